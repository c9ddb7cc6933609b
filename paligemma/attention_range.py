"""The positions of the tokens of a pass, and the cached positions that each of them attends to."""

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionRange(NamedTuple):
    """Each query attends to the cached positions from `start` (0 if it is None) up to, but not including,
    `limit`; (B, T) each."""

    start: Tensor | None
    limit: Tensor
    everything: bool = False  # every query attends to every cached position, as far as the host knows

    def mask(self, first: int, last: int, S: int) -> Tensor:
        """(B, last - first, S): true where a query, from `first` to `last` - 1, attends to a position, from 0
        to S - 1."""
        position = torch.arange(S, device=self.limit.device)
        inside = position < self.limit[:, first:last, None]
        return inside if self.start is None else inside & (position >= self.start[:, first:last, None])


class Positions(NamedTuple):
    """The positions of the tokens of one pass. They are the same in every layer."""

    indices: Tensor  # (B, T), positions in the row's cache
    rotation: Tensor  # (2, B, T, D/2) float32, cosines and sines of the rotary angles
    visible: dict[int | None, AttentionRange]  # window of a layer -> the positions that each token attends to


def visible(
    positions: Tensor, prefix: Tensor, S: int, window: int | None = None, on_host: bool = True
) -> AttentionRange:
    """The ranges of tokens at `positions` (B, T), in a cache of S positions of which the first `prefix` (B,)
    attend to one another.

    A token of the prefix attends to the whole prefix of its row. Any other token attends to itself and all
    tokens before it, or only to the last `window` of these, itself included. on_host: see attention_range."""
    limit, start = torch.maximum(prefix[:, None], positions + 1), None
    if window is not None:
        start = (positions + 1 - window).clamp(min=0).masked_fill(positions < prefix[:, None], 0)
    return attention_range(start, limit, S, window, on_host)


def attention_range(
    start: Tensor | None, limit: Tensor, S: int, window: int | None = None, on_host: bool = True
) -> AttentionRange:
    """The range from start to limit, (B, T) each, of S positions. The start is ignored unless there is a
    window smaller than S. on_host: read the limits, for which the host waits for a GPU, to find out whether
    every query attends to every position."""
    if window is None or window >= S:
        start = None
    return AttentionRange(start, limit, on_host and start is None and bool((limit >= S).all()))
