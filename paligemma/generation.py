"""A batch's answer in the making, and CUDA graphs of its steps.

Everything that changes from token to token lies in memory that stays where it is, so that a token is the same launches every time. A GPU
is given a step as it is the first time, which compiles and loads what it needs; the second time the step is recorded as a graph, and
from then on it is replayed. The host looks at a token when the next ones are under way, and what these have made behind the end of
every row is left behind.
"""

import gc
import os
import threading
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import ops
from .config import PaliGemmaConfig
from .gemma import Places
from .kv_cache import KVCache

GRAPHS = os.environ.get("PALIGEMMA_GRAPHS", "1") != "0"  # "0": every kernel is launched from the host
AHEAD = 4  # tokens that a GPU is given before the first of them is looked at
BUCKETS = (512, 1280, 4608)  # positions of a cache: of 224, 448 or 896 pixels, and text; above, multiples of 1024
TEXT = 16  # lengths of a prompt are rounded up to multiples of it
KEPT = 4  # generations that have ended, for the next calls of their kind


def bucket(positions: int) -> int:
    return next((size for size in BUCKETS if size >= positions), -(-positions // 1024) * 1024)


class Generation:
    """Of B rows with room for `capacity` positions: `recorded` as graphs, `sampled` by temperature and top-p, `scored` with log-probabilities.
    `kernels`: each row's length is known to the device alone. It holds no model, so that it goes when its model goes."""

    def __init__(
        self, config: PaliGemmaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, *,
        kernels: bool = False, recorded: bool = False, sampled: bool = False, scored: bool = False,
    ):  # fmt: skip
        self.kind = batch, capacity, sampled, scored
        text, windows = config.text_config, {config.text_config.window(i) for i in range(config.text_config.num_hidden_layers)}
        self.recorded, self.sampled, self.scored = recorded, sampled, scored
        self.windows, self.window = windows, max((window for window in windows if window), default=None)
        self.cache = KVCache(text, batch, capacity, dtype, device, whole=kernels)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.following = ops.Next(
            said=zeros(capacity, batch), number=zeros(batch), x=zeros(batch, 1, text.hidden_size, dtype=dtype), position=self.cache.length[:, None],
            rotation=zeros(2, batch, 1, text.head_dim // 2, dtype=torch.float32), limit=zeros(batch, 1),
            start=None if self.window is None else zeros(batch, 1), best=torch.full((batch, 64), -(1 << 63), device=device),
        )  # fmt: skip
        self.row = torch.arange(batch, device=device)
        self.chances = ops.Chances(
            temperature=zeros(dtype=torch.float64), top_p=zeros(dtype=torch.float64),
            uniform=zeros(batch, capacity if sampled else 0, dtype=torch.float64), state=zeros(batch, ops.STATE if sampled else 0),
        )  # fmt: skip
        self.log_probs = zeros(capacity if scored else 0, batch, dtype=torch.float32)
        self.steps: dict[tuple[tuple[torch.Size, torch.dtype], ...], Step] = {}
        self.stream, self.copying = streams(device) if recorded else (None, None)
        self.pool = torch.cuda.graph_pool_handle() if self.stream else None
        self.events: list[torch.cuda.Event | torch.Event] = []  # of the tokens that are on the host
        if self.stream:
            self.on_host = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) for x in (self.following.said, self.log_probs)]

    def begin(self, temperature: float, top_p: float, uniform: Tensor | None) -> None:
        """Anew, for another prompt."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.events.clear()
        self.cache.used = self.cache.capacity if self.cache.whole else 0
        with self.on_stream():
            self.following.number.zero_()
            self.chances.temperature.fill_(temperature)
            self.chances.top_p.fill_(top_p)
            if uniform is not None:
                self.chances.uniform[:, : uniform.shape[1]].copy_(uniform)

    def places(self) -> Places:
        """Of the tokens that were said last."""
        self.cache.advance(1)
        seen = {window: ops.seen(self.following.start, self.following.limit, self.cache.used, window) for window in self.windows}
        return Places(self.following.position, self.following.rotation, seen)

    def accept(self, logits: Tensor, table: Tensor, tokens: Tensor | None = None) -> None:  # (B, V), (V, E), (B,)
        """Say the tokens, or those that the logits make; the table has their embeddings."""
        following, row = self.following, self.row
        if tokens is None and self.sampled:
            tokens = ops.sample(logits, following, self.chances)
        ops.next_token(logits, tokens, following, table, self.cache.rotation, self.window)
        if self.scored:
            last = following.number - 1
            said = following.said[last, row].clamp(min=0)
            self.log_probs[last, row] = logits.log_softmax(dim=-1).gather(1, said[:, None])[:, 0]

    def launch(self, work: Callable[..., None], *inputs: Tensor) -> None:
        """Have work(*inputs) make the next token. It may read what it is given here and what lies in this object, and nothing else that
        changes."""
        with self.on_stream():
            if self.recorded:
                kinds = tuple((x.shape, x.dtype) for x in inputs)
                if kinds not in self.steps:
                    self.steps[kinds] = Step([torch.empty_like(x, device=self.cache.length.device) for x in inputs])
                self.steps[kinds].run(work, inputs, self.pool)
            else:
                work(*(x.to(self.cache.length.device) for x in inputs))
        if self.stream and self.copying:  # each token has a place of its own, on the device and on the host: nothing waits for a copy but `read`
            made, n = self.stream.record_event(), len(self.events)
            with torch.cuda.stream(self.copying):
                self.copying.wait_event(made)
                for mine, theirs in zip(self.on_host, (self.following.said, self.log_probs), strict=True):
                    mine[n : n + 1].copy_(theirs[n : n + 1], non_blocking=True)
                self.events.append(self.copying.record_event())

    @property
    def ahead(self) -> int:
        """How many tokens may be under way when one is read. Before there is a graph, none: a token would wait for the next one's compilation."""
        step = self.steps.get(())
        return AHEAD if step and step.replay else 0

    def read(self, n: int) -> tuple[Tensor, Tensor]:  # -> (B,), (B,) or ()
        """The n-th tokens, once they are made, and their log-probabilities where they are scored; on the CPU."""
        if self.stream:
            self.events[n].synchronize()
        said, log_probs = self.on_host if self.stream else (self.following.said, self.log_probs)
        return said[n].to("cpu", copy=True), log_probs[n : n + 1].flatten().to("cpu", copy=True)

    def finish(self) -> None:
        """Wait for what is under way."""
        if self.stream and self.copying:
            self.stream.synchronize()
            self.copying.synchronize()

    def on_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    @property
    def nbytes(self) -> int:
        """What it holds: the cache, and the memory of the graphs."""
        return self.cache.keys_values.nbytes + sum(step.nbytes for step in self.steps.values())


def streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream] | tuple[None, None]:
    """For the steps, and for the copies of their tokens to the host, for which the next step need not wait; none on a CPU."""
    return (torch.cuda.Stream(device), torch.cuda.Stream(device)) if device.type == "cuda" else (None, None)


