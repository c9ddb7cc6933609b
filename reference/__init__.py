"""PaliGemma in plain NumPy: slow, exact, and the definition of the correct numbers.
`reference.load(model_dir)`."""

from .model import Reference as Reference
from .model import load as load
