"""Samples the next token from logits by temperature and top-p (Holtzman et al. 2019, arXiv:1904.09751), with
random numbers for each row.

Probabilities are represented by integer weights, so that their sums do not depend on the order of the
additions. The vocabulary is not sorted: sums over intervals of the logits give the interval in which the
nucleus ends and the interval of the token, and only these two are sorted. The kernels in kernels/top_p_*.py
compute the same."""

import math
import sys

import numpy as np
import torch
from torch import Tensor

SCALE = 2.0**43  # the weight of the most probable token; 2^19 of them are below 2^63
WIDTH, BINS = 1 / 64, 4096  # of the intervals of the logits, from the largest down; the last has the rest
# Added to a float64 from 0 to 2^52, it leaves the nearest whole number in the last 52 bits; .long() is ten
# times slower.
TO_INTEGER = 2.0**52
TO_INTEGER_BITS = 0x433 << 52
# A temperature at which all tokens but the most probable ones have the weight 0; with u = 0, the first of
# these is chosen. It stands for greedy decoding where other rows of the batch sample.
GREEDY = sys.float_info.min


def uniform(seed: int | None, rows: int, tokens: int) -> Tensor:
    """Random numbers in [0, 1), (rows, tokens) float64. Those of a row depend only on the seed and the row's
    index, so its tokens do not depend on the other rows."""
    generators = [np.random.default_rng(None if seed is None else [seed, row]) for row in range(rows)]
    return torch.from_numpy(np.stack([generator.random(tokens) for generator in generators]))


def sample(logits: Tensor, temperature: float, top_p: float, u: float) -> int:
    """The token of logits (V,) at which the cumulative probability within the nucleus exceeds `u` in [0, 1).
    The nucleus is the smallest set of most probable tokens whose probability reaches top_p; among equally
    probable tokens, lower ids come first. The exponentials are float64; the error of their sums is at most V
    2^-44 of the largest. The token is -1 if a logit is not finite."""
    least, peak = logits.aminmax()
    if not bool(least.isfinite() & peak.isfinite()):
        return -1
    if temperature == GREEDY and u == 0:  # not by the sums below, which take 100 times as long
        return int(logits.argmax())
    # The difference is computed before the division: a tiny temperature would make both quotients infinite.
    power = logits.double().sub(peak).div_(temperature).exp_()
    weights = power.mul_(SCALE).add_(TO_INTEGER).view(torch.int64).sub_(TO_INTEGER_BITS)
    bins = (peak - logits).div_(WIDTH).clamp_(max=BINS - 1).long()
    mass = weights.new_zeros(BINS).scatter_add_(0, bins, weights)
    upto = mass.cumsum(0)
    total = int(upto[-1])

    def first_to_reach(target: int) -> tuple[int, int]:
        """The first token at which the cumulative weight reaches `target`, and that cumulative weight."""
        b = int(torch.searchsorted(upto, target))
        inside = (bins == b).nonzero()[:, 0]
        inside = inside[logits[inside].sort(descending=True, stable=True).indices]
        reached = weights[inside].cumsum(0) + (upto[b] - mass[b])
        i = int(torch.searchsorted(reached, target))
        return int(inside[i]), int(reached[i])

    _, nucleus = first_to_reach(max(1, min(math.ceil(top_p * total), total)))
    return first_to_reach(min(int(u * nucleus), nucleus - 1) + 1)[0]
