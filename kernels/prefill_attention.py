"""Attention of many queries over a prefix: no mask matrix, a limit for each query.

    out[b, t, h] = softmax(q[b, t, h] k[b, :n, h // G]^T / sqrt(D)) v[b, :n, h // G],    n = limit[b, t], G = H / K

q (B, T, H, D); k, v (B, S, K, D); limit (B, T) -> (B, T, H * D). A prefix sees all of itself and a suffix what is before it, so
a query sees a first part of its row and `limit` says how much. The G heads of a key head are stacked with the tokens as rows
of one tile, so that keys and values are read once for all of them. Keys run in blocks up to the largest limit of the tile;
scores stay on the chip (Dao 2023, arXiv:2307.08691). A head of 72 features is two products, 64 + 16, and not padded to 128.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from .decode_attention import NONE


@triton.jit
def prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, limit_ptr, out_ptr, scale, stride_b, stride_s, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // K
    b, kv = tl.program_id(1).to(tl.int64), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = row // G, kv * G + row % G
    rows = t < T
    limit = tl.load(limit_ptr + b * T + t, mask=rows, other=0).to(tl.int32)
    last = tl.max(limit, axis=0)
    d, s = tl.arange(0, MAIN), tl.arange(0, BLOCK_S)
    place = ((b * T + t) * H + head)[:, None] * D
    q = tl.load(q_ptr + place + d[None, :], mask=rows[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    if TAIL:
        e = MAIN + tl.arange(0, TAIL)
        q_tail = tl.load(q_ptr + place + e[None, :], mask=rows[:, None] & (e < D)[None, :], other=0.0)
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)

    best = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, last, BLOCK_S):
        position = first + s
        inside = position < last
        cached = b * stride_b + position.to(tl.int64)[:, None] * stride_s + kv * D
        k = tl.load(k_ptr + cached + d[None, :], mask=inside[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if TAIL:
            k_tail = tl.load(k_ptr + cached + e[None, :], mask=inside[:, None] & (e < D)[None, :], other=0.0)
            scores = tl.dot(q_tail, tl.trans(k_tail), scores, input_precision="ieee")
        seen = position[None, :] < limit[:, None]
        scores = tl.where(seen, scores * scale, NONE)
        higher = tl.maximum(best, tl.max(scores, axis=1))
        p = tl.where(seen, tl.exp(scores - higher[:, None]), 0.0)
        shrink = tl.exp(best - higher)
        total = total * shrink + tl.sum(p, axis=1)
        v = tl.load(v_ptr + cached + d[None, :], mask=inside[:, None], other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        if TAIL:
            v_tail = tl.load(v_ptr + cached + e[None, :], mask=inside[:, None] & (e < D)[None, :], other=0.0)
            acc_tail = tl.dot(p.to(v.dtype), v_tail, acc_tail * shrink[:, None], input_precision="ieee")
        best = higher

    total = tl.where(total > 0, total, 1.0)  # rows behind the last token have seen nothing
    tl.store(out_ptr + place + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=rows[:, None])
    if TAIL:
        tail = rows[:, None] & (e < D)[None, :]
        tl.store(out_ptr + place + e[None, :], (acc_tail / total[:, None]).to(out_ptr.dtype.element_ty), mask=tail)


def prefill_attention(q: Tensor, k: Tensor, v: Tensor, limit: Tensor) -> Tensor:
    """q (B, T, H, D) contiguous; k, v (B, S, K, D) of one layout, in which a position's K x D values are contiguous; limit (B, T)
    int64, at most S -> (B, T, H * D). D is at least 16."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    assert k.shape == v.shape == (B, S, K, D)
    assert limit.shape == (B, T)
    assert H % K == 0
    assert D >= 16
    assert q.dtype == k.dtype == v.dtype
    assert q.is_contiguous()
    assert limit.is_contiguous()
    assert k.stride() == v.stride()
    assert k.stride()[2:] == (D, 1), f"strides of keys {k.stride()}, of values {v.stride()}"
    main = 1 << (D.bit_length() - 1)
    tail = 0 if main == D else max(16, triton.next_power_of_2(D - main))
    block_m = 64 if main >= 256 else 128
    out = q.new_empty(B, T, H * D)
    prefill_attention_kernel[(triton.cdiv(T * (H // K), block_m), B, K)](
        q, k, v, limit, out, 1 / math.sqrt(D), k.stride(0), k.stride(1), T,
        H=H, K=K, D=D, MAIN=main, TAIL=tail, BLOCK_M=block_m, BLOCK_S=64, num_warps=8, num_stages=2,
    )  # fmt: skip
    return out
