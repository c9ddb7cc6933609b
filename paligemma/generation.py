"""Generation: one prefill, then one token at a time. The host reads a token while the GPU computes later
ones; tokens that were computed after all rows have ended are dropped."""

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .attention_range import Positions
from .config import PaliGemmaConfig
from .decode_state import DecodeState, StatePool, bucket
from .errors import PaliGemmaError
from .kv_cache import KVCache
from .options import Sampling
from .padding import UnpaddedBatch

GRAPHS = os.environ.get("PALIGEMMA_GRAPHS", "1") != "0"  # the default of GenerativeModel.graphs
TEXT = 16  # prompts are extended to a multiple of this number of tokens, so that fewer lengths need a graph


class GenerativeModel(nn.Module):
    """The loop of a generation, for a model that computes the logits of each row's next token."""

    def __init__(self, config: PaliGemmaConfig, backend: str):
        super().__init__()
        self.config, self.backend = config, backend
        self.graphs = GRAPHS  # whether decode steps are replayed, as CUDA graphs or as calls that were listed
        self.pool = StatePool()

    def first_logits(
        self, cache: KVCache, batch: UnpaddedBatch, pixel_values: Tensor | None, argmax_scratch: Tensor
    ) -> Tensor:
        """The logits (B, V) float32 of each row's first token. Fills the cache."""
        raise NotImplementedError

    def next_logits(self, cache: KVCache, x: Tensor, positions: Positions, argmax_scratch: Tensor) -> Tensor:
        """The logits (B, V) float32 of the token after the one whose embedding is x (B, 1, E). Appends to the
        cache."""
        raise NotImplementedError

    def damage(self) -> str:
        """The reason why logits hold NaN or infinity."""
        raise NotImplementedError

    @property
    def table(self) -> Tensor:
        """The embeddings of the tokens, (V, E)."""
        raise NotImplementedError

    def computing(self, tokens: int) -> AbstractContextManager:
        """The context in which the model computes on this many tokens; see backend.computing."""
        raise NotImplementedError

    def new_state(self, batch: int, capacity: int, **kind: bool) -> DecodeState:
        """A state for `batch` rows of up to `capacity` positions; kind: graphed, sampled, scored."""
        dtype, device, on_device = self.table.dtype, self.table.device, self.backend == "triton"
        return DecodeState(self.config, batch, capacity, dtype, device, lengths_on_device=on_device, **kind)

    def first_step(self, state: DecodeState, batch: UnpaddedBatch, pixel_values: Tensor | None) -> Tensor:
        """Append the first token of each row, and return its logits (B, V) float32."""
        logits = self.first_logits(state.cache, batch, pixel_values, state.buffers.argmax_scratch)
        with self.computing(len(logits)):  # few rows, on as few threads as for every later token
            state.append(logits, self.table)
        return logits

    def first_work(
        self, state: DecodeState, batch: UnpaddedBatch, pixel_values: Tensor | None
    ) -> tuple[Callable[..., None], tuple[Tensor, ...]]:
        """The first step as a function of tensors, for `DecodeState.compute`, and these tensors."""
        inputs = batch if pixel_values is None else (*batch, pixel_values)

        def work(*inputs: Tensor) -> None:
            self.first_step(state, UnpaddedBatch(*inputs[: len(batch)]), *inputs[len(batch) :] or (None,))

        return work, tuple(inputs)

    def next_step(self, state: DecodeState) -> Tensor:
        """Append the next token of each row, and return its logits (B, V) float32."""
        positions, buffers = state.next_positions(), state.buffers
        logits = self.next_logits(state.cache, buffers.x, positions, buffers.argmax_scratch)
        state.append(logits, self.table)
        return logits

    @torch.inference_mode(False)  # later calls, perhaps outside of that mode, change the tensors created here
    @torch.no_grad()
    def tokens(
        self, batch: UnpaddedBatch, pixel_values: Tensor | None, count: int, sampling: Sampling,
        ends: tuple[int, ...], log_probs: list[Tensor] | None,
    ) -> Iterator[Tensor]:  # fmt: skip
        """Up to `count` columns of tokens (B,), on the CPU; see PaliGemma.stream."""
        B, T = batch.input_ids.shape
        graphed, pool = self.uses_graphs, self.pool  # a pool that replaces this one must not get old graphs
        if graphed:
            batch = batch.extended(-(-T // TEXT) * TEXT)
        tokens_of_prompt = batch.input_ids.numel()
        capacity = batch.input_ids.shape[1] + count
        kind = {"sampled": float(sampling.temperature) > 0, "scored": log_probs is not None}
        state = pool.take(B, bucket(capacity), *kind.values()) if graphed else None
        state = state or self.new_state(B, bucket(capacity) if graphed else capacity, graphed=graphed, **kind)
        first, inputs = self.first_work(state, batch, pixel_values)

        def following() -> None:
            self.next_step(state)

        ended, launched = torch.zeros(B, dtype=torch.bool, device="cpu"), 0
        end_ids = torch.tensor(ends, dtype=torch.int64, device="cpu")
        try:
            for n in range(count):
                with self.computing(B if n else tokens_of_prompt):
                    if n == 0:
                        state.begin(sampling, count)
                    while launched <= min(n + state.ahead, count - 1):
                        state.launch(following) if launched else state.launch(first, *inputs)
                        launched += 1
                    tokens, scores = state.read(n)
                if bool((tokens[~ended] < 0).any()):
                    raise PaliGemmaError(self.damage())
                tokens.masked_fill_(ended, self.config.pad_token_id)
                if log_probs is not None:
                    log_probs.append(scores.masked_fill_(ended, 0.0))
                ended |= torch.isin(tokens, end_ids)
                try:
                    yield tokens
                except GeneratorExit:  # the caller wants no more tokens
                    state.finish()
                    pool.keep(state)
                    raise
                if bool(ended.all()):
                    break
        finally:
            state.finish()
        pool.keep(state)

    @property
    def uses_graphs(self) -> bool:
        return self.graphs and self.backend == "triton" and self.table.is_cuda and ops.fusion()

    @property
    def held_bytes(self) -> int:
        """The bytes of the caches and graphs that are kept for later generations."""
        return sum(state.nbytes for state in self.pool.states)

    def load_state_dict(self, *args, **kwargs) -> Any:
        self.pool = StatePool()  # graphs hold the old addresses of the parameters
        return super().load_state_dict(*args, **kwargs)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "GenerativeModel":
        self.pool = StatePool()
        return super()._apply(fn, recurse)
