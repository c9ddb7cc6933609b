"""Products of a few rows and a weight matrix on a CPU, in Numba: out[r, n] = sum_k x[r, k] w[n, k].

x (R, K) and out (R, N) are float32; w (N, K) is read once, in the dtype in which it is stored, and converted
to float32 in registers, exactly. If the CPU multiplies bfloat16 in AVX-512 and x is bfloat16, w is converted
to bfloat16 if that is exact, and the sums are float32; numbers below 2^-126 then count as 0. On such a CPU,
cpu_few_rows.py is faster from 2 rows on.

A tile is the sums of some rows of x and some rows of w, in registers: each vector of w is multiplied by all
rows of x, and each vector of x by all rows of w. Loops that Numba compiles itself keep fewer sums in
registers: for 8 rows they took 3.4 times as long. The rows of w of a tile are far apart: several streams keep
more reads of memory in flight than one, and more than torch.sum does. Each thread takes a few tiles at a
time, so that a thread whose core is busy takes fewer: equal parts took 1.2 times as long on an idle machine,
and 1.3 times beside a busy process. The threads are Numba's, which do not sleep while they wait for one
another. Threads that sleep took 1.8 times as long for all products of a token on an idle machine."""

import hashlib
import threading
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from llvmlite import ir
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from torch import Tensor

from .cpu_vectors import (
    EXACT_IN_BFLOAT16,
    LANES,
    MULTIPLIES_BFLOAT16,
    STORED,
    _bfloat16,
    _float32,
    _function,
    _rounded,
    _vector,
    converts_halves,
)
from .cpu_workers import own_threads

TAKEN = 16  # tiles that a thread takes at a time
PREFETCHED = 1536  # bytes ahead of each load of weights
BESIDE = 16  # numbers after each row of out: if N is 2^14, its rows would share a few lines of the cache
# Without OpenMP, Numba aborts the process when two Python threads enter a kernel at the same time.
ONE_AT_A_TIME = threading.Lock()
TileTypes = tuple[tuple[int, ...], ...]  # the last arguments of `products`, whose types say what a tile is
SHAPES = [(1, 4), (4, 4), (8, 3)] if LANES == 16 else [(1, 4), (4, 3)]  # rows of x and of w in a tile


@intrinsic
def widened(_, value):  # a stored weight -> float32
    def generate(context, builder, signature, arguments):
        return _float32(builder, arguments[0], value)

    return types.float32(value), generate


@intrinsic
def narrowed(_, value):  # float32 -> the bits of the nearest bfloat16 number
    def generate(context, builder, signature, arguments):
        return _rounded(builder, arguments[0])

    return types.uint16(value), generate


