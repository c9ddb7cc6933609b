"""PaliGemma in plain NumPy: slow and exact, it defines the correct numbers. Begin with
`reference.load(model_dir)`."""

from .model import Reference as Reference
from .model import load as load
