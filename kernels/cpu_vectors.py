"""The vectors of the CPU that Numba compiles for, and stored weights in them, as LLVM code."""

import math
import platform
from collections.abc import Sequence
from functools import cache

import numba
import torch
from llvmlite import binding, ir
from numba import types

STORED = {  # the dtype in which NumPy views each weight; all differ, so that `_float32` can tell them apart
    torch.float32: torch.float32, torch.bfloat16: torch.uint16, torch.float16: torch.int16,
    torch.float8_e4m3fn: torch.uint8, torch.int8: torch.int8,
}  # fmt: skip
EXACT_IN_BFLOAT16 = (torch.bfloat16, torch.int8, torch.float8_e4m3fn)


def _has(feature: str) -> bool:
    """Whether the CPU that Numba compiles for has an LLVM feature. If Numba's settings name another CPU than
    this one, it is assumed not to have it."""
    config = numba.config
    own = config.ENABLE_AVX and not (config.CPU_NAME or config.CPU_FEATURES)
    return bool(own and binding.get_host_cpu_features().get(feature, False))


LANES = 16 if _has("avx512f") else 8  # float32 numbers of a vector
MULTIPLIES_BFLOAT16 = _has("avx512bf16")


OLDER = (
    "generic",
    "x86-64",
    "x86-64-v2",
    "core2",
    "penryn",
    "nehalem",
    "westmere",
    "sandybridge",
    "ivybridge",
)
X86 = platform.machine().lower() in ("x86_64", "amd64")


def _x86_has(feature: str) -> bool:
    """Whether the x86 CPU that Numba compiles for has a feature of those since 2013, which a virtual machine
    may hide. If Numba's settings name a CPU, it is assumed to have it unless it is an older one."""
    if numba.config.CPU_NAME:
        named = f"+{feature}" in (numba.config.CPU_FEATURES or "").split(",")
        return named or numba.config.CPU_NAME not in OLDER
    return _has(feature)


MULTIPLIES_AND_ADDS = X86 and _x86_has("fma") and _x86_has("avx2")  # in one instruction, 8 numbers at least


@cache
def converts_halves() -> bool:
    """Whether the CPU that Numba compiles for has an instruction that converts float16 to float32, which e4m3
    needs too. Without it, LLVM calls a function that does not exist in the process."""
    return not X86 or _x86_has("f16c")


def _vector(lanes: int, element: ir.Type | None = None) -> ir.VectorType:
    return ir.VectorType(element or ir.FloatType(), lanes)


