"""Products of 2 to 16 rows and a weight matrix on a CPU that multiplies pairs of bfloat16 numbers, in Numba:
out[r, n] = sum_k x[r, k] w[n, k].

x (R, K) is bfloat16; w (N, K) is bfloat16, int8 or e4m3, and converted to bfloat16 exactly; out (R, N) and
the sums are float32. Numbers below 2^-126 count as 0.

`cpu_gemv` multiplies vectors of consecutive numbers of a row of x and of a row of w. Here, x is packed so
that a vector has a few numbers of every row of x. It is multiplied by the same numbers of a row of w, which
an instruction repeats in a vector as it reads them. That takes as many multiplications and more loads, but
the CPU waits less for memory: with all data in the cache, both ways take the same time. On Zen 5, 8 rows of
a 16384 x 2048 matrix in bfloat16 take 1.2 times the time of one row while memory is read at 42 GB/s, and
1.3 times at 62 GB/s; 16 rows take 1.3 and 1.6 times. With `cpu_gemv`, 8 rows took 1.3 and 1.9 times, 16
rows 1.9 and 2.9."""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .cpu_gemv import (
    BESIDE,
    TAKEN,
    TileTypes,
    _add_pairs,
    _load,
    _prefetch,
    add_ends,
    compiled,
    run,
    serial,
    taken,
)
from .cpu_vectors import EXACT_IN_BFLOAT16, LANES, MULTIPLIES_BFLOAT16, STORED, _bfloat16, _shuffled, _vector
from .cpu_workers import own_threads

COLUMNS = 2 * LANES  # of w in a step: those of a vector of bfloat16
CONVERTED = 4 * COLUMNS  # columns that are converted at a time; they stay in the cache
# For each number of rows of x: rows of w in a tile, vectors of sums of each
SHAPES = {2: (4, 2), 4: (4, 4), 8: (8, 2), 16: (8, 2)}


def takes(rows: int, x: torch.dtype, weight: torch.dtype) -> bool:
    return MULTIPLIES_BFLOAT16 and 2 <= rows <= 16 and x == torch.bfloat16 and weight in EXACT_IN_BFLOAT16


@intrinsic
def tile(_, x, w, out, n, apart, rows, weights, phases):
    """out[:, n + j * apart], for all j < len(weights), summed over all k of whole steps. Each row of w has
    len(phases) vectors of sums, which take turns, because a sum is ready only 6 cycles after an addition.
    `rows`, `weights` and `phases` are tuples for the reason that `cpu_gemv.tile` gives."""
    R, pairs = rows.count, LANES // rows.count

    def generate(context, builder, signature, arguments):
        def number(value: int):
            return ir.Constant(ir.IntType(64), value)

        def steps(end):
            return cgutils.for_range_slice(builder, number(0), end, number(COLUMNS), inc=True)

        def multiply(k, places) -> None:
            """Add the products of the columns from k on; `places` are pointers to those of each row of w."""
            for part in range(R):
                at = builder.add(builder.mul(k, number(R)), number(part * COLUMNS))
                vector = _load(builder, x_array.data, at, COLUMNS)
                for place, w_sums in zip(places, sums, strict=True):
                    few = _load(builder, place, number(part * 2 * pairs), 2 * pairs)
                    few = builder.bitcast(few, _vector(pairs, ir.IntType(32)))
                    repeated = _shuffled(builder, few, [i % pairs for i in range(LANES)])
                    each = w_sums[part % phases.count]
                    builder.store(_add_pairs(builder, builder.load(each), vector, repeated), each)

        x_array, w_array, out_array = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip((x, w, out), arguments[:3], strict=True)
        )
        n, apart = arguments[3:5]
        K, stride = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (w_array, out_array))
        end = builder.and_(K, number(-COLUMNS))
        rows_w = [builder.add(n, builder.mul(number(j), apart)) for j in range(weights.count)]
        w_rows = [builder.gep(w_array.data, [builder.mul(row, K)]) for row in rows_w]
        sums = [[cgutils.alloca_once(builder, _vector(LANES)) for _ in range(phases.count)] for _ in w_rows]
        for each in (each for row in sums for each in row):
            builder.store(ir.Constant(_vector(LANES), [0.0] * LANES), each)
        if w.dtype == types.uint16:
            with steps(end) as (k, _):
                for row in w_rows:
                    _prefetch(builder, row, k)
                multiply(k, [builder.gep(row, [k]) for row in w_rows])
        else:
            short = ir.IntType(16)
            converted = [cgutils.alloca_once(builder, short, CONVERTED) for _ in w_rows]
            with cgutils.for_range_slice(builder, number(0), end, number(CONVERTED), inc=True) as (first, _):
                rest = builder.sub(end, first)
                count = builder.select(
                    builder.icmp_signed("<", rest, number(CONVERTED)), rest, number(CONVERTED)
                )
                with steps(count) as (k, _):
                    for row, memory in zip(w_rows, converted, strict=True):
                        at = builder.add(first, k)
                        _prefetch(builder, row, at)
                        wide = _bfloat16(builder, _load(builder, row, at, COLUMNS), w.dtype, COLUMNS)
                        place = builder.bitcast(builder.gep(memory, [k]), wide.type.as_pointer())
                        builder.store(wide, place, align=2)
                with steps(count) as (k, _):
                    multiply(builder.add(first, k), [builder.gep(memory, [k]) for memory in converted])
        for w_row, w_sums in zip(rows_w, sums, strict=True):
            total, *others = (builder.load(each) for each in w_sums)
            for other in others:
                total = builder.fadd(total, other)
            while total.type.count > R:  # the sums of the pairs of a row are neighbours
                even, odd = (_shuffled(builder, total, range(i, total.type.count, 2)) for i in (0, 1))
                total = builder.fadd(even, odd)
            for r in range(R):
                place = builder.gep(out_array.data, [builder.add(builder.mul(number(r), stride), w_row)])
                builder.store(builder.extract_element(total, ir.Constant(ir.IntType(32), r)), place)
        return context.get_dummy_value()

    return types.void(x, w, out, n, apart, rows, weights, phases), generate


