"""The CPU kernels as on a CPU with AVX-512: their vectors have 16 lanes, and LLVM makes each instruction that
this CPU lacks of those that it has. With WIDE_VECTORS=bfloat16, the tests compute as on a CPU that multiplies
bfloat16; with WIDE_VECTORS=float32, as on one that does not."""

import os
import sys
import tempfile
import zlib
from pathlib import Path

from llvmlite import ir

# Numba keeps machine code by the source and the CPU, which are those of kernels that are not imitated.
own = zlib.crc32(Path(__file__).read_bytes())
os.environ["NUMBA_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"wide-vectors-{os.getuid()}-{own:08x}")
assert not any("kernels.cpu_" in name for name in sys.modules), "a kernel was imported before"
from paligemma.kernels import cpu_vectors  # noqa: E402

WORD, LANES = ir.IntType(32), 16


def product_of_pairs(builder: ir.IRBuilder, total, x, w) -> ir.Value:
    """total + the products of two bfloat16 numbers in each lane."""
    kind = x.type

    def constant(value: int) -> ir.Constant:
        return ir.Constant(kind, [value] * LANES)

    def upper(bits):
        return builder.bitcast(builder.and_(bits, constant(0xFFFF0000)), total.type)

    def lower(bits):
        return builder.bitcast(builder.shl(bits, constant(16)), total.type)

    for part in (upper, lower):
        total = builder.fadd(total, builder.fmul(part(x), part(w)))
    return total


def looked_up(builder: ir.IRBuilder, table, places) -> ir.Value:
    """The elements of the table at the places, whose upper bits are ignored."""
    memory = builder.alloca(table.type)
    builder.store(table, memory)
    element, count = table.type.element, table.type.count
    start, found = builder.bitcast(memory, element.as_pointer()), ir.Constant(table.type, ir.Undefined)
    for i in range(count):
        lane = ir.Constant(WORD, i)
        place = builder.extract_element(places, lane)
        place = builder.and_(place, ir.Constant(place.type, count - 1))
        found = builder.insert_element(found, builder.load(builder.gep(start, [place])), lane)
    return found


IMITATIONS = {
    "llvm.x86.avx512bf16.dpbf16ps.512": product_of_pairs,
    "llvm.x86.avx512.permvar.hi.512": looked_up,
    "llvm.x86.avx512.permvar.sf.512": looked_up,
}


def imitated(builder, name: str, result: ir.Type, *arguments: ir.Type):
    if name not in IMITATIONS:
        assert "avx512" not in name, f"{name} is not imitated"
        return declared(builder, name, result, *arguments)
    own = name.replace("llvm.", "imitated.")
    if own in builder.module.globals:
        return builder.module.globals[own]
    function = ir.Function(builder.module, ir.FunctionType(result, arguments), own)
    function.linkage = "internal"
    inside = ir.IRBuilder(function.append_basic_block())
    inside.ret(IMITATIONS[name](inside, *function.args))
    return function


declared = cpu_vectors._function
cpu_vectors._function, cpu_vectors.LANES = imitated, LANES
cpu_vectors.MULTIPLIES_BFLOAT16 = {"bfloat16": True, "float32": False}[os.environ["WIDE_VECTORS"]]
