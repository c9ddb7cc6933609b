"""The one exception of this package. Its message is addressed to the person who gave the input."""


class PaliGemmaError(ValueError):
    """A checkpoint, an image, a prompt or an option that cannot be used. The message names the value and the
    remedy."""