@compiled
def products(x, w, out, counter, threads, rows, weights, phases):
    counter[0] = 0
    apart = len(w) // len(weights)
    for _ in prange(threads):
        n = taken(counter)
        while n < apart:
            for i in range(n, min(n + TAKEN, apart)):
                tile(x, w, out, i, apart, rows, weights, phases)
            n = taken(counter)
    for n in range(len(weights) * apart, len(w)):
        tile(x, w, out, n, 1, rows, (0,), phases)


@serial
def pack(x, out, numbers):
    """x (R, K) as (K // P, rows * P), where P is the length of `numbers`: each vector has P numbers of each
    row. What is not in x is not written."""
    for r in range(len(x)):
        for part in range(len(out)):
            for i in range(len(numbers)):
                out[part, r * len(numbers) + i] = x[r, part * len(numbers) + i]


def tile_of(rows: int) -> tuple[TileTypes, tuple[int, ...]]:
    """The tile for so many rows of x, and the last argument of `pack`."""
    of_x = next(size for size in SHAPES if size >= rows)
    of_w, phases = SHAPES[of_x]
    return ((0,) * of_x, (0,) * of_w, (0,) * phases), (0,) * (COLUMNS // of_x)


def cpu_few_rows(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T: (R, K), (N, K) -> (R, N) float32, for dtypes and an R that it `takes`. The weight is
    contiguous."""
    (R, K), N = x.shape, len(weight)
    assert weight.shape == (N, K), f"weight {tuple(weight.shape)} for x {tuple(x.shape)}"
    assert weight.is_contiguous()
    assert takes(R, x.dtype, weight.dtype)
    tile, numbers = tile_of(R)
    out = torch.empty(len(tile[0]), N + BESIDE, dtype=torch.float32, device="cpu")
    stored, sums = weight.view(STORED[weight.dtype]).numpy(), out.numpy()
    packed = np.zeros((K // COLUMNS * len(tile[0]), COLUMNS), np.uint16)
    run(pack, x.contiguous().view(torch.uint16).numpy(), packed, numbers)
    with own_threads() as count:
        run(products, packed, stored, sums, np.zeros(1, np.int64), count, *tile)
        if K % COLUMNS:
            run(add_ends, x.float().contiguous().numpy(), stored, sums[:R], K - K % COLUMNS)
    return out[:R, :N]
