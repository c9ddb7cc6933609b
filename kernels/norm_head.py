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


@triton.jit
def vocabulary(block, given, BLOCK_N: tl.constexpr):
    _, _, _, V, _ = given
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, n < V


@triton.jit
def choose(logits, block, given, R):
    out_ptr, best_ptr, softcap, V, SLOTS = given
    BLOCK_R: tl.constexpr = logits.shape[0]
    BLOCK_N: tl.constexpr = logits.shape[1]
    n, r = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_R)[:, None]
    if softcap is not None:
        logits = capped(logits, softcap, tl.float32)
    tl.store(out_ptr + r * V + n, logits, mask=(r < R) & (n < V))
    if best_ptr is not None:
        best, rows = tl.max(ordered(logits, n, n < V), axis=1), tl.arange(0, BLOCK_R)
        tl.atomic_max(best_ptr + rows * SLOTS + block % SLOTS, best, mask=rows < R, sem="relaxed")


@triton.jit(do_not_specialize=["R"])
def norm_head_kernel(
    x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, w_ptr, scale_ptr, out_ptr, best_ptr, eps, softcap, R,
    V: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gemv(
        x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, None, w_ptr, scale_ptr, vocabulary, choose, (out_ptr, best_ptr, softcap, V, SLOTS), R, eps,
        K, PARTS, BLOCK_PARTS, BLOCK_R, BLOCK_N, FIRST, SECOND, STAGES, ONE, V % BLOCK_N == 0, PDL,
    )  # fmt: skip


def norm_head(rows: Rows, weight: Tensor, scale: Tensor | None, softcap: float | None, best: Tensor | None = None) -> Tensor:
    """weight (V, K) contiguous, with scale (V,) of 8 bits; best (R, places) int64, of which each is -2^63 -> (R, V) float32."""
    rows.check(weight, scale)
    assert rows.norm is not None
    (R, K), V = rows.x.shape, weight.shape[0]
    assert best is None or (best.shape[:1] == (R,) and best.dtype == torch.int64 and best.is_contiguous())
    out = rows.x.new_empty(R, V, dtype=torch.float32)
    tile = Tile.of(R, V, K, rows.x.dtype, weight.dtype)
    blocks = triton.cdiv(V, tile.outputs)
    norm_head_kernel[(blocks,)](
        *rows[:4], rows.squares, weight, scale, out, best, rows.eps, softcap, R,
        V=V, K=K, SLOTS=0 if best is None else best.shape[1], **rows.parts, **tile.options(R), PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out
