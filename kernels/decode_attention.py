"""Attention of one new token over the KV cache, for memory-bound decoding.

    out[b, h] = softmax(cap(q[b, h] k[b, n, h // G]^T scale)) v[b, n, h // G]
    n = start[b] .. length[b] - 1,    G = H / K

q (B, 1, H, D); k, v (B, S, K, D); start, length (B, 1) -> (B, 1, H * D); cap(x) = c tanh(x / c) if there is a
softcap c, else x. The G query heads of a key head are the rows of one tl.dot (padded to 16), so each key and
value is read once: B x n x K x D x 2 x itemsize bytes. The cache is split over up to 16 programs, each of
which keeps a running maximum and float32 sums. A counter for each row and key head tells which program
finishes last. That program merges the parts in the same launch, four at a time, and resets the counter. A
split outside the row's range ends at once and is not counted."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import LOG2E, NONE, capped, dependent, launch_dependents, wait_for_dependencies


@triton.jit
def decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, start_ptr, length_ptr, out_ptr, part_ptr, stat_ptr, counter_ptr,
    scale, softcap, stride_b, stride_s, per_split,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    G: tl.constexpr = H // K
    split, splits = tl.program_id(0), tl.num_programs(0)
    b, kv = tl.program_id(1).to(tl.int64), tl.program_id(2)
    g, d, s = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_S)
    head = kv * G + g
    heads = (g < G)[:, None] & (d < D)[None, :]
    place = (b * H + head)[:, None] * D + d[None, :]
    q = tl.load(q_ptr + place, mask=heads, other=0.0)
    length = tl.load(length_ptr + b).to(tl.int32)
    begin = split * per_split
    end = tl.minimum(begin + per_split, length)
    start = 0
    if start_ptr is not None:
        start = tl.load(start_ptr + b).to(tl.int32)
        begin = tl.maximum(begin, start // BLOCK_S * BLOCK_S)

    first_split, end_split = start // per_split, tl.cdiv(length, per_split)  # the splits that the row reaches

    peak = tl.full([BLOCK_G], NONE, tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    within = (s * stride_s)[:, None]
    for first in range(begin, end, BLOCK_S):
        inside = (first + s < end) & (first + s >= start)
        block = b * stride_b + first * stride_s + kv * D
        tile = inside[:, None] & (d < D)[None, :]
        if CHUNK:
            scores = tl.zeros([BLOCK_G, BLOCK_S], tl.float32)
            for c in range(0, D, CHUNK):
                f = c + tl.arange(0, CHUNK)
                q_part = tl.load(
                    q_ptr + (b * H + head)[:, None] * D + f[None, :],
                    mask=(g < G)[:, None] & (f < D)[None, :],
                    other=0.0,
                )
                k_part = tl.load(
                    k_ptr + block + within + f[None, :], mask=inside[:, None] & (f < D)[None, :], other=0.0
                )
                # This product has sums of its own, of few terms each.
                scores += tl.dot(q_part, tl.trans(k_part), input_precision="ieee")
        else:
            k = tl.load(k_ptr + block + within + d[None, :], mask=tile, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # (G, S)
        v = tl.load(v_ptr + block + within + d[None, :], mask=tile, other=0.0)
        scores = (
            capped(scores * scale, softcap, q.dtype) * LOG2E
            if softcap is not None
            else scores * (scale * LOG2E)
        )
        scores = tl.where(inside[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        p = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(peak - higher)
        total = total * shrink + tl.sum(p, axis=1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        peak = higher

    if splits == 1:
        tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=heads)
    elif (split >= first_split) & (split < end_split):
        row = b * K + kv
        part = (row * splits + split) * BLOCK_G
        tl.store(part_ptr + (part + g)[:, None] * BLOCK_D + d[None, :], acc, mask=heads)
        tl.store(stat_ptr + (part + g) * 2, peak)
        tl.store(stat_ptr + (part + g) * 2 + 1, total)
        tl.debug_barrier()  # every warp has written before one increments the counter
        if tl.atomic_add(counter_ptr + row, 1, sem="acq_rel") == end_split - first_split - 1:
            every = tl.arange(0, MOST)[:, None]
            held = (every >= first_split) & (every < end_split)
            stat = stat_ptr + ((row * splits + every) * BLOCK_G + g[None, :]) * 2
            peaks = tl.load(stat, mask=held, other=NONE, cache_modifier=".cg")
            peak = tl.max(peaks, axis=0)
            total = tl.sum(
                tl.load(stat + 1, mask=held, other=0.0, cache_modifier=".cg")
                * tl.exp2(peaks - peak[None, :]),
                axis=0,
            )
            acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
            # Four at a time, because one at a time each would cost the latency of the L2 cache.
            for other in tl.range(first_split, end_split, loop_unroll_factor=4):
                part = (row * splits + other) * BLOCK_G
                weight = tl.exp2(tl.load(stat_ptr + (part + g) * 2, cache_modifier=".cg") - peak)
                acc += tl.load(
                    part_ptr + (part + g)[:, None] * BLOCK_D + d[None, :], mask=heads, other=0.0,
                    cache_modifier=".cg",
                ) * weight[:, None]  # fmt: skip
            tl.store(out_ptr + place, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=heads)
            tl.store(counter_ptr + row, 0)


def decode_attention(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, *, start: Tensor | None = None,
    scale: float | None = None, softcap: float | None = None, counters: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """q (B, 1, H, D) contiguous; k, v (B, S, K, D) with equal strides, the K x D values of a position
    contiguous; length and start (B, 1) int64, start < length <= S -> (B, 1, H * D). The default start is 0,
    the default scale 1 / sqrt(D). counters (B * K,) int32 are zero before and after a call; calls that may
    overlap need counters of their own."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    assert T == 1
    assert k.shape == v.shape == (B, S, K, D)
    assert all(x is None or (x.shape == (B, 1) and x.is_contiguous()) for x in (length, start))
    assert H % K == 0
    assert q.dtype == k.dtype == v.dtype
    assert q.is_contiguous()
    assert k.stride() == v.stride()
    assert k.stride()[2:] == (D, 1), f"cache strides {k.stride()}"
    assert S * k.stride(1) < 2**31  # offsets within a row are 32 bits
    splits, per_split = plan(B * K, S)
    block_g, block_d = max(16, triton.next_power_of_2(H // K)), triton.next_power_of_2(D)
    out = q.new_empty(B, 1, H * D)
    parts = q.new_empty(B * K * splits * block_g * (block_d + 2), dtype=torch.float32)
    parts, stats = parts.split([B * K * splits * block_g * block_d, B * K * splits * block_g * 2])
    counters = torch.zeros(B * K, dtype=torch.int32, device=q.device) if counters is None else counters
    assert counters.shape == (B * K,)
    assert counters.dtype == torch.int32
    single = q.dtype == torch.float32
    decode_attention_kernel[(splits, B, K)](
        q, k, v, start, length, out, parts, stats, counters,
        1 / math.sqrt(D) if scale is None else scale, softcap, k.stride(0), k.stride(1), per_split,
        H=H, K=K, D=D, BLOCK_D=block_d, BLOCK_G=block_g, BLOCK_S=BLOCK_S, CHUNK=32 if single else 0,
        MOST=MOST_SPLITS, num_warps=4,
        num_stages=2 if single else 4,  # few programs, each with an SM's shared memory
        PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
    return out


MOST_SPLITS = 16
BLOCK_S = 32  # positions at a time; at D = 256, two stages of 64 would fill most of an SM's shared memory


def plan(rows: int, S: int, programs: int = 132) -> tuple[int, int]:
    """The number of splits of the cache, none of them empty, and the positions in each, for about `programs`
    programs in all."""
    blocks = triton.cdiv(S, BLOCK_S)
    per_split = triton.cdiv(blocks, min(MOST_SPLITS, max(1, triton.next_power_of_2(programs // rows))))
    return triton.cdiv(blocks, per_split), per_split * BLOCK_S
