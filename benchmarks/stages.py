"""What each stage of the measurement does, as independent tasks: a name, and a function that returns what it
found.

A task may say {"failed": why}; one that raises has failed as well. `dry` runs on a CPU, in Triton's
interpreter, with tiny shapes."""

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
PRODUCTION = "bfloat16"  # what production cases are in; odd ones are in every dtype


def tasks(stage: str, dry: bool) -> list[Task]:
    return list(STAGES[stage](dry))


def chosen(dry: bool) -> tuple[list[Case], list[Case]]:
    """Odd and production cases that this GPU has instructions for; for the dry run the first odd one of each
    kernel, and none."""
    odd = cases.odd()
    if dry:
        return list({case.kernel: case for case in reversed(odd)}.values())[::-1], []
    major, minor = torch.cuda.get_device_capability()
    odd, production = (
        [case for case in part if case.chip <= 10 * major + minor] for part in (odd, cases.production())
    )
    return odd, production


# Environment


def environment(dry: bool) -> Iterator[Task]:
    yield "environment", partial(describe_environment, dry)


def describe_environment(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "device": device_name(timing.device_of(dry)),
        "versions": versions(),
        "cores": os.cpu_count(),
    }
    if not dry:
        p = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gb": p.total_memory / 1e9,
            "l2_mb": p.L2_cache_size / 1e6,
        }
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


# Compilation: every kernel once, many processes at a time, so that later stages find it on the disk


def compilation(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    smallest = {
        (case.kernel, case.variant): case for case in sorted(production, key=lambda case: -case.bytes(1))
    }
    for dtype in dtypes(dry):
        for case in [
            *(smallest.values() if dtype == PRODUCTION else ()),
            *odd[: 2 if dry else None],
        ]:  # correctness will interpret them all
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
        if own and dtype == PRODUCTION and not dry:  # as the replays are compared with
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
    """The launcher's results beside the exact ones, with guards around inputs and outputs; then many replays,
    bit for bit."""
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
    changed = [
        i
        for i, (x, y) in enumerate(zip(given, before, strict=True))
        if not any(x is result for result in results) and races.differing(x, y)
    ]
    faults += [f"it changed its input {i}" for i in changed]
    found: dict[str, Any] = {"outputs": []}
    for i, (value, exact, yardstick) in enumerate(zip(case.seen(*results), truth, plain, strict=True)):
        if value.shape != exact.shape or value.dtype not in (DTYPES[dtype], torch.float32, torch.int64):
            faults.append(
                f"output {i} is {tuple(value.shape)} {value.dtype}, not {tuple(exact.shape)} {dtype}"
            )
            continue
        nearest = (
            exact.to(DTYPES[dtype]) if exact.is_floating_point() else exact
        )  # also of logits, which are float32
        floor = (
            2.0**-23 if dtype == "float32" else 0.0
        )  # a GPU's own exp2 and reciprocal are good to a unit in the last place
        rms, rms_allowed = (
            distance(value, exact),
            RMS_FACTOR * max(distance(yardstick, exact), distance(nearest, exact), floor),
        )
        most, most_allowed = (
            largest(value, exact),
            MAX_FACTOR * max(largest(yardstick, exact), largest(nearest, exact)),
        )
        found["outputs"].append(
            {"rms": rms, "rms_allowed": rms_allowed, "max": most, "max_allowed": most_allowed}
        )
        if not (rms <= rms_allowed and most <= most_allowed):  # NaN is not
            faults.append(
                f"output {i}: relative RMS error {rms:.1e} (allowed {rms_allowed:.1e}), largest {most:.1e} (allowed {most_allowed:.1e})"
            )
    if dtype == dtypes(dry)[0]:
        again = races.replays_of_case(case, inputs, dry)
        found |= again
        faults += [races.FAULT] if again["values_that_differed"] else []
    return found | ({"failed": "; ".join(faults)} if faults else {})


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).abs().max())


# Kernels


