"""The state of a generation: all that changes from token to token, in tensors that keep their addresses, so
that all tokens need the same launches. On a GPU, these launches are replayed as a CUDA graph."""

import copy
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from . import cuda_graph, ops
from .attention_range import Positions, attention_range
from .buffers import SAMPLING_SCRATCH, DecodeBuffers, SamplingBuffers
from .config import PaliGemmaConfig
from .cuda_graph import GraphedStep
from .kv_cache import KVCache
from .options import Sampling
from .sampling import GREEDY, uniform

AHEAD = 4  # steps that are launched before the host reads the token of the first of them
BUCKETS = (512, 1280, 4608)  # capacities of a cache, for text and an image of 224, 448 or 896 pixels
KEPT = 4  # states of ended generations that are kept for later generations


def bucket(positions: int) -> int:
    """The capacity of a cache for this many positions: one of BUCKETS, or a multiple of 1024."""
    return next((size for size in BUCKETS if size >= positions), -(-positions // 1024) * 1024)


class DecodeState:
    """The tensors of one generation: B rows with room for `capacity` positions. It does not refer to the
    model, so it can be freed with the model; but on a CPU, the steps of its cache refer to the weights.

    graphed: its steps are CUDA graphs. sampled: it samples, instead of choosing the most probable token.
    scored: it computes log-probabilities. lengths_on_device: as in KVCache."""

    def __init__(
        self, config: PaliGemmaConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, *,
        lengths_on_device: bool = False, graphed: bool = False, sampled: bool = False, scored: bool = False,
    ):  # fmt: skip
        self.kind = batch, capacity, sampled, scored
        text, self.graphed, self.sampled, self.scored = config.text_config, graphed, sampled, scored
        self.windows = text.windows
        self.window = max((window for window in text.windows if window), default=None)
        self.cache = KVCache(text, batch, capacity, dtype, device, lengths_on_device)

        def zeros(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.buffers = DecodeBuffers(
            output_ids=zeros(capacity, batch),
            output_length=zeros(batch),
            x=zeros(batch, 1, text.hidden_size, dtype=dtype),
            position=self.cache.length[:, None],
            rotation=zeros(2, batch, 1, text.head_dim // 2, dtype=torch.float32),
            limit=zeros(batch, 1),
            start=None if self.window is None else zeros(batch, 1),
            argmax_scratch=torch.full((batch, 64), -(1 << 63), device=device),
        )
        self.sampling = SamplingBuffers(
            temperature=torch.full((batch,), GREEDY, dtype=torch.float64, device=device),
            top_p=zeros(batch, dtype=torch.float64),
            uniform=zeros(batch, capacity if sampled else 0, dtype=torch.float64),
            scratch=zeros(batch, SAMPLING_SCRATCH if sampled else 0),
        )
        self.row = torch.arange(batch, device=device)
        self.latest = zeros(2, batch, dtype=torch.float64)  # each row's last token, and its log-probability
        self.idle = zeros(batch, dtype=torch.bool)  # the rows that are computed for nobody
        self.log_probs = zeros(capacity if scored else 0, batch, dtype=torch.float32)
        self.steps: dict[tuple, GraphedStep] = {}  # by the shapes and dtypes of their inputs
        self.stream, self.copying = cuda_graph.streams(device) if graphed else (None, None)
        self.graph_memory = torch.cuda.graph_pool_handle() if self.stream else None
        # For each step, the event that ends the copy of its tokens to the host.
        self.copied: list[torch.cuda.Event | torch.Event] = []
        self.outputs = (self.buffers.output_ids, self.log_probs)
        if self.stream:
            self.host_copies = [torch.empty_like(x, device="cpu", pin_memory=x.is_cuda) for x in self.outputs]

    def begin(self, sampling: Sampling, tokens: int) -> None:
        """Prepare for a prompt that up to `tokens` new tokens follow."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream())
        self.copied.clear()
        self.cache.clear()
        with self.on_stream():
            self.buffers.output_length.zero_()
            self.sampling.temperature.fill_(float(sampling.temperature) or GREEDY)
            self.sampling.top_p.fill_(float(sampling.top_p))
            self.sampling.uniform.zero_()
            if self.sampled and sampling.temperature:
                self.sampling.uniform[:, :tokens].copy_(uniform(sampling.seed, len(self.row), tokens))

    def next_positions(self) -> Positions:
        """The position of each row's last token, which the cache counts as used from now on."""
        self.cache.advance(1)
        start, limit, used = self.buffers.start, self.buffers.limit, self.cache.used
        on_host = not ops.triton(limit)
        ranges = {window: attention_range(start, limit, used, window, on_host) for window in self.windows}
        return Positions(self.buffers.position, self.buffers.rotation, ranges)

    def append(self, logits: Tensor, table: Tensor, tokens: Tensor | None = None) -> None:
        """Append a token to each row's output, and write its embedding, a row of the table, as the input of
        the next step. The token is chosen from the logits unless it is given. (B, V) float32, (V, E),
        (B,)."""
        if tokens is None and self.sampled:
            tokens = ops.sample(logits, self.buffers, self.sampling)
        ops.next_token(logits, tokens, self.buffers, table, self.cache.rotation, self.window)
        if self.scored:
            last = self.buffers.output_length - 1
            chosen = self.buffers.output_ids[last, self.row].clamp(min=0)
            self.log_probs[last, self.row] = logits.log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]

    def keep_latest(self) -> None:
        """Copy the last token of each row, and its log-probability, to `latest`. The state must be scored."""
        last = self.buffers.output_length - 1
        self.latest[0].copy_(self.buffers.output_ids[last, self.row])
        self.latest[1].copy_(self.log_probs[last, self.row])

    def park(self) -> None:
        """Move the idle rows back to position 0, so that they never reach the end of the cache."""
        start = [] if self.buffers.start is None else [self.buffers.start[:, 0]]
        for counted in (self.cache.length, self.buffers.output_length, *start):
            counted.masked_fill_(self.idle, 0)
        self.buffers.limit[:, 0].masked_fill_(self.idle, 1)

    def first(self, rows: int, used: int) -> "DecodeState":
        """A state of the first rows alone, in the memory of this one. used: as in KVCache."""
        view = copy.copy(self)
        view.cache = self.cache.first(rows, used)
        b, s = self.buffers, self.sampling
        view.buffers = DecodeBuffers(
            b.output_ids[:, :rows], b.output_length[:rows], b.x[:rows], view.cache.length[:, None],
            b.rotation[:, :rows], b.limit[:rows], None if b.start is None else b.start[:rows],
            b.argmax_scratch[:rows],
        )  # fmt: skip
        view.sampling = SamplingBuffers(*(x[:rows] for x in s))
        view.row, view.log_probs, view.latest = (
            self.row[:rows],
            self.log_probs[:, :rows],
            self.latest[:, :rows],
        )
        return view

    def copy_row(self, row: int, other: "DecodeState", from_row: int, filled: int) -> None:
        """Copy a row of another state, or of this one, with the first `filled` positions of its cache. A
        sampled row needs a sampled state."""
        b, o, s = self.buffers, other.buffers, other.sampling
        pairs = [
            (self.cache.keys_values[:, :, row, :filled], other.cache.keys_values[:, :, from_row, :filled]),
            (b.rotation[:, row], o.rotation[:, from_row]),
        ]
        vectors = [
            (self.cache.length, other.cache.length), (self.cache.prefix, other.cache.prefix),
            (b.output_length, o.output_length), (b.x, o.x), (b.limit, o.limit),
            (self.sampling.temperature, s.temperature), (self.sampling.top_p, s.top_p),
        ]  # fmt: skip
        vectors += [] if b.start is None or o.start is None else [(b.start, o.start)]
        pairs += [(mine[row], theirs[from_row]) for mine, theirs in vectors]
        if self.sampled:
            N = min(self.sampling.uniform.shape[1], s.uniform.shape[1])
            pairs.append((self.sampling.uniform[row, :N], s.uniform[from_row, :N]))
        with self.on_stream():
            for mine, theirs in pairs:
                mine.copy_(theirs)

    def launch(self, work: Callable[..., None], *inputs: Tensor) -> None:
        """Start work(*inputs), as `compute` does, and the copy of the tokens to the host, for `read`."""
        self.compute(work, *inputs)
        # Each token has a place of its own on the device and on the host, so only `read` waits for a copy.
        if self.stream and self.copying:
            computed, n = self.stream.record_event(), len(self.copied)
            with torch.cuda.stream(self.copying):
                self.copying.wait_event(computed)
                for copy, original in zip(self.host_copies, self.outputs, strict=True):
                    copy[n : n + 1].copy_(original[n : n + 1], non_blocking=True)
                self.copied.append(self.copying.record_event())

    def compute(self, work: Callable[..., None], *inputs: Tensor) -> None:
        """Start work(*inputs), which appends a token to each row. It may read its inputs and this object. No
        other data that it reads may change between calls, because a graph would not see the change."""
        device = self.cache.length.device
        with self.on_stream():
            if self.graphed:
                shapes = tuple((x.shape, x.dtype) for x in inputs)
                if shapes not in self.steps:
                    self.steps[shapes] = GraphedStep([torch.empty_like(x, device=device) for x in inputs])
                self.steps[shapes].run(work, inputs, self.graph_memory)
            else:
                work(*(x.to(device) for x in inputs))

    @property
    def ahead(self) -> int:
        """How many further steps may be launched before a token is read. It is 0 until there is a graph,
        because the token would wait for the compilation of the next step."""
        step = self.steps.get(())
        return AHEAD if step and step.replay else 0

    def read(self, n: int) -> tuple[Tensor, Tensor]:
        """Wait for the tokens (B,) of step n, and return them on the CPU, with their log-probabilities, (B,)
        if the state is scored and empty if not."""
        if self.stream:
            self.copied[n].synchronize()
        output_ids, log_probs = self.host_copies if self.stream else self.outputs
        return output_ids[n].to("cpu", copy=True), log_probs[n : n + 1].flatten().to("cpu", copy=True)

    def finish(self) -> None:
        """Wait for all launched steps and copies."""
        if self.stream and self.copying:
            self.stream.synchronize()
            self.copying.synchronize()

    def on_stream(self) -> AbstractContextManager:
        return torch.cuda.stream(self.stream) if self.stream else nullcontext()

    @property
    def nbytes(self) -> int:
        """The bytes that the cache and the graphs hold."""
        return self.cache.keys_values.nbytes + sum(step.nbytes for step in self.steps.values())


class StatePool:
    """The states of ended generations, with their graphs. A copy of a model starts with an empty pool."""

    def __init__(self):
        self.states: list[DecodeState] = []
        self.lock = threading.Lock()

    def take(self, *kind: int) -> DecodeState | None:
        with self.lock:
            found = next((state for state in self.states if state.kind == kind), None)
            if found:
                self.states.remove(found)
            return found

    def keep(self, state: DecodeState) -> None:
        with self.lock:
            if state.graphed:
                self.states = [*self.states, state][-KEPT:]

    def __reduce__(self):
        return StatePool, ()
