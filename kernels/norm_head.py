"""The last norm and the output head, for up to 16 rows, and the first step of their argmax.

    logits[r, v] = cap(scale[v] sum_k z[r, k] w[v, k])

z = norm(x), or norm(x + norm'(branch)). x, branch (R, K), R up to 16; w (V, K) in x's dtype, or 8-bit with a
scale for each row; logits (R, V) float32, not rounded; cap(x) = c tanh(x / c) if there is a softcap c, else
x.

If the argmax is wanted, each program stores the largest of its logits in one of the row's slots, as a key:
the upper half is in the order of the logits, the lower half in the reverse order of the indices. The largest
key of a row gives its argmax, which next_token.py reads. Reads V x K x itemsize bytes of the weight, and
little else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capped, dependent
from .gemv import gemv
from .gemv_input import GemvInput
from .gemv_tile import Tile

LOWEST = tl.constexpr(-(1 << 63))  # the initial value of a slot
LAST = tl.constexpr((1 << 32) - 1)
INFINITE = tl.constexpr(0x7F800000)  # the bits of float32 infinity


@triton.jit
def sort_keys(logits, v, wanted):
    """int64 keys in the order of the logits; among equal logits, the lower v has the larger key. The keys of
    NaN and infinity are above all others."""
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
    out_ptr, argmax_ptr, softcap, V, SLOTS = given
    BLOCK_R: tl.constexpr = logits.shape[0]
    BLOCK_N: tl.constexpr = logits.shape[1]
    n, r = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_R)[:, None]
    if softcap is not None:
        logits = capped(logits, softcap, tl.float32)
    tl.store(out_ptr + r * V + n, logits, mask=(r < R) & (n < V))
    if argmax_ptr is not None:
        best, rows = tl.max(sort_keys(logits, n, n < V), axis=1), tl.arange(0, BLOCK_R)
        tl.atomic_max(argmax_ptr + rows * SLOTS + block % SLOTS, best, mask=rows < R, sem="relaxed")


@triton.jit(do_not_specialize=["R"])
def norm_head_kernel(
    x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, w_ptr, scale_ptr, out_ptr, argmax_ptr,
    eps, softcap, R, V: tl.constexpr, K: tl.constexpr, SLOTS: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gemv(
        x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, None, w_ptr, scale_ptr,
        vocabulary, choose, (out_ptr, argmax_ptr, softcap, V, SLOTS), R, eps,
        K, PARTS, BLOCK_PARTS, BLOCK_R, BLOCK_N, FIRST, SECOND, STAGES, ONE, V % BLOCK_N == 0, PDL,
    )  # fmt: skip


def norm_head(
    rows: GemvInput, weight: Tensor, scale: Tensor | None, softcap: float | None,
    argmax_scratch: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """weight (V, K) contiguous, with scale (V,) if it is 8-bit; argmax_scratch (R, slots) int64, each slot
    -2^63 -> (R, V) float32."""
    rows.check(weight, scale)
    assert rows.norm is not None
    (R, K), V = rows.x.shape, weight.shape[0]
    if argmax_scratch is not None:
        assert argmax_scratch.shape[:1] == (R,)
        assert argmax_scratch.dtype == torch.int64
        assert argmax_scratch.is_contiguous()
    out = rows.x.new_empty(R, V, dtype=torch.float32)
    tile = Tile.of(R, V, K, rows.x.dtype, weight.dtype)
    blocks = triton.cdiv(V, tile.outputs)
    norm_head_kernel[(blocks,)](
        *rows[:4], rows.squares, weight, scale, out, argmax_scratch, rows.eps, softcap, R,
        V=V, K=K, SLOTS=0 if argmax_scratch is None else argmax_scratch.shape[1],
        **rows.parts, **tile.options(R), PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out
