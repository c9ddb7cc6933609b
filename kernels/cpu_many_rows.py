"""Products of many rows and a weight matrix on a CPU, in Numba:

    out[r, n] = sum_k x[r, k] w[n, k] * scale[n] + bias[n]

or gelu_tanh of it, or gelu_tanh of it times the product of a second weight. x (R, K) and out (R, N) have one
dtype; w (N, K) is stored in it, in bfloat16, float16, int8 or e4m3, or in 4 bits: see int4.py. The sums are
float32, and the result is rounded once.

If the CPU multiplies pairs of bfloat16 numbers, x is bfloat16, and w is neither float16 nor float32, then the
numbers of w are bfloat16: 8-bit weights are converted exactly; 4-bit weights are multiplied by the scales of
their groups and rounded. Numbers below 2^-126 then count as 0. Otherwise both are converted to float32,
exactly. A unit of 32 bits is a pair or a float32 number; all that follows is the same for both.

A tile is the sums of 48 rows of x and 8 rows of w, in 24 vectors whose lanes are rows of x; with AVX2, of 24
and 4 rows, in 12 vectors. For each unit, an instruction multiplies a vector of x by the unit of one row of
w, which a load repeats in all lanes. Both operands are packed for that: x once, and w a block at a time, by
the thread that needs it. A block is some rows of w and some features, which stay in the core's second cache,
and is used by all rows of x. So a conversion of weights takes a few parts in a hundred of the time, and every
format of weights takes about the same. While a block is multiplied, the next one is fetched from memory."""

import math
from functools import partial

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..cpu_instructions import multiplies
from .cpu_gemv import TAKEN, _add, _add_pairs, _load, compiled, run, taken
from .cpu_int4 import GROUP, WORDS
from .cpu_panels import PANEL, WORD, _address, _number, _store, pack_rows, pack_weights
from .cpu_vectors import (
    EXACT_IN_BFLOAT16,
    LANES,
    MULTIPLIES_AND_ADDS,
    MULTIPLIES_BFLOAT16,
    STORED,
    _function,
    _gelu,
    _has,
    _in_dtype,
    _repeated,
    _transposed,
    _vector,
    converts_halves,
)
from .cpu_workers import own_threads

VECTORS = 3  # most vectors of rows of a tile
PAIRS = 64, 640  # rows of weights, and units of a row, in a block: at most, if the units are pairs
SINGLES = 128, 256  # and if they are float32 numbers
HALVES = (torch.bfloat16, torch.float16)
MULTIPLIES_TILES = _has("amx-bf16")  # by AMX, which is faster than this kernel


def in_pairs(x: torch.dtype, weight: torch.dtype) -> bool:
    """Whether the products are those of pairs in bfloat16."""
    return MULTIPLIES_BFLOAT16 and x == torch.bfloat16 and weight in (*EXACT_IN_BFLOAT16, WORDS)


def takes(x: torch.dtype, weight: torch.dtype, features: int, outputs: int) -> bool:
    """Whether the kernel computes such a product, and torch has no faster instructions or kernel for it."""
    if x not in (*HALVES, torch.float32) or weight not in (*STORED, WORDS) or outputs < PANEL:
        return False
    if in_pairs(x, weight):
        whole = features % (2 if weight == torch.bfloat16 else 2 * LANES) == 0
        return whole and features >= 2 * LANES and not MULTIPLIES_TILES
    by_torch = multiplies(x) if x in HALVES else weight == x
    halves = torch.float16 in (x, weight) or weight == torch.float8_e4m3fn
    whole = features >= LANES and (weight != WORDS or features % GROUP == 0)
    return MULTIPLIES_AND_ADDS and whole and not by_torch and (not halves or converts_halves())


@intrinsic
def tile(_, x, at, w, t, place, size, sums, where, ahead, step, apart, vectors):
    """Add to sums[t, where:] the products of `size` units of packed rows x[at:] and packed weights
    w[t, place:]. For each LANES units, it prefetches the lines of memory at the address `ahead`, which it
    moves by `step` bytes, and `apart` bytes after it. `vectors` is a tuple for the reason that
    `cpu_gemv.tile` gives."""
    pairs = w.dtype == types.int32

    def generate(context, builder, signature, arguments):
        address = partial(_address, context, builder, signature, arguments)
        _, at, _, t, place, size, _, where, ahead, step, apart, _ = arguments
        x, w, target = address(0, _number(0), at), address(2, t, place), address(6, t, where)
        sums = [
            [cgutils.alloca_once(builder, _vector(LANES)) for _ in range(PANEL)] for _ in range(vectors.count)
        ]
        in_order = [each for row in sums for each in row]
        for i, each in enumerate(in_order):
            builder.store(_load(builder, target, _number(i * LANES), LANES), each)
        with cgutils.for_range_slice(builder, _number(0), size, _number(LANES), inc=True) as (first, _):
            line = builder.add(ahead, builder.mul(builder.udiv(first, _number(LANES)), step))
            for bytes_ in (line, builder.add(line, apart)):
                _prefetch(builder, bytes_)
            _add_products(builder, x, w, first, builder.add(first, _number(LANES)), sums, pairs)
        for i, each in enumerate(in_order):
            _store(builder, builder.load(each), builder.gep(target, [_number(i * LANES)]))
        return context.get_dummy_value()

    return types.void(x, at, w, t, place, size, sums, where, ahead, step, apart, vectors), generate


