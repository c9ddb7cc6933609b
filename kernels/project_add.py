"""The product that ends a branch, for a few rows, with the residual added.

    out[r, n] = residual[r, n] + scale[n] sum_k x[r, k] w[n, k]

x (R, K), R up to 16; w (N, K) of x's dtype, or of 8 bits with a scale for each row; residual, out (R, N). Gemma 2 normalises the whole row
before it is added: no residual then, and the next operation makes the sum. float32 inside, one rounding at the store. Moves
N x K x itemsize bytes, of the weight, and little beside it.
"""

import triton
import triton.language as tl
from torch import Tensor

from .common import dependent
from .gemv import Rows, Tile, gemv


@triton.jit(do_not_specialize=["R"])
def project_add_kernel(
    x_ptr, w_ptr, scale_ptr, residual_ptr, out_ptr, R,
    N: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    out = gemv(x_ptr, None, None, None, None, w_ptr, scale_ptr, n, n < N, R, 0.0, K, BLOCK_R, BLOCK_K, PDL)
    r = tl.arange(0, BLOCK_R)[:, None]
    inside = (r < R) & (n < N)[None, :]
    if residual_ptr is not None:
        out += tl.load(residual_ptr + r * N + n[None, :], mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + r * N + n[None, :], out.to(out_ptr.dtype.element_ty), mask=inside)


def project_add(x: Tensor, weight: Tensor, scale: Tensor | None, residual: Tensor | None) -> Tensor:
    """x (..., K), 1 to 16 rows; weight (N, K), with scale (N,) of 8 bits; residual (..., N) -> (..., N). All contiguous."""
    (N, K), out = weight.shape, x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = Rows(x.view(-1, K))
    rows.check(weight, scale)
    assert residual is None or (residual.shape == out.shape and residual.dtype == x.dtype and residual.is_contiguous())
    R = len(rows.x)
    tile = Tile.of(R, N, K, x.dtype, weight.dtype)
    project_add_kernel[(triton.cdiv(N, tile.outputs),)](
        x, weight, scale, residual, out, R,
        N=N, K=K, BLOCK_R=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.features, num_warps=tile.warps,
        PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out
