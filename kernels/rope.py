"""Rotary embedding of q and k, and the store of k and v to the cache.

Feature i of a head is rotated with feature i + D/2. The cosines and sines of each token's angles come from a
float32 table, because sin and cos in the kernel lose accuracy at large angles and spill registers. The
token's position is read from memory. Arithmetic is float32, with one rounding at each store; v is copied. A
program computes all heads of one token. Moves 2 x (H + 2 K) x D x itemsize bytes per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["T"])
def rope_kernel(
    q_ptr, k_ptr, v_ptr, turned_ptr, k_cache_ptr, v_cache_ptr, cos_ptr, sin_ptr, position_ptr,
    T, stride_b, stride_s, stride_q, stride_k,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    D: tl.constexpr = 2 * HALF
    token = tl.program_id(0).to(tl.int64)
    place = token // T * stride_b + tl.load(position_ptr + token) * stride_s
    # The heads of q come first, then those of k, then those of v.
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    q_row = token * stride_q + h * D + i
    k_row = token * stride_k + (h - H) * D + i
    v_row = token * stride_k + (h - H - K) * D + i
    of_q = (h < H) & (i < HALF)
    of_k = (h >= H) & (h < H + K) & (i < HALF)
    of_v = (h >= H + K) & (h < H + 2 * K) & (i < HALF)
    first = (tl.load(q_ptr + q_row, mask=of_q, other=0.0).to(tl.float32)
             + tl.load(k_ptr + k_row, mask=of_k, other=0.0).to(tl.float32))  # fmt: skip
    second = (tl.load(q_ptr + q_row + HALF, mask=of_q, other=0.0).to(tl.float32)
              + tl.load(k_ptr + k_row + HALF, mask=of_k, other=0.0).to(tl.float32))  # fmt: skip
    angle = token * HALF + tl.broadcast_to(i, [HEADS, BLOCK])
    cos = tl.load(cos_ptr + angle, mask=i < HALF, other=0.0)
    sin = tl.load(sin_ptr + angle, mask=i < HALF, other=0.0)
    turned = (first * cos - second * sin).to(q_ptr.dtype.element_ty)
    turned_half = (second * cos + first * sin).to(q_ptr.dtype.element_ty)
    k_place, v_place = place + (h - H) * D + i, place + (h - H - K) * D + i
    q_place = (token * H + h) * D + i
    tl.store(turned_ptr + q_place, turned, mask=of_q)
    tl.store(turned_ptr + q_place + HALF, turned_half, mask=of_q)
    tl.store(k_cache_ptr + k_place, turned, mask=of_k)
    tl.store(k_cache_ptr + k_place + HALF, turned_half, mask=of_k)
    tl.store(v_cache_ptr + v_place, tl.load(v_ptr + v_row, mask=of_v), mask=of_v)
    tl.store(v_cache_ptr + v_place + HALF, tl.load(v_ptr + v_row + HALF, mask=of_v), mask=of_v)


def rope(
    q: Tensor, k: Tensor, v: Tensor, rotation: Tensor, positions: Tensor, k_cache: Tensor, v_cache: Tensor
) -> Tensor:
    """q (B, T, H, D), k and v (B, T, K, D), the values of each token contiguous; rotation (2, B, T, D/2)
    float32 contiguous; positions (B, T) int64; caches (B, S, K, D) with equal strides, the K x D values of a
    position contiguous -> the rotated q (B, T, H, D)."""
    B, T, H, D = q.shape
    K = k.shape[2]
    assert k.shape == v.shape == (B, T, K, D)
    assert positions.shape == (B, T)
    assert rotation.shape == (2, B, T, D // 2)
    assert rotation.dtype == torch.float32
    assert positions.dtype == torch.int64
    assert D % 2 == 0
    assert q.dtype == k.dtype == v.dtype == k_cache.dtype == v_cache.dtype
    turned, (q, k, v) = q.new_empty(q.shape), (x.view(B * T, -1, D) for x in (q, k, v))
    assert all(x.stride()[1:] == (D, 1) for x in (q, k, v))
    assert k.stride(0) == v.stride(0) or B * T == 1
    assert all(x.is_contiguous() for x in (rotation, positions))
    assert k_cache.stride() == v_cache.stride()
    assert k_cache.stride()[2:] == (D, 1), f"cache strides {k_cache.stride()}"
    rope_kernel[(B * T,)](
        q, k, v, turned, k_cache, v_cache, rotation[0], rotation[1], positions,
        T, k_cache.stride(0), k_cache.stride(1), q.stride(0), k.stride(0),
        H=H, K=K, HALF=D // 2, HEADS=triton.next_power_of_2(H + 2 * K), BLOCK=triton.next_power_of_2(D // 2),
        num_warps=4 if H + 2 * K <= 16 and q.dtype != torch.float32 else 8,
    )  # fmt: skip
    return turned