def kernels(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    launches: dict[str, dict[str, int]] = {}  # of a token, by case and kind of weight
    for quantize in generation.QUANTIZATIONS:
        for case, count in cases.token(quantize).items():
            launches.setdefault(case.name, {})[quantize or PRODUCTION] = count
    for case in production or odd:
        yield case.name, partial(time_kernel, case, dry, launches.get(case.name, {}))


def time_kernel(case: Case, dry: bool, launches: dict[str, int]) -> dict[str, Any]:
    torch.manual_seed(0)
    row: dict[str, Any] = timing.time_case(
        case, timed(case, dry), DTYPES[PRODUCTION], timing.device_of(dry)
    ) | {"launches": launches}
    error = row["contenders"]["triton"].get("error")
    return row | ({"failed": error} if error else {})


def timed(case: Case, dry: bool) -> dict[str, Callable[[], Callable]]:
    """Contender -> what makes it. On a CPU, only what needs no compiler and no GPU."""
    peers = {
        name: make for name, make in case.peers.items() if not dry or name in ("SDPA flash", "SDPA cudnn")
    }
    return {"triton": lambda: case.run, "torch": lambda: case.plain, **peers}


# One decode step, with and without programmatic dependent launch


def steps(dry: bool) -> Iterator[Task]:
    size = 14 if dry else 224
    sampled = Cell(size, 1, sampled=True)
    found = (
        [sampled]
        if dry
        else [*(Cell(size, 1, quantize=q) for q in generation.QUANTIZATIONS), sampled, Cell(size, 4)]
    )
    for i, cell in enumerate((*found, Cell(size, 1, model=generation.PG2))):
        yield f"{cell.name}, replays", partial(check_step, cell, dry)
        if i == 0:  # the one account of a step's parts
            yield (
                "parts of a step",
                partial(
                    timing.attempt,
                    False,
                    partial(generation.profile, Cell(size, 1, "torch" if dry else "triton"), dry),
                ),
            )
        if not cell.sampled:  # the tokens are judged as greedy ones
            yield f"{cell.name}, graphs beside eager launches", partial(generation.check_graphs, cell, dry)


def steps_without_pdl(dry: bool) -> Iterator[Task]:
    yield next(steps(dry))


AT_ONCE = 4  # steps of one graph: the last kernel of one overlaps with the first of the next


def check_step(cell: Cell, dry: bool) -> dict[str, Any]:
    """1000 steps in 250 replays, logits and tokens bit for bit, in memory that is given out again and again,
    and 200 more in memory full of NaN; and how long one takes."""
    step, reset = generation.step_of(cell, dry)

    def several() -> tuple[Tensor, ...]:
        for _ in range(0 if dry else AT_ONCE - 1):
            step()
        return step()

    def measure() -> float:
        reset()
        return clock()

    found = cell._asdict() | races.replays(
        reset, several, dry, guarded=False, most=1000 // AT_ONCE, seconds=3.0
    )
    full_of_nan = races.replays(reset, several, dry, most=200 // AT_ONCE, seconds=2.0)
    found |= {name: found[name] + more for name, more in full_of_nan.items()}
    clock = timing.timer(step, [()], timing.device_of(dry))
    samples = timing.interleaved(
        {"step": measure}, 0.5, 1 if dry else timing.ROUNDS, least=1 if dry else timing.LEAST
    )["step"]
    found |= timing.spread("step_ms", 1e3, samples) | {
        "context": generation.inputs_for(cell, dry)["input_ids"].shape[1]
    }
    found |= generation.decode_fractions(cell, found["context"], found["step_ms"], dry)
    return found | ({"failed": races.FAULT} if found["values_that_differed"] else {})


# Which form of a product is the fastest: from how many rows on, and with which sums


def crossover(dry: bool) -> Iterator[Task]:
    m = cases.DECODERS[0]._replace(E=33, M=20) if dry else cases.DECODERS[0]
    for R in (1, 2) if dry else (1, 2, 4, 8, 16, 32, 64):
        for case in (
            cases.gate_up_case(f"{R} rows", R, m.E, m.M, False, None),
            cases.head_case(f"{R} rows", R, m.E, 70 if dry else cases.VOCABULARY, False, None, None),
        ):
            yield case.name, partial(time_forms, case, R, dry)
    for name, (sizes, options) in (
        {"": ((2, 33, 20), {"bias": True, "gelu": True})}.items() if dry else PREFILL.items()
    ):
        yield f"prefill, {name}", partial(time_linear, name, *sizes, dry, **options)


# The products of a first token: rows, features in, features out, and what else they are. SigLIP's that have
# few tiles, and Gemma's down, at 224, 448 and 896 pixels.
PREFILL: dict[str, tuple[tuple[int, int, int], dict[str, bool]]] = {
    f"{name}, {rows} rows": ((rows, *sizes), options)
    for name, every, sizes, options in (
        ("SigLIP out_proj", (256, 1024, 4096), (1152, 1152), {"bias": True}),
        ("SigLIP fc2", (256, 1024, 4096), (4304, 1152), {"bias": True}),
        ("down", (272, 1040, 4112), (16384, 2048), {}),
        ("SigLIP fc1", (256, 1024), (1152, 4304), {"bias": True, "gelu": True}),
        ("SigLIP qkv", (256, 1024), (1152, 3 * 1152), {"bias": True}),
        ("qkv", (272,), (2048, 2560), {}), ("o", (272,), (2048, 2048), {}), ("gate and up", (272,), (2048, 2 * 16384), {}),
    )
    for rows in every
}  # fmt: skip
REDUCED, ALL_WANTED = "cuBLAS, sums in bfloat16", "cuBLAS, sums in float32"


def time_linear(
    name: str, rows: int, size_in: int, size_out: int, dry: bool, **options: bool
) -> dict[str, Any]:
    """cuBLAS with its parts' sums in bfloat16, which is torch's default, and in float32, beside the kernel's
    forms: microseconds, and the error of each. Where a form is faster than both of cuBLAS's by more than the
    spread of the times, what to write into kernels/linear.py."""
    settings = torch.backends.cuda.matmul
    before = settings.allow_bf16_reduced_precision_reduction
    gelu = options.get("gelu", False)

    def cublas(reduced: bool) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
            settings.allow_bf16_reduced_precision_reduction = reduced
            with ops.use("torch"):
                return ops.linear(x, weight, bias, gelu)

        return run

    forms = {str(form): form for form in forms_for(rows, size_in, size_out)}
    made = {
        name: cases.linear_case(name, rows, size_in, size_out, form, **options)
        for name, form in forms.items()
    }
    case = next(iter(made.values()))
    runs = {REDUCED: cublas(True), ALL_WANTED: cublas(False)} | {
        name: case.run for name, case in made.items()
    }
    try:
        device, dtype = timing.device_of(dry), DTYPES[PRODUCTION]
        found = timing.time_case(
            case, {name: lambda run=run: run for name, run in runs.items()}, dtype, device, 0.3
        )
        inputs = case.make(device, dtype)
        exact = case.exact(*inputs)
        errors = {name: timing.distance(run(*inputs), exact) for name, run in runs.items()}
    finally:
        settings.allow_bf16_reduced_precision_reduction = before
    broken = [
        f"{name}: {found['contenders'][name]['error']}"
        for name in forms
        if "error" in found["contenders"][name]
    ]
    found |= {"rms": errors, "rms_of_rounding": timing.distance(exact.to(dtype), exact), "line": None}
    if broken:
        return found | {"failed": "; ".join(broken)}
    best = fastest(found["contenders"])
    if best in forms:
        found["line"] = (
            f"({nearest(rows)}, {size_out}, {size_in}): {{{architecture()}: Form{tuple.__repr__(forms[best])}}},  # {name}"
        )
    return found


def forms_for(rows: int, size_in: int, size_out: int, programs: int = 132) -> list[Form]:
    """Each tile, with as many splits as it takes to have a program for each SM, and with twice as many; one
    where there are tiles enough."""
    found = []
    for tile in cases.TILES:
        missing = programs / (-(-rows // tile.rows) * -(-size_out // tile.outputs))
        least = 1 << max(0, math.ceil(math.log2(missing)))
        splits = [
            n
            for n in ((1,) if least == 1 else (least, 2 * least))
            if n <= min(16, -(-size_in // tile.features))
        ]
        found += [tile._replace(splits=n) for n in splits or (1,)]
    return found


def fastest(times: dict[str, dict[str, float]]) -> str:
    """cuBLAS with torch's own sums, unless another's slow measurements are faster than the fast ones of
    cuBLAS."""
    limit = min(times[name]["us_p10"] for name in (REDUCED, ALL_WANTED) if "us" in times[name])
    best = min((name for name in times if "us" in times[name]), key=lambda name: times[name]["us"])
    return best if times[best]["us_p90"] < limit else REDUCED


def time_forms(case: Case, R: int, dry: bool) -> dict[str, Any]:
    """The fused kernel, from two rows on by tl.dot; the same by FMA, a row at a time; and norm, cuBLAS and
    GeGLU one after another."""

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
    errors = [f"{name}: {times['error']}" for name, times in found["contenders"].items() if "error" in times]
    return found | {"rows": R} | ({"failed": "; ".join(errors)} if errors else {})


STAGES: dict[str, Callable[[bool], Iterator[Task]]] = {
    "environment": environment, "ceilings": ceilings, "compilation": compilation, "correctness": correctness,
    "steps": steps, "steps_without_pdl": steps_without_pdl, "model": generation.model_tasks, "peers": generation.peer_tasks,
    "kernels": kernels, "crossover": crossover,
}  # fmt: skip
