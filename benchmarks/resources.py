"""Finds the resources of a GPU that the kernels use, by compiling them: `python -m benchmarks.resources`.

This works on any machine. Every launcher is called as the model calls it, at every production shape, with
tensors that have no memory and a driver that names a chip and launches nothing. The compiled code shows how
many registers and how much shared memory a program uses, whether registers spill to memory, and how wide the
loads are. The exit code is 1 if a kernel breaks a limit."""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

SHARED = {80: 166_912, 90: 232_448, 100: 232_448}  # bytes that a program can have on sm_80, sm_90, sm_100
# SMs of A100, H100 and H200, B200. Each SM has 64 Ki registers, room for 2,048 threads, and SHARED + 1 KiB.
PROCESSORS = {80: 108, 90: 132, 100: 148}
# KB of loads that an SM has issued before the wait: 44 hide the latency of an H200 near its full bandwidth
AHEAD = 48
# thread instructions for each 8-bit weight: an H200 issues 6.9 in the time that it takes to load a weight
INSTRUCTIONS = 5.0
# the same for each 4-bit weight; an H200 issues 3.9 in the time that it takes to load one and its scale
INSTRUCTIONS_4_BIT = 6.0
# the same for each 16-bit weight, and for each 8-bit weight of a matrix that is loaded before the wait
MOST = 20.0
DTYPES = ("bfloat16", "float16", "float32")
PRODUCTS = ("norm_qkv_rope", "project_add", "norm_geglu", "norm_head")
BETWEEN = ("next_token", "top_p_histogram", "top_p_search")  # the kernels between two tokens
KERNELS = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope", "geglu", "linear",
    "prefill_attention", "decode_attention", *PRODUCTS, *BETWEEN,
)  # fmt: skip
# The number of loads of fewer than 16 bytes a thread that a kernel may have. They are for positions, counts
# and limits, the last 8 of SigLIP's 72 features, the cos and sin of an angle, the bias of a linear layer, and
# the inputs of a decode's products other than their weights, which are in the L2 cache.
NARROW = {
    "rope": 1, "linear": 16, "prefill_attention": 18, "decode_attention": 2,
    "next_token": 5, "top_p_histogram": 4, "top_p_search": 6, **dict.fromkeys(PRODUCTS, 64),
}  # fmt: skip


class Row(NamedTuple):
    """One compiled kernel, as a row of the table."""

    kernel: str
    variant: str
    dtype: str
    chip: int
    registers: int  # for each thread
    shared: int  # bytes
    spills: int  # instructions that store to local memory
    wide: int  # loads from global memory of 16 bytes a thread
    narrow: int  # loads from global memory of fewer bytes a thread
    bulk: int  # loads by TMA
    # memory accesses, other than loads of weights and of the scales of 4-bit weights, before the wait for the
    # kernels that were launched earlier
    early: int = 0
    slow: int = (
        0  # loads of weights of fewer than 16 bytes a thread; loads of weights are marked as read once
    )
    late: int = 0  # FMA instructions before the last load of weights to registers
    stray: int = 0  # loads of weights to registers after the wait
    plain: bool = False  # whether there are tiles after the first two, and no cp.async
    weights: "Weights | None" = None  # for a product

    @property
    def faults(self) -> list[str]:
        most, of_one_row = SHARED[self.chip], "rows 1 " in f"{self.variant} "
        checks = (
            (self.spills, f"{self.spills} spills"),
            (self.shared > most, f"more than {most} bytes of shared memory"),
            (self.early, f"{self.early} accesses before the wait"),
            (self.slow, f"{self.slow} narrow loads of weights"),
            (self.narrow > NARROW.get(self.kernel, 0), f"{self.narrow} narrow loads"),
            (self.late, f"{self.late} FMA instructions before the last load of weights"),
            (self.stray, f"{self.stray} loads of weights to registers after the wait"),
            (self.plain, "later tiles do not come by cp.async"),
        )
        found = [fault for broken, fault in checks if broken]
        return found + (
            self.weights.faults if self.weights and self.dtype != "float32" and of_one_row else []
        )


