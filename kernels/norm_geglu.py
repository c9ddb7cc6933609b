"""A norm, the gate and up products, and GeGLU, for up to 16 rows.

    out[r, m] = gelu_tanh(gate) * up
    gate = scale[m] sum_k z[r, k] w[m, k],    up = scale[M + m] sum_k z[r, k] w[M + m, k]

z = norm(x), or norm(x + norm'(branch)), where the sum x + norm'(branch) is an output too. x, branch (R, K), R
up to 16; w (2 M, K), the rows of gate and then those of up, in x's dtype, 8-bit or 4-bit, as in gemv.py;
out (R, M). A program computes the same outputs of gate and up. Arithmetic is float32, with one rounding at
the store. Reads 2 x M x K x itemsize bytes of the weight, and moves little else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dependent
from .geglu import gated
from .gemv import gemv
from .gemv_input import GemvInput
from .gemv_tile import Tile


@triton.jit
def pairs(block, given, BLOCK_N: tl.constexpr):
    """Rows of gate and of up alternate."""
    _, M = given
    j = tl.arange(0, BLOCK_N)
    m = block * (BLOCK_N // 2) + j // 2
    return j % 2 * M + m, m < M


@triton.jit
def gate(both, block, given, R):
    out_ptr, M = given
    BLOCK_R: tl.constexpr = both.shape[0]
    PAIRS: tl.constexpr = both.shape[1] // 2
    first, second = tl.split(both.reshape(BLOCK_R, PAIRS, 2))
    m, r = block * PAIRS + tl.arange(0, PAIRS)[None, :], tl.arange(0, BLOCK_R)[:, None]
    tl.store(out_ptr + r * M + m, gated(first, second).to(out_ptr.dtype.element_ty), mask=(r < R) & (m < M))


@triton.jit(do_not_specialize=["R"])
def norm_geglu_kernel(
    x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, sum_ptr, w_ptr, scale_ptr, out_ptr, eps, R,
    M: tl.constexpr, K: tl.constexpr, PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STAGES: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gemv(
        x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, sum_ptr, w_ptr, scale_ptr,
        pairs, gate, (out_ptr, M), R, eps, K, PARTS, BLOCK_PARTS, BLOCK_R, BLOCK_N,
        FIRST, SECOND, STAGES, ONE, 2 * M % BLOCK_N == 0, PDL,
    )  # fmt: skip


def norm_geglu(rows: GemvInput, weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight (2 M, K) and scale as GemvInput.check takes them -> (R, M), and x or the sum (R, K)."""
    rows.check(weight, scale)
    assert rows.norm is not None
    (R, K), M = rows.x.shape, weight.shape[0] // 2
    out = rows.x.new_empty(R, M)
    total = rows.x if rows.branch is None else torch.empty_like(rows.x)
    tile = Tile.of(R, 2 * M, K, rows.x.dtype, weight.dtype)
    blocks = triton.cdiv(2 * M, tile.outputs)
    norm_geglu_kernel[(blocks,)](
        *rows[:4], rows.squares, None if rows.branch is None else total, weight, scale, out, rows.eps, R,
        M=M, K=K, **rows.parts, **tile.options(R), PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out, total
