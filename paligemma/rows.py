"""Generation for many inputs at once. Each input is prefilled alone, and then decoded together with the
others; an input whose answer has ended gives its place to the next one.

    rows = Rows(model, slots=8)
    for name in ("a.jpg", "b.jpg"):
        rows.submit(name, processor("caption en", name))
    while rows.busy:
        for row in rows.step():
            print(row.id, row.tokens[-1], row.finish_reason)

A decode step reads the weights once for all rows. On a CPU it computes only the rows in use. The kernels of a
GPU compute all slots, because a CUDA graph has one size; and its steps are launched before the tokens of
earlier steps are read, so a row that ends is computed a few times more, and these tokens are dropped."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .decode_state import DecodeState, bucket
from .errors import PaliGemmaError
from .fields import is_whole, shown
from .generation import TEXT
from .kv_cache import position_bytes
from .machine import free_bytes
from .model import PaliGemma
from .options import Sampling, end_tokens, token_count
from .row import GREEDY, Row


class Rows:
    """Answers up to `slots` inputs at a time. `submit` and `cancel` are for any thread, `step` for one.

    The tokens of an input are those of `model.generate` on that input alone with the same options, except
    where rounding decides between two: a product of several rows has other roundings, which change logits by
    about 1e-6 in float32, and 1e-2 in bfloat16."""

    def __init__(self, model: PaliGemma, slots: int):
        if not is_whole(slots) or slots < 1:
            raise PaliGemmaError(f"slots is {shown(slots)}; it must be a whole number of at least 1")
        self.model, self.slots = model, int(slots)
        self.waiting: deque[Row] = deque()
        self.live: list[Row | None] = [None] * self.slots  # by slot
        # The steps whose tokens have not been read: their rows by slot, and a function that waits for the
        # tokens and their log-probabilities.
        self.launched: deque[tuple[dict[int, Row], Callable[[], Tensor]]] = deque()
        self.state: DecodeState | None = None  # of all slots
        self.entry: DecodeState | None = None  # of the row that is prefilled
        self.damage: str | None = None

    def submit(
        self, id: Any, inputs: Mapping[str, Any], max_new_tokens: int = 100, sampling: Sampling = GREEDY,
        eos_token_id: int | list[int] | None = None,
    ) -> Row:  # fmt: skip
        """Add an input: what the processor returns for one prompt. A later `step` begins its answer. The
        options are those of `PaliGemma.generate`. Raises PaliGemmaError if one is wrong, or if input and
        answer could exceed the model's context."""
        model, count, own = self.model, token_count(max_new_tokens), self.model.config.eos_token_ids
        ends = own if eos_token_id is None else end_tokens(eos_token_id, len(model.table))
        batch, pixel_values = model.unpad(**inputs)
        B, T = batch.input_ids.shape
        if B != 1:
            raise PaliGemmaError(f"the input has {B} rows: submit them one by one")
        model.config.text_config.check_positions(T + count - 1)
        row = Row(id, (batch, pixel_values), T, count, sampling, tuple(ends))
        self.waiting.append(row)
        return row

    def cancel(self, row: Row) -> None:
        """End a row early. The next `step` frees its slot, and returns it with finish_reason "cancelled"."""
        row.cancelled = True

    @property
    def busy(self) -> bool:
        """Whether a row has not ended."""
        return bool(self.waiting or self.launched or any(self.live))

    @property
    def free(self) -> int:
        """How many more inputs would begin at the next step."""
        return max(0, self.live.count(None) - len(self.waiting))

    @torch.inference_mode(False)  # later calls, perhaps outside of that mode, change the tensors created here
    @torch.no_grad()
    def step(self) -> list[Row]:
        """Begin waiting inputs while a slot is free, and compute the next token of every row. Returns the
        rows that have new tokens or have ended, each once."""
        changed: dict[Row, None] = {}
        for row in (*self.waiting, *self.live):
            if row and row.cancelled:
                self._end(row, "cancelled", changed)
        while None in self.live and self.waiting:
            self._begin(self.waiting.popleft(), changed)
            self._read(self._ahead, changed)
        if any(self.live):
            self._decode()
            self._read(self._ahead, changed)
        if not any(self.live):
            self._read(0, changed)
        return list(changed)

    @property
    def _compacts(self) -> bool:
        """Whether a step computes the rows in use alone."""
        return self.model.backend != "triton"

    @property
    def _ahead(self) -> int:
        return self.state.ahead if self.state else 0

    def _begin(self, row: Row, changed: dict[Row, None]) -> None:
        """Prefill a row alone, and copy it to a free slot."""
        assert row.inputs is not None
        (batch, pixel_values), graphed = row.inputs, self.model.uses_graphs
        batch = batch.extended(-(-row.length // TEXT) * TEXT) if graphed else batch
        try:
            state, entry = self._states(batch.input_ids.shape[1] + row.count, row.sampled, changed)
        except PaliGemmaError as error:  # the memory has no room for a row of this length
            row.error = str(error)
            return self._end(row, "error", changed)
        work, inputs = self.model.first_work(entry, batch, pixel_values)

        def first(*inputs: Tensor) -> None:
            work(*inputs)
            entry.keep_latest()

        slot = self.live.index(None)
        if self._compacts:
            entry.sampled = row.sampled
        with self.model.computing(batch.input_ids.numel()):
            entry.begin(row.sampling, row.count)
            entry.compute(first, *inputs)
            state.copy_row(slot, entry, 0, row.length)
            self._copy_tokens(entry, {0: row})
        row.inputs, self.live[slot] = None, row
        self._count(row)

    def _decode(self) -> None:
        """Compute the next token of every row."""
        state = self.state
        assert state is not None
        if self._compacts:
            state = self._compact(state)
        else:
            with state.on_stream():
                state.idle.copy_(torch.tensor([row is None for row in self.live], device="cpu"))

        def following() -> None:
            if not self._compacts:
                state.park()
            self.model.next_step(state)
            state.keep_latest()

        rows = {slot: row for slot, row in enumerate(self.live) if row}
        with self.model.computing(len(state.row)):
            state.compute(following)
            self._copy_tokens(state, rows)
        for row in rows.values():
            self._count(row)

    def _compact(self, state: DecodeState) -> DecodeState:
        """The state of the rows in use, which are moved to the first slots."""
        rows = [(slot, row) for slot, row in enumerate(self.live) if row]
        while None in self.live[: len(rows)]:
            slot, (last, row) = self.live.index(None), rows.pop()
            state.copy_row(slot, state, last, row.filled)
            self.live[slot], self.live[last] = row, None
            rows.insert(slot, (slot, row))
        view = state.first(len(rows), max(row.filled for _, row in rows))
        view.sampled = any(row.sampled for _, row in rows)
        return view

    def _count(self, row: Row) -> None:
        """Count a token as launched. If tokens are read later, the last one frees the slot at once."""
        row.launched += 1
        if row.launched == row.count and self._ahead:
            self.live[self.live.index(row)] = None

    def _copy_tokens(self, state: DecodeState, rows: dict[int, Row]) -> None:
        """Start the copy of the latest tokens to the host."""
        with state.on_stream():
            host = torch.empty_like(state.latest, device="cpu", pin_memory=state.latest.is_cuda)
            host.copy_(state.latest, non_blocking=True)
        copied = state.stream.record_event() if state.stream else None

        def wait() -> Tensor:
            if copied:
                copied.synchronize()
            return host

        self.launched.append((rows, wait))

    def _read(self, ahead: int, changed: dict[Row, None]) -> None:
        """Read the tokens of all launched steps but the last `ahead`."""
        while len(self.launched) > ahead:
            rows, wait = self.launched.popleft()
            tokens, log_probs = wait().tolist()
            for slot, row in rows.items():
                if row.finish_reason is None:
                    self._append(row, int(tokens[slot]), log_probs[slot], changed)

    def _append(self, row: Row, token: int, log_prob: float, changed: dict[Row, None]) -> None:
        changed[row] = None
        if token < 0:  # its logits hold NaN or infinity
            self.damage = row.error = self.damage or self.model.damage()
            return self._end(row, "error", changed)
        row.tokens.append(token)
        row.log_probs.append(log_prob)
        if token in row.ends or len(row.tokens) == row.count:
            self._end(row, "stop" if token in row.ends else "length", changed)

    def _end(self, row: Row, reason: str, changed: dict[Row, None]) -> None:
        row.finish_reason, row.inputs, changed[row] = reason, None, None
        if row in self.waiting:
            self.waiting.remove(row)
        if row in self.live:
            slot = self.live.index(row)
            self.live[slot] = None
            if reason == "error" and self.state:  # a later row of this slot would multiply NaN by zero
                with self.state.on_stream():
                    self.state.cache.keys_values[:, :, slot].zero_()

    def _states(
        self, positions: int, sampled: bool, changed: dict[Row, None]
    ) -> tuple[DecodeState, DecodeState]:
        """The states, replaced by others if they lack room for so many positions, or cannot sample. States of
        which the rows in use alone are computed can, and do if one of these rows is sampled."""
        model, old = self.model, self.state
        graphed, capacity = model.uses_graphs, bucket(positions)
        kind = {"graphed": graphed, "sampled": sampled or self._compacts or bool(old and old.sampled)}
        fits = old and old.cache.capacity >= capacity and old.sampled >= kind["sampled"]
        if old and self.entry and fits and old.graphed == graphed:
            return old, self.entry
        capacity = max(capacity, old.cache.capacity if old else 0)
        self.check_memory(capacity)
        self._read(0, changed)
        state, entry = (model.new_state(n, capacity, scored=True, **kind) for n in (self.slots, 1))
        entry.stream, entry.copying = state.stream, state.copying  # one stream, so that one follows the other
        if state.stream:  # the zeros of the new state come first, and so do the last steps of the old one
            state.stream.wait_stream(torch.cuda.current_stream())
        if old:
            old.finish()
            for slot, row in enumerate(self.live):
                if row:
                    state.copy_row(slot, old, slot, row.filled)
        state.finish()  # the memory of the old state is free only after the copies
        self.state, self.entry = state, entry
        return state, entry

    def check_memory(self, capacity: int) -> None:
        """Raise PaliGemmaError if the memory has no room for so many positions in each row."""
        needed = self.slots * capacity * position_bytes(self.model.config.text_config, self.model.dtype)
        free = free_bytes(self.model.device)
        if needed > free:
            sizes = f"{needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free"
            raise PaliGemmaError(f"the caches of {self.slots} rows need {sizes}: take fewer rows")