class Weights(NamedTuple):
    """How a program reads its weights."""

    ahead: float  # KB of loads that an SM has issued before the wait
    all: float  # KB of the matrix for each SM
    instructions: float  # thread instructions for each weight
    waves: float  # the programs, divided by the number that fits on the chip at once
    bits: int

    @property
    def faults(self) -> list[str]:
        most = INSTRUCTIONS if self.bits == 8 and self.ahead < 0.99 * self.all else MOST
        most = INSTRUCTIONS_4_BIT if self.bits == 4 else most
        checks = (
            (self.ahead < 0.99 * min(AHEAD, self.all), f"{self.ahead:.0f} KB an SM before the wait"),
            (self.instructions > most, f"{self.instructions:.1f} instructions a weight"),
        )
        return [fault for broken, fault in checks if broken]


class NoGPU:
    """A driver for Triton that names a chip to compile for and has no device to run on."""

    def __init__(self, chip: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", chip, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @classmethod
    def is_active(cls) -> bool:
        return True


def compile_all(chip: int, dtype: str, kernels: list[str], every: int = 1) -> list[Row]:
    """The rows of every n-th variant of these kernels. Each chip needs a process of its own, because Triton
    caches compiled kernels by the number of the device."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from .cases import production

    triton.runtime.driver.set_active(NoGPU(chip))  # pyright: ignore[reportArgumentType]
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        given = dict(zip(self.arg_names, args, strict=False)) | options
        compiled.append((run(self, *args, grid=grid, warmup=True, **options), grid[0], given))

    variants: dict[tuple[str, str], Any] = {}
    for case in production():
        if case.kernel in kernels and case.chip <= chip:
            variants.setdefault((case.kernel, case.variant), case)
    rows = []
    JITFunction.run = compile_only
    try:
        for case in list(variants.values())[::every]:
            compiled.clear()
            case.run(*case.make("meta", getattr(torch, dtype)))
            for i, (kernel, programs, given) in enumerate(compiled):
                row = Row(case.kernel, case.variant + ", its end" * i, dtype, chip, *inspect(kernel))
                if case.kernel in PRODUCTS:
                    row = row._replace(**inspect_product(kernel, programs, given, row))
                rows.append(row)
    finally:
        JITFunction.run = run
    return rows


@lru_cache(maxsize=1)
def machine_code(kernel: Any) -> tuple[int, str]:
    """The number of registers of a thread, and the assembly."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"

    def output(tool: str, option: str, file: str) -> str:
        command = [tools / tool, option, file]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = output("cuobjdump", "--dump-resource-usage", file.name)
        code = output("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return int(found[1]), code


ACCESS = re.compile(r"\b(?:LDG|LD|STG|ST|RED|REDG|ATOM|ATOMG|LDGSTS|UTMALDG)\b[\w.]*")


def inspect(kernel: Any) -> Iterator[Any]:
    """The values of Row from `registers` to `slow`, from the machine code."""
    registers, code = machine_code(kernel)
    # without the loads by which splits read one another's results, which are STRONG
    loads = [load for load in re.findall(r"\bLDG(?:STS)?\.[\w.]*", code) if "STRONG" not in load]
    wide = sum(".128" in load for load in loads)
    spills, bulk = len(re.findall(r"\bSTL\b", code)), len(re.findall(r"\bUTMALDG", code))
    yield from (registers, kernel.metadata.shared, spills, wide, len(loads) - wide, bulk)
    # A kernel without a wait has no ACQBULK: then all of its accesses count.
    early = ACCESS.findall(code.split("ACQBULK")[0]) if kernel.metadata.launch_pdl else []
    yield sum(".EF" not in access and ".EL" not in access for access in early)
    yield sum(".EF" in load and ".128" not in load for load in loads)


def instructions(code: str) -> tuple[list[str], list[range]]:
    """The instructions in order, without predicates, and the ranges of those that are loops."""
    found, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            found.append(instruction[1])
    ends = [(i, re.match(r"BRA.*?(\.L_\w+)", instruction)) for i, instruction in enumerate(found)]
    return found, [range(labels[end[1]], i + 1) for i, end in ends if end and labels[end[1]] < i]


def inspect_product(kernel: Any, programs: int, given: dict[str, Any], row: Row) -> dict[str, Any]:
    """`late`, `stray`, `plain` and `weights` of a row, from the machine code and the arguments of the
    launch."""
    import torch

    code, loops = instructions(machine_code(kernel)[1])

    def places(*names: str) -> list[int]:
        return [i for i, instruction in enumerate(code) if instruction.startswith(names)]

    loads = [i for i, instruction in enumerate(code) if re.match(r"LDG\.\S*\.EF", instruction)]  # of weights
    late = sum(i < loads[-1] for i in places("FFMA", "HMMA", "HGMMA"))
    wait = next(iter(places("ACQBULK")), loads[-1] + 1)
    stray = sum(i > wait for i in loads)

    matrix, threads, processors = given["w_ptr"], 32 * given["num_warps"], PROCESSORS[row.chip]
    bits = 4 if matrix.dtype == torch.int32 else 8 * matrix.element_size()
    features = matrix.shape[1] * 8 * matrix.element_size() // bits
    by_registers = 65536 // (-(-row.registers // 8) * 8 * threads)  # programs that fit on an SM
    by_shared = (SHARED[row.chip] + 1024) // (row.shared + 1024)
    fit = min(by_registers, 2048 // threads, by_shared, 32)

    # The instructions that a thread executes: those outside the loop over later tiles once, and those of the
    # loop in every pass.
    mine = matrix.shape[0] * features / programs  # weights of a program
    first_tiles = given["FIRST"] + given["SECOND"]
    more_tiles = first_tiles < features
    copies = set(places("LDGSTS"))
    inner = max((loop for loop in loops if not copies.isdisjoint(loop)), key=len, default=range(0))
    unrolled = max(1, sum(code[i].startswith("LDGDEPBAR") for i in inner))
    passes = max(0, features - first_tiles) / given["FIRST"] / unrolled if inner else 0
    executed = len(code) + (passes - 1) * len(inner) if inner else len(code)

    weights = Weights(
        ahead=(len(loads) - stray) * threads * 16 / 1024 * min(fit, programs / processors),
        all=matrix.nbytes / 1024 / processors,
        instructions=executed * threads / mine,
        waves=programs / fit / processors,
        bits=bits,
    )
    return {"late": late, "stray": stray, "plain": more_tiles and not copies, "weights": weights}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is imported; here they must be compiled
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the default, set so that Triton does not warn
    print(
        f"{'kernel':17} {'variant':40} {'dtype':8} {'chip':6} {'regs':>4} {'shared':>7} {'spills':>6}"
        f" {'128-bit':>7} {'narrow':>6} {'TMA':>3} {'KB/SM':>5} {'instr':>5} {'waves':>6}"
    )
    faults, tasks = 0, [(chip, dtype, args.kernel, args.every) for chip in args.chip for dtype in args.dtype]
    with ProcessPoolExecutor(args.jobs, get_context("spawn")) as pool:
        for rows in pool.map(isolated, *zip(*tasks, strict=True)):
            for row in rows:
                print(table_line(row), flush=True)
                faults += bool(row.faults)
    broken = f"{faults} of the compiled kernels break a limit"
    print(broken if faults else "no spills, no narrow loads, shared memory within the limit of every chip")
    return 1 if faults else 0


def table_line(row: Row) -> str:
    weights = ""
    if row.weights:
        weights = f" {row.weights.ahead:5.0f} {row.weights.instructions:5.1f} {row.weights.waves:6.2f}"
    return (
        f"{row.kernel:17} {row.variant:40} {row.dtype:8} sm_{row.chip:<3} {row.registers:4} {row.shared:7}"
        f" {row.spills:6} {row.wide:7} {row.narrow:6} {row.bulk:3}{weights}"
        + "".join(f"  <-- {fault}" for fault in row.faults)
    )


def isolated(chip: int, dtype: str, kernels: list[str], every: int) -> list[Row]:
    """compile_all in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(compile_all, chip, dtype, kernels, every).result()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources",
        description="Registers, shared memory and spills of every kernel. Needs no GPU.",
    )
    add = parser.add_argument
    chips = "compute capabilities to compile for (default: all)"
    names = f"of {', '.join(KERNELS)} (default: all)"
    add("--chip", type=int, nargs="+", choices=SHARED, default=list(SHARED), help=chips)
    add("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    add("--kernel", nargs="+", choices=KERNELS, default=KERNELS, metavar="NAME", help=names)
    add("--every", type=int, default=1, metavar="N", help="compile every N-th variant (default: %(default)s)")
    add("--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: one for each core)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