@intrinsic
def tile(_, x, w, out, r, n, apart, rows, weights, vector):
    """out[r + i, n + j * apart], for all i < len(rows) and j < len(weights), summed over all k of whole
    vectors. `rows`, `weights` and `vector` are tuples because machine code is kept by the types of its
    arguments, and the type of a tuple has its length; that of `vector` is LANES."""
    pairs = x.dtype == types.uint16  # an instruction multiplies pairs of bfloat16
    lanes, add = (2 * LANES, _add_pairs) if pairs else (LANES, _add)

    def generate(context, builder, signature, arguments):
        def number(value: int):
            return ir.Constant(ir.IntType(64), value)

        x_array, w_array, out_array = (
            context.make_array(kind)(context, builder, argument)
            for kind, argument in zip((x, w, out), arguments[:3], strict=True)
        )
        r, n, apart = arguments[3:6]
        K, stride = (cgutils.unpack_tuple(builder, array.shape)[1] for array in (w_array, out_array))
        end = builder.and_(K, number(-lanes))
        rows_x = [builder.add(r, number(i)) for i in range(rows.count)]
        rows_w = [builder.add(n, builder.mul(number(j), apart)) for j in range(weights.count)]
        x_rows = [builder.gep(x_array.data, [builder.mul(row, K)]) for row in rows_x]
        w_rows = [builder.gep(w_array.data, [builder.mul(row, K)]) for row in rows_w]
        sums = [[cgutils.alloca_once(builder, _vector(LANES)) for _ in x_rows] for _ in w_rows]
        for each in (each for row in sums for each in row):
            builder.store(ir.Constant(_vector(LANES), [0.0] * LANES), each)
        with cgutils.for_range_slice(builder, number(0), end, number(lanes), inc=True) as (k, _):
            vectors = []
            for row in w_rows:
                vector = _load(builder, row, k, lanes)
                _prefetch(builder, row, k)
                vectors.append((_bfloat16 if pairs else _float32)(builder, vector, w.dtype, lanes))
            for i, row in enumerate(x_rows):  # one vector of x at a time, as the sums fill the registers
                vector = _load(builder, row, k, lanes)
                for w_vector, w_sums in zip(vectors, sums, strict=True):
                    total = add(builder, builder.load(w_sums[i]), vector, w_vector)
                    builder.store(total, w_sums[i])
        for w_row, w_sums in zip(rows_w, sums, strict=True):
            for x_row, each in zip(rows_x, w_sums, strict=True):
                place = builder.gep(out_array.data, [builder.add(builder.mul(x_row, stride), w_row)])
                builder.store(_total(builder, builder.load(each)), place)
        return context.get_dummy_value()

    return types.void(x, w, out, r, n, apart, rows, weights, vector), generate


@intrinsic
def taken(_, counter):
    """The first of the next TAKEN tiles, which no other thread takes."""

    def generate(context, builder, signature, arguments):
        array = context.make_array(counter)(context, builder, arguments[0])
        return builder.atomic_rmw("add", array.data, ir.Constant(ir.IntType(64), TAKEN), "monotonic")

    return types.int64(counter), generate


def _load(builder, row, k, lanes: int):
    place = builder.gep(row, [k])
    vector = _vector(lanes, place.type.pointee)
    return builder.load(builder.bitcast(place, vector.as_pointer()), align=1)


def _prefetch(builder, row, k, ahead=None) -> None:
    """ahead: bytes; None is PREFETCHED."""
    byte, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
    ahead = ahead or ir.Constant(ir.IntType(64), PREFETCHED)
    place = builder.gep(builder.bitcast(builder.gep(row, [k]), byte), [ahead])
    prefetch = _function(builder, "llvm.prefetch.p0", ir.VoidType(), byte, flag, flag, flag)
    builder.call(prefetch, [place, *(ir.Constant(flag, value) for value in (0, 3, 1))])  # read, keep, data


def _add(builder, total, x, w):
    """total + x * w, in one instruction if the CPU has it."""
    return builder.fadd(total, builder.fmul(x, w, flags=["contract"]), flags=["contract"])


def _add_pairs(builder, total, x, w):
    """total + x * w of two bfloat16 numbers a lane."""
    vector = _vector(LANES, ir.IntType(32))
    add = _function(
        builder, f"llvm.x86.avx512bf16.dpbf16ps.{32 * LANES}", total.type, total.type, vector, vector
    )
    return builder.call(add, [total, builder.bitcast(x, vector), builder.bitcast(w, vector)])


def _add_total(builder, place, vector, first) -> None:
    """Add the sum of a vector to the number at a place, which counts as 0 if first is 0."""
    zero = ir.Constant(ir.FloatType(), 0.0)
    begins = builder.icmp_signed("==", first, ir.Constant(first.type, 0))
    before = builder.select(begins, zero, builder.load(place))
    builder.store(builder.fadd(before, _total(builder, vector)), place)


def _total(builder, vector):
    name, single = f"llvm.vector.reduce.fadd.v{LANES}f32", ir.FloatType()
    reduce = _function(builder, name, single, single, vector.type)
    return builder.call(reduce, [ir.Constant(single, -0.0), vector], fastmath=["reassoc"])