def _shuffled(builder, vector, places: Sequence[int]):
    """The elements of a vector at these places."""
    mask = ir.Constant(_vector(len(places), ir.IntType(32)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def _float32(builder, bits, stored, lanes: int | None = None):
    """A stored weight, or a vector of them, in float32."""

    def kind(element: ir.Type) -> ir.Type:
        return _vector(lanes, element) if lanes else element

    def constant(element: ir.Type, value: float) -> ir.Constant:
        return ir.Constant(kind(element), [value] * lanes if lanes else value)

    single, half, word, short = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)
    if stored == types.uint16:  # bfloat16: the upper half of a float32
        wide = builder.zext(bits, kind(word))
        return builder.bitcast(builder.shl(wide, constant(word, 16)), kind(single))
    if stored == types.int16:  # float16
        return builder.fpext(builder.bitcast(bits, kind(half)), kind(single))
    if stored == types.uint8:  # e4m3 without NaN: shifted, its bits are a float16 of 1/256 of the value
        shifted = builder.shl(builder.sext(bits, kind(short)), constant(short, 7))
        small = builder.bitcast(builder.and_(shifted, constant(short, 0xBFFF)), kind(half))
        return builder.fmul(builder.fpext(small, kind(single)), constant(single, 256.0))
    return builder.sitofp(bits, kind(single)) if stored == types.int8 else bits


def _bfloat16(builder, bits, stored, lanes: int):
    """A vector of stored weights in bfloat16: the upper halves of float32 numbers, whose lower halves are 0,
    because 8-bit weights have at most 8 significant bits."""
    if stored == types.uint16:
        return bits
    halves = builder.bitcast(_float32(builder, bits, stored, lanes), _vector(2 * lanes, ir.IntType(16)))
    return _shuffled(builder, halves, range(1, 2 * lanes, 2))


def _function(builder, name: str, result: ir.Type, *arguments: ir.Type):
    kind = ir.FunctionType(result, arguments)
    return builder.module.globals.get(name) or ir.Function(builder.module, kind, name)


def _repeated(builder, value):
    undefined = ir.Constant(_vector(LANES, value.type), ir.Undefined)
    one = builder.insert_element(undefined, value, ir.Constant(ir.IntType(32), 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(_vector(LANES, ir.IntType(32)), [0] * LANES))


def _transposed(builder, vectors: list) -> list:
    """Vectors with the first elements of all vectors, then the second elements of all vectors, and so on."""
    lanes, half = vectors[0].type.count, len(vectors) // 2
    for _ in range(len(vectors).bit_length() - 1):
        made = []
        for pair in zip(vectors[:half], vectors[half:], strict=True):
            for start in (0, lanes // 2):
                order = [i + lanes * side for i in range(start, start + lanes // 2) for side in (0, 1)]
                made.append(builder.shuffle_vector(*pair, ir.Constant(_vector(lanes, ir.IntType(32)), order)))
        vectors = made
    return vectors


def _rounded(builder, value):
    """A float32 number, or a vector of them, in bfloat16: rounded to the nearest, of two to the even one."""
    lanes = getattr(value.type, "count", None)

    def kind(element: ir.Type) -> ir.Type:
        return _vector(lanes, element) if lanes else element

    def constant(number: int) -> ir.Constant:
        return ir.Constant(bits.type, [number] * lanes if lanes else number)

    bits = builder.bitcast(value, kind(ir.IntType(32)))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    nearest = builder.add(builder.add(bits, constant(0x7FFF)), odd)
    nan = builder.or_(bits, constant(0x400000))
    bits = builder.select(builder.fcmp_unordered("uno", value, value), nan, nearest)
    return builder.trunc(builder.lshr(bits, constant(16)), kind(ir.IntType(16)))


def _in_dtype(builder, stored, value):
    """A vector of float32 numbers as `STORED` has those of a floating-point dtype."""
    if stored == types.uint16:
        return _rounded(builder, value)
    if stored == types.int16:
        half = builder.fptrunc(value, _vector(value.type.count, ir.HalfType()))
        return builder.bitcast(half, _vector(value.type.count, ir.IntType(16)))
    return value


def _gelu(builder, x):
    """gelu_tanh(x) = x / (1 + 2^z), z = -2 log2(e) sqrt(2 / pi) (x + 0.044715 x^3). Where 2^z would overflow,
    it is 0, and NaN for negative infinity."""

    def constant(value: float) -> ir.Constant:
        return ir.Constant(x.type, [value] * LANES)

    factor = -2 * math.log2(math.e) * math.sqrt(2 / math.pi)
    inner = _add_product(builder, constant(factor), builder.fmul(x, x), constant(0.044715 * factor))
    z = builder.fmul(x, inner)
    y = builder.fdiv(x, builder.fadd(_power_of_2(builder, z), constant(1.0)))
    return builder.select(builder.fcmp_ordered(">", z, constant(126.0)), builder.fmul(x, constant(0.0)), y)


def _power_of_2(builder, z):
    """2^z, and 2^-126 or 2^126 beyond these; NaN of NaN. It is 2 to the nearest whole number, in the bits of
    the exponent, times a polynomial with an error of 2e-7 of the result."""

    def constant(value: float) -> ir.Constant:
        return ir.Constant(z.type, [value] * LANES)

    for limit, sign in ((126.0, ">"), (-126.0, "<")):
        z = builder.select(builder.fcmp_ordered(sign, z, constant(limit)), constant(limit), z)
    whole = builder.call(_function(builder, f"llvm.rint.v{LANES}f32", z.type, z.type), [z])
    rest = builder.fsub(z, whole)
    power = constant(0.0)
    for degree in reversed(range(7)):
        factor = constant(math.log(2) ** degree / math.factorial(degree))
        power = _add_product(builder, factor, power, rest)
    bits = builder.fptosi(whole, _vector(LANES, ir.IntType(32)))
    bits = builder.shl(
        builder.add(bits, ir.Constant(bits.type, [127] * LANES)), ir.Constant(bits.type, [23] * LANES)
    )
    return builder.fmul(power, builder.bitcast(bits, z.type))


def _add_product(builder, total, first, second):
    return builder.fadd(total, builder.fmul(first, second, flags=["contract"]), flags=["contract"])
