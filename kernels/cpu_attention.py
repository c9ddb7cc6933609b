"""Attention of many rows on a CPU that multiplies pairs of bfloat16 numbers, in Numba:

    score[r, s] = scale q[r] k[s], or softcap tanh(scale q[r] k[s] / softcap)
    p[r, s] = e^(score[r, s] - max_s score[r, s])
    out[r] = sum_s p[r, s] v[s] / sum_s p[r, s]

The query heads that share a key head are rows of one product: q and out are (B, K, R, D), k and v (B, K, S,
D), bfloat16 each. The scores and the sums are float32, p is rounded to bfloat16, and the result is rounded
once. Numbers below 2^-126 count as 0.

A thread computes all scores of up to 48 rows, then p, then the result. The tiles are those of
`cpu_many_rows`: their lanes are rows of q. So no sum of the softmax crosses lanes, and the values of p of two
keys become a pair of the second product in the lanes in which they are computed.

On two cores of Zen 4, 256 patches of SigLIP (16 heads of 72) take 1.2 ms, and with torch 2.4 ms; 268 tokens
of PaliGemma 3B take 1.7 and 4.3 ms, of PaliGemma 2 3B 2.3 and 7.3 ms."""

import math
from functools import partial

import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .cpu_gemv import OPTIONS, TAKEN, _load, compiled, run, taken
from .cpu_heads import SHORT, _row, pack, pack_values, rows_of
from .cpu_many_rows import MULTIPLIES_TILES, VECTORS, _add_products
from .cpu_panels import PANEL, WORD, _address, _number, _store
from .cpu_vectors import (
    LANES,
    MULTIPLIES_BFLOAT16,
    _power_of_2,
    _repeated,
    _rounded,
    _transposed,
    _vector,
)
from .cpu_workers import own_threads

ROWS = VECTORS * LANES  # most rows of a tile


def takes(dtype: torch.dtype, head_dim: int) -> bool:
    """Whether the kernel computes such an attention, and no instructions of the CPU are faster."""
    fits = head_dim % 2 == 0 and head_dim >= PANEL
    return MULTIPLIES_BFLOAT16 and not MULTIPLIES_TILES and dtype == torch.bfloat16 and fits


@intrinsic
def score(_, queries, keys, place, size, scores, where, largest, t, factors, capped, vectors):
    """The scores of PANEL keys, which are packed in keys[place:], to scores[t, where:], and the largest so
    far of each row to largest[t]. `size` is the number of pairs of features. With a softcap, `capped` has 2
    elements, and factors[:2] are 2 log2(e) scale / softcap and the softcap; otherwise the scores lack the
    factor `scale`."""

    def generate(context, builder, signature, arguments):
        address = partial(_address, context, builder, signature, arguments)
        _, _, place, size, _, where, _, t, _, _, _ = arguments
        x, w, target = address(0, t, _number(0)), address(1, _number(0), place), address(4, t, where)
        tops = address(6, t, _number(0))
        before, cap = (_repeated(builder, builder.load(address(8, _number(0), _number(i)))) for i in (0, 1))
        sums = _zeros(builder, vectors.count)
        _add_products(builder, x, w, _number(0), size, sums, pairs=True)
        for i, each in enumerate(each for row in sums for each in row):
            _store(builder, builder.load(each), builder.gep(target, [_number(i * LANES)]))
        most = [cgutils.alloca_once(builder, _vector(LANES)) for _ in sums]
        for v, each in enumerate(most):
            builder.store(_load(builder, tops, _number(v * LANES), LANES), each)
        with cgutils.for_range(builder, _number(PANEL)) as loop:
            for v in range(vectors.count):
                at = builder.mul(builder.add(loop.index, _number(v * PANEL)), _number(LANES))
                total, top = _load(builder, target, at, LANES), builder.load(most[v])
                if capped.count > 1:  # tanh(x) = 1 - 2 / (1 + e^2x)
                    power = _power_of_2(builder, builder.fmul(total, before))
                    one = ir.Constant(total.type, [1.0] * LANES)
                    rest = builder.fdiv(builder.fadd(cap, cap), builder.fadd(power, one))
                    total = builder.fsub(cap, rest)
                    _store(builder, total, builder.gep(target, [at]))
                top = builder.select(builder.fcmp_ordered(">", total, top), total, top)
                builder.store(top, most[v])
        for v, each in enumerate(most):
            _store(builder, builder.load(each), builder.gep(tops, [_number(v * LANES)]))
        return context.get_dummy_value()

    given = (queries, keys, place, size, scores, where, largest, t, factors, capped, vectors)
    return types.void(*given), generate


