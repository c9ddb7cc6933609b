"""From logits to the next token by temperature and top-p (Holtzman et al. 2019, arXiv:1904.09751), with a
seed for each row.

Weights are integers, so that their sums do not depend on the order of the additions. The vocabulary is not
sorted: sums over intervals of the logits give the interval in which the nucleus ends and the one that has the
token, and only these are sorted. The kernels of kernels/top_p_*.py do the same."""

import math

import numpy as np
import torch
from torch import Tensor

SCALE = 2.0**43  # the weight of the most probable token; 2^19 of them are below 2^63
WIDTH, BINS = (
    1 / 64,
    4096,
)  # of the intervals of the logits, from the largest down; the last one has what is left
TO_INTEGER = (
    2.0**52
)  # added to a float64 between 0 and it, leaves the nearest whole number in the last 52 bits: .long() is ten times slower
TO_INTEGER_BITS = 0x433 << 52


def uniform(seed: int | None, rows: int, tokens: int) -> Tensor:  # -> (rows, tokens) float64
    """The random numbers in [0, 1), one a token. Those of a row depend on the seed and the row's index alone,
    so its tokens do not depend on the other rows."""
    return torch.from_numpy(
        np.stack(
            [
                np.random.default_rng(None if seed is None else [seed, row]).random(tokens)
                for row in range(rows)
            ]
        )
    )


def sample(logits: Tensor, temperature: float, top_p: float, u: float) -> int:  # (V,) -> a token
    """The token at `u` in [0, 1) of the nucleus: the smallest set of most probable tokens whose probability
    reaches top_p; of equals, the lower ids. The exponentials are float64, and their sums are wrong by at most
    V 2^-44 of the largest. -1 where a logit is not finite."""
    least, peak = logits.aminmax()
    if not bool(least.isfinite() & peak.isfinite()):
        return -1
    power = (
        logits.double().sub(peak).div_(temperature).exp_()
    )  # the difference first: a tiny temperature would make infinities of both
    weights = power.mul_(SCALE).add_(TO_INTEGER).view(torch.int64).sub_(TO_INTEGER_BITS)
    bins = (peak - logits).div_(WIDTH).clamp_(max=BINS - 1).long()
    mass = weights.new_zeros(BINS).scatter_add_(0, bins, weights)
    upto = mass.cumsum(0)
    total = int(upto[-1])

    def first_to_reach(target: int) -> tuple[int, int]:
        """The token, and the weight of it and all before it."""
        b = int(torch.searchsorted(upto, target))
        inside = (bins == b).nonzero()[:, 0]
        inside = inside[logits[inside].sort(descending=True, stable=True).indices]
        reached = weights[inside].cumsum(0) + (upto[b] - mass[b])
        i = int(torch.searchsorted(reached, target))
        return int(inside[i]), int(reached[i])

    _, nucleus = first_to_reach(max(1, min(math.ceil(top_p * total), total)))
    return first_to_reach(min(int(u * nucleus), nucleus - 1) + 1)[0]
