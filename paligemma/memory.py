"""How much memory a model needs: for its weights, which loading checks, and for an answer. No torch, no
NumPy."""

from collections.abc import Collection, Mapping

from .checkpoint.quantized import Shape, forms, nbytes
from .checkpoint.stored import expected_shapes
from .config import PaliGemmaConfig

CARDS = (8, 12, 16, 24, 40, 80)  # GiB of memory that GPUs have
RESERVED = 1e9  # bytes of a GPU that are not for the model: CUDA's context, workspaces, gaps, a display
TEXT = 256  # tokens of prompt and answer
ITEMSIZES = {"float32": 4, "float16": 2, "bfloat16": 2}  # bytes


def weight_bytes(
    shapes: Mapping[str, Shape], dtype: str, format: str | None = None, mapped: Collection[str] = ()
) -> int:
    """Bytes of the weights of a model that computes in `dtype`, with its matrices quantised in `format`.

    shapes: of its parameters before they are quantised, with an output head if that is not tied. mapped: the
    tensors that stay in their file and take no memory. Raises PaliGemmaError as `forms` does."""
    return sum(nbytes(form) for name, form in forms(shapes, dtype, format).items() if name not in mapped)


def answer_bytes(config: PaliGemmaConfig, dtype: str, tokens: int) -> int:
    """Bytes, beside the weights, for one answer in which images, prompt and answer have `tokens` tokens: keys
    and values of all layers, and the hidden states of a prefill where they are largest, in the decoder's MLP
    and in the vision tower's."""
    t, v = config.text_config, config.vision_config
    cache = 2 * t.num_hidden_layers * tokens * t.num_key_value_heads * t.head_dim
    decoder = tokens * (4 * t.hidden_size + 3 * t.intermediate_size)
    vision = v.num_patches * (6 * v.hidden_size + 2 * v.intermediate_size)
    return ITEMSIZES[dtype] * (cache + max(decoder, vision))


def needed_bytes(config: PaliGemmaConfig, dtype: str, format: str | None = None) -> int:
    """Bytes of the weights of a model and of one answer about one image."""
    tokens = config.vision_config.num_patches + TEXT
    return weight_bytes(expected_shapes(config), dtype, format) + answer_bytes(config, dtype, tokens)


def smallest_card(needed: float) -> int | None:
    """The smallest of CARDS on which so many bytes are free; None if there is none."""
    return next((card for card in CARDS if needed <= card * 2**30 - RESERVED), None)
