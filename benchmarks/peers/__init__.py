"""Times this engine on a CPU beside the other engines that are installed: see __main__.py."""
