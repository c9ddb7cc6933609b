"""What the kernels of a decode share: a few rows times a weight matrix, of which every value is read once.

    out[r, n] = scale[n] sum_k z[r, k] w[n, k],    z = x, norm(x), or norm(x + norm'(branch)),    norm(x) = x / rms(x) * (1 + weight)

x, branch (R, K), R up to 16; w (N, K) of x's dtype, or int8 or e4m3 with a scale for each row. A program takes a block of w's rows, a block
of features at a time; the next block is on its way while one is multiplied, and the first is before the activations are looked
at: also before the kernel that makes them has ended, where there is programmatic dependent launch.
One row is multiplied and summed in float32 as it comes, by FMA, and the norm divides the sum; several rows are normalised, rounded
to x's dtype and padded to 16 for tl.dot. Every program makes the norms for itself, from rows that are in the L2 cache by then.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import architecture, overtake, wait

MOST_ROWS = 16


@triton.jit
def row_sums(x_ptr, branch_ptr, post_ptr, place, k, inside, branch_scale):
    """x, or x + norm'(branch) rounded to x's dtype, in float32."""
    z = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if branch_ptr is not None:
        post = tl.load(post_ptr + k, mask=inside, other=0.0).to(tl.float32)
        z += tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32) * branch_scale * (1 + post)
        z = z.to(x_ptr.dtype.element_ty).to(tl.float32)
    return z


@triton.jit
def inverse_rms(x_ptr, branch_ptr, post_ptr, branch_scale, r, R, eps, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr):  # -> (BLOCK_R, 1)
    squares = tl.zeros([BLOCK_R, BLOCK_K], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = tl.broadcast_to(first + tl.arange(0, BLOCK_K)[None, :], [BLOCK_R, BLOCK_K])
        z = row_sums(x_ptr, branch_ptr, post_ptr, r * K + k, k, (r < R) & (k < K), branch_scale)
        squares += z * z
    return tl.rsqrt(tl.sum(squares, axis=1) / K + eps)[:, None]


@triton.jit
def gemv(
    x_ptr, branch_ptr, post_ptr, norm_ptr, sum_ptr, w_ptr, scale_ptr, n, wanted, R, eps,
    K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The rows n (BLOCK_N,) of w, where they are wanted -> (BLOCK_R, BLOCK_N) float32. The first program writes x + norm'(branch) to sum_ptr."""
    overtake(PDL)
    r, k = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_K)[None, :]
    row = n.to(tl.int64)[:, None] * K
    w = tl.load(w_ptr + row + k, mask=wanted[:, None] & (k < K), other=0.0, eviction_policy="evict_first")
    wait(PDL)
    branch_scale = 1.0
    if branch_ptr is not None:
        branch_scale = inverse_rms(branch_ptr, None, None, 1.0, r, R, eps, K, BLOCK_R, BLOCK_K)
    if norm_ptr is not None and BLOCK_R > 1:
        inverse = inverse_rms(x_ptr, branch_ptr, post_ptr, branch_scale, r, R, eps, K, BLOCK_R, BLOCK_K)
    squares = tl.zeros([1, BLOCK_K], tl.float32)
    acc = tl.zeros([n.shape[0], BLOCK_K] if BLOCK_R == 1 else [BLOCK_R, n.shape[0]], tl.float32)
    for first in range(0, K, BLOCK_K):
        here = tl.broadcast_to(first + k, [BLOCK_R, BLOCK_K])
        inside = (r < R) & (here < K)
        following = first + BLOCK_K + k
        upcoming = tl.load(w_ptr + row + following, mask=wanted[:, None] & (following < K), other=0.0, eviction_policy="evict_first")
        z = row_sums(x_ptr, branch_ptr, post_ptr, r * K + here, here, inside, branch_scale)
        if sum_ptr is not None:  # noqa: SIM102  known when it is compiled, the other when it runs
            if tl.program_id(0) == 0:
                tl.store(sum_ptr + r * K + here, z.to(sum_ptr.dtype.element_ty), mask=inside)
        if norm_ptr is not None:
            weight = 1 + tl.load(norm_ptr + here, mask=inside, other=0.0).to(tl.float32)
            if BLOCK_R == 1:
                squares += z * z
                z *= weight
            else:
                z *= inverse * weight
        if BLOCK_R == 1:
            acc += w.to(tl.float32) * z
        else:
            acc += tl.dot(z.to(x_ptr.dtype.element_ty), tl.trans(w.to(x_ptr.dtype.element_ty)), input_precision="ieee")
        w = upcoming
    if BLOCK_R == 1:
        acc = tl.sum(acc, axis=1)[None, :]
        if norm_ptr is not None:
            acc *= tl.rsqrt(tl.sum(squares, axis=1)[:, None] / K + eps)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + n, mask=wanted, other=0.0).to(tl.float32)[None, :]
    return acc


class Rows(NamedTuple):
    """What a product begins with: x, or x + norm(branch) with `post` as that norm's weight; the norm of it, where there is one."""

    x: Tensor  # (R, K)
    branch: Tensor | None = None  # (R, K)
    post: Tensor | None = None  # (K,)
    norm: Tensor | None = None  # (K,)
    eps: float = 0.0

    def check(self, weight: Tensor, scale: Tensor | None) -> None:
        R, K = self.x.shape
        assert 1 <= R <= MOST_ROWS, f"{R} rows"
        assert (self.branch is None) == (self.post is None)
        assert self.branch is None or self.branch.shape == (R, K)
        assert all(x is None or x.shape == (K,) for x in (self.post, self.norm))
        assert all(x is None or (x.dtype == self.x.dtype and x.device == weight.device and x.is_contiguous()) for x in self[:4])
        assert weight.shape[1:] == (K,), f"weight {tuple(weight.shape)} for {K} features"
        assert weight.is_contiguous()
        assert weight.dtype in ((self.x.dtype,) if scale is None else (torch.int8, torch.float8_e4m3fn))
        assert scale is None or (scale.shape == weight.shape[:1] and scale.is_contiguous())


class Tile(NamedTuple):
    """How many outputs a program makes, of how many features at a time."""

    rows: int
    outputs: int
    features: int
    warps: int

    @classmethod
    def of(cls, R: int, N: int, K: int, dtype: torch.dtype, weight: torch.dtype) -> "Tile":
        """For R rows and a weight (N, K): a thread has 32 values of it, of a large one 64, and as many on their way, so that an SM has more
        under way than it receives in the time that memory takes to answer. Features divide K where a power of two from 128 does."""
        divisor = K & -K if (K & -K) >= 128 else triton.next_power_of_2(K)
        if architecture() == 0:  # the interpreter: the larger the blocks, the faster
            return cls(1 if R == 1 else 16, 512, min(max(16, divisor), 1024), 4)
        large = N >= 8192
        # Triton 3.8 spills 8 registers with int8 there, where 3.6 and 3.9 spill none.
        spilling = architecture() >= 100 and weight == torch.int8 and triton.__version__.startswith("3.8.")
        if R == 1:
            features = min(divisor, 512 if spilling else 1024)
            values = (16384 if large else 8192) // max(2, weight.itemsize)
            return cls(1, max(2, values // features), features, 4)
        if dtype == torch.float32:  # products are made by FMA from registers, not by tensor cores
            return cls(16, 16 if weight == dtype else 32, 64, 4)
        return cls(16, 64 if large else 16, 128, 4)
