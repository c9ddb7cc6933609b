"""Products of many rows and a weight matrix on a CPU that multiplies pairs of bfloat16 numbers, in Numba:

    out[r, n] = sum_k x[r, k] w[n, k] * scale[n] + bias[n]

or gelu_tanh of it, or gelu_tanh of it times the product of a second weight. x (R, K) and out (R, N) are
bfloat16; w (N, K) is bfloat16, int8 or e4m3, or 4-bit: see int4.py. 8-bit weights are converted to bfloat16
exactly; 4-bit weights are multiplied by the scales of their groups and rounded to bfloat16. The sums are
float32, and the result is rounded once. Numbers below 2^-126 count as 0.

A tile is the sums of 48 rows of x and 8 rows of w, in 24 vectors whose lanes are rows of x. For each pair of
features, an instruction multiplies a vector of x by the pair of one row of w, which a load repeats in all
lanes. Both operands are packed for that: x once, and w a block at a time, by the thread that needs it. A
block is 32 rows of w and up to 1280 features, which stay in the core's second cache, and is used by all rows
of x. So a conversion of weights takes one part in a hundred of the time, and every format of weights takes
the time of bfloat16. While a block is multiplied, the next one is fetched from memory."""

import math
from functools import partial

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .cpu_gemv import ONE_AT_A_TIME, TAKEN, _add_pairs, _load, compiled, run, taken
from .cpu_panels import PANEL, WORD, _address, _number, _store, pack_rows, pack_weights
from .cpu_vectors import (
    LANES,
    MULTIPLIES_BFLOAT16,
    STORED,
    _function,
    _gelu,
    _has,
    _repeated,
    _rounded,
    _transposed,
    _vector,
)

OUTPUTS = 32  # outputs of a block
VECTORS = 3  # most vectors of rows of a tile
PAIRS = 640  # most pairs of features of a block
WORDS = torch.int32  # the dtype of 4-bit weights
FORMATS = (torch.bfloat16, torch.int8, torch.float8_e4m3fn, WORDS)
MULTIPLIES_TILES = _has("amx-bf16")  # by AMX, which is faster than this kernel


def takes(x: torch.dtype, weight: torch.dtype, features: int, outputs: int) -> bool:
    """Whether the kernel computes such a product, and no instructions of the CPU are faster."""
    whole = features % (2 if weight == torch.bfloat16 else 2 * LANES) == 0
    return (
        MULTIPLIES_BFLOAT16 and not MULTIPLIES_TILES and x == torch.bfloat16 and weight in FORMATS
        and whole and features >= 2 * LANES and outputs >= PANEL
    )  # fmt: skip


@intrinsic
def tile(_, x, at, w, t, place, size, sums, where, ahead, apart, vectors):
    """Add to sums[t, where:] the products of `size` pairs of features of packed rows x[at:] and packed
    weights w[t, place:]. For each LANES pairs, it prefetches a line of memory from the address `ahead` on,
    and another `apart` bytes after it. `vectors` is a tuple for the reason that `cpu_gemv.tile` gives."""

    def generate(context, builder, signature, arguments):
        address = partial(_address, context, builder, signature, arguments)
        _, at, _, t, place, size, _, where, ahead, apart, _ = arguments
        x, w, target = address(0, _number(0), at), address(2, t, place), address(6, t, where)
        sums = [
            [cgutils.alloca_once(builder, _vector(LANES)) for _ in range(PANEL)] for _ in range(vectors.count)
        ]
        in_order = [each for row in sums for each in row]
        for i, each in enumerate(in_order):
            builder.store(_load(builder, target, _number(i * LANES), LANES), each)
        with cgutils.for_range_slice(builder, _number(0), size, _number(LANES), inc=True) as (first, _):
            line = builder.add(ahead, builder.shl(first, _number(2)))
            for bytes_ in (line, builder.add(line, apart)):
                _prefetch(builder, bytes_)
            _add_products(builder, x, w, first, builder.add(first, _number(LANES)), sums)
        for i, each in enumerate(in_order):
            _store(builder, builder.load(each), builder.gep(target, [_number(i * LANES)]))
        return context.get_dummy_value()

    return types.void(x, at, w, t, place, size, sums, where, ahead, apart, vectors), generate


