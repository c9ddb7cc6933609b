"""Products of a few rows in bfloat16 and a matrix of int8 weights on a CPU with AVX2 and without AVX-512, in
Numba: out[r, n] = sum_k x[r, k] w[n, k].

x becomes whole numbers of 16 bits: see cpu_operand.py. 64 weights of a row take 15 instructions, and in
float32, as cpu_gemv.py multiplies them, 34."""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .cpu_gemv import (
    BESIDE,
    PREFETCHED,
    TAKEN,
    _add_total,
    _load,
    _prefetch,
    add_ends,
    compiled,
    run,
    taken,
)
from .cpu_operand import FEATURES, PAIRS, Ordered, _add_products, _scaled, order, vectors_of, whole_numbers
from .cpu_operand import ordered as ordered_for
from .cpu_vectors import LANES, _vector
from .cpu_workers import own_threads

SHAPES = [(1, 4), (2, 2), (4, 1)]  # rows of x and of weights in a tile


def takes(x: torch.dtype, weight: torch.dtype) -> bool:
    return whole_numbers(x) and weight == torch.int8


@intrinsic
def tile(_, x, w, out, r, n, apart, first, last, rows, weights, vector):
    """out[r + i, n + j * apart], for all i < len(rows) and j < len(weights), as in `cpu_gemv.tile`. x is as
    `cpu_operand.order` puts it."""
    numbers = vectors_of(1) * LANES  # of x, for FEATURES

    def generate(context, builder, signature, arguments):
        def number(value: int):
            return ir.Constant(ir.IntType(64), value)

        def row_of(array, row):
            return builder.gep(array.data, [builder.mul(row, cgutils.unpack_tuple(builder, array.shape)[1])])

        x_array, w_array, out_array = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip((x, w, out), arguments[:3], strict=True)
        )
        r, n, apart, first, last = arguments[3:8]
        rows_w = [builder.add(n, builder.mul(number(j), apart)) for j in range(weights.count)]
        x_rows, w_rows = row_of(x_array, r), [row_of(w_array, row) for row in rows_w]
        K = cgutils.unpack_tuple(builder, w_array.shape)[1]
        ahead = number(PREFETCHED) if rows.count < 4 else K
        zero, short = ir.Constant(_vector(LANES), [0.0] * LANES), _vector(2 * LANES, ir.IntType(16))
        sums = [[cgutils.alloca_once(builder, zero.type) for _ in range(rows.count)] for _ in w_rows]
        for each in (each for row in sums for each in row):
            builder.store(zero, each)
        with cgutils.for_range_slice(builder, first, last, number(FEATURES), inc=True) as (k, _):
            vectors = builder.mul(builder.udiv(k, number(FEATURES)), number(numbers * rows.count))
            values = builder.gep(x_rows, [vectors])
            totals: list = [[None] * rows.count for _ in w_rows]
            for row in w_rows:
                _prefetch(builder, row, k, ahead)
            for part in range(PAIRS):  # few vectors at a time, as the sums fill the registers
                place = builder.add(k, number(part * 2 * LANES))
                weight = [builder.sext(_load(builder, row, place, 2 * LANES), short) for row in w_rows]
                for i in range(rows.count):
                    pairs = _load(builder, values, number(i * numbers + part * LANES), LANES)
                    for w_totals, each in zip(totals, weight, strict=True):
                        w_totals[i] = _add_products(builder, w_totals[i], pairs, each)
            for i in range(rows.count):
                scale = _load(builder, values, number(i * numbers + PAIRS * LANES), LANES)
                for w_totals, w_sums in zip(totals, sums, strict=True):
                    total = _scaled(builder, w_totals[i], scale)
                    builder.store(builder.fadd(builder.load(w_sums[i]), total, flags=["contract"]), w_sums[i])
        for w_row, w_sums in zip(rows_w, sums, strict=True):
            for i, each in enumerate(w_sums):
                place = builder.gep(row_of(out_array, builder.add(r, number(i))), [w_row])
                _add_total(builder, place, builder.load(each), first)
        return context.get_dummy_value()

    return types.void(x, w, out, r, n, apart, first, last, rows, weights, vector), generate


@compiled
def products(ordered, w, out, counter, threads, whole, chunk, rows, weights, vector):
    """whole: the features of whole vectors. chunk: how many of them are multiplied at a time, so that the
    rows of x of a tile stay in the first cache, while a few rows of w come from the second one."""
    counter[0] = 0
    apart = len(w) // len(weights)
    for _ in prange(threads):
        n = taken(counter)
        while n < apart:
            for first in range(0, max(whole, 1), chunk):
                last = min(first + chunk, whole)
                for r in range(0, len(out), len(rows)):
                    for i in range(n, min(n + TAKEN, apart)):
                        tile(ordered, w, out, r, i, apart, first, last, rows, weights, vector)
            n = taken(counter)
    for n in range(len(weights) * apart, len(w)):
        for r in range(0, len(out), len(rows)):
            tile(ordered, w, out, r, n, 1, 0, whole, rows, (0,), vector)


def ordered(rows: int, features: int, x: torch.dtype) -> Ordered:
    return ordered_for(rows, features, x, SHAPES, codes=1)


def cpu_int8(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T: (R, K), (N, K) -> (R, N) float32, for dtypes that it `takes`. The weight is
    contiguous."""
    (R, K), N = x.shape, len(weight)
    assert weight.shape == (N, K), f"weight {tuple(weight.shape)} for x {tuple(x.shape)}"
    assert weight.is_contiguous()
    assert takes(x.dtype, weight.dtype)
    made = ordered(R, K, x.dtype)
    operand = torch.empty(made.sizes, dtype=made.dtype, device="cpu").numpy()
    out = torch.empty(len(operand), N + BESIDE, dtype=torch.float32, device="cpu")
    stored, sums = weight.numpy(), out.numpy()
    with own_threads() as count:
        run(order, x.contiguous().view(torch.uint16).numpy(), operand, *made.order)
        counter = np.zeros(1, np.int64)
        run(products, operand, stored, sums, counter, count, *made.parts, *made.tile)
        if K % FEATURES:
            run(add_ends, x.float().contiguous().numpy(), stored, sums[:R], K - K % FEATURES)
    return out[:R, :N]