@intrinsic
def exponentiate(_, scores, where, largest, totals, t, both, factors, p, place, vectors):
    """p of the keys s and s + 1 from scores[t, where:] to p[t, place:], and added to totals[t]. `both`:
    whether there is a key s + 1."""

    def generate(context, builder, signature, arguments):
        address = partial(_address, context, builder, signature, arguments)
        _, where, _, _, t, both, _, _, place, _ = arguments
        source, tops, sums = address(0, t, where), address(2, t, _number(0)), address(3, t, _number(0))
        target, kind = address(7, t, place), _vector(LANES, WORD)
        factor = _repeated(builder, builder.load(address(6, _number(0), _number(2))))
        half, upper = (ir.Constant(kind, [value] * LANES) for value in (0x8000, 0xFFFF0000))
        for v in range(vectors.count):
            at = _number(v * LANES)
            top, total, words = _load(builder, tops, at, LANES), _load(builder, sums, at, LANES), []
            for side in (0, 1):
                each = _load(builder, source, _number((v * PANEL + side) * LANES), LANES)
                power = _power_of_2(builder, builder.fmul(builder.fsub(each, top), factor))
                # Rounded to the nearest. It is not negative, so no carry changes a sign.
                bits = builder.and_(builder.add(builder.bitcast(power, kind), half), upper)
                if side:
                    bits = builder.select(both, bits, ir.Constant(kind, [0] * LANES))
                total = builder.fadd(total, builder.bitcast(bits, total.type))
                words.append(bits)
            _store(builder, total, builder.gep(sums, [at]))
            low = builder.lshr(words[0], ir.Constant(kind, [16] * LANES))
            _store(builder, builder.or_(low, words[1]), builder.gep(target, [at]))
        return context.get_dummy_value()

    return types.void(scores, where, largest, totals, t, both, factors, p, place, vectors), generate


@intrinsic
def average(_, p, values, place, size, totals, t, rows, r, d, vectors):
    """The result of PANEL features from d on, whose values are packed in values[place:], to the rows from r
    on: see `_row`. `size` is the number of pairs of keys."""

    def generate(context, builder, signature, arguments):
        address = partial(_address, context, builder, signature, arguments)
        _, _, place, size, _, t, rows, r, d, _ = arguments
        x, w, totals = address(0, t, _number(0)), address(1, _number(0), place), address(4, t, _number(0))
        sums = _zeros(builder, vectors.count)
        _add_products(builder, x, w, _number(0), size, sums, pairs=True)
        for v, row in enumerate(sums):
            total = _load(builder, totals, _number(v * LANES), LANES)
            rounded = [_rounded(builder, builder.fdiv(builder.load(each), total)) for each in row]
            for i, two in enumerate(_transposed(builder, rounded)):  # two rows, PANEL features of each
                for side in (0, 1):
                    order = list(range(side * PANEL, (side + 1) * PANEL))
                    part = builder.shuffle_vector(two, two, ir.Constant(_vector(PANEL, WORD), order))
                    place = _row(builder, rows, builder.add(r, _number(v * LANES + 2 * i + side)), SHORT)
                    _store(builder, part, builder.gep(place, [d]))
        return context.get_dummy_value()

    return types.void(p, values, place, size, totals, t, rows, r, d, vectors), generate


def _zeros(builder, vectors: int) -> list:
    sums = [[cgutils.alloca_once(builder, _vector(LANES)) for _ in range(PANEL)] for _ in range(vectors)]
    for each in (each for row in sums for each in row):
        builder.store(ir.Constant(_vector(LANES), [0.0] * LANES), each)
    return sums


