"""The shapes of the published models, as far as the cases use them.

The letters are: E hidden size, H query heads, K key/value heads, D head size, M MLP size.
"""

from typing import NamedTuple


class Decoder(NamedTuple):
    """The shapes of one Gemma decoder."""

    name: str
    E: int
    H: int
    K: int
    D: int
    M: int
    softcap: float | None = None
    window: int | None = None  # positions that a query sees in every other layer
    scale: float | None = None  # factor of the scores; None: 1 / sqrt(D)


DECODERS = (
    Decoder("PaliGemma 3B", 2048, 8, 1, 256, 16384),
    Decoder("PaliGemma 2 3B", 2304, 8, 4, 256, 9216, 50.0, 4096),
    Decoder("PaliGemma 2 10B", 3584, 16, 8, 256, 14336, 50.0, 4096),
    Decoder("PaliGemma 2 28B", 4608, 32, 16, 128, 36864, 50.0, 4096, 144**-0.5),
)
LAYERS = 18  # of PaliGemma 3B's decoder
VOCABULARY = 257_216
FINAL_SOFTCAP = 30.0  # of PaliGemma 2
SIGLIP_WIDTH, SIGLIP_HEADS = 1152, (16, 16, 72)  # the heads: H, K, D
TEXT = 16  # tokens of a prompt
IMAGE = {224: 256, 448: 1024, 896: 4096}  # pixels a side -> image tokens
CONTEXTS = (300, 1100, 4200)  # cached positions of a decode at these resolutions
