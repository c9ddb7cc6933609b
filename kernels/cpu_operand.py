"""The rows of x as the products with int8 and 4-bit weights read them: as whole numbers, or in the order of
the codes of 4-bit weights, or both. In Numba.

With AVX2, x in bfloat16 becomes whole numbers of 16 bits with a power of 2 as the scale of 8 features, so
that an instruction multiplies 16 of them by as many weights, which are whole numbers too, and adds
neighbours. Numbers of less than 1/128 of the largest of the 8 are rounded to 2^-15 of it, and all to 2^-126.
The sums of the 8 products are exact until they become float32."""

from typing import NamedTuple

import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic

from .cpu_gemv import TileTypes, _load, compiled
from .cpu_vectors import LANES, MULTIPLIES_AND_ADDS, MULTIPLIES_BFLOAT16, _function, _vector

SCALED = 8  # features that share a scale, if x is whole numbers
FEATURES = SCALED * LANES  # that are put in order at a time
IN_WORD, IN_GROUP = 8, 32  # 4-bit weights of a word, and those that share a scale: see cpu_int4.py
# Features that a tile of 4 rows of whole numbers multiplies at a time: 20 or 24 KB, which stay in the first
# cache for the next tiles. On Zen 3, 8 rows of 4-bit weights took 1.2 to 1.4 times as long with all of them.
CHUNK = 2048
PAIRS = SCALED // 2  # vectors of pairs of whole numbers of FEATURES


class Ordered(NamedTuple):
    """What `products` reads instead of x."""

    sizes: tuple[int, int]
    dtype: torch.dtype
    of_bits: bool  # whether `order` reads the bits of x, and not x in float32
    parts: tuple[int, int]  # weights or words of a row in whole vectors, and how many a tile takes at a time
    tile: TileTypes
    order: TileTypes  # the last arguments of `order`


def whole_numbers(x: torch.dtype) -> bool:
    """Whether x becomes whole numbers."""
    return x == torch.bfloat16 and MULTIPLIES_AND_ADDS and LANES == 8


def ordered(rows: int, features: int, x: torch.dtype, shapes: list[tuple[int, int]], codes: int) -> Ordered:
    """shapes: rows of x and of weights in a tile. codes: weights of a word, 1 for those of 8 bits."""
    of_x, of_w = next((shape for shape in shapes if shape[0] >= rows), shapes[-1])
    whole = whole_numbers(x)
    of_bits = whole or (x == torch.bfloat16 and MULTIPLIES_BFLOAT16)
    dtype = torch.int32 if whole else torch.uint16 if of_bits else torch.float32
    numbers = vectors_of(codes) * LANES if whole else FEATURES
    sizes = (rows + -rows % of_x, features // FEATURES * numbers)
    tile = (0,) * of_x, (0,) * of_w, (0,) * LANES
    end = features // FEATURES * FEATURES
    chunk = CHUNK if whole and of_x == 4 else max(end, 1)
    parts = end // codes, -(-chunk // codes)
    return Ordered(sizes, dtype, of_bits, parts, tile, (tile[0], (0,) * codes, tile[2]))


def vectors_of(codes: int) -> int:
    """The vectors of a row of whole numbers for FEATURES: their pairs and their scales, and, for 4-bit
    weights, between them, -8 times the sums of the numbers that share a scale."""
    return PAIRS + (2 if codes > 1 else 1)


@compiled
def order(x, out, rows, codes, vector):
    """Put x (R, K) in order. The length of `rows` is that of a tile, and that of `codes` is the number of
    weights of a word, 1 for those of 8 bits: see `cpu_gemv.tile`."""
    for r in prange(len(x)):
        put_in_order(x, out, r, rows, codes, vector)


@intrinsic
def put_in_order(_, x, out, r, rows, codes, vector):
    """Put row r of x in order: for each FEATURES of them, the rows of the tile in turn. With 4-bit weights, a
    row has the features of the first nibbles of all words, then those of the second, and so on."""
    halves, whole = 1 + (x.dtype == types.uint16), out.dtype == types.int32
    numbers = vectors_of(codes.count) * LANES if whole else FEATURES
    parts, order = IN_WORD // halves, list(range(FEATURES))
    if codes.count > 1:
        order = [
            IN_GROUP * group + 4 * (half * parts + part) + c
            for part in range(parts) for group in range(LANES // 4)
            for c in range(4) for half in range(halves)
        ]  # fmt: skip

    def generate(context, builder, signature, arguments):
        def number(value: int):
            return ir.Constant(ir.IntType(64), value)

        x_array, out_array = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip((x, out), arguments[:2], strict=True)
        )
        K, width = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (x_array, out_array))
        end = builder.and_(K, number(-FEATURES))
        r, count = arguments[2], number(rows.count)
        row = builder.gep(x_array.data, [builder.mul(r, K)])
        place = builder.urem(r, count)
        first = builder.add(builder.mul(builder.sub(r, place), width), builder.mul(place, number(numbers)))
        target = builder.gep(out_array.data, [first])
        with cgutils.for_range_slice(builder, number(0), end, number(FEATURES), inc=True) as (k, _):
            values = _load(builder, row, k, FEATURES)
            mask = ir.Constant(_vector(FEATURES, ir.IntType(32)), order)
            put = builder.shuffle_vector(values, values, mask)
            vector = builder.mul(builder.udiv(k, number(FEATURES)), number(numbers))
            to = builder.gep(target, [builder.mul(vector, count)])
            made = _whole_numbers(builder, put, codes.count) if whole else [put]
            for i, each in enumerate(made):
                place = builder.bitcast(builder.gep(to, [number(i * LANES)]), each.type.as_pointer())
                builder.store(each, place, align=1)
        return context.get_dummy_value()

    return types.void(x, out, r, rows, codes, vector), generate


