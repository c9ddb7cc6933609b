"""What the kernels take of a GPU, found by compiling them, on any machine: `python -m benchmarks.resources`.

Every launcher is called as the model calls it, at every production shape, with tensors that have no memory
and a driver that names a chip and launches nothing. The compiled code then says how many registers and how
much shared memory a program takes, whether registers spill to memory, and how wide its loads are. Exit code 1
when a kernel breaks a limit."""

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
PROCESSORS = {
    80: 108,
    90: 132,
    100: 148,
}  # of A100, H100 and H200, B200; each has 64 Ki registers, room for 2,048 threads, and SHARED + 1 KiB
AHEAD = (
    48  # KB on their way to an SM before the wait: 44 cover the latency of an H200 near its full bandwidth
)
INSTRUCTIONS = 5.0  # of a thread for each 8-bit weight: an H200 issues 6.9 in the time that a weight takes
MOST = 20.0  # for each weight of 16 bits, or of a matrix that is all there before the wait
DTYPES = ("bfloat16", "float16", "float32")
PRODUCTS = ("norm_qkv_rope", "project_add", "norm_geglu", "norm_head")
BETWEEN = ("next_token", "top_p_histogram", "top_p_search")  # two tokens
KERNELS = (
    "rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm", "rope", "geglu", "linear", "prefill_attention", "decode_attention", *PRODUCTS, *BETWEEN
)  # fmt: skip
# Loads of fewer than 16 bytes a thread: only positions, counts and limits may have them, the last 8 of
# SigLIP's 72 features, an angle's cos and sin; a linear layer's bias; and what the products of a decode read
# beside their weights, which is in the L2 cache
NARROW = {
    "rope": 1,
    "linear": 16,
    "prefill_attention": 18,
    "decode_attention": 2,
    "next_token": 5,
    "top_p_histogram": 4,
    "top_p_search": 6,
}
NARROW |= dict.fromkeys(PRODUCTS, 64)


class Row(NamedTuple):
    kernel: str
    variant: str
    dtype: str
    chip: int
    registers: int
    shared: int  # bytes
    spills: int  # instructions that store to local memory
    wide: int  # loads from global memory of 16 bytes a thread
    narrow: int  # of fewer
    bulk: int  # loads by TMA
    early: int = (
        0  # accesses of memory, other than loads of weights, before it waits for the kernels before it
    )
    slow: int = 0  # of the loads of weights, which are marked as read once: fewer than 16 bytes a thread
    late: int = 0  # FMA instructions before the last load of weights to registers
    stray: int = 0  # loads of weights to registers after the wait
    plain: bool = False  # whether there are tiles after the first two, and no cp.async
    weights: "Weights | None" = None  # of a product of one row

    @property
    def faults(self) -> list[str]:
        return [
            *([f"{self.spills} spills"] if self.spills else []),
            *(
                [f"more than {SHARED[self.chip]} bytes of shared memory"]
                if self.shared > SHARED[self.chip]
                else []
            ),
            *([f"{self.early} accesses before the wait"] if self.early else []),
            *([f"{self.slow} narrow loads of weights"] if self.slow else []),
            *([f"{self.narrow} narrow loads"] if self.narrow > NARROW.get(self.kernel, 0) else []),
            *([f"{self.late} FMA instructions before the last load of weights"] if self.late else []),
            *([f"{self.stray} loads of weights to registers after the wait"] if self.stray else []),
            *(["later tiles do not come by cp.async"] if self.plain else []),
            *(
                self.weights.faults
                if self.weights and self.dtype != "float32" and "rows 1 " in f"{self.variant} "
                else []
            ),
        ]