SOURCES = b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("cpu_*.py")))
OPTIONS = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}


def compiled(function, parallel: bool = True, fastmath=OPTIONS["fastmath"]):
    """Machine code is cached beside this file or under the home directory. If neither can be written, each
    process compiles it again, which takes about 8 s for the first answer of a model. Numba keeps it by the
    function's name, and until its file changes. It is generated by other files too, hence their digest."""
    function.__qualname__ += "_" + hashlib.sha256(SOURCES).hexdigest()[:16]
    function.options = OPTIONS | {"parallel": parallel, "fastmath": fastmath}
    try:
        return njit(cache=True, **function.options)(function)
    except RuntimeError:  # no directory can hold the cache
        return njit(**function.options)(function)


def serial(function):
    return compiled(function, parallel=False)


@compiled
def products(x, w, out, counter, threads, rows, weights, vector):
    counter[0] = 0
    apart = len(w) // len(weights)
    for _ in prange(threads):
        n = taken(counter)
        while n < apart:
            for i in range(n, min(n + TAKEN, apart)):
                for r in range(0, len(x), len(rows)):  # from the second r on, w comes from the cache
                    tile(x, w, out, r, i, apart, rows, weights, vector)
            n = taken(counter)
    for n in range(len(weights) * apart, len(w)):
        for r in range(0, len(x), len(rows)):
            tile(x, w, out, r, n, 1, rows, (0,), vector)


@compiled
def add_ends(x, w, out, first):
    """Add the products of the features from `first` on, which fill no vector. x is float32."""
    for n in prange(len(w)):
        for r in range(len(out)):
            total = types.float32(0)
            for k in range(first, w.shape[1]):
                total += x[r, k] * widened(w[n, k])
            out[r, n] += total


@cache
def uncached(function):
    return njit(**function.py_func.options)(function.py_func)


def run(function, *arguments) -> None:
    """Run a kernel, while no other Python thread runs one."""
    with ONE_AT_A_TIME:
        try:
            function(*arguments)
        except OSError:  # the disk is full, so the machine code cannot be cached
            uncached(function)(*arguments)


def reads_bits(x: torch.dtype, weight: torch.dtype) -> bool:
    """Whether x is multiplied in bfloat16, and not in float32."""
    return MULTIPLIES_BFLOAT16 and x == torch.bfloat16 and weight in EXACT_IN_BFLOAT16


def tile_of(rows: int) -> TileTypes:
    of_x, of_w = next((shape for shape in SHAPES if shape[0] >= rows), SHAPES[-1])
    return (0,) * of_x, (0,) * of_w, (0,) * LANES


def cpu_gemv(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight^T: (R, K), (N, K) -> (R, N) float32, not contiguous. The weight has a dtype of STORED
    and is contiguous."""
    (R, K), N = x.shape, len(weight)
    assert weight.shape == (N, K), f"weight {tuple(weight.shape)} for x {tuple(x.shape)}"
    assert weight.is_contiguous()
    assert weight.dtype not in (torch.float16, torch.float8_e4m3fn) or converts_halves()
    tile, bits = tile_of(R), reads_bits(x.dtype, weight.dtype)
    padded = F.pad(x, (0, 0, 0, -R % len(tile[0]))).contiguous()
    rows = (padded.view(torch.uint16) if bits else padded.float()).numpy()
    out = torch.empty(len(rows), N + BESIDE, dtype=torch.float32, device="cpu")
    stored, sums = weight.view(STORED[weight.dtype]).numpy(), out.numpy()
    whole = K - K % (2 * LANES if bits else LANES)
    with own_threads() as count:
        run(products, rows, stored, sums, np.zeros(1, np.int64), count, *tile)
        if whole < K:
            run(add_ends, x.float().contiguous().numpy(), stored, sums[:R], whole)
    return out[:R, :N]
