"""Makes 8-bit and 4-bit weights on a CPU, in Numba, as checkpoint/quantize.py and int4.py describe, with
the same bits: sums are exact in any order, and every other operation is rounded as there.

torch takes 7 operations for a block of numbers, and for 4 bits some 80, each of which reads and writes the
cache. Here, what is read stays in registers. For 4 bits these are two vectors of a group, and then vectors of
the sums of all factors. On two cores of Ice Lake, PaliGemma 3B loads in 3.5 s in int8 and 6.4 s in int4, and
with torch alone in 8 to 11 s and 50 to 54 s."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from llvmlite import ir
from numba import prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from ..int4 import FACTORS, GROUP, WORDS
from .cpu_gemv import _load, compiled, narrowed, run, widened
from .cpu_panels import WORD, _array, _least, _number, _store
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

SMALLEST = np.float32(torch.finfo(torch.float32).tiny)  # scale
WIDE = 16  # numbers of a vector; without AVX-512, LLVM takes two registers for it
FLOATS, INTEGERS, SINGLE = _vector(WIDE), _vector(WIDE, WORD), ir.FloatType()
SIGN, INFINITE, TINY = 0x80000000, 0x7F800000, 0x0D800000  # bits: of infinity, and of 2^-100


def exactly(function):
    """Compiled so that each operation is rounded as it is written. Machine code is kept for these FACTORS."""
    function.__qualname__ += "_" + hashlib.sha256(repr((FACTORS, GROUP, WORDS)).encode()).hexdigest()[:16]
    return compiled(function, fastmath=False)


def takes(weight: Tensor) -> bool:
    """Whether the kernels make weights of this one, (N, K)."""
    known = weight.dtype in (torch.bfloat16, torch.float32) or (
        weight.dtype == torch.float16 and converts_halves()
    )
    whole = weight.device.type == "cpu" and weight.is_contiguous() and weight.shape[1] >= WIDE
    return MULTIPLIES_AND_ADDS and known and whole


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

    def word(value: int):
        return ir.Constant(WORD, value)

    bits = [builder.bitcast(value, INTEGERS) for value in values]
    magnitudes = [builder.and_(each, ir.Constant(INTEGERS, [SIGN - 1] * WIDE)) for each in bits]
    larger = builder.icmp_unsigned(">", *magnitudes)
    largest = _reduced(builder, "umax", builder.select(larger, *magnitudes))
    lowest = _all(builder, builder.or_(largest, word(SIGN)))
    negative = _reduced(
        builder, "or", builder.or_(*(builder.icmp_unsigned("==", each, lowest) for each in bits))
    )
    extreme = builder.select(negative, builder.or_(largest, word(SIGN)), largest)
    infinite = builder.icmp_unsigned(">=", largest, word(INFINITE))
    zero = builder.icmp_unsigned("<", largest, word(TINY))
    without = builder.or_(infinite, zero)  # a scale; the search then takes 1, and its result is not used
    extreme = builder.bitcast(builder.select(without, word(0x3F800000), extreme), SINGLE)
    x = [builder.fdiv(value, _all(builder, extreme)) for value in values]
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
    most = _reduced(builder, "umax", builder.bitcast(left, INTEGERS))  # of numbers that are not negative
    same = builder.icmp_unsigned("==", builder.bitcast(left, INTEGERS), _all(builder, most))
    flags = builder.bitcast(same, ir.IntType(WIDE))
    first = builder.cttz(flags, ir.Constant(ir.IntType(1), 0))
    scale = builder.extract_element(builder.fdiv(product, square), builder.zext(first, WORD))
    rounded = _rounded(builder, builder.fmul(scale, extreme))
    inverse = builder.fdiv(extreme, _float32(builder, rounded, types.uint16))
    codes, eight = [], ir.Constant(INTEGERS, [8] * WIDE)
    for each in x:
        code = builder.fptosi(_code(builder, each, _all(builder, inverse)), INTEGERS)
        code = builder.select(without, ir.Constant(INTEGERS, [0] * WIDE), code)
        codes.append(builder.add(code, eight))
    missing = builder.select(infinite, ir.Constant(rounded.type, 0x7FC0), ir.Constant(rounded.type, 0))
    return builder.select(without, missing, rounded), codes


def _constant(value: float):
    return ir.Constant(FLOATS, [value] * WIDE)


def _all(builder, value):
    """A vector of the same number."""
    undefined = ir.Constant(_vector(WIDE, value.type), ir.Undefined)
    return _shuffled(builder, builder.insert_element(undefined, value, ir.Constant(WORD, 0)), [0] * WIDE)


def _reduced(builder, name: str, vector):
    element = vector.type.element
    name = f"llvm.vector.reduce.{name}.v{WIDE}i{element.width}"
    return builder.call(_function(builder, name, element, vector.type), [vector])


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


@exactly
def quantize_groups(w, words, scales):
    for n in prange(len(w)):
        for g in range(scales.shape[1]):
            quantize_group(w, n, g, words, scales)


@intrinsic
def largest_of_row(_, w, n):
    """The largest magnitude of row n; NaN if it has one."""

    def generate(context, builder, signature, arguments):
        row, columns = _row(context, builder, signature, arguments, 0, arguments[1])
        largest = cgutils.alloca_once(builder, INTEGERS)
        builder.store(ir.Constant(INTEGERS, [0] * WIDE), largest)
        with _vectors(builder, columns) as k:
            bits = builder.bitcast(_float32(builder, _load(builder, row, k, WIDE), w.dtype, WIDE), INTEGERS)
            bits, before = builder.and_(bits, ir.Constant(INTEGERS, [SIGN - 1] * WIDE)), builder.load(largest)
            builder.store(builder.select(builder.icmp_unsigned(">", bits, before), bits, before), largest)
        return builder.bitcast(_reduced(builder, "umax", builder.load(largest)), SINGLE)

    return types.float32(w, n), generate


@intrinsic
def divide_row(_, w, n, scale, most, values):
    """The nearest values to row n divided by the scale, from -most to most: int8, or the bits of e4m3."""

    def generate(context, builder, signature, arguments):
        _, n, scale, most, _ = arguments
        row, columns = _row(context, builder, signature, arguments, 0, n)
        target, _ = _row(context, builder, signature, arguments, 4, n)
        scale, most = _all(builder, scale), _all(builder, most)
        least = builder.fsub(ir.Constant(FLOATS, [-0.0] * WIDE), most)
        with _vectors(builder, columns) as k:
            x = _float32(builder, _load(builder, row, k, WIDE), w.dtype, WIDE)
            x = builder.fdiv(x, scale)
            for limit, beyond in ((least, "<"), (most, ">")):
                x = builder.select(builder.fcmp_ordered(beyond, x, limit), limit, x)
            if values.dtype == types.int8:
                made = builder.fptosi(_nearest(builder, x), INTEGERS)
            else:
                made = _e4m3(builder, x)
            _store(builder, builder.trunc(made, _vector(WIDE, ir.IntType(8))), builder.gep(target, [k]))
        return context.get_dummy_value()

    return types.void(w, n, scale, most, values), generate


def _row(context, builder, signature, arguments, i: int, n):
    """The address of row n of argument i, and the number of its columns."""
    array = _array(context, builder, signature.args[i], arguments[i])
    columns = cgutils.unpack_tuple(builder, array.shape)[1]
    return builder.gep(array.data, [builder.mul(n, columns)]), columns


@contextmanager
def _vectors(builder, columns) -> Iterator:
    """A loop over the first columns of vectors; the last vector may begin before the end of another one."""
    with cgutils.for_range_slice(builder, _number(0), columns, _number(WIDE), inc=True) as (k, _):
        yield _least(builder, k, builder.sub(columns, _number(WIDE)))


def _e4m3(builder, x):
    """The bits of the nearest e4m3 numbers to those of a vector, up to 448."""

    def word(value: int):
        return ir.Constant(INTEGERS, [value] * WIDE)

    bits = builder.bitcast(x, INTEGERS)
    magnitude = builder.and_(bits, word(SIGN - 1))
    odd = builder.and_(builder.lshr(magnitude, word(20)), word(1))
    normal = builder.add(builder.add(magnitude, word(0x7FFFF - (120 << 23))), odd)
    # Below 2^-6, the numbers are multiples of 2^-9: the last bit of a float32 number near 2^14.
    small = builder.fadd(builder.bitcast(magnitude, FLOATS), _constant(2.0**14))
    small = builder.sub(builder.bitcast(small, INTEGERS), word((127 + 14) << 23))
    rounded = builder.lshr(normal, word(20))
    rounded = builder.select(builder.icmp_unsigned("<", magnitude, word((127 - 6) << 23)), small, rounded)
    return builder.or_(rounded, builder.lshr(builder.and_(bits, word(SIGN)), word(24)))


@exactly
def quantize_rows(w, most, half, values, scales):
    """half: whether the scales are bfloat16."""
    for n in prange(len(w)):
        scale = max(largest_of_row(w, n) / most, SMALLEST)
        if half:
            scale = widened(narrowed(scale))
        divide_row(w, n, scale, most, values)
        scales[n] = scale


def cpu_quantize_rows(weight: Tensor, stored: torch.dtype, kept: torch.dtype) -> tuple[Tensor, Tensor]:
    """(N, K) -> values (N, K), int8 or e4m3, and scales (N,) of the dtype `kept`, of what it `takes`."""
    assert takes(weight)
    most = torch.finfo(stored).max if stored.is_floating_point else torch.iinfo(stored).max
    values, scales = torch.empty_like(weight, dtype=stored), torch.empty(len(weight), device="cpu")
    arrays = (values.view(STORED[stored]).numpy(), scales.numpy())
    with own_threads():
        run(
            quantize_rows,
            weight.view(STORED[weight.dtype]).numpy(),
            np.float32(most),
            kept != torch.float32,
            *arrays,
        )
    return values, scales.to(kept)


def cpu_quantize_groups(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) -> words (N, K // 8), int32, and scales (N, K // 32), bfloat16, of what it `takes`."""
    N, K = weight.shape
    assert takes(weight)
    assert K % GROUP == 0, f"{K} features are not whole groups of {GROUP}"
    words = torch.empty(N, K // 8, dtype=torch.int32, device="cpu")
    scales = torch.empty(N, K // GROUP, dtype=torch.bfloat16, device="cpu")
    stored, bits = weight.view(STORED[weight.dtype]).numpy(), scales.view(torch.uint16).numpy()
    with own_threads():
        run(quantize_groups, stored, words.numpy(), bits)
    return words, scales
