"""Products of a few rows and a matrix of 4-bit weights on a CPU, in Numba:

    out[r, n] = sum_k x[r, k] (q[n, k] - 8) scale[n, k // 32]

out (R, N) is float32. The eight codes q of a word are its nibbles, the lowest first; four words are a group
of 32 features, which has one scale: nibble i of word c of a group is the code of the feature 4 i + c of it.

A vector of words has one group in every four lanes, so every lane of its sums belongs to one group, and one
multiplication by the scales adds them to the total. x is put in the order of the nibbles beforehand. With
AVX-512, an instruction looks up the codes of a nibble of all lanes in a table of numbers. If the CPU
multiplies bfloat16 and x is bfloat16, the numbers are bfloat16, and each instruction takes the nibbles of the
lower and of the upper halves of all words. x and the codes are multiplied exactly. Sums and scales are
float32.

With AVX2, x in bfloat16 becomes whole numbers: see cpu_operand.py. A row takes 25 instructions for 36 bytes
of weights.

The weights are read once, 4.5 bits for each. On two cores of Zen 5, a row of bfloat16 and a 16384 x 2048
matrix take 0.3 of the time of cpu_gemv with bfloat16 weights, 4 rows the time of one, and 8 rows twice the
time. A tile of 8 rows took 1.2 times as long as two tiles of 4: LLVM does not keep it in the registers."""

from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from . import cpu_gemv
from .cpu_gemv import LANES, PREFETCHED, TAKEN, compiled, run, taken, widened
from .cpu_operand import FEATURES, IN_GROUP, IN_WORD, Ordered, _add_products, _scaled, order, vectors_of
from .cpu_operand import ordered as ordered_for
from .cpu_vectors import _function
from .cpu_workers import own_threads

WORDS = torch.int32  # the dtype of the weights
GROUP, CODES = IN_GROUP, IN_WORD  # features that share a scale, and the codes of a word
SHAPES = [(1, 4), (4, 3)] if LANES == 16 else [(1, 4), (2, 2), (4, 1)]  # rows of x and of weights in a tile


@intrinsic
def tile(_, x, words, scale, out, r, n, apart, first, last, rows, weights, vector):
    """out[r + i, n + j * apart], for all i < len(rows) and j < len(weights): the products of the words from
    first to last, which are whole vectors, are added to those of the words before them. x is as
    `cpu_operand.order` puts it."""
    pairs, whole = x.dtype == types.uint16, x.dtype == types.int32
    add = cpu_gemv._add_pairs if pairs else cpu_gemv._add
    parts, of_word = CODES // (1 + pairs), vectors_of(CODES) if whole else CODES

    def generate(context, builder, signature, arguments):
        def number(value: int):
            return ir.Constant(ir.IntType(64), value)

        def row_of(array, row):
            return builder.gep(array.data, [builder.mul(row, cgutils.unpack_tuple(builder, array.shape)[1])])

        def sums_of(i, values, codes) -> list:
            """The sums of the words of each row of weights, for row i of x."""
            if whole:
                places = [number((i * of_word + part) * LANES) for part in range(of_word)]
                *numbers, total, scale = (cpu_gemv._load(builder, values, place, LANES) for place in places)
                found = []
                for each in codes:
                    sums = total
                    for some, part in zip(numbers, each, strict=True):
                        sums = _add_products(builder, sums, some, part)
                    found.append(_scaled(builder, sums, scale))
                return found
            totals, size = [zero] * len(codes), LANES * CODES // parts
            for part in range(parts):
                some = cpu_gemv._load(builder, values, number((i * parts + part) * size), size)
                totals = [
                    add(builder, total, each[part], some) for total, each in zip(totals, codes, strict=True)
                ]
            return totals

        x_array, w_array, s_array, out_array = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip((x, words, scale, out), arguments[:4], strict=True)
        )
        r, n, apart, first, last = arguments[4:9]
        N, K = cgutils.unpack_tuple(builder, w_array.shape)
        ahead = number(PREFETCHED) if rows.count < 4 or not whole else builder.mul(K, number(4))
        rows_x = [builder.add(r, number(i)) for i in range(rows.count)]
        rows_w = [builder.add(n, builder.mul(number(j), apart)) for j in range(weights.count)]
        zero = ir.Constant(cpu_gemv._vector(LANES), [0.0] * LANES)
        sums = [[cgutils.alloca_once(builder, zero.type) for _ in rows_x] for _ in rows_w]
        for each in (each for row in sums for each in row):
            builder.store(zero, each)
        x_rows, w_rows = row_of(x_array, r), [row_of(w_array, row) for row in rows_w]
        s_rows = [row_of(s_array, row) for row in rows_w]
        with cgutils.for_range_slice(builder, first, last, number(LANES), inc=True) as (k, _):
            codes, scales = [], []
            for w_row, s_row in zip(w_rows, s_rows, strict=True):
                vector = cpu_gemv._load(builder, w_row, k, LANES)
                codes.append(_pairs_of_codes(builder, vector) if whole else _codes(builder, vector, pairs))
                cpu_gemv._prefetch(builder, w_row, k, ahead)
                scales.append(_scales(builder, s_row, builder.lshr(k, number(2))))
            values = builder.gep(x_rows, [builder.mul(k, number(of_word * rows.count))])
            for i in range(rows.count):
                totals = sums_of(i, values, codes)
                for total, factor, w_sums in zip(totals, scales, sums, strict=True):
                    builder.store(cpu_gemv._add(builder, builder.load(w_sums[i]), total, factor), w_sums[i])
        for w_row, w_sums in zip(rows_w, sums, strict=True):
            for x_row, each in zip(rows_x, w_sums, strict=True):
                place = builder.gep(out_array.data, [builder.add(builder.mul(x_row, N), w_row)])
                cpu_gemv._add_total(builder, place, builder.load(each), first)
        return context.get_dummy_value()

    return types.void(x, words, scale, out, r, n, apart, first, last, rows, weights, vector), generate


