"""Attention of many queries, each over a range of positions; there is no mask matrix.

    out[b, t, h] = softmax(cap(q[b, t, h] k[b, n, h // G]^T scale)) v[b, n, h // G]
    n = start[b, t] .. limit[b, t] - 1,    G = H / K

q (B, T, H, D); k, v (B, S, K, D); start, limit (B, T) -> (B, T, H * D); cap(x) = c tanh(x / c) if there is a
softcap c, else x. A token of the prefix sees the whole prefix, and a token of the suffix sees all tokens up
to itself, so each query sees a range of positions. The G query heads of a key head and the tokens are stacked
as rows of one tile, so that keys and values are read once for all of them. Keys are processed in blocks.
Blocks that all rows of the tile see need no mask, and are loaded through TMA descriptors where the chip has
them. Scores stay on the chip (Dao 2023, arXiv:2307.08691). A head of 72 features is computed as two products,
of 64 and 16 features, and not padded to 128."""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import LOG2E, NONE, architecture, capped


@triton.jit(do_not_specialize=["S", "T"])  # one kernel for prompts of every length
def prefill_attention_kernel(
    q_ptr, k_ptr, v_ptr, k_main, v_main, k_tail, v_tail, start_ptr, limit_ptr, out_ptr,
    scale, softcap, stride_b, stride_s, S, T,
    H: tl.constexpr, K: tl.constexpr, D: tl.constexpr, MAIN: tl.constexpr, TAIL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, EDGE: tl.constexpr, STRIDE_Q: tl.constexpr,
    TMA: tl.constexpr, CHUNK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // K
    b, kv = tl.program_id(1), tl.program_id(2)
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = row // G, kv * G + row % G
    rows = t < T
    d = tl.arange(0, MAIN)
    token = b.to(tl.int64) * T + t
    place = (token * H + head)[:, None] * D
    q_place = place
    if STRIDE_Q != H * D:  # one product computed q, k and v: they are beside one another
        q_place += token[:, None] * (STRIDE_Q - H * D)
    q = tl.load(q_ptr + q_place + d[None, :], mask=rows[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, MAIN], tl.float32)
    if TAIL:
        e = MAIN + tl.arange(0, TAIL)
        q_tail = tl.load(q_ptr + q_place + e[None, :], mask=rows[:, None] & (e < D)[None, :], other=0.0)
        acc_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)

    if limit_ptr is None:
        limit = tl.where(rows, S, 0)
        last = S
    else:
        limit = tl.load(limit_ptr + token, mask=rows, other=0).to(tl.int32)
        last = tl.max(limit, axis=0)
    all_to = tl.min(tl.where(rows, limit, last), axis=0) // BLOCK_S * BLOCK_S
    if start_ptr is not None:
        start = tl.load(start_ptr + token, mask=rows, other=last).to(tl.int32)
        lowest = tl.min(start, axis=0)
        begin = lowest // BLOCK_S * BLOCK_S
        all_from = (tl.max(tl.where(rows, start, 0), axis=0) + BLOCK_S - 1) // BLOCK_S * BLOCK_S
        all_to = tl.maximum(all_to, all_from)
    else:
        lowest, begin, all_from = 0, 0, 0

    peak = tl.full([BLOCK_M], NONE, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    # The blocks before those that all rows attend to, these blocks, and the blocks after them.
    for part in tl.static_range(1 if start_ptr is None else 0, 3):
        part_from = begin if part == 0 else all_from if part == 1 else all_to
        part_to = tl.minimum(all_from, last) if part == 0 else all_to if part == 1 else last
        s = tl.arange(0, BLOCK_S if part == 1 else EDGE)
        within = (s * stride_s)[:, None]
        for first in tl.range(
            part_from, part_to, BLOCK_S if part == 1 else EDGE, num_stages=STAGES if part == 1 else 1
        ):
            if part == 1 and TMA:
                k = k_main.load([b, first, kv * D]).reshape(BLOCK_S, MAIN)
                v = v_main.load([b, first, kv * D]).reshape(BLOCK_S, MAIN)
                # The tail reaches into the next head: zeros of q_tail cancel its (finite) keys, and its part
                # of acc_tail is not stored.
                if TAIL:
                    k_rest = k_tail.load([b, first, kv * D + MAIN]).reshape(BLOCK_S, TAIL)
                    v_rest = v_tail.load([b, first, kv * D + MAIN]).reshape(BLOCK_S, TAIL)
            else:
                block = b.to(tl.int64) * stride_b + first * stride_s + kv * D
                inside = (
                    ((s >= lowest - first) & (s < last - first))[:, None] if part != 1 else (s >= 0)[:, None]
                )
                k = tl.load(k_ptr + block + within + d[None, :], mask=inside, other=0.0)
                v = tl.load(v_ptr + block + within + d[None, :], mask=inside, other=0.0)
                if TAIL:
                    k_rest = tl.load(
                        k_ptr + block + within + e[None, :], mask=inside & (e < D)[None, :], other=0.0
                    )
                    v_rest = tl.load(
                        v_ptr + block + within + e[None, :], mask=inside & (e < D)[None, :], other=0.0
                    )
            if CHUNK:
                scores = tl.zeros([BLOCK_M, BLOCK_S if part == 1 else EDGE], tl.float32)
                for c in range(0, D, CHUNK):
                    f = c + tl.arange(0, CHUNK)
                    q_part = tl.load(
                        q_ptr + q_place + f[None, :], mask=rows[:, None] & (f < D)[None, :], other=0.0
                    )
                    k_part = tl.load(
                        k_ptr + block + within + f[None, :], mask=inside & (f < D)[None, :], other=0.0
                    )
                    # This product has sums of its own, of few terms each.
                    scores += tl.dot(q_part, tl.trans(k_part), input_precision="ieee")
            else:
                scores = tl.dot(q, tl.trans(k), input_precision="ieee")
                if TAIL:
                    scores = tl.dot(q_tail, tl.trans(k_rest), scores, input_precision="ieee")
            scores = (
                capped(scores * scale, softcap, q.dtype) * LOG2E
                if softcap is not None
                else scores * (scale * LOG2E)
            )
            if part != 1:
                seen = (first + s)[None, :] < limit[:, None]
                if start_ptr is not None:
                    seen &= (first + s)[None, :] >= start[:, None]
                scores = tl.where(seen, scores, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, axis=1))
            p = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(peak - higher)
            total = total * shrink + tl.sum(p, axis=1)
            acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            if TAIL:
                acc_tail = tl.dot(p.to(v.dtype), v_rest, acc_tail * shrink[:, None], input_precision="ieee")
            peak = higher

    total = tl.where(total > 0, total, 1.0)  # rows after the last token attend to nothing
    tl.store(
        out_ptr + place + d[None, :], (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=rows[:, None]
    )
    if TAIL:
        tail = rows[:, None] & (e < D)[None, :]
        tl.store(
            out_ptr + place + e[None, :], (acc_tail / total[:, None]).to(out_ptr.dtype.element_ty), mask=tail
        )


def prefill_attention(
    q: Tensor, k: Tensor, v: Tensor, limit: Tensor | None, *, start: Tensor | None = None,
    scale: float | None = None, softcap: float | None = None,
) -> Tensor:  # fmt: skip
    """q (B, T, H, D), the H x D values of a token contiguous, the tokens at equal distances; k, v (B, S, K,
    D) with equal strides, the K x D values of a position contiguous; limit and start (B, T) int64, start <
    limit <= S -> (B, T, H * D). The default limit is S, the default start 0, the default scale 1 / sqrt(D). D
    is at least 16."""
    B, T, H, D = q.shape
    S, K = k.shape[1:3]
    assert k.shape == v.shape == (B, S, K, D)
    assert all(x is None or (x.shape == (B, T) and x.is_contiguous()) for x in (limit, start))
    assert H % K == 0
    assert D >= 16
    assert q.dtype == k.dtype == v.dtype
    assert q.stride()[2:] == (D, 1), f"strides of queries {q.stride()}"
    assert B == 1 or T == 1 or q.stride(0) == T * q.stride(1), f"strides of queries {q.stride()}"
    assert k.stride() == v.stride()
    assert k.stride()[2:] == (D, 1), f"strides of keys {k.stride()}, of values {v.stride()}"
    assert S * k.stride(1) < 2**31  # offsets within a row are 32 bits
    main = 1 << (D.bit_length() - 1)
    tail = 0 if main == D else max(16, triton.next_power_of_2(D - main))
    bytes_apart = [n * q.itemsize for n in (*k.stride()[:2], D)]
    aligned = all(n % 16 == 0 for n in (k.data_ptr(), v.data_ptr(), *bytes_apart))  # TMA requires this
    chip = architecture()
    tile = Tile.of(chip if aligned else min(chip, 80), main, q.dtype, start is not None)
    k_main, v_main, k_tail, v_tail = (
        TensorDescriptor(x, [B, S, K * D], [*x.stride()[:2], 1], [1, tile.positions, width])
        if tile.tma and width
        else x
        for width in (main, tail)
        for x in (k, v)
    )
    out = q.new_empty(B, T, H * D)
    prefill_attention_kernel[(triton.cdiv(T * (H // K), tile.rows), B, K)](
        q, k, v, k_main, v_main, k_tail, v_tail, start, limit, out,
        1 / math.sqrt(D) if scale is None else scale, softcap, k.stride(0), k.stride(1), S, T,
        H=H, K=K, D=D, MAIN=main, TAIL=tail, BLOCK_M=tile.rows, BLOCK_S=tile.positions, EDGE=tile.edge,
        STRIDE_Q=q.stride(1) if T > 1 else q.stride(0), TMA=tile.tma, CHUNK=tile.chunk, STAGES=tile.stages,
        num_warps=8,
    )  # fmt: skip
    return out


class Tile(NamedTuple):
    """How a program divides its work. The sizes are those that fit a chip's registers and shared memory (see
    benchmarks/resources.py)."""

    rows: int  # of q
    positions: int  # of k and v at a time, where no mask is needed
    edge: int  # the same where a mask is needed: fewer, because these are loaded through registers
    stages: int
    tma: bool
    chunk: int  # features of a q k^T product at a time; 0: all

    @classmethod
    def of(cls, chip: int, main: int, dtype: torch.dtype, windowed: bool) -> "Tile":
        """For sm_`chip`. Chips before sm_90, and tensors that TMA cannot load, need the small tiles. So does
        sm_120, which has as little shared memory as the older chips."""
        if chip == 0:  # the interpreter: larger blocks are faster
            return cls(128, 64, 16, 1, False, 0)
        if dtype == torch.float32:  # products are computed by FMA from registers, not by tensor cores
            return cls(32, 32, 32, 1, False, 32) if main == 128 else cls(32, 16, 16, 1, False, 64)
        if not 90 <= chip < 120 and main >= 256:
            return cls(64, 32, 16, 2, False, 0)
        if not 90 <= chip < 120:
            return cls(128, 32 if main == 128 else 64, 16, 2, False, 0)
        # With 128 rows, Triton 3.8 spills up to 24 registers; 3.6, 3.7 and 3.9 spill none.
        if main >= 256 and triton.__version__.startswith("3.8."):
            return cls(64, 64, 16, 2, True, 0)
        if main >= 256:
            return cls(128, 64 if chip == 90 and not windowed else 32, 16, 2, True, 0)
        return cls(128, 64, 16, 3, True, 0)
