"""Checks that overlapping kernels compute the same bits as kernels that run one after another, in many
replays of CUDA graphs.

From sm_90 on, a kernel of a decode starts before the previous kernel has ended (programmatic dependent
launch), and waits before it reads what that kernel writes. Another kernel between two of ours, such as a
fill, would prevent the overlap. So there are three graphs, replayed in turn: the first restores all inputs
and fills every buffer that a kernel will write with NaN, the second has only our kernels, and the third
compares their results with those of launches that do not overlap.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import timing
from benchmarks.cases import Case
from benchmarks.timing import tensors
from paligemma.kernels import common
from paligemma.kernels.common import dependent, launch_dependents, wait_for_dependencies

GUARD = 4096  # elements of NaN on either side of a buffer
ALIGNMENT = 256  # bytes, as torch's allocator aligns
FAULT = "replays in which kernels overlap differ from launches one after another"
DELAY = 5000  # ns; enough for the next kernel to start and to read everything that it reads without waiting


class Guarded(TorchFunctionMode):
    """Within this context, memory from torch.empty, empty_like and new_empty is filled with NaN and is
    surrounded by guards.

    again: return the buffers of an earlier context in the same order, and leave it to `fill` to fill them."""

    def __init__(self, again: "Guarded | None" = None):
        super().__init__()
        self.buffers: list[Tensor] = []
        self.prepared = None if again is None else iter(again.buffers)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.place(out) if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty) else out

    def place(self, like: Tensor) -> Tensor:
        """Memory with the shape and strides of `like`, within a buffer."""
        places = zip(like.shape, like.stride(), strict=True)
        size = 2 * GUARD + (1 + sum((n - 1) * stride for n, stride in places) if like.numel() else 0)
        if self.prepared is None:
            self.buffers.append(torch.full((size,), poison(like.dtype), dtype=like.dtype, device=like.device))
        else:
            self.buffers.append(next(self.prepared))
            if (len(self.buffers[-1]), self.buffers[-1].dtype) != (size, like.dtype):
                raise RuntimeError("the second launch asks for other memory than the first")
        return self.buffers[-1].as_strided(like.shape, like.stride(), GUARD)

    def copy(self, x: Tensor) -> Tensor:
        return self.place(x).copy_(x)

    def fill(self) -> None:
        for buffer in self.buffers:
            buffer.fill_(poison(buffer.dtype))

    def intact(self) -> bool:
        """Whether nothing was written outside of the returned memory."""
        ends = [end for buffer in self.buffers for end in (buffer[:GUARD], buffer[-GUARD:])]
        return all(bool(is_poison(end).all()) for end in ends)


def poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def is_poison(x: Tensor) -> Tensor:
    return x.isnan() if x.dtype.is_floating_point else x == torch.iinfo(x.dtype).max


def differing(x: Tensor, y: Tensor) -> int:
    """The number of values whose bits differ."""
    return int((bits(x) != bits(y)).sum())


def bits(x: Tensor) -> Tensor:
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize]
    return x.contiguous().view(whole)


@contextmanager
def one_after_another() -> Iterator[None]:
    """Within this context no kernel starts before the previous one has ended."""
    before, common.DEPENDENT = common.DEPENDENT, False
    try:
        yield
    finally:
        common.DEPENDENT = before


def replays(
    begin: Callable[[], None], launch: Callable[[], Any], dry: bool,
    guarded: bool = True, most: int = 1000, seconds: float = 0.3,
) -> dict[str, Any]:  # fmt: skip
    """Replay launch() at most `most` times or for about `seconds`, each time after begin() has restored the
    inputs. Returns the number of values of the results, over all replays, that differ from the values of
    launches one after another.

    guarded: the memory that launch() writes is full of NaN before each replay. This finds a kernel that reads
    without waiting. Otherwise the allocator reuses memory within the graph. This finds a kernel that
    overwrites memory before another kernel has read it."""
    begin()
    with one_after_another():
        expected = [x.clone() for x in tensors(launch())]
    differed = torch.zeros((), dtype=torch.int64, device=expected[0].device)
    memory = Guarded()
    begin()
    if guarded:
        with memory:
            launch()

    def prepare() -> None:
        memory.fill()
        begin()

    def work() -> tuple[Tensor, ...]:
        if not guarded:
            return tensors(launch())
        with Guarded(memory):
            return tensors(launch())

    def compare() -> None:
        for x, y in zip(results, expected, strict=True):
            differed.add_((bits(x) != bits(y)).sum())

    if dry:
        prepare()
        results = work()
        compare()
        return {"replays": 1, "values_that_differed": int(differed)}
    first, _ = timing.captured(prepare, prepare)
    second, results = timing.captured(work, work)
    third, _ = timing.captured(compare, compare)
    differed.zero_()
    done, start = 0, time.perf_counter()
    while done < most and time.perf_counter() - start < seconds:
        for _ in range(min(50, most - done)):
            for graph in (first, second, third):
                graph.replay()
            done += 1
        torch.cuda.synchronize()
    return {"replays": done, "values_that_differed": int(differed)}


def replays_of_case(case: Case, inputs: tuple[Tensor, ...], dry: bool) -> dict[str, Any]:
    """Replay one kernel after another kernel that writes its inputs while it starts. The inputs that are
    weights are not written, because the kernel may read them before it waits."""
    weights = {id(x) for x in case.weights(*inputs)}
    written = [i for i, x in enumerate(inputs) if id(x) not in weights]
    starts, size = [], 0
    for i in written:
        starts.append(size)
        size += -(-inputs[i].nbytes // ALIGNMENT) * ALIGNMENT
    kept, passed_on = (torch.zeros(size, dtype=torch.uint8, device=inputs[0].device) for _ in range(2))
    given = list(inputs)
    for i, start in zip(written, starts, strict=True):
        place = slice(start, start + inputs[i].nbytes)
        kept[place].view(inputs[i].dtype).view(inputs[i].shape).copy_(inputs[i])
        given[i] = passed_on[place].view(inputs[i].dtype).view(inputs[i].shape)

    def launch() -> Any:
        pass_on(kept, passed_on)
        return case.bare(*given)

    def begin() -> None:
        passed_on.fill_(0xFF)  # NaN, and -1

    return replays(begin, launch, dry)


@triton.jit
def pass_on_kernel(from_ptr, to_ptr, n, BLOCK: tl.constexpr, DELAY: tl.constexpr, PDL: tl.constexpr):
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    if PDL:
        now = tl.extra.cuda.globaltimer()  # pyright: ignore[reportAttributeAccessIssue]
        end = now + DELAY
        while now < end:
            now = tl.extra.cuda.globaltimer()  # pyright: ignore[reportAttributeAccessIssue]
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + i, tl.load(from_ptr + i, mask=i < n, other=0), mask=i < n)


def pass_on(source: Tensor, destination: Tensor) -> None:
    """Copy a multiple of 8 bytes with a small, slow kernel that lets the next kernel start at once."""
    source, destination, block = source.view(torch.int64), destination.view(torch.int64), 1024
    n = len(source)
    launch: Any = pass_on_kernel[(triton.cdiv(n, block),)]
    launch(source, destination, n, BLOCK=block, DELAY=DELAY, PDL=dependent(), launch_pdl=dependent())
