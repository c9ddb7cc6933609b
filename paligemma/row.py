"""A row of a shared decode: one input, and its answer so far; see rows.py."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .options import Sampling
from .padding import UnpaddedBatch

GREEDY = Sampling()


@dataclass(eq=False)
class Row:
    """One input, and its answer so far."""

    id: Any
    inputs: tuple[UnpaddedBatch, Tensor | None] | None = field(repr=False)  # None from its prefill on
    length: int  # tokens of the input
    count: int  # the most new tokens
    sampling: Sampling
    ends: tuple[int, ...]  # its end tokens
    tokens: list[int] = field(default_factory=list)  # the new tokens, with the end token
    log_probs: list[float] = field(default_factory=list)  # of the tokens, as PaliGemma.stream describes them
    # None while the row is answered; then "stop" (an end token), "length", "cancelled" or "error".
    finish_reason: str | None = None
    error: str = ""  # what is wrong, if finish_reason is "error"
    cancelled: bool = False
    launched: int = 0  # tokens whose computation has begun

    @property
    def sampled(self) -> bool:
        return float(self.sampling.temperature) > 0

    @property
    def filled(self) -> int:
        """The filled positions of its cache, which the last token has not entered yet."""
        return self.length + self.launched - 1
