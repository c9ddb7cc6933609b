"""PaliGemma vision-language inference: a NumPy reference that defines the numbers, and a fast PyTorch model.

`from paligemma import load_hf_model` imports the model's loader, `from paligemma import reference` the
reference. Importing this package imports neither torch nor NumPy."""

from typing import TYPE_CHECKING

from .errors import PaliGemmaError

if TYPE_CHECKING:
    from .loading import load_hf_model

__all__ = ["PaliGemmaError", "load_hf_model"]
__version__ = "0.1.0"


def __getattr__(name: str):
    if name == "load_hf_model":
        from .loading import load_hf_model

        return load_hf_model
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
