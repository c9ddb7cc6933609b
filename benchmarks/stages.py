"""The stages of the measurement. Each is a list of independent tasks: a name, and a function that returns
its findings.

A task fails if its findings contain {"failed": why} or if it raises. `dry` runs the tasks on a CPU, in
Triton's interpreter, with tiny shapes."""

import math
import os
import platform
import time
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import cases, generation, races, timing
from benchmarks.cases import Case
from benchmarks.cases.norms import EPS
from benchmarks.generation import Cell
from benchmarks.timing import Task, distance, tensors
from benchmarks.whole_model import device_name
from paligemma import ops
from paligemma.kernels.common import architecture
from paligemma.kernels.geglu import geglu
from paligemma.kernels.gemv_input import MOST_ROWS
from paligemma.kernels.linear import Form, nearest
from paligemma.kernels.rms_norm import rms_norm

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PRODUCTION = "bfloat16"  # the dtype of production cases; odd cases run in every dtype


def tasks(stage: str, dry: bool) -> list[Task]:
    return list(STAGES[stage](dry))


def chosen(dry: bool) -> tuple[list[Case], list[Case]]:
    """(odd, production): the cases for which this GPU has instructions. A dry run has the first odd case of
    each kernel, and no production case."""
    odd = cases.odd()
    if dry:
        return list({case.kernel: case for case in reversed(odd)}.values())[::-1], []
    major, minor = torch.cuda.get_device_capability()
    chip = 10 * major + minor
    production = cases.production()
    return [case for case in odd if case.chip <= chip], [case for case in production if case.chip <= chip]


# Environment


def environment(dry: bool) -> Iterator[Task]:
    yield "environment", partial(describe_environment, dry)


