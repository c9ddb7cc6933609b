"""Products of 2 to 16 rows of bfloat16 and a weight matrix on a CPU that multiplies pairs of bfloat16."""

import os

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .cpu_gemv import (
    LANES, MULTIPLIES_BFLOAT16, ONE_AT_A_TIME, STORED, TAKEN, _add_pairs, _float32, _function, _load, _vector,
    add_ends, compiled, run, taken,
)  # fmt: skip

COLUMNS = 2 * LANES
PREFETCHED = int(os.environ.get("PREF", 2048))
BLOCK = int(os.environ.get("BLOCK", 128))
SHAPES = eval(os.environ.get("SH", "0")) or {2: (4, 2), 4: (4, 4), 8: (4, 4), 16: (4, 4)}


@intrinsic
def tile(_, x, w, out, n, apart, rows, weights, phases):
    R, pairs = rows.count, LANES // rows.count
    direct = w.dtype == types.uint16
    size = w.dtype.bitwidth // 8

    def generate(context, builder, signature, arguments):
        def number(value: int):
            return ir.Constant(ir.IntType(64), value)

        x_array, w_array, out_array = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip((x, w, out), arguments[:3], strict=True)
        )
        n, apart = arguments[3:5]
        N, K = cgutils.unpack_tuple(builder, w_array.shape)
        end = builder.and_(K, number(-COLUMNS))
        x_data = x_array.data
        rows_w = [builder.add(n, builder.mul(number(j), apart)) for j in range(weights.count)]
        w_rows = [builder.gep(w_array.data, [builder.mul(row, K)]) for row in rows_w]
        sums = [[cgutils.alloca_once(builder, _vector(LANES)) for _ in range(phases.count)] for _ in w_rows]
        for each in (each for row in sums for each in row):
            builder.store(ir.Constant(_vector(LANES), [0.0] * LANES), each)
        short = ir.IntType(16)
        i32 = ir.IntType(32)

        def multiply(k, places):  # pointers to i16 of COLUMNS numbers of each row
            for c in range(R):
                vector = _load(builder, x_data, builder.add(builder.mul(k, number(R)), number(c * COLUMNS)), COLUMNS)
                for place, w_sums in zip(places, sums, strict=True):
                    part = builder.bitcast(builder.gep(place, [number(c * 2 * pairs)]), _vector(pairs, i32).as_pointer())
                    part = builder.load(part, align=2)
                    mask = ir.Constant(_vector(LANES, i32), [i % pairs for i in range(LANES)])
                    spread = builder.shuffle_vector(part, ir.Constant(part.type, ir.Undefined), mask)
                    place_ = w_sums[c % phases.count]
                    builder.store(_add_pairs(builder, builder.load(place_), vector, spread), place_)

        if direct:
            with cgutils.for_range_slice(builder, number(0), end, number(COLUMNS), inc=True) as (k, _):
                for row in w_rows:
                    prefetch(builder, row, k)
                multiply(k, [builder.gep(row, [k]) for row in w_rows])
        else:
            memory = [cgutils.alloca_once(builder, ir.ArrayType(short, BLOCK)) for _ in w_rows]
            memory = [builder.bitcast(m, short.as_pointer()) for m in memory]
            with cgutils.for_range_slice(builder, number(0), end, number(BLOCK), inc=True) as (first, _):
                left = builder.sub(end, first)
                count = builder.select(builder.icmp_signed("<", left, number(BLOCK)), left, number(BLOCK))
                with cgutils.for_range_slice(builder, number(0), count, number(COLUMNS), inc=True) as (k, _):
                    for row, m in zip(w_rows, memory, strict=True):
                        at = builder.add(first, k)
                        prefetch(builder, row, at)
                        wide = _float32(builder, _load(builder, row, at, COLUMNS), w.dtype, COLUMNS)
                        halves = builder.bitcast(wide, _vector(2 * COLUMNS, short))
                        mask = ir.Constant(_vector(COLUMNS, i32), list(range(1, 2 * COLUMNS, 2)))
                        upper = builder.shuffle_vector(halves, ir.Constant(halves.type, ir.Undefined), mask)
                        builder.store(upper, builder.bitcast(builder.gep(m, [k]), upper.type.as_pointer()), align=2)
                with cgutils.for_range_slice(builder, number(0), count, number(COLUMNS), inc=True) as (k, _):
                    places = [builder.gep(m, [k]) for m in memory]
                    base = builder.add(first, k)
                    multiply(base, places)
        for w_row, w_sums in zip(rows_w, sums, strict=True):
            total = builder.load(w_sums[0])
            for each in w_sums[1:]:
                total = builder.fadd(total, builder.load(each))
            lanes = LANES
            step = pairs
            while step > 1:  # lanes i and i + 1
                even = ir.Constant(_vector(lanes // 2, i32), list(range(0, lanes, 2)))
                odd = ir.Constant(_vector(lanes // 2, i32), list(range(1, lanes, 2)))
                undefined = ir.Constant(total.type, ir.Undefined)
                total = builder.fadd(
                    builder.shuffle_vector(total, undefined, even), builder.shuffle_vector(total, undefined, odd)
                )
                lanes, step = lanes // 2, step // 2
            for r in range(R):
                place = builder.gep(out_array.data, [builder.add(builder.mul(number(r), builder.add(N, number(16))), w_row)])
                builder.store(builder.extract_element(total, ir.Constant(i32, r)), place)
        return context.get_dummy_value()

    def prefetch(builder, row, k):
        byte, flag, ahead = ir.IntType(8).as_pointer(), ir.IntType(32), ir.Constant(ir.IntType(64), PREFETCHED)
        place = builder.gep(builder.bitcast(builder.gep(row, [k]), byte), [ahead])
        function = _function(builder, "llvm.prefetch.p0", ir.VoidType(), byte, flag, flag, flag)
        builder.call(function, [place, *(ir.Constant(flag, value) for value in (0, 3, 1))])

    return types.void(x, w, out, n, apart, rows, weights, phases), generate


@compiled
def products(x, w, out, counter, threads, rows, weights, phases):
    apart = len(w) // len(weights)
    for _ in prange(threads):
        n = taken(counter)
        while n < apart:
            for i in range(n, min(n + TAKEN, apart)):
                tile(x, w, out, i, apart, rows, weights, phases)
            n = taken(counter)
    for n in range(len(weights) * apart, len(w)):
        tile(x, w, out, n, 1, rows, (0,), phases)


def packed(x: Tensor, rows: int) -> np.ndarray:
    R, K = x.shape
    part = np.dtype({4: np.uint32, 8: np.uint64, 16: np.complex128, 32: "V32"}[64 // rows])
    values = x.contiguous().view(torch.uint16).numpy()[:, : K - K % COLUMNS]
    out = np.zeros((values.shape[1] * 2 // part.itemsize, rows), part)
    out[:, :R] = values.view(part).T
    return out.view(np.uint16)


def cpu_gemv(x: Tensor, weight: Tensor, threads: int) -> Tensor:
    (R, K), N = x.shape, len(weight)
    if R == 1:
        from .cpu_gemv import cpu_gemv as g
        return g(x, weight, threads)
    rows = next(rows for rows in SHAPES if rows >= R)
    of_w, phases = SHAPES[rows]
    out = torch.empty(rows, N + 16, dtype=torch.float32, device="cpu")
    stored, sums = weight.view(STORED[weight.dtype]).numpy(), out.numpy()
    with ONE_AT_A_TIME:
        count = min(threads, numba.config.NUMBA_NUM_THREADS)
        numba.set_num_threads(count)
        operand = packed(x, rows)
        counter = np.zeros(1, np.int64)
        run(products, operand, stored, sums, counter, count, (0,) * rows, (0,) * of_w, (0,) * phases)
        if K % COLUMNS:
            run(add_ends, x.float().contiguous().numpy(), stored, sums[:R, :N], K - K % COLUMNS)
    return out[:R, :N]
