"""A norm, the q, k and v products, the rotary embedding of q and k, and the store of k and v to the cache,
for up to 16 rows.

    q, k, v = the heads of scale[n] sum_e z[r, e] w[n, e]
    q and k are rotated: feature i of a head is paired with feature i + D/2

z = norm(x), or norm(x + norm'(branch)), where the sum x + norm'(branch) is an output too. x, branch (R, E), R
up to 16; w ((H + 2 K) D, E), the rows of q, then k, then v, in x's dtype, 8-bit or 4-bit, as in gemv.py.
Each row's position, and the cosines and sines of its angles, are read from memory. A program computes both
features of each pair. Arithmetic is float32, with one rounding at the store. Reads (H + 2 K) x D x E x
itemsize bytes of the weight, and moves little else."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dependent
from .gemv import gemv
from .gemv_input import GemvInput
from .gemv_tile import Tile


@triton.jit
def turning_pairs(block, given, BLOCK_N: tl.constexpr):
    """Features i and i + D/2 of a head alternate. The heads of q come first, then those of k, then those of
    v."""
    HALF: tl.constexpr = given[-1]
    blocks: tl.constexpr = (2 * HALF + BLOCK_N - 1) // BLOCK_N  # in a head
    j = tl.arange(0, BLOCK_N)
    i = block % blocks * (BLOCK_N // 2) + j // 2
    return block // blocks * (2 * HALF) + j % 2 * HALF + i, i < HALF


@triton.jit
def turn(both, block, given, R):
    q_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, position_ptr, T, stride_b, stride_s, H, K, HALF = given
    BLOCK_R: tl.constexpr = both.shape[0]
    PAIRS: tl.constexpr = both.shape[1] // 2
    D: tl.constexpr = 2 * HALF
    blocks: tl.constexpr = (HALF + PAIRS - 1) // PAIRS
    head, i = block // blocks, block % blocks * PAIRS + tl.arange(0, PAIRS)[None, :]
    r = tl.arange(0, BLOCK_R)[:, None]
    first, second = tl.split(both.reshape(BLOCK_R, PAIRS, 2))
    inside = (r < R) & (i < HALF)
    if head < H + K:
        cos = tl.load(cos_ptr + r * HALF + i, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + r * HALF + i, mask=inside, other=0.0)
        turned, turned_half = first * cos - second * sin, second * cos + first * sin
    else:
        turned, turned_half = first, second
    place = r // T * stride_b + tl.load(position_ptr + r, mask=r < R, other=0) * stride_s + i
    if head < H:
        out_ptr = q_ptr + (r * H + head) * D + i
    elif head < H + K:
        out_ptr = k_cache_ptr + place + (head - H) * D
    else:
        out_ptr = v_cache_ptr + place + (head - H - K) * D
    tl.store(out_ptr, turned.to(q_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + HALF, turned_half.to(q_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["R", "T"])
def norm_qkv_rope_kernel(
    x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, sum_ptr, w_ptr, scale_ptr,
    q_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, position_ptr, eps, R, T, stride_b, stride_s,
    E: tl.constexpr, H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
    FIRST: tl.constexpr, SECOND: tl.constexpr, STAGES: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    gemv(
        x_ptr, branch_ptr, post_ptr, norm_ptr, squares_ptr, sum_ptr, w_ptr, scale_ptr, turning_pairs, turn,
        (q_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, position_ptr, T, stride_b, stride_s, H, K, HALF),
        R, eps,
        E, PARTS, BLOCK_PARTS, BLOCK_R, BLOCK_N, FIRST, SECOND, STAGES, ONE, 2 * HALF % BLOCK_N == 0, PDL,
    )  # fmt: skip


def norm_qkv_rope(
    rows: GemvInput, weight: Tensor, scale: Tensor | None, rotation: Tensor, positions: Tensor,
    k_cache: Tensor, v_cache: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """weight ((H + 2 K) D, E) and scale as GemvInput.check takes them; rotation (2, B, T, D/2)
    float32 contiguous; positions (B, T) int64; caches (B, S, K, D) with equal strides, the K x D values of a
    position contiguous; B x T = R -> the rotated q (B, T, H, D), and x or the sum (R, E)."""
    rows.check(weight, scale)
    assert rows.norm is not None
    (R, E), (B, T), (K, D) = rows.x.shape, positions.shape, k_cache.shape[2:]
    H = weight.shape[0] // D - 2 * K
    assert B * T == R
    assert weight.shape[0] == (H + 2 * K) * D
    assert rotation.shape == (2, B, T, D // 2)
    assert rotation.dtype == torch.float32
    assert positions.dtype == torch.int64
    assert D % 2 == 0
    assert rows.x.dtype == k_cache.dtype == v_cache.dtype
    assert all(x.is_contiguous() for x in (rotation, positions))
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[2:] == (D, 1), f"cache strides {k_cache.stride()}"
    q = rows.x.new_empty(B, T, H, D)
    total = rows.x if rows.branch is None else torch.empty_like(rows.x)
    tile = Tile.of(R, weight.shape[0], E, rows.x.dtype, weight.dtype)
    tile = tile._replace(outputs=min(tile.outputs, triton.next_power_of_2(D)))
    blocks = triton.cdiv(D, tile.outputs) * (H + 2 * K)
    norm_qkv_rope_kernel[(blocks,)](
        *rows[:4], rows.squares, None if rows.branch is None else total, weight, scale, q, k_cache, v_cache,
        rotation[0], rotation[1], positions, rows.eps, R, T, k_cache.stride(0), k_cache.stride(1),
        E=E, H=H, K=K, HALF=D // 2, **rows.parts, **tile.options(R), PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return q, total