def _whole_numbers(builder, ordered, codes: int) -> list:
    """FEATURES of x in bfloat16, in order, as the vectors of `vectors_of`, of 32 bits. A scale is NaN if one
    of its numbers is not finite."""
    bits = builder.bitcast(ordered, _vector(PAIRS * LANES, ir.IntType(32)))
    undefined, word = ir.Constant(bits.type, ir.Undefined), _vector(LANES, ir.IntType(32))
    single = _vector(LANES)

    def constant(value: int) -> ir.Constant:
        return ir.Constant(word, [value] * LANES)

    numbers = []  # the lower numbers of the first pairs, the upper ones, those of the second pairs, ...
    for part in range(PAIRS):
        mask = ir.Constant(word, list(range(part * LANES, (part + 1) * LANES)))
        pair = builder.shuffle_vector(bits, undefined, mask)
        numbers += [builder.shl(pair, constant(16)), builder.and_(pair, constant(0xFFFF0000))]
    largest = constant(0)
    for each in numbers:
        size = builder.and_(each, constant(0x7F800000))
        largest = builder.select(builder.icmp_unsigned(">", size, largest), size, largest)
    finite = builder.icmp_unsigned("<", largest, constant(0x7F800000))
    smallest = constant(15 << 23)
    largest = builder.select(builder.icmp_unsigned(">", largest, smallest), largest, smallest)
    factor = builder.bitcast(builder.sub(constant((2 * 127 + 14) << 23), largest), single)
    nearest = _function(builder, f"llvm.rint.v{LANES}f32", single, single)
    pairs, total = [], constant(0)
    for low, high in zip(numbers[::2], numbers[1::2], strict=True):
        both = []
        for each in (low, high):
            value = builder.fmul(builder.bitcast(each, single), factor)
            value = builder.select(finite, value, ir.Constant(single, [0.0] * LANES))
            both.append(builder.fptosi(builder.call(nearest, [value]), word))
            total = builder.add(total, both[-1])
        low = builder.and_(both[0], constant(0xFFFF))
        pairs.append(builder.or_(low, builder.shl(both[1], constant(16))))
    scale = builder.select(finite, builder.sub(largest, constant(14 << 23)), constant(0x7FC00000))
    sums = [builder.mul(total, constant(-8 & 0xFFFFFFFF))] if codes > 1 else []
    return [*pairs, *sums, scale]


def _add_products(builder, total, pairs, weights):
    """total + the products of whole numbers, as a vector of pairs, and as many weights of 16 bits. A total of
    None is 0."""
    multiply = _function(builder, "llvm.x86.avx2.pmadd.wd", pairs.type, weights.type, weights.type)
    product = builder.call(multiply, [builder.bitcast(pairs, weights.type), weights])
    return product if total is None else builder.add(total, product)


def _scaled(builder, total, scale):
    """A vector of sums of whole numbers times their scale, in float32."""
    single = _vector(LANES)
    return builder.fmul(builder.sitofp(total, single), builder.bitcast(scale, single), flags=["contract"])
