"""Times device work, as medians of CUDA-graph replays. On a CPU it times plain calls, only to test this code.

A graph holds a call for each of several input sets, which have separate outputs and together are several
times as large as the L2 cache. It repeats them until it takes half a millisecond, so that the microseconds
between two graphs are a small part. Events time its replay directly after another replay, so that the device
never waits for the host.
"""

import json
import math
import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import Case

Task = tuple[str, Callable[[], dict[str, Any]]]  # a name, and a function that returns the findings
ROUNDS = 25  # measurements of each contender, in turn
LEAST = 5  # measurements of each contender that are made however long they take
MOST_SETS = 64
GRAPH_SECONDS = 500e-6  # the shortest duration of a graph
RIGHT = 0.05  # in half precision, a right contender's relative RMS difference from plain torch is below this
# After a failed capture, torch's generator and allocator may be broken: a new process is needed.
failed_captures: list[torch.cuda.CUDAGraph] = []


def time_case(
    case: Case, contenders: dict[str, Callable[[], Callable]], dtype: torch.dtype, device: str,
    seconds: float = 1.0,
) -> dict[str, Any]:  # fmt: skip
    """The times of every contender, interleaved, in at most about `seconds` after the warm-up.

    A contender that fails, or whose result differs from plain torch's, has an error instead of times."""
    limits, sets = ceilings(device), input_sets(case, dtype, device)
    expected = case.seen(*tensors(case.plain(*(x.clone() for x in sets[0]))))
    timers, rows = {}, {}
    for name, make in contenders.items():
        try:
            timers[name] = timer(checked(case, make(), sets[0], expected), sets, device)
        except Exception as error:
            if is_fatal(error):
                raise RuntimeError(f"{name}: {one_line(error)}") from error
            rows[name] = {"error": one_line(error)}
    for name, samples in interleaved(timers, seconds, ROUNDS if device == "cuda" else 1).items():
        rows[name] = describe(case, samples, dtype, limits)
    size = sum(x.nbytes for x in sets[0])
    return {
        "kernel": case.kernel, "shape": case.shape, "dtype": str(dtype).removeprefix("torch."),
        "bytes": case.bytes(dtype.itemsize), "flops": case.flops, "sets": len(sets),
        "sets_over_l2": len(sets) * size / l2_bytes(device),
        "timed": "graph replays" if device == "cuda" else "calls", "contenders": rows,
    }  # fmt: skip