def _add_products(builder, x, w, first, end, sums: list, pairs: bool) -> None:
    """Add to sums[v][j] the products of the units from `first` to `end`: of vector v of rows of x, and row j
    of w."""
    add = _add_pairs if pairs else _add
    with cgutils.for_range_slice(builder, first, end, _number(1), inc=True) as (p, _):
        row = builder.mul(p, _number(len(sums) * LANES))
        vectors = [_load(builder, x, builder.add(row, _number(v * LANES)), LANES) for v in range(len(sums))]
        for j in range(PANEL):
            unit = builder.gep(w, [builder.add(builder.mul(p, _number(PANEL)), _number(j))])
            unit = _repeated(builder, builder.load(unit))
            for vector, of_row in zip(vectors, sums, strict=True):
                builder.store(add(builder, builder.load(of_row[j]), vector, unit), of_row[j])


@intrinsic
def finish(_, sums, t, where, where_up, scale, scale_up, bias, out, r, n, kind):
    """out[r + i, n + j] of LANES rows and PANEL outputs from sums[t, where:]. The length of `kind` says what
    it is: 1, the product; 2, its GELU; 3, its GELU times the product of sums[t, where_up:]."""

    def generate(context, builder, signature, arguments):
        address = partial(_address, context, builder, signature, arguments)
        _, t, where, where_up, _, _, _, _, r, n, _ = arguments
        totals, totals_up = address(0, t, where), address(0, t, where_up)
        factors, factors_up, added = (address(i, _number(0), n) for i in (4, 5, 6))
        rounded = []
        for j in range(PANEL):

            def one(numbers, j=j):
                return _repeated(builder, builder.load(builder.gep(numbers, [_number(j)])))

            place = _number(j * LANES)
            total = builder.fmul(_load(builder, totals, place, LANES), one(factors))
            total = builder.fadd(total, one(added))
            if kind.count > 1:
                total = _gelu(builder, total)
            if kind.count > 2:
                up = builder.fmul(_load(builder, totals_up, place, LANES), one(factors_up))
                total = builder.fmul(total, up)
            rounded.append(_in_dtype(builder, out.dtype, total))
        for i, two in enumerate(_transposed(builder, rounded)):  # two rows, PANEL outputs of each
            for side in (0, 1):
                order = list(range(side * PANEL, (side + 1) * PANEL))
                row = builder.shuffle_vector(two, two, ir.Constant(_vector(PANEL, WORD), order))
                _store(builder, row, address(7, builder.add(r, _number(2 * i + side)), n))
        return context.get_dummy_value()

    return types.void(sums, t, where, where_up, scale, scale_up, bias, out, r, n, kind), generate


def _prefetch(builder, address) -> None:
    """Fetch a line of memory to the second cache. An address outside of the process's memory does no harm."""
    byte, flag = ir.IntType(8).as_pointer(), WORD
    prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), byte, flag, flag, flag)
    builder.call(prefetch, [builder.inttoptr(address, byte), *(ir.Constant(flag, i) for i in (0, 2, 1))])


