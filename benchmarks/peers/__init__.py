"""Times this engine on a CPU beside the other engines that are installed, in alternating runs: see __main__.py."""
