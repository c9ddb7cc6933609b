"""Makes 4-bit weights on a CPU, in Numba, by the search that `int4.least_squares` describes. The result is
the same to the bit: its sums are exact in any order, and every other operation is rounded as there.

torch takes some 80 operations for a block of numbers, each of which reads and writes the cache. Here, a group
stays in registers: two vectors of 16 numbers, and then vectors of the sums of all factors. 2 billion numbers
take 2 s on two cores of Ice Lake, and with torch 42 s."""

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..int4 import FACTORS, GROUP, WORDS
from .cpu_gemv import _load, compiled, run
from .cpu_panels import WORD, _array, _number, _store
from .cpu_vectors import (
    MULTIPLIES_AND_ADDS,
    STORED,
    _float32,
    _function,
    _rounded,
    _shuffled,
    _vector,
    converts_halves,
)
from .cpu_workers import own_threads

WIDE = 16  # numbers of a vector; without AVX-512, LLVM takes two registers for it
FLOATS, INTEGERS, SINGLE = _vector(WIDE), _vector(WIDE, WORD), ir.FloatType()
SIGN, INFINITE, TINY = 0x80000000, 0x7F800000, 0x0D800000  # bits: of infinity, and of 2^-100


def takes(weight: Tensor) -> bool:
    known = weight.dtype in (torch.bfloat16, torch.float32) or (
        weight.dtype == torch.float16 and converts_halves()
    )
    return MULTIPLIES_AND_ADDS and known and weight.device.type == "cpu" and weight.is_contiguous()


