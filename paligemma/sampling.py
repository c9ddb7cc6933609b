"""From logits to the next token: greedy, or temperature and top-p with a seed for each row."""

import numpy as np
import torch
from torch import Tensor


class Sampler:
    """Takes one token a row at each call; temperature 0 takes the most probable.

    A row's random numbers depend on the seed and its index alone: batch mates do not change what a row says."""

    def __init__(self, batch: int, temperature: float, top_p: float, seed: int | None):
        self.temperature, self.top_p = temperature, top_p
        self.uniform = [np.random.default_rng(None if seed is None else [seed, row]) for row in range(batch)]

    def __call__(self, logits: Tensor) -> Tensor:  # (B, V) -> (B,)
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        tokens = [sample(row, self.temperature, self.top_p, u.random()) for row, u in zip(logits, self.uniform, strict=True)]
        return torch.tensor(tokens, device=logits.device)


def sample(logits: Tensor, temperature: float, top_p: float, u: float) -> int:  # (V,) -> a token
    """The token at `u` in [0, 1) of the nucleus: Holtzman et al. 2019, arXiv:1904.09751.

    The nucleus is the smallest set of most probable tokens whose probability reaches top_p; of equals, the lower ids."""
    logits = logits.double()
    probabilities = ((logits - logits.max()) / temperature).softmax(dim=-1)  # the difference first: a tiny temperature overflows
    # Tokens below this weigh less than 1 - top_p together, so the nucleus is among the others: sort a few, not 257,216.
    candidates = (probabilities >= (1 - top_p) / len(probabilities)).nonzero().squeeze(1)
    ordered, order = probabilities[candidates].sort(descending=True, stable=True)
    cumulative = ordered.cumsum(dim=0)
    size = min(int(torch.searchsorted(cumulative, top_p)) + 1, len(ordered))
    index = int(torch.searchsorted(cumulative[:size], u * float(cumulative[size - 1]), right=True))
    return int(candidates[order[index]])
