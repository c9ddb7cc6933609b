"""The rows that gemv.py multiplies, and the checks of what its kernels assume."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gemv_int4 import interleaved

MOST_ROWS = 16


@triton.jit
def features(
    x_ptr, branch_ptr, post_ptr, norm_ptr, sum_ptr, branch_scale, R, first,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, INTERLEAVED: tl.constexpr = False,
):  # fmt: skip
    """-> z, and z times the norm's (1 + weight), each (BLOCK_R, BLOCK_K) float32. z is x, or x +
    norm'(branch) rounded to x's dtype; the first program writes z to sum_ptr. INTERLEAVED: in the order of
    gemv_int4.py."""
    i = tl.arange(0, BLOCK_K)
    if INTERLEAVED:
        i = interleaved(i)
    r, k = tl.arange(0, BLOCK_R)[:, None], tl.broadcast_to(first + i[None, :], [BLOCK_R, BLOCK_K])
    inside = (r < R) & (k < K)
    z = tl.load(x_ptr + r * K + k, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        post = tl.load(post_ptr + k, mask=inside, other=0.0).to(tl.float32)
        z += (
            tl.load(branch_ptr + r * K + k, mask=inside, other=0.0).to(tl.float32) * branch_scale * (1 + post)
        )
        z = z.to(x_ptr.dtype.element_ty).to(tl.float32)
    if sum_ptr is not None:
        tl.store(sum_ptr + r * K + k, z.to(sum_ptr.dtype.element_ty), mask=inside & (tl.program_id(0) == 0))
    weighted = z
    if norm_ptr is not None:
        weighted = z * (1 + tl.load(norm_ptr + k, mask=inside, other=0.0).to(tl.float32))
    return z, weighted


@triton.jit
def inverse_of_parts(
    squares_ptr, R, eps,
    K: tl.constexpr, PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_PARTS: tl.constexpr,
):  # fmt: skip
    """1 / rms of rows, from the parts (R, PARTS) of their sums of squares -> (BLOCK_R, 1)."""
    r, part = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_PARTS)[None, :]
    squares = tl.load(squares_ptr + r * PARTS + part, mask=(r < R) & (part < PARTS), other=0.0)
    return tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]


@triton.jit
def inverse_rms(
    x_ptr, branch_ptr, post_ptr, branch_scale, R, eps,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """1 / rms of the rows of z -> (BLOCK_R, 1)."""
    squares = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for first in tl.range(0, K, BLOCK_K, num_stages=3):  # stages hide the latency of the L2 cache
        z, _ = features(x_ptr, branch_ptr, post_ptr, None, None, branch_scale, R, first, K, BLOCK_R, BLOCK_K)
        squares += z * z
    return tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]


class GemvInput(NamedTuple):
    """x, or the sum x + norm'(branch) with `post` as the weight of norm'; then the norm of that, if `norm` is
    its weight."""

    x: Tensor  # (R, K)
    branch: Tensor | None = None  # (R, K)
    post: Tensor | None = None  # (K,)
    norm: Tensor | None = None  # (K,)
    eps: float = 0.0
    squares: Tensor | None = None  # (R, parts) float32, parts of the sum of squares of each row of the branch

    def check(self, weight: Tensor, scale: Tensor | None) -> None:
        """Assert that the product can be computed: weight (N, K), with scale (N,) if it is 8-bit; or 4-bit,
        int32 (N, K / 8), with scale (N, K / 32) bfloat16."""
        R, K = self.x.shape
        assert 1 <= R <= MOST_ROWS, f"{R} rows"
        assert (self.branch is None) == (self.post is None) == (self.squares is None)
        assert self.branch is None or self.branch.shape == (R, K)
        if self.squares is not None:
            assert self.squares.shape[:1] == (R,)
            assert self.squares.dtype == torch.float32
            assert self.squares.is_contiguous()
        assert all(x is None or x.shape == (K,) for x in (self.post, self.norm))
        given = [x for x in self[:4] if x is not None]
        assert all(x.dtype == self.x.dtype and x.device == weight.device and x.is_contiguous() for x in given)
        assert weight.is_contiguous()
        assert scale is None or scale.is_contiguous()
        if weight.dtype == torch.int32:
            assert weight.shape[1:] == (K // 8,), f"weight {tuple(weight.shape)} of words for {K} features"
            assert scale is not None
            assert scale.shape == (len(weight), K // 32), f"scale {tuple(scale.shape)}"
            assert scale.dtype == torch.bfloat16
            assert K % 32 == 0
            return
        assert weight.shape[1:] == (K,), f"weight {tuple(weight.shape)} for {K} features"
        assert weight.dtype in ((self.x.dtype,) if scale is None else (torch.int8, torch.float8_e4m3fn))
        assert scale is None or scale.shape == weight.shape[:1]

    @property
    def parts(self) -> dict[str, int]:
        """The constants of `gemv` for the parts of the sums of squares."""
        parts = 0 if self.squares is None else self.squares.shape[1]
        return {"PARTS": parts, "BLOCK_PARTS": triton.next_power_of_2(max(parts, 1))}