@intrinsic
def quantize_group(_, w, n, g, words, scales):
    """The words and the scale of group g of row n."""

    def generate(context, builder, signature, arguments):
        _, n, g, _, _ = arguments

        def address(argument: int, place):
            array = _array(context, builder, signature.args[argument], arguments[argument])
            columns = cgutils.unpack_tuple(builder, array.shape)[1]
            return builder.gep(array.data, [builder.add(builder.mul(n, columns), place)])

        row = address(0, builder.mul(g, _number(GROUP)))
        parts = [_load(builder, row, _number(first), WIDE) for first in range(0, GROUP, WIDE)]
        scale, codes = _searched(builder, [_float32(builder, part, w.dtype, WIDE) for part in parts])
        builder.store(scale, address(4, g))
        joined = None
        for i, part in enumerate(codes):
            shifts = ir.Constant(INTEGERS, [4 * ((i * WIDE + lane) // WORDS) for lane in range(WIDE)])
            fields = builder.shl(part, shifts)
            joined = fields if joined is None else builder.or_(joined, fields)
        while joined.type.count > WORDS:
            half = joined.type.count // 2
            joined = builder.or_(*(_shuffled(builder, joined, range(i, i + half)) for i in (0, half)))
        _store(builder, joined, address(3, builder.mul(g, _number(WORDS))))
        return context.get_dummy_value()

    return types.void(w, n, g, words, scales), generate


def _searched(builder, values: list):
    """The bits of the scale of a group in bfloat16, and vectors of its codes."""

    def repeated(value):
        one = builder.insert_element(ir.Constant(_vector(WIDE, value.type), ir.Undefined), value, _index(0))
        return _shuffled(builder, one, [0] * WIDE)

    def reduced(name: str, vector):
        element = vector.type.element
        kind = f"v{WIDE}{'i1' if element.width == 1 else 'i32'}"
        return builder.call(
            _function(builder, f"llvm.vector.reduce.{name}.{kind}", element, vector.type), [vector]
        )

    def word(value: int):
        return ir.Constant(WORD, value)

    bits = [builder.bitcast(value, INTEGERS) for value in values]
    magnitudes = [builder.and_(each, ir.Constant(INTEGERS, [SIGN - 1] * WIDE)) for each in bits]
    larger = builder.icmp_unsigned(">", *magnitudes)
    largest = reduced("umax", builder.select(larger, *magnitudes))
    lowest = repeated(builder.or_(largest, word(SIGN)))
    negative = reduced("or", builder.or_(*(builder.icmp_unsigned("==", each, lowest) for each in bits)))
    extreme = builder.select(negative, builder.or_(largest, word(SIGN)), largest)
    infinite = builder.icmp_unsigned(">=", largest, word(INFINITE))
    zero = builder.icmp_unsigned("<", largest, word(TINY))
    without = builder.or_(infinite, zero)  # a scale; the search then takes 1, and its result is not used
    extreme = builder.bitcast(builder.select(without, word(0x3F800000), extreme), SINGLE)
    x = [builder.fdiv(value, repeated(extreme)) for value in values]
    fine, coarse = _constant(2.0**15), _constant(2.0**-15)
    rough = [builder.fmul(_nearest(builder, builder.fmul(each, fine)), coarse) for each in x]
    products, squares = [], []
    for factor in FACTORS:
        codes = [_code(builder, each, _constant(float(np.float32(factor)))) for each in rough]
        products.append(builder.fadd(*(builder.fmul(c, r) for c, r in zip(codes, rough, strict=True))))
        squares.append(builder.fadd(*(builder.fmul(c, c) for c in codes)))
    rest = WIDE - len(FACTORS)
    product = _sums(builder, products + [_constant(0.0)] * rest)
    square = _sums(builder, squares + [_constant(1.0)] * rest)
    left = builder.fdiv(builder.fmul(product, product), square)
    most = reduced("umax", builder.bitcast(left, INTEGERS))  # of numbers that are not negative
    same = builder.icmp_unsigned("==", builder.bitcast(left, INTEGERS), repeated(most))
    flags = builder.bitcast(same, ir.IntType(WIDE))
    first = builder.cttz(flags, ir.Constant(ir.IntType(1), 0))
    scale = builder.extract_element(builder.fdiv(product, square), builder.zext(first, WORD))
    rounded = _rounded(builder, builder.fmul(scale, extreme))
    inverse = builder.fdiv(extreme, _float32(builder, rounded, types.uint16))
    codes, eight = [], ir.Constant(INTEGERS, [8] * WIDE)
    for each in x:
        code = builder.fptosi(_code(builder, each, repeated(inverse)), INTEGERS)
        code = builder.select(without, ir.Constant(INTEGERS, [0] * WIDE), code)
        codes.append(builder.add(code, eight))
    missing = builder.select(infinite, ir.Constant(rounded.type, 0x7FC0), ir.Constant(rounded.type, 0))
    return builder.select(without, missing, rounded), codes


def _constant(value: float):
    return ir.Constant(FLOATS, [value] * WIDE)


def _index(value: int):
    return ir.Constant(WORD, value)


def _nearest(builder, vector):
    return builder.call(_function(builder, f"llvm.rint.v{WIDE}f32", FLOATS, FLOATS), [vector])


def _code(builder, x, factor):
    """The nearest whole number to x * factor from -8 to 7."""
    code = _nearest(builder, builder.fmul(x, factor))
    for limit, beyond in ((-8.0, "<"), (7.0, ">")):
        code = builder.select(builder.fcmp_ordered(beyond, code, _constant(limit)), _constant(limit), code)
    return code


def _sums(builder, vectors: list):
    """The sums of the numbers of each vector."""
    while len(vectors) > 1:
        both = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [_pairs(builder, *two) for two in both]
    return vectors[0]


def _pairs(builder, first, second):
    even, odd = ([*range(i, 2 * WIDE, 2)] for i in (0, 1))
    mask = _vector(WIDE, WORD)
    return builder.fadd(
        *(builder.shuffle_vector(first, second, ir.Constant(mask, each)) for each in (even, odd))
    )


@compiled
def quantize_rows(w, words, scales):
    for n in prange(len(w)):
        for g in range(scales.shape[1]):
            quantize_group(w, n, g, words, scales)


def cpu_quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> words (N, K // 8), int32, and scales (N, K // 32), bfloat16, of what it `takes`."""
    N, K = weight.shape
    assert takes(weight)
    assert K % GROUP == 0, f"{K} features are not whole groups of {GROUP}"
    words = torch.empty(N, K // 8, dtype=torch.int32, device="cpu")
    scales = torch.empty(N, K // GROUP, dtype=torch.bfloat16, device="cpu")
    stored, bits = weight.view(STORED[weight.dtype]).numpy(), scales.view(torch.uint16).numpy()
    with own_threads():
        run(quantize_rows, stored, words.numpy(), bits)
    return words, scales