class Weights(NamedTuple):
    """How a program reads its weights."""

    ahead: float  # KB on their way to an SM before the wait
    all: float  # KB of the matrix for each SM
    instructions: float  # of a thread for each weight
    waves: float  # programs, of those that fit on the chip at once
    bits: int

    @property
    def faults(self) -> list[str]:
        most = INSTRUCTIONS if self.bits == 8 and self.ahead < 0.99 * self.all else MOST
        return [
            *(
                [f"{self.ahead:.0f} KB an SM before the wait"]
                if self.ahead < 0.99 * min(AHEAD, self.all)
                else []
            ),
            *([f"{self.instructions:.1f} instructions a weight"] if self.instructions > most else []),
        ]


class NoGPU:
    """A driver for Triton that has a chip to compile for and nothing to run on."""

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
    """The rows of these kernels, of every n-th variant. Each chip needs a process of its own: Triton keeps
    what it has compiled by the device's number."""
    import torch
    import triton
    from triton.runtime.jit import JITFunction

    from .cases import production

    triton.runtime.driver.set_active(NoGPU(chip))  # pyright: ignore[reportArgumentType]
    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **options):
        compiled.append(
            (
                run(self, *args, grid=grid, warmup=True, **options),
                grid[0],
                dict(zip(self.arg_names, args, strict=False)) | options,
            )
        )

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
                rows.append(
                    row._replace(**inspect_product(kernel, programs, given, row))
                    if case.kernel in PRODUCTS
                    else row
                )
    finally:
        JITFunction.run = run
    return rows


@lru_cache(maxsize=1)
def machine_code(kernel: Any) -> tuple[int, str]:
    """Registers of a thread, and the assembly."""
    import triton.backends.nvidia

    tools = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run(
                [tools / tool, option, file.name], capture_output=True, text=True, check=True
            ).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    found = re.search(r"REG:(\d+)", usage)
    assert found, usage
    return int(found[1]), code


def inspect(kernel: Any) -> Iterator[Any]:
    """Row's numbers, from the machine code."""
    registers, code = machine_code(kernel)
    loads = [
        load for load in re.findall(r"\bLDG(?:STS)?\.[\w.]*", code) if "STRONG" not in load
    ]  # that is how splits read one another's results
    wide = sum(".128" in load for load in loads)
    yield from (
        registers,
        kernel.metadata.shared,
        len(re.findall(r"\bSTL\b", code)),
        wide,
        len(loads) - wide,
        len(re.findall(r"\bUTMALDG", code)),
    )
    early = (
        re.findall(
            r"\b(?:LDG|LD|STG|ST|RED|REDG|ATOM|ATOMG|LDGSTS|UTMALDG)\b[\w.]*", code.split("ACQBULK")[0]
        )
        if kernel.metadata.launch_pdl
        else []
    )
    yield sum(".EF" not in access for access in early)  # without a wait, all of them
    yield sum(".EF" in load and ".128" not in load for load in loads)


def instructions(code: str) -> tuple[list[str], list[range]]:
    """The instructions in order, without predicates, and the loops among them."""
    found, labels = [], {}
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(found)
        if instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z].*?)\s*;", line):
            found.append(instruction[1])
    ends = [(i, re.match(r"BRA.*?(\.L_\w+)", instruction)) for i, instruction in enumerate(found)]
    return found, [range(labels[end[1]], i + 1) for i, end in ends if end and labels[end[1]] < i]