def _add_products(builder, x, w, first, end, sums: list) -> None:
    """Add to sums[v][j] the products of the pairs of features from `first` to `end`: of vector v of rows of
    x, and row j of w."""
    with cgutils.for_range_slice(builder, first, end, _number(1), inc=True) as (p, _):
        row = builder.mul(p, _number(len(sums) * LANES))
        vectors = [_load(builder, x, builder.add(row, _number(v * LANES)), LANES) for v in range(len(sums))]
        for j in range(PANEL):
            pair = builder.gep(w, [builder.add(builder.mul(p, _number(PANEL)), _number(j))])
            pair = _repeated(builder, builder.load(pair))
            for vector, of_row in zip(vectors, sums, strict=True):
                builder.store(_add_pairs(builder, builder.load(of_row[j]), vector, pair), of_row[j])


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
            rounded.append(_rounded(builder, total))
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
    addresses, steps, threads, kind, one, two, three,
):  # fmt: skip
    """steps: the first pairs of the blocks of features, and the number of all pairs. kind: see `finish`.
    addresses: those of w and up, and the bytes of a row. If N is not a multiple of PANEL, the last panel
    begins before the end of another one, and both write the same values."""
    N, width, vectors = out.shape[1], steps[-1], len(out) // LANES
    tiles = (vectors + VECTORS - 1) // VECTORS
    parts = 2 if kind == 3 else 1
    for i in prange(tiles):
        first, end = i * vectors // tiles, (i + 1) * vectors // tiles
        for v in range(first, end):
            place = LANES * (first * width + (v - first))
            pack_rows(x, packed, v * LANES, width, place, end - first)
    for t in prange(threads):
        block = taken(counter) // TAKEN
        while block * OUTPUTS < N:
            start = block * OUTPUTS
            panels = (min(OUTPUTS, N - start) + PANEL - 1) // PANEL
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
                row, column = (start + threads * OUTPUTS, 0) if last else (start, steps[s + 1])
                fetched = 0
                for i in range(tiles):
                    first, end = i * vectors // tiles, (i + 1) * vectors // tiles
                    at = LANES * (first * width + steps[s] * (end - first))
                    for p in range(parts * panels):
                        part = fetched // OUTPUTS
                        ahead = addresses[min(part, parts - 1)] + (row + fetched % OUTPUTS) * addresses[2]
                        ahead += column * addresses[2] // width
                        fetched += 2
                        place, where = p * PANEL * size, (p * vectors + first) * PANEL * LANES
                        if end - first == 1:
                            tile(packed, at, weights, t, place, size, sums, where, ahead, addresses[2], one)
                        elif end - first == 2:
                            tile(packed, at, weights, t, place, size, sums, where, ahead, addresses[2], two)
                        else:
                            tile(packed, at, weights, t, place, size, sums, where, ahead, addresses[2], three)
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
            block = taken(counter) // TAKEN


def cpu_many_rows(
    x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, threads: int, *,
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
    rows, width = R + -R % LANES, K // 2 + -(K // 2) % LANES
    parts = math.ceil(width / PAIRS)
    size = math.ceil(width / parts / LANES) * LANES
    steps = np.array([*range(0, width, size), width])
    out = torch.empty(rows, N, dtype=torch.bfloat16, device="cpu")
    (groups, factors), (groups_up, factors_up) = _scales(weight, scale), _scales(other, other_scale)
    added = torch.zeros(N, device="cpu") if bias is None else bias.float().contiguous()
    with ONE_AT_A_TIME:
        count = min(threads, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(count)
        blocks = (1 if up is None else 2) * OUTPUTS
        packed = torch.empty(rows * width, dtype=torch.int32, device="cpu")
        weights = torch.empty(count, blocks * size, dtype=torch.int32, device="cpu")
        sums = torch.empty(count, blocks * rows, dtype=torch.float32, device="cpu")
        addresses = np.array([weight.data_ptr(), other.data_ptr(), weight.itemsize * weight.shape[1]])
        pairs, kind = x.contiguous().view(torch.uint16).numpy().view(np.int32), 3 if up else 2 if gelu else 1
        made = (out.view(torch.uint16), packed, weights, sums)
        arrays = (each.numpy() for each in (groups, groups_up, factors, factors_up, added, *made))
        counter, tile_types = np.zeros(1, np.int64), ((0,), (0,) * 2, (0,) * 3)
        operands = (pairs, _stored(weight), _stored(other), *arrays)
        run(products, *operands, counter, addresses, steps, count, kind, *tile_types)
    return out[:R]


def _stored(weight: Tensor) -> np.ndarray:
    return (weight if weight.dtype == WORDS else weight.view(STORED[weight.dtype])).numpy()


def _scales(weight: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """The scales of groups, uint16 (N, K // 32), and of outputs, float32 (N,)."""
    if weight.dtype == WORDS:
        assert scale is not None
        assert (scale.dtype, scale.shape) == (torch.bfloat16, (len(weight), weight.shape[1] // 4))
        return scale.contiguous().view(torch.uint16), torch.ones(len(weight), device="cpu")
    factors = torch.ones(len(weight), device="cpu") if scale is None else scale.float().contiguous()
    return torch.empty(0, 0, dtype=torch.uint16, device="cpu"), factors