def _codes(builder, words, pairs: bool) -> list:
    """The numbers q - 8 of a vector of words, a vector for each nibble: float32, or bfloat16 pairs."""
    if pairs:
        table = torch.arange(-8, 8).bfloat16().view(torch.uint16).tolist() * 2  # bit 4 of an index is ignored
        table, shifts = ir.Constant(cpu_gemv._vector(2 * LANES, ir.IntType(16)), table), range(0, 16, 4)
        words = builder.bitcast(words, table.type)
        name = "llvm.x86.avx512.permvar.hi.512"
    elif LANES == 16:
        table = ir.Constant(cpu_gemv._vector(LANES), [float(q) for q in range(-8, 8)])
        shifts, name = range(0, 32, 4), "llvm.x86.avx512.permvar.sf.512"
    else:
        flipped = builder.xor(words, ir.Constant(words.type, [0x88888888] * LANES))  # q - 8 in 4 signed bits
        top = ir.Constant(words.type, [28] * LANES)
        lifted = [builder.shl(flipped, ir.Constant(words.type, [28 - i] * LANES)) for i in range(0, 32, 4)]
        return [builder.sitofp(builder.ashr(each, top), cpu_gemv._vector(LANES)) for each in lifted]
    look_up = _function(builder, name, table.type, table.type, words.type)
    shifted = [builder.lshr(words, ir.Constant(words.type, [i] * table.type.count)) for i in shifts]
    return [builder.call(look_up, [table, each]) for each in shifted]


def _pairs_of_codes(builder, words) -> list:
    """The codes q of a vector of words as whole numbers of 16 bits: a vector for each nibble of a half."""
    halves = builder.bitcast(words, cpu_gemv._vector(2 * LANES, ir.IntType(16)))

    def constant(value: int) -> ir.Constant:
        return ir.Constant(halves.type, [value] * halves.type.count)

    return [builder.and_(builder.lshr(halves, constant(i)), constant(15)) for i in range(0, 16, 4)]