def inspect_product(kernel: Any, programs: int, given: dict[str, Any], row: Row) -> dict[str, Any]:
    """`late`, `stray`, `plain` and `weights` of a row, from the machine code and what the kernel was launched
    with."""
    code, loops = instructions(machine_code(kernel)[1])
    loads = [
        i for i, instruction in enumerate(code) if re.match(r"LDG\.\S*\.EF", instruction)
    ]  # of weights, to registers
    late = sum(instruction.startswith(("FFMA", "HMMA", "HGMMA")) for instruction in code[: loads[-1]])
    wait = next((i for i, instruction in enumerate(code) if instruction.startswith("ACQBULK")), loads[-1] + 1)
    stray = sum(i > wait for i in loads)
    matrix, threads, size = given["w_ptr"], 32 * given["num_warps"], given["w_ptr"].element_size()
    fit = min(
        65536 // (-(-row.registers // 8) * 8 * threads),
        2048 // threads,
        (SHARED[row.chip] + 1024) // (row.shared + 1024),
        32,
    )
    one, early = (
        given["BLOCK_N"] * (given["FIRST"] + given["SECOND"]),
        len(loads) * threads * 16 // size,
    )  # weights of a step, and to registers
    mine = matrix.numel() / programs
    steps = given["BLOCK_N"] * given["FIRST"] if given["FIRST"] + given["SECOND"] < matrix.shape[1] else one
    inner = max(
        (loop for loop in loops if any(code[i].startswith("LDGSTS") for i in loop)), key=len, default=range(0)
    )
    unrolled = max(1, sum(code[i].startswith("LDGDEPBAR") for i in inner))
    passes = max(0.0, (mine - early) / steps) / unrolled if inner else 0
    executed = len(code) + (passes - 1) * len(inner) if inner else len(code)
    weights = Weights(
        ahead=(len(loads) - stray) * threads * 16 / 1024 * min(fit, programs / PROCESSORS[row.chip]), all=matrix.numel() * size / 1024 / PROCESSORS[row.chip],
        instructions=executed * threads / mine, waves=programs / fit / PROCESSORS[row.chip],
        bits=8 * size,
    )  # fmt: skip
    plain = given["FIRST"] + given["SECOND"] < matrix.shape[1] and not any(
        instruction.startswith("LDGSTS") for instruction in code
    )
    return {"late": late, "stray": stray, "plain": plain, "weights": weights}


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)  # kernels are interpreted or compiled, from their import on
    os.environ.setdefault(
        "TRITON_DEFAULT_FP_FUSION", "1"
    )  # Triton's own default, set so that it does not warn
    print(
        f"{'kernel':17} {'variant':40} {'dtype':8} {'chip':6} {'regs':>4} {'shared':>7} {'spills':>6} {'128-bit':>7} {'narrow':>6} {'TMA':>3}"
        f" {'KB/SM':>5} {'instr':>5} {'waves':>6}"
    )
    faults = 0
    with ProcessPoolExecutor(
        args.jobs, get_context("spawn")
    ) as pool:  # one process for each task: see compile_all
        tasks = [(chip, dtype) for chip in args.chip for dtype in args.dtype]
        for rows in pool.map(
            isolated, *zip(*[(chip, dtype, args.kernel, args.every) for chip, dtype in tasks], strict=True)
        ):
            for row in rows:
                print(
                    f"{row.kernel:17} {row.variant:40} {row.dtype:8} sm_{row.chip:<3} {row.registers:4} {row.shared:7} {row.spills:6} {row.wide:7}"
                    f" {row.narrow:6} {row.bulk:3}"
                    + (
                        f" {row.weights.ahead:5.0f} {row.weights.instructions:5.1f} {row.weights.waves:6.2f}"
                        if row.weights
                        else ""
                    )
                    + "".join(f"  <-- {fault}" for fault in row.faults),
                    flush=True,
                )
                faults += bool(row.faults)
    print(
        f"{faults} of the compiled kernels break a limit"
        if faults
        else "no spills, no narrow loads, shared memory within every chip's"
    )
    return 1 if faults else 0


def isolated(chip: int, dtype: str, kernels: list[str], every: int) -> list[Row]:
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(compile_all, chip, dtype, kernels, every).result()


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.resources",
        description="Registers, shared memory and spills of every kernel. Needs no GPU.",
    )
    parser.add_argument(
        "--chip",
        type=int,
        nargs="+",
        choices=SHARED,
        default=list(SHARED),
        help="compute capabilities to compile for (default: all)",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES), help="default: all")
    parser.add_argument(
        "--kernel",
        nargs="+",
        choices=KERNELS,
        default=KERNELS,
        metavar="NAME",
        help=f"of {', '.join(KERNELS)} (default: all)",
    )
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="compile every N-th variant only (default: %(default)s)",
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="processes at a time (default: one for each core)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
