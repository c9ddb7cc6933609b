"""Rotary embedding of q and k, with k and v written to their places in the cache.

Feature i of a head turns with feature i + D/2. Cosine and sine of each token's angles come in float32 from a table, because sin
and cos in the kernel lose accuracy at large angles and spill; its position is read from memory. float32 inside, one rounding at
each store; v is copied. A program owns a token with all its heads. Moves 2 x (H + 2 K) x D x itemsize bytes a token.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rope_kernel(
    q_ptr, k_ptr, v_ptr, turned_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, position_ptr, T, stride_b, stride_s,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    b, position = token // T, tl.load(position_ptr + token)
    i = tl.arange(0, BLOCK)[None, :]
    cos = tl.load(cos_ptr + token * HALF + i, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + token * HALF + i, mask=i < HALF, other=0.0)

    head = tl.arange(0, BLOCK_H)[:, None]
    inside, place = (head < H) & (i < HALF), (token * H + head) * 2 * HALF + i
    first = tl.load(q_ptr + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(q_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(turned_ptr + place, (first * cos - second * sin).to(turned_ptr.dtype.element_ty), mask=inside)
    tl.store(turned_ptr + place + HALF, (second * cos + first * sin).to(turned_ptr.dtype.element_ty), mask=inside)

    head = tl.arange(0, BLOCK_K)[:, None]
    inside, place = (head < K) & (i < HALF), (token * K + head) * 2 * HALF + i
    cached = b * stride_b + position * stride_s + head * 2 * HALF + i
    first = tl.load(k_ptr + place, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(k_ptr + place + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(k_cache_ptr + cached, (first * cos - second * sin).to(k_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(k_cache_ptr + cached + HALF, (second * cos + first * sin).to(k_cache_ptr.dtype.element_ty), mask=inside)
    tl.store(v_cache_ptr + cached, tl.load(v_ptr + place, mask=inside), mask=inside)
    tl.store(v_cache_ptr + cached + HALF, tl.load(v_ptr + place + HALF, mask=inside), mask=inside)


def rope(q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """The turned q. q (B, T, H, D), k and v (B, T, K, D) contiguous; rotation (2, B, T, D/2) float32 contiguous; positions (B, T)
    int64; caches (B, S, K, D) of one layout, in which a position's K x D values are contiguous."""
    B, T, H, D = q.shape
    K = k.shape[2]
    assert k.shape == v.shape == (B, T, K, D)
    assert positions.shape == (B, T)
    assert rotation.shape == (2, B, T, D // 2)
    assert rotation.dtype == torch.float32
    assert positions.dtype == torch.int64
    assert all(x.is_contiguous() for x in (q, k, v, rotation, positions))
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[2:] == (D, 1), f"cache strides {k_cache.stride()}"
    turned = torch.empty_like(q)
    rope_kernel[(B * T,)](
        q, k, v, turned, k_cache, v_cache, rotation[0], rotation[1], positions, T, k_cache.stride(0), k_cache.stride(1),
        H=H, K=K, HALF=D // 2, BLOCK_H=triton.next_power_of_2(H), BLOCK_K=triton.next_power_of_2(K), BLOCK=triton.next_power_of_2(D // 2), num_warps=4,
    )  # fmt: skip
    return turned
