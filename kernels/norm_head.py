"""The last norm and the output head, for a few rows.

    logits[r, v] = cap(scale[v] sum_k z[r, k] w[v, k])

z = norm(x), or norm(x + norm'(branch)); x, branch (R, K), R up to 16; w (V, K) of x's dtype, or of 8 bits with a scale for each row; logits
(R, V) float32, which no rounding touches; cap(x) = c tanh(x / c) where there is a softcap c. Moves V x K x itemsize bytes, of the
weight, and little beside it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import capped, dependent
from .gemv import Rows, Tile, gemv


@triton.jit(do_not_specialize=["R"])
def norm_head_kernel(
    x_ptr, branch_ptr, post_ptr, norm_ptr, w_ptr, scale_ptr, out_ptr, eps, softcap, R,
    V: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    n, r = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_R)[:, None]
    logits = gemv(x_ptr, branch_ptr, post_ptr, norm_ptr, None, w_ptr, scale_ptr, n, n < V, R, eps, K, BLOCK_R, BLOCK_K, PDL)
    if softcap is not None:
        logits = capped(logits, softcap, tl.float32)
    tl.store(out_ptr + r * V + n[None, :], logits, mask=(r < R) & (n < V)[None, :])


def norm_head(rows: Rows, weight: Tensor, scale: Tensor | None, softcap: float | None) -> Tensor:
    """weight (V, K) contiguous, with scale (V,) of 8 bits -> (R, V) float32."""
    rows.check(weight, scale)
    assert rows.norm is not None
    (R, K), V = rows.x.shape, weight.shape[0]
    out = rows.x.new_empty(R, V, dtype=torch.float32)
    tile = Tile.of(R, V, K, rows.x.dtype, weight.dtype)
    norm_head_kernel[(triton.cdiv(V, tile.outputs),)](
        *rows[:4], weight, scale, out, rows.eps, softcap, R,
        V=V, K=K, BLOCK_R=tile.rows, BLOCK_N=tile.outputs, BLOCK_K=tile.features, num_warps=tile.warps,
        PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out