@compiled
def products(
    x, w, up, groups, groups_up, scale, scale_up, bias, out, packed, weights, sums, counter,
    addresses, steps, block, threads, kind, one, two, three, vector,
):  # fmt: skip
    """steps: the first units of the blocks of features, and the number of all units. block: the outputs of a
    block. kind: see `finish`. addresses: those of w and up, and the bytes of a row. vector: a tuple of LANES
    elements, see `cpu_gemv.tile`. If N is not a multiple of PANEL, the last panel begins before the end of
    another one, and both write the same values."""
    N, width, vectors = out.shape[1], steps[-1], len(out) // LANES
    tiles = (vectors + VECTORS - 1) // VECTORS
    parts = 2 if kind == 3 else 1
    for i in prange(tiles):
        first, end = i * vectors // tiles, (i + 1) * vectors // tiles
        for v in range(first, end):
            place = LANES * (first * width + (v - first))
            pack_rows(x, packed, v * LANES, width, place, end - first)
    for t in prange(threads):
        start = taken(counter) // TAKEN * block
        while start < N:
            panels = (min(block, N - start) + PANEL - 1) // PANEL
            sums[t, :] = 0
            for s in range(len(steps) - 1):
                size = steps[s + 1] - steps[s]
                for part in range(parts):
                    for p in range(panels):
                        n, place = min(start + p * PANEL, N - PANEL), (part * panels + p) * PANEL * size
                        if part == 0:
                            pack_weights(w, groups, n, steps[s], size, weights, t, place)
                        else:
                            pack_weights(up, groups_up, n, steps[s], size, weights, t, place)
                last = s + 2 == len(steps)  # then the next block is probably the one after those of others
                row, column = (start + threads * block, 0) if last else (start, steps[s + 1])
                fetched = 0
                for i in range(tiles):
                    first, end = i * vectors // tiles, (i + 1) * vectors // tiles
                    at = LANES * (first * width + steps[s] * (end - first))
                    for p in range(parts * panels):
                        part = fetched // block
                        ahead = addresses[min(part, parts - 1)] + (row + fetched % block) * addresses[2]
                        ahead += column * addresses[2] // width
                        fetched += 2
                        place, where = p * PANEL * size, (p * vectors + first) * PANEL * LANES
                        step, apart = LANES * addresses[2] // width, addresses[2]
                        if end - first == 1:
                            tile(packed, at, weights, t, place, size, sums, where, ahead, step, apart, one)
                        elif end - first == 2:
                            tile(packed, at, weights, t, place, size, sums, where, ahead, step, apart, two)
                        else:
                            tile(packed, at, weights, t, place, size, sums, where, ahead, step, apart, three)
            for p in range(panels):
                n = min(start + p * PANEL, N - PANEL)
                for v in range(vectors):
                    r, where = v * LANES, (p * vectors + v) * PANEL * LANES
                    where_up = where + panels * vectors * PANEL * LANES
                    if kind == 1:
                        finish(sums, t, where, where, scale, scale_up, bias, out, r, n, one)
                    elif kind == 2:
                        finish(sums, t, where, where, scale, scale_up, bias, out, r, n, two)
                    else:
                        finish(sums, t, where, where_up, scale, scale_up, bias, out, r, n, three)
            start = taken(counter) // TAKEN * block


def cpu_many_rows(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, *,
    gelu: bool = False, up: tuple[Tensor, Tensor | None] | None = None,
) -> Tensor:  # fmt: skip
    """x @ weight^T * scale + bias, or gelu_tanh of it, or geglu with the product of `up`: (R, K), (N, K) ->
    (R, N), for what it `takes`. The scale of 4-bit weights is (N, K // 32). The weights are contiguous."""
    (R, K), N = x.shape, len(weight)
    (other, other_scale) = up or (weight, scale)
    assert takes(x.dtype, weight.dtype, K, N)
    assert weight.shape == (N, K // 8 if weight.dtype == WORDS else K), f"{tuple(weight.shape)} for {x.shape}"
    assert (weight.shape, weight.dtype) == (other.shape, other.dtype)
    assert weight.is_contiguous()
    assert other.is_contiguous()
    pairs = in_pairs(x.dtype, weight.dtype)
    features = 2 if pairs else 1  # of a unit
    rows, width = R + -R % LANES, K // features + -(K // features) % LANES
    most, units = PAIRS if pairs else SINGLES
    parts = math.ceil(width / units)
    size = math.ceil(width / parts / LANES) * LANES
    steps = np.array([*range(0, width, size), width])
    out = torch.empty(rows, N, dtype=x.dtype, device="cpu")
    (groups, factors), (groups_up, factors_up) = _scales(weight, scale), _scales(other, other_scale)
    added = torch.zeros(N, device="cpu") if bias is None else bias.float().contiguous()
    with own_threads() as count:
        both, unit = 1 if up is None else 2, torch.int32 if pairs else torch.float32
        block = max(16, min(most // both, N // (4 * count) // PANEL * PANEL))
        packed = torch.empty(rows * width, dtype=unit, device="cpu")
        weights = torch.empty(count, both * block * size, dtype=unit, device="cpu")
        sums = torch.empty(count, both * block * rows, dtype=torch.float32, device="cpu")
        addresses = np.array([weight.data_ptr(), other.data_ptr(), weight.itemsize * weight.shape[1]])
        stored = _stored(x.contiguous())
        kind, made = 3 if up else 2 if gelu else 1, (_stored(out), packed, weights, sums)
        arrays = (np.asarray(each) for each in (groups, groups_up, factors, factors_up, added, *made))
        counter, tile_types = np.zeros(1, np.int64), ((0,), (0,) * 2, (0,) * 3, (0,) * LANES)
        operands = (stored.view(np.int32) if pairs else stored, _stored(weight), _stored(other), *arrays)
        run(products, *operands, counter, addresses, steps, block, count, kind, *tile_types)
    return out[:R]


def _stored(x: Tensor) -> np.ndarray:
    return (x if x.dtype == WORDS else x.view(STORED[x.dtype])).numpy()


def _scales(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales of groups, uint16 (N, K // 32), and of outputs, float32 (N,)."""
    if weight.dtype == WORDS:
        assert scale is not None
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (len(weight), weight.shape[1] // 4))
        return scale.contiguous().view(torch.uint16), torch.ones(len(weight), device="cpu")
    factors = torch.ones(len(weight), device="cpu") if scale is None else scale.float().contiguous()
    return torch.empty(0, 0, dtype=torch.uint16, device="cpu"), factors
