"""norm_head: the last norm and the output head, and the first step of the argmax of the logits.

The first step stores, for each row, the largest number (see `sort_keys`) of each of PLACES parts of the
logits. The second step is in `next_token.py`."""

import torch
from torch import Tensor

from paligemma.kernels.norm_head import norm_head

from .attention import capped
from .case import Case
from .gemv import Products

# of the argmax, as in kernels/norm_head.py
PLACES, LOWEST, LAST, INFINITE = 64, -(1 << 63), (1 << 32) - 1, 0x7F800000


def sort_keys(logits: Tensor, index: Tensor) -> Tensor:
    """float32 logits and their int64 indices -> int64 in the order of the logits. Of equal logits the lower
    index has the larger number. NaN and infinities have the largest numbers of all."""
    bits = logits.view(torch.int32).long()
    bits = torch.where(logits.isfinite(), torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits), INFINITE)
    return (bits << 32) | (LAST - index)


def chosen(best: Tensor) -> Tensor:  # (B, places) -> (B,)
    """The index of the largest logit, or -1 if a logit is NaN or infinite."""
    largest = best.amax(dim=1)
    return torch.where(largest >> 32 >= INFINITE, -1, LAST - (largest & LAST))


def head_case(
    shape: str, R: int, E: int, V: int, post: bool, quantize: str | None, softcap: float | None,
    begins: bool = False,
) -> Case:  # fmt: skip
    """begins: the kernel also computes the first step of the argmax, and `plain` and `exact` compute all of
    it."""
    given = Products(R, E, V, post, quantize)

    def make(device, dtype):
        best = [torch.full((R, PLACES), LOWEST, device=device)] if begins else []
        return *given.make(device, dtype), *best

    def run(*inputs: Tensor):
        rows, weight, scale, best = given.read(*inputs)
        logits = norm_head(rows, weight, scale, softcap, *best)
        return logits, *best

    def finish(y: Tensor):
        logits = capped(y, softcap)
        return (logits, logits.argmax(dim=-1)) if begins else (logits,)

    def seen(logits: Tensor, *best: Tensor):
        """The logits, and for each row 1 if the logit of its token is below the largest logit, else 0."""
        tokens = ((chosen(x) if x.ndim == 2 else x).clamp(0, V - 1) for x in best)
        return logits, *((logits.gather(1, x[:, None])[:, 0] < logits.amax(dim=-1)).long() for x in tokens)

    return Case(
        "norm_head", shape, f"{given.variant}{' softcap' * bool(softcap)}{' argmax' * begins}", make, run,
        lambda *inputs: finish(given.plain(*inputs)[0].float()),
        lambda *inputs: finish(given.exact(*inputs)[0]),
        lambda itemsize: given.bytes(itemsize, 0) + 4 * R * V,
        chip=given.chip, seen=seen, weights=given.weights,
    )  # fmt: skip