class Idle:
    """Generations that have ended. A copy of the model that they belong to has none."""

    def __init__(self):
        self.runs: list[Generation] = []
        self.lock = threading.Lock()

    def take(self, *kind: int) -> Generation | None:
        with self.lock:
            found = next((run for run in self.runs if run.kind == kind), None)
            if found:
                self.runs.remove(found)
            return found

    def keep(self, run: Generation) -> None:
        with self.lock:
            if run.recorded:
                self.runs = [*self.runs, run][-KEPT:]

    def __reduce__(self):
        return Idle, ()


class Step:
    """One function of some tensors, as a graph from the second time on. Where none can be made, for want of memory or by a driver's limits, a
    warning says so and it is launched as it is."""

    def __init__(self, inputs: list[Tensor]):
        self.inputs, self.warm, self.failed, self.replay, self.nbytes = inputs, False, False, None, 0

    def run(self, work: Callable[..., None], inputs: tuple[Tensor, ...], pool: Any) -> None:
        for mine, given in zip(self.inputs, inputs, strict=True):
            mine.copy_(given)
        if self.warm and not self.failed and self.replay is None:
            try:
                self.replay, self.nbytes = record(lambda: work(*self.inputs), pool)
            except RuntimeError as error:
                self.failed = True
                warnings.warn(f"no CUDA graph was made, and every kernel is launched from the host: {str(error).splitlines()[0]}", stacklevel=2)
        if self.replay:
            self.replay()
        else:
            work(*self.inputs)
            self.warm = True


def record(work: Callable[[], None], pool: Any) -> tuple[Callable[[], None], int]:
    """What replays the launches of work(), and the bytes that it holds. As torch.cuda.graph does it, without collecting garbage first."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()  # for the graph cannot take from what torch keeps for others
    torch.cuda.current_blas_handle()  # of this thread, which could not be made in between
    # The workspace of a product goes into the graph's memory, as in torch's own cudagraph_trees: others are freed with the graphs of others.
    forget_workspaces = getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)
    forget_workspaces()
    graph, before, collecting = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(), gc.isenabled()
    gc.disable()  # what it would free might wait for the device
    try:
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        work()
    finally:
        if torch.cuda.is_current_stream_capturing():
            graph.capture_end()
        forget_workspaces()
        if collecting:
            gc.enable()
    return graph.replay, torch.cuda.memory_reserved() - before
