"""The last norm and the output head, for a few rows, and the beginning of their argmax.

    logits[r, v] = cap(scale[v] sum_k z[r, k] w[v, k])

z = norm(x), or norm(x + norm'(branch)); x, branch (R, K), R up to 16; w (V, K) of x's dtype, or of 8 bits with a scale for each row; logits
(R, V) float32, which no rounding touches; cap(x) = c tanh(x / c) where there is a softcap c. Where the argmax is wanted, each program
puts the largest of its logits into one of the row's places, as a number whose order is the logit's, then, backwards, its index's: the
largest of these is the answer, which next_token.py reads. Moves V x K x itemsize bytes, of the weight, and little beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capped, dependent
from .gemv import Rows, Tile, gemv

LOWEST = tl.constexpr(-(1 << 63))  # what a place holds before
LAST = tl.constexpr((1 << 32) - 1)
INFINITE = tl.constexpr(0x7F800000)  # the bits of float32 infinity


@triton.jit
def ordered(logits, v, wanted):
    """int64 numbers that are in the order of the logits, of equals the lower v first; NaN and infinity above all others."""
    bits = logits.to(tl.int32, bitcast=True)
    bits = tl.where((bits & INFINITE) == INFINITE, INFINITE, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    return tl.where(wanted, (bits.to(tl.int64) << 32) | (LAST - v.to(tl.int64)), LOWEST)


@triton.jit(do_not_specialize=["R"])
def norm_head_kernel(
    x_ptr, branch_ptr, post_ptr, norm_ptr, w_ptr, scale_ptr, out_ptr, best_ptr, eps, softcap, R, V: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)[:, None]
    logits = gemv(x_ptr, branch_ptr, post_ptr, norm_ptr, None, w_ptr, scale_ptr, n, n < V, R, eps, K, BLOCK_R, BLOCK_K, PDL)
    if softcap is not None:
        logits = capped(logits, softcap, tl.float32)
    tl.store(out_ptr + r * V + n[None, :], logits, mask=(r < R) & (n < V)[None, :])
    if best_ptr is not None:
        best = tl.max(ordered(logits, n[None, :], (n < V)[None, :]), axis=1)
        rows = tl.arange(0, BLOCK_R)
        tl.atomic_max(best_ptr + rows * SLOTS + tl.program_id(0) % SLOTS, best, mask=rows < R, sem="relaxed")


def norm_head(rows: Rows, weight: Tensor, scale: Tensor | None, softcap: float | None, best: Tensor | None = None) -> Tensor:
    """weight (V, K) contiguous, with scale (V,) of 8 bits; best (R, places) int64, of which each is -2^63 -> (R, V) float32."""
    rows.check(weight, scale)
    assert rows.norm is not None
    (R, K), V = rows.x.shape, weight.shape[0]
    assert best is None or (best.shape[:1] == (R,) and best.dtype == torch.int64 and best.is_contiguous())
    out = rows.x.new_empty(R, V, dtype=torch.float32)
    tile = Tile.of(R, V, K, rows.x.dtype, weight.dtype)
    norm_head_kernel[(triton.cdiv(V, tile.outputs),)](
        *rows[:4], weight, scale, out, best, rows.eps, softcap, R,
        V=V, K=K, BLOCK_R=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.features, SLOTS=0 if best is None else best.shape[1], num_warps=tile.warps,
        PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out
