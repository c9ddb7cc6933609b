"""From logits to the next token by temperature and top-p (Holtzman et al. 2019, arXiv:1904.09751), with a seed for each row."""

import numpy as np
import torch
from torch import Tensor


def uniform(seed: int | None, rows: int, tokens: int) -> Tensor:  # -> (rows, tokens) float64
    """The random numbers in [0, 1), one a token. A row's depend on the seed and its index alone: batch mates do not change what it says."""
    return torch.from_numpy(np.stack([np.random.default_rng(None if seed is None else [seed, row]).random(tokens) for row in range(rows)]))


def sample(logits: Tensor, temperature: Tensor, top_p: Tensor, u: Tensor, look: bool = True) -> Tensor:  # (B, V), (), (), (B,) float64 -> (B,)
    """The token at `u` in [0, 1) of each row's nucleus: the smallest set of most probable tokens whose probability reaches top_p; of equals,
    the lower ids. With `look` the host looks how many come into question, to sort a few and not 257,216; otherwise it has to know nothing."""
    weights = ((logits.double() - logits.amax(dim=-1, keepdim=True)) / temperature).softmax(dim=-1)  # the difference first: a tiny temperature overflows
    candidates = None
    if look:  # tokens below this weigh less than 1 - top_p together
        candidates = (weights >= (1 - top_p) / logits.shape[1]).any(dim=0).nonzero()[:, 0]
        logits, weights = logits[:, candidates], weights[:, candidates]
    order = logits.sort(dim=-1, descending=True, stable=True).indices
    cumulative = weights.gather(1, order).cumsum(dim=-1)
    last = torch.searchsorted(cumulative, top_p.repeat(len(logits), 1)).clamp(max=logits.shape[1] - 1)
    index = torch.searchsorted(cumulative, u[:, None] * cumulative.gather(1, last), right=True)
    chosen = order.gather(1, torch.minimum(index, last))[:, 0]
    return chosen if candidates is None else candidates[chosen]