@njit(nogil=True, fastmath=OPTIONS["fastmath"])
def attend(q, out, r, D, S, packed_k, packed_v, head, memory, t, factors, capped, vectors):
    """A tile: the rows from r on, of query heads that share the key head `head`."""
    queries, scores, p, largest, totals = memory
    size, count, pairs = D // 2, len(vectors), (S + 1) // 2
    width = size + -size % LANES
    panels, parts = (S + PANEL - 1) // PANEL, (D + PANEL - 1) // PANEL
    for i in range(count):
        pack(q, r + i * LANES, size, queries, t, i * LANES, count * LANES, (0,) * 16)
    largest[t, :], totals[t, :] = -np.inf, 0
    for i in range(panels):
        place, where = (head * panels + i) * PANEL * width, i * PANEL * count * LANES
        score(queries, packed_k, place, size, scores, where, largest, t, factors, capped, vectors)
    for i in range(pairs):
        where = (2 * i // PANEL * count * PANEL + 2 * i % PANEL) * LANES
        both, place = 2 * i + 1 < S, i * count * LANES
        exponentiate(scores, where, largest, totals, t, both, factors, p, place, vectors)
    for i in range(parts):
        place, d = (head * parts + i) * pairs * PANEL, min(i * PANEL, D - PANEL)
        average(p, packed_v, place, pairs, totals, t, out, r, d, vectors)


@compiled
def attention(places, sizes, packed_k, packed_v, memory, factors, counter, threads, capped, two, three):
    """places: of q, k, v and out, the address, and the bytes between batches, heads and rows. sizes: see
    `cpu_attention`."""
    B, K, R, S, D = sizes
    width, pairs = D // 2 + -(D // 2) % LANES, (S + 1) // 2
    panels, parts = (S + PANEL - 1) // PANEL, (D + PANEL - 1) // PANEL
    for i in prange(B * K * panels):
        head, first = i // panels, i % panels * PANEL
        pack(rows_of(places[1], head, K, S), first, D // 2, packed_k, 0, i * PANEL * width, PANEL, (0,) * 8)
        values = rows_of(places[2], head, K, S)
        for j in range(parts):
            for s in range(first, min(first + PANEL, S), 2):
                place = ((head * parts + j) * pairs + s // 2) * PANEL
                pack_values(values, s, min(j * PANEL, D - PANEL), packed_v, place)
    vectors = max((R + LANES - 1) // LANES, 2)
    tiles = (vectors + VECTORS - 1) // VECTORS
    for t in prange(threads):
        i = taken(counter) // TAKEN
        while i < B * K * tiles:
            head, tile = i // tiles, i % tiles
            first, end = tile * vectors // tiles, (tile + 1) * vectors // tiles
            q, out = rows_of(places[0], head, K, R), rows_of(places[3], head, K, R)
            if end - first == 2:
                attend(q, out, first * LANES, D, S, packed_k, packed_v, head, memory, t, factors, capped, two)
            else:
                attend(
                    q, out, first * LANES, D, S, packed_k, packed_v, head, memory, t, factors, capped, three
                )
            i = taken(counter) // TAKEN


def cpu_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """softmax(scale q k^T) v, as ops.attention describes, for what it `takes`: (B, T, H, D), (B, S, K, D)
    twice -> (B, T, H * D). The scale is positive."""
    (B, T, H, D), (_, S, K, _) = q.shape, k.shape
    scale = 1 / math.sqrt(D) if scale is None else scale
    assert takes(q.dtype, D), f"{q.dtype}, heads of {D}"
    assert scale > 0, f"scale {scale}"
    assert k.shape == v.shape == (B, S, K, D), f"{tuple(k.shape)} for {tuple(q.shape)}"
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    shared, R = (K, H // K), T * (H // K)
    rows = q.unflatten(2, shared).transpose(1, 2).flatten(2, 3)  # (B, K, R, D)
    out = torch.empty(B, T, *shared, D, dtype=torch.bfloat16, device="cpu").transpose(1, 2).flatten(2, 3)
    used = (rows, k.transpose(1, 2), v.transpose(1, 2), out)
    places = np.array([[x.data_ptr(), *(2 * stride for stride in x.stride()[:3])] for x in used])
    factors = [0.0, 0.0, scale * math.log2(math.e)]
    if softcap is not None:
        factors = [2 * math.log2(math.e) * scale / softcap, softcap, math.log2(math.e)]
    keys, width = math.ceil(S / PANEL) * PANEL, D // 2 + -(D // 2) % LANES
    with own_threads() as count:
        numbers = (ROWS * width, keys * ROWS, keys // 2 * ROWS, 2 * ROWS, 2 * ROWS)
        kinds = (np.int32, np.float32, np.int32, np.float32, np.float32)
        memory = tuple(np.empty((count, size), kind) for size, kind in zip(numbers, kinds, strict=True))
        packed_k = np.empty((1, B * K * keys * width), np.int32)
        packed_v = np.empty((1, B * K * math.ceil(D / PANEL) * PANEL * math.ceil(S / 2)), np.int32)
        given = (memory, np.array(factors, np.float32), np.zeros(1, np.int64), count)
        tile_types = ((0,) * (1 if softcap is None else 2), (0,) * 2, (0,) * 3)
        run(attention, places, (B, K, R, S, D), packed_k, packed_v, *given, *tile_types)
    return out.unflatten(2, (T, H // K)).transpose(1, 2).flatten(2)