def describe_environment(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device_name(timing.device_of(dry)), "versions": versions()}
    found["cores"] = os.cpu_count()
    if not dry:
        p = torch.cuda.get_device_properties(0)
        found |= {"capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count}
        found |= {"memory_gb": p.total_memory / 1e9, "l2_mb": p.L2_cache_size / 1e6}
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers", "numpy", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# Ceilings


def ceilings(dry: bool) -> Iterator[Task]:
    yield "ceilings", lambda: dict(timing.ceilings(timing.device_of(dry)))


# Compilation: every kernel once, in many processes at a time, so that later stages find it on the disk


def compilation(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    by_size = sorted(production, key=lambda case: -case.bytes(1))
    smallest = {(case.kernel, case.variant): case for case in by_size}.values()
    few = odd[: 2 if dry else None]  # a dry run compiles nothing, and correctness runs them all
    for dtype in dtypes(dry):
        for case in [*(smallest if dtype == PRODUCTION else ()), *few]:
            yield f"{case.name}, {dtype}", partial(run_once, case, dtype, dry)
    for case in production:
        for name in ("torch.compile", "flex_attention"):
            if name in timed(case, dry):
                yield f"{case.name}, {name}", partial(run_once, case, PRODUCTION, dry, name)


def run_once(case: Case, dtype: str, dry: bool, contender: str = "triton") -> dict[str, Any]:
    inputs = case.make(timing.device_of(dry), DTYPES[dtype])
    start, own = time.perf_counter(), contender == "triton"

    def work() -> dict[str, Any]:
        timed(case, dry)[contender]()(*inputs)
        if own and dtype == PRODUCTION and not dry:  # the launches with which replays are compared
            with races.one_after_another():
                case.run(*inputs)
        timing.synchronize(dry)
        return {"seconds": time.perf_counter() - start}

    return timing.attempt(own, work)


def dtypes(dry: bool) -> list[str]:
    return ["bfloat16"] if dry else list(DTYPES)


# Correctness


def correctness(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    for dtype in dtypes(dry):
        for case in [*odd, *(production if dtype == PRODUCTION else ())]:
            if dry or case.bytes(8) < torch.cuda.get_device_properties(0).total_memory / 16:
                yield f"{case.name}, {dtype}", partial(check, case, dtype, dry)


RMS_FACTOR, MAX_FACTOR = 2, 4  # as in paligemma.compare


def check(case: Case, dtype: str, dry: bool) -> dict[str, Any]:
    """Compare the launcher's results with the exact ones, with guards around inputs and outputs; then compare
    many replays bit by bit."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    device, memory = timing.device_of(dry), races.Guarded()
    inputs = case.make(device, DTYPES[dtype])
    truth = case.seen(*tensors(case.exact(*(x.clone() for x in inputs))))
    plain = case.seen(*tensors(case.plain(*(x.clone() for x in inputs))))
    given = [memory.copy(x) for x in inputs]
    case.hide(*given)
    before = [x.clone() for x in given]
    with memory:
        results = tensors(case.run(*given))
    timing.synchronize(dry)
    faults = [] if memory.intact() else ["it wrote beside a buffer"]
    for i, (x, y) in enumerate(zip(given, before, strict=True)):
        if not any(x is result for result in results) and races.differing(x, y):
            faults.append(f"it changed its input {i}")
    found: dict[str, Any] = {"outputs": []}
    for i, (value, exact, yardstick) in enumerate(zip(case.seen(*results), truth, plain, strict=True)):
        if value.shape != exact.shape or value.dtype not in (DTYPES[dtype], torch.float32, torch.int64):
            wanted = f"{tuple(exact.shape)} {dtype}"
            faults.append(f"output {i} is {tuple(value.shape)} {value.dtype}, not {wanted}")
            continue
        error = errors(value, exact, yardstick, dtype)
        found["outputs"].append(error)
        if not (error["rms"] <= error["rms_allowed"] and error["max"] <= error["max_allowed"]):  # NaN fails
            said = "relative RMS error {rms:.1e} (allowed {rms_allowed:.1e}), "
            said += "largest {max:.1e} (allowed {max_allowed:.1e})"
            faults.append(f"output {i}: {said.format(**error)}")
    if dtype == dtypes(dry)[0]:
        again = races.replays_of_case(case, inputs, dry)
        found |= again
        faults += [races.FAULT] if again["values_that_differed"] else []
    return found | ({"failed": "; ".join(faults)} if faults else {})


def errors(value: Tensor, exact: Tensor, yardstick: Tensor, dtype: str) -> dict[str, float]:
    """The relative RMS error and the largest error, and what is allowed: multiples of the errors of plain
    torch (the yardstick) or of the exact values rounded to the dtype, whichever are larger."""
    # The rounding counts for logits too, although they are float32.
    nearest = exact.to(DTYPES[dtype]) if exact.is_floating_point() else exact
    # A GPU's own exp2 and reciprocal have errors of a unit in the last place.
    floor = 2.0**-23 if dtype == "float32" else 0.0
    return {
        "rms": distance(value, exact),
        "rms_allowed": RMS_FACTOR * max(distance(yardstick, exact), distance(nearest, exact), floor),
        "max": largest(value, exact),
        "max_allowed": MAX_FACTOR * max(largest(yardstick, exact), largest(nearest, exact)),
    }


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).abs().max())


# Kernels


def kernels(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    launches: dict[str, dict[str, int]] = {}  # for one token, by case and kind of weight
    for quantize in generation.QUANTIZATIONS:
        for case, count in cases.token(quantize).items():
            launches.setdefault(case.name, {})[quantize or PRODUCTION] = count
    for case in production or odd:
        yield case.name, partial(time_kernel, case, dry, launches.get(case.name, {}))


def time_kernel(case: Case, dry: bool, launches: dict[str, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    row = timing.time_case(case, timed(case, dry), DTYPES[PRODUCTION], timing.device_of(dry))
    row["launches"] = launches
    error = row["contenders"]["triton"].get("error")
    return row | ({"failed": error} if error else {})


def timed(case: Case, dry: bool) -> dict[str, Callable[[], Callable]]:
    """Contender -> a function that returns it. On a CPU, only those that need no compiler and no GPU."""
    dry_peers = ("SDPA flash", "SDPA cudnn")
    peers = {name: make for name, make in case.peers.items() if not dry or name in dry_peers}
    return {"triton": lambda: case.run, "torch": lambda: case.plain, **peers}


# One decode step, with and without programmatic dependent launch


def steps(dry: bool) -> Iterator[Task]:
    size = 14 if dry else 224
    found = [Cell(size, 1, sampled=True)]
    if not dry:
        found = [*(Cell(size, 1, quantize=q) for q in generation.QUANTIZATIONS), *found, Cell(size, 4)]
    for i, cell in enumerate((*found, Cell(size, 1, model=generation.PG2))):
        yield f"{cell.name}, replays", partial(check_step, cell, dry)
        if i == 0:  # one profile is enough
            profile = partial(generation.profile, Cell(size, 1, "torch" if dry else "triton"), dry)
            yield "parts of a step", partial(timing.attempt, False, profile)
        if not cell.sampled:  # check_graphs expects greedy tokens
            yield f"{cell.name}, graphs beside eager launches", partial(generation.check_graphs, cell, dry)


def steps_without_pdl(dry: bool) -> Iterator[Task]:
    yield next(steps(dry))


AT_ONCE = 4  # steps in one graph: the last kernel of a step overlaps with the first kernel of the next step


def check_step(cell: Cell, dry: bool) -> dict[str, Any]:
    """Compare the logits and tokens of many steps bit by bit: 1000 steps in 250 replays, in memory that the
    allocator reuses, and 200 more in memory full of NaN. Then measure the time of one step."""
    step, reset = generation.step_of(cell, dry)

    def several() -> tuple[Tensor, ...]:
        for _ in range(0 if dry else AT_ONCE - 1):
            step()
        return step()

    def measure() -> float:
        reset()
        return clock()

    reused = races.replays(reset, several, dry, guarded=False, most=1000 // AT_ONCE, seconds=3.0)
    found = cell._asdict() | reused
    full_of_nan = races.replays(reset, several, dry, most=200 // AT_ONCE, seconds=2.0)
    found |= {name: found[name] + more for name, more in full_of_nan.items()}
    clock = timing.timer(step, [()], timing.device_of(dry))
    rounds, least = (1, 1) if dry else (timing.ROUNDS, timing.LEAST)
    samples = timing.interleaved({"step": measure}, 0.5, rounds, least)["step"]
    found |= timing.spread("step_ms", 1e3, samples)
    found["context"] = generation.inputs_for(cell, dry)["input_ids"].shape[1]
    found |= generation.decode_fractions(cell, found["context"], found["step_ms"], dry)
    return found | ({"failed": races.FAULT} if found["values_that_differed"] else {})


# The fastest form of a product: from how many rows on, and with which precision of the sums


def crossover(dry: bool) -> Iterator[Task]:
    m = cases.DECODERS[0]._replace(E=33, M=20) if dry else cases.DECODERS[0]
    for R in (1, 2) if dry else (1, 2, 4, 8, 16, 32, 64):
        for case in (
            cases.gate_up_case(f"{R} rows", R, m.E, m.M, False, None),
            cases.head_case(f"{R} rows", R, m.E, 70 if dry else cases.VOCABULARY, False, None, None),
        ):
            yield case.name, partial(time_forms, case, R, dry)
    prefill = {"": ((2, 33, 20), {"bias": True, "gelu": True})} if dry else PREFILL
    for name, (sizes, options) in prefill.items():
        yield f"prefill, {name}", partial(time_linear, name, *sizes, dry, **options)


# The products of a first token: (rows, input features, output features), and the options of linear_case.
# SigLIP's products with few tiles and Gemma's down_proj are here at 224, 448 and 896 pixels.
PREFILL: dict[str, tuple[tuple[int, int, int], dict[str, bool]]] = {
    f"{name}, {rows} rows": ((rows, *sizes), options)
    for name, every, sizes, options in (
        ("SigLIP out_proj", (256, 1024, 4096), (1152, 1152), {"bias": True}),
        ("SigLIP fc2", (256, 1024, 4096), (4304, 1152), {"bias": True}),
        ("down", (272, 1040, 4112), (16384, 2048), {}),
        ("SigLIP fc1", (256, 1024), (1152, 4304), {"bias": True, "gelu": True}),
        ("SigLIP qkv", (256, 1024), (1152, 3 * 1152), {"bias": True}),
        ("qkv", (272,), (2048, 2560), {}), ("o", (272,), (2048, 2048), {}),
        ("gate and up", (272,), (2048, 2 * 16384), {}),
    )
    for rows in every
}  # fmt: skip
REDUCED, ALL_WANTED = "cuBLAS, sums in bfloat16", "cuBLAS, sums in float32"


def time_linear(name: str, rows: int, size_in: int, size_out: int, dry: bool, **options) -> dict[str, Any]:
    """Compare the times and the errors of the kernel's forms with those of cuBLAS, which adds partial sums in
    bfloat16 (torch's default) or in float32. If a form is faster than both by more than the spread of the
    times, `line` is the line to add to FORMS of kernels/linear.py."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    gelu = options.get("gelu", False)

    def cublas(reduced: bool) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            settings.allow_bf16_reduced_precision_reduction = reduced
            with ops.use("torch"):
                return ops.linear(x, weight, bias, gelu)

        return run

    forms, sizes = {str(form): form for form in forms_for(rows, size_in, size_out)}, (rows, size_in, size_out)
    made = {each: cases.linear_case(each, *sizes, form, **options) for each, form in forms.items()}
    case = next(iter(made.values()))
    runs = {REDUCED: cublas(True), ALL_WANTED: cublas(False)} | {each: c.run for each, c in made.items()}
    device, dtype = timing.device_of(dry), DTYPES[PRODUCTION]
    contenders = {each: lambda run=run: run for each, run in runs.items()}
    try:
        found = timing.time_case(case, contenders, dtype, device, 0.3)
        inputs = case.make(device, dtype)
        exact = case.exact(*inputs)
        rms = {each: distance(run(*inputs), exact) for each, run in runs.items()}
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
    found |= {"rms": rms, "rms_of_rounding": distance(exact.to(dtype), exact), "line": None}
    times = found["contenders"]
    broken = [f"{each}: {times[each]['error']}" for each in forms if "error" in times[each]]
    if broken:
        return found | {"failed": "; ".join(broken)}
    best = fastest(times)
    if best in forms:
        form = f"{{{architecture()}: Form{tuple.__repr__(forms[best])}}}"
        found["line"] = f"({nearest(rows)}, {size_out}, {size_in}): {form},  # {name}"
    return found


def forms_for(rows: int, size_in: int, size_out: int, programs: int = 132) -> list[Form]:
    """Each tile with one split if its tiles are at least as many as `programs` (one for each SM of an H100);
    otherwise with the number of splits that gives so many programs, and with twice that number."""
    found = []
    for tile in cases.TILES:
        missing = programs / (-(-rows // tile.rows) * -(-size_out // tile.outputs))
        least = 1 << max(0, math.ceil(math.log2(missing)))
        most = min(16, -(-size_in // tile.features))
        splits = [n for n in ((1,) if least == 1 else (least, 2 * least)) if n <= most]
        found += [tile._replace(splits=n) for n in splits or (1,)]
    return found


def fastest(times: dict[str, dict[str, float]]) -> str:
    """The name of the fastest contender. It is REDUCED, torch's default, unless the slow measurements of
    another contender are faster than the fast ones of cuBLAS."""
    limit = min(times[name]["us_p10"] for name in (REDUCED, ALL_WANTED) if "us" in times[name])
    best = min((name for name in times if "us" in times[name]), key=lambda name: times[name]["us"])
    return best if times[best]["us_p90"] < limit else REDUCED


def time_forms(case: Case, R: int, dry: bool) -> dict[str, Any]:
    """Time the fused kernel, which uses tl.dot from two rows on; the same kernel for one row at a time, which
    uses FMA; and norm, cuBLAS and GeGLU one after another."""

    def each_row(x: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        parts = [tensors(case.run(row, *rest)) for row in x.split(1)]
        return tuple(map(torch.cat, zip(*parts, strict=True)))

    def unfused(x: Tensor, norm: Tensor, weight: Tensor) -> Tensor | tuple[Tensor, ...]:
        y = F.linear(rms_norm(x, norm, EPS), weight)
        return y.float() if case.kernel == "norm_head" else (geglu(*y.chunk(2, dim=-1)), x)

    forms: dict[str, Callable[[], Callable]] = {"norm, linear": lambda: unfused}
    if R <= MOST_ROWS:
        forms |= {"fused": lambda: case.run, "a row at a time": lambda: each_row}
    found = timing.time_case(case, forms, DTYPES[PRODUCTION], timing.device_of(dry), 0.3)
    broken = [f"{name}: {times['error']}" for name, times in found["contenders"].items() if "error" in times]
    return found | {"rows": R} | ({"failed": "; ".join(broken)} if broken else {})


STAGES: dict[str, Callable[[bool], Iterator[Task]]] = {
    "environment": environment, "ceilings": ceilings, "compilation": compilation, "correctness": correctness,
    "steps": steps, "steps_without_pdl": steps_without_pdl, "model": generation.model_tasks,
    "peers": generation.peer_tasks, "kernels": kernels, "crossover": crossover,
}  # fmt: skip
