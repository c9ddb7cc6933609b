"""The one exception of this package: its message is a whole sentence for the person who gave the input."""


class PaliGemmaError(ValueError):
    """A checkpoint, an image, a prompt or an option that cannot be used; names the value and what to do
    instead."""