def _scales(builder, row, k):
    """The scales of the groups of a vector of words, in the lanes of these words, as float32."""
    groups = cpu_gemv._load(builder, row, k, LANES // 4)
    zero = ir.Constant(groups.type, [0] * groups.type.count)
    order = [each for lane in range(LANES) for each in (LANES // 4, lane // 4)]  # bfloat16: the upper half
    order = ir.Constant(cpu_gemv._vector(2 * LANES, ir.IntType(32)), order)
    return builder.bitcast(builder.shuffle_vector(groups, zero, order), cpu_gemv._vector(LANES))


@compiled
def products(ordered, words, scale, out, counter, ends, threads, whole, chunk, rows, weights, vector):
    """whole: the words of whole vectors. chunk: see `cpu_int8.products`."""
    counter[0] = 0
    apart = len(words) // len(weights)
    for _ in prange(threads):
        part = taken(counter) // TAKEN
        while part < len(ends):
            for n in range(ends[part - 1] if part else 0, ends[part], TAKEN):
                for first in range(0, max(whole, 1), chunk):
                    last = min(first + chunk, whole)
                    for r in range(0, len(out), len(rows)):
                        for i in range(n, min(n + TAKEN, ends[part])):
                            tile(ordered, words, scale, out, r, i, apart, first, last, rows, weights, vector)
            part = taken(counter) // TAKEN
    for n in range(len(weights) * apart, len(words)):
        for r in range(0, len(out), len(rows)):
            tile(ordered, words, scale, out, r, n, 1, 0, whole, rows, (0,), vector)


@compiled
def add_ends(x, words, scale, out, first):
    """Add the products of the features from `first` on, which fill no vector of words. x is float32."""
    for n in prange(len(words)):
        for r in range(len(out)):
            for group in range(first // 32, scale.shape[1]):
                total = types.float32(0)
                for i in range(32):
                    code = (words[n, 4 * group + i % 4] >> (4 * (i // 4))) & 15
                    total += x[r, 32 * group + i] * types.float32(code - 8)
                out[r, n] += total * widened(scale[n, group])


@cache
def ends_of_parts(tiles: int, threads: int) -> np.ndarray:
    """The ends of the parts of the tiles that threads take in turn. Each is half of a fair share of the tiles
    that are left, so the last parts are short, and few parts begin at memory that nobody has prefetched."""
    ends, left = [], tiles
    while left:
        left -= min(left, max(TAKEN, left // (2 * threads)))
        ends.append(tiles - left)
    return np.array(ends, np.int64)


def ordered(rows: int, features: int, x: torch.dtype) -> Ordered:
    return ordered_for(rows, features, x, SHAPES, CODES)


def cpu_int4(x: Tensor, words: Tensor, scale: Tensor) -> Tensor:
    """(R, K), int32 (N, K // 8), bfloat16 (N, K // 32) -> (R, N) float32. words and scale are contiguous."""
    (R, K), N = x.shape, len(words)
    assert K % GROUP == 0, f"{K} features are not whole groups of {GROUP}"
    assert words.shape == (N, K // CODES), f"words {tuple(words.shape)} for x {tuple(x.shape)}"
    assert scale.shape == (N, K // GROUP), f"scale {tuple(scale.shape)} for x {tuple(x.shape)}"
    assert (words.dtype, scale.dtype) == (torch.int32, torch.bfloat16)
    assert words.is_contiguous()
    assert scale.is_contiguous()
    made = ordered(R, K, x.dtype)
    values = (x.contiguous().view(torch.uint16) if made.of_bits else x.float().contiguous()).numpy()
    # NumPy's memory is not aligned to vectors: 8 rows took 1.5 times as long with it.
    operand = torch.empty(made.sizes, dtype=made.dtype, device="cpu").numpy()
    out = torch.empty(len(operand), N, dtype=torch.float32, device="cpu")
    stored, factors, sums = words.numpy(), scale.view(torch.uint16).numpy(), out.numpy()
    with own_threads() as count:
        counter, ends = np.zeros(1, np.int64), ends_of_parts(N // len(made.tile[1]), count)
        run(order, values, operand, *made.order)
        run(products, operand, stored, factors, sums, counter, ends, count, *made.parts, *made.tile)
        if K % FEATURES:
            run(add_ends, x.float().contiguous().numpy(), stored, factors, sums[:R], K - K % FEATURES)
    return out[:R]