def checked(case: Case, call: Callable, inputs: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> Callable:
    """Return call if its results are close to the expected ones; raise ArithmeticError otherwise."""
    results = case.seen(*tensors(call(*(x.clone() for x in inputs))))
    difference = max(distance(a, b) for a, b in zip(results, expected, strict=True))
    if not difference < RIGHT:
        raise ArithmeticError(f"its result differs from plain torch's by {difference:.1e} (relative RMS)")
    return call


def input_sets(case: Case, dtype: torch.dtype, device: str) -> list[tuple[Tensor, ...]]:
    first = case.make(device, dtype)
    size = sum(x.nbytes for x in first)
    count = min(MOST_SETS, max(2, math.ceil(3 * l2_bytes(device) / size))) if device == "cuda" else 1
    return [first, *(case.make(device, dtype) for _ in range(count - 1))]


def timer(call: Callable, sets: list[tuple[Tensor, ...]], device: str) -> Callable[[], float]:
    """A function that measures the seconds of one call."""
    return graph_timer(call, sets) if device == "cuda" else call_timer(call, sets)


def call_timer(call: Callable, sets: list[tuple[Tensor, ...]]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        for inputs in sets:
            call(*inputs)
        return (time.perf_counter() - start) / len(sets)

    return measure


def graph_timer(call: Callable, sets: list[tuple[Tensor, ...]]) -> Callable[[], float]:
    whole = graph_of(call, sets, 1)
    whole()  # raises the clocks for the next measurement
    times = math.ceil(GRAPH_SECONDS / max(whole(), 1e-6))
    if times > 1:
        whole = graph_of(call, sets, times)
    return lambda: whole() / times / len(sets)


def graph_of(call: Callable, sets: list[tuple[Tensor, ...]], times: int) -> Callable[[], float]:
    """A function that measures the seconds of one replay of a graph with `times` passes over the sets."""

    def work() -> list:
        outputs = []
        for _ in range(times):
            outputs = [call(*inputs) for inputs in sets]
        return outputs

    graph, outputs = captured(work, lambda: call(*sets[0]))
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def measure(kept: Any = outputs) -> float:  # keeps the outputs as long as the graph that writes them
        graph.replay()
        before.record()
        graph.replay()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    return measure


def captured(work: Callable[[], Any], warm_up: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """work() as a CUDA graph, and the result of work(), which each replay overwrites."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # kernels must be compiled, loaded and planned before the capture
        for _ in range(3):
            warm_up()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            outputs = work()
    except Exception:
        failed_captures.append(graph)
        raise
    return graph, outputs


def interleaved(
    timers: dict[str, Callable[[], float]], seconds: float, rounds: int = ROUNDS, least: int = LEAST
) -> dict[str, list[float]]:
    """`rounds` samples of each timer, in turn; after `seconds` fewer, but at least `least`."""
    samples: dict[str, list[float]] = {name: [] for name in timers}
    for measure in timers.values() if rounds > 1 else ():
        measure()
    start = time.monotonic()
    for done in range(rounds):
        if done >= least and time.monotonic() - start > seconds:
            break
        for name, measure in timers.items():
            samples[name].append(measure())
    return samples


def describe(
    case: Case, samples: list[float], dtype: torch.dtype, limits: dict[str, float]
) -> dict[str, float]:
    """Microseconds (median, 10th and 90th percentile), rates, and the fraction of this machine's limit. The
    limit is the time of copying as many bytes or of the matrix products alone, whichever is longer, and the
    fraction is this time divided by the measured time. `read_fraction` uses the speed of reading instead of
    copying. It is higher, and a decode writes almost nothing."""
    moved, median = case.bytes(dtype.itemsize), statistics.median(samples)
    compute = case.flops / limits["matmul_tflop_s"] / 1e12
    floor, read_floor = (max(moved / limits[name] / 1e9, compute) for name in ("copy_gb_s", "read_gb_s"))
    return spread("us", 1e6, samples) | {
        "rounds": len(samples), "gb_s": moved / median / 1e9, "tflop_s": case.flops / median / 1e12,
        "floor_us": 1e6 * floor, "fraction": floor / median,
        "read_floor_us": 1e6 * read_floor, "read_fraction": read_floor / median,
    }  # fmt: skip


def spread(name: str, per_second: float, samples: list[float]) -> dict[str, float]:
    """The median, and the 10th and 90th percentile, in units of which a second has `per_second`."""
    ordered = sorted(samples)
    at = [per_second * ordered[round(part * (len(ordered) - 1))] for part in (0.1, 0.9)]
    return {name: per_second * statistics.median(ordered), f"{name}_p10": at[0], f"{name}_p90": at[1]}


@lru_cache
def ceilings(device: str) -> dict[str, float]:
    """This machine's limits: the rates of a copy (bytes read and written), a sum (bytes read) and a square
    bfloat16 product (float32 on a CPU), and the time of the shortest kernel in a graph. If the environment
    variable MEASURED_CEILINGS holds limits that were measured earlier, these are used."""
    if measured := os.environ.get("MEASURED_CEILINGS"):
        return json.loads(measured)
    cuda = device == "cuda"
    n, side = (1 << 30, 8192) if cuda else (1 << 20, 256)
    x = torch.randn(n, device=device)
    y = torch.empty_like(x)
    dtype = torch.bfloat16 if cuda else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    one = torch.randn(1, device=device)
    timers = {
        "copy": timer(y.copy_, [(x,)] * 2, device), "read": timer(torch.sum, [(x,)] * 2, device),
        "matmul": timer(torch.mm, [(a, b)] * 4, device),
        "launch": timer(lambda: one.add_(1), [()] * 100, device),
    }  # fmt: skip
    times = {name: statistics.median(samples) for name, samples in interleaved(timers, 5.0).items()}
    return {
        "copy_gb_s": 2 * x.nbytes / times["copy"] / 1e9, "read_gb_s": x.nbytes / times["read"] / 1e9,
        "matmul_tflop_s": 2 * side**3 / times["matmul"] / 1e12, "launch_us": 1e6 * times["launch"],
    }  # fmt: skip


def l2_bytes(device: str) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device == "cuda" else 1 << 20


def tensors(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def distance(x: Tensor, y: Tensor) -> float:
    """Relative RMS of the difference from y; NaN if either holds NaN. For integers: 0 if all are equal, else
    infinity."""
    if not y.is_floating_point():
        return 0.0 if torch.equal(x, y) else math.inf
    return float((x.double() - y.double()).norm() / y.double().norm().clamp_min(1e-30))


def device_of(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def synchronize(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()


def attempt(own: bool, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of work(). If another implementation (own=False) fails, the result is {"error": why}, unless
    the error is fatal."""
    try:
        return work()
    except Exception as error:
        if own or is_fatal(error):
            raise
        return {"error": one_line(error)}


FATAL = (
    "CUDA error", "illegal memory access", "misaligned address", "unspecified launch failure",
    "device-side assert",
)  # fmt: skip


def is_fatal(error: Exception) -> bool:
    """Whether the process's CUDA context is unusable after this error."""
    text = str(error)
    return "captur" not in text and any(sign in text for sign in FATAL)


def one_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]
