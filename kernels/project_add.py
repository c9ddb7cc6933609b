"""The product that ends a branch, with the residual added, for up to 16 rows.

    out[r, n] = residual[r, n] + scale[n] sum_k x[r, k] w[n, k]

x (R, K), R up to 16; w (N, K) in x's dtype, 8-bit or 4-bit, as in gemv.py; residual, out (R, N). Gemma 2
normalises the whole row before it is added. There, no residual is given; the kernel also stores parts of the
sum of squares of each row of out, one part for each block of outputs, and the next operation computes the
norm and the sum. Arithmetic is float32, with one rounding at the store. Reads N x K x itemsize bytes of the
weight, and moves little else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dependent
from .gemv import gemv
from .gemv_input import GemvInput
from .gemv_tile import Tile


@triton.jit
def in_order(block, given, BLOCK_N: tl.constexpr):
    _, _, _, N, _ = given
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    return n, n < N


@triton.jit
def add(out, block, given, R):
    residual_ptr, out_ptr, squares_ptr, N, blocks = given
    BLOCK_R: tl.constexpr = out.shape[0]
    BLOCK_N: tl.constexpr = out.shape[1]
    n, r = block * BLOCK_N + tl.arange(0, BLOCK_N)[None, :], tl.arange(0, BLOCK_R)[:, None]
    inside = (r < R) & (n < N)
    if residual_ptr is not None:
        out += tl.load(residual_ptr + r * N + n, mask=inside, other=0.0).to(tl.float32)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + r * N + n, out, mask=inside)
    if squares_ptr is not None:
        rounded, rows = tl.where(inside, out.to(tl.float32), 0.0), tl.arange(0, BLOCK_R)
        tl.store(squares_ptr + rows * blocks + block, tl.sum(rounded * rounded, axis=1), mask=rows < R)


@triton.jit(do_not_specialize=["R", "blocks"])
def project_add_kernel(
    x_ptr, w_ptr, scale_ptr, residual_ptr, out_ptr, squares_ptr, R, blocks, N: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr,
    STAGES: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gemv(
        x_ptr, None, None, None, None, None, w_ptr, scale_ptr,
        in_order, add, (residual_ptr, out_ptr, squares_ptr, N, blocks), R, 0.0,
        K, 0, 1, BLOCK_R, BLOCK_N, FIRST, SECOND, STAGES, ONE, N % BLOCK_N == 0, PDL,
    )  # fmt: skip


def project_add(
    x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """x (..., K), 1 to 16 rows; weight and scale as GemvInput.check takes them; residual (..., N) -> (..., N)
    and, without a residual, the parts of the sums of squares of its R rows, (R, parts) float32. All
    contiguous."""
    N, K = len(weight), x.shape[-1]
    out = x.new_empty(*x.shape[:-1], N)
    rows = GemvInput(x.view(-1, K))
    rows.check(weight, scale)
    if residual is not None:
        assert residual.shape == out.shape
        assert residual.dtype == x.dtype
        assert residual.is_contiguous()
    R = len(rows.x)
    tile = Tile.of(R, N, K, x.dtype, weight.dtype)
    blocks = triton.cdiv(N, tile.outputs)
    squares = x.new_empty(R, blocks, dtype=torch.float32) if residual is None else None
    project_add_kernel[(blocks,)](
        x, weight, scale, residual, out, squares, R, blocks,
        N=N, K=K, **tile.options(R), PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out, squares
