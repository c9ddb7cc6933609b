"""The keys and values of the tokens so far: allocated once, written in place, never copied or enlarged."""

import copy

import torch
from torch import Tensor

from . import torch_ops
from .config import TextConfig


class Steps(dict):
    """The decode steps of a cache on a CPU, by rows and threads; see cpu_step.py. A copy of the cache starts
    with none, because they write to the memory of this one."""

    def __reduce__(self):
        return Steps, ()


class KVCache:
    """Room for `capacity` positions in each of B rows. Every row starts at position 0, whatever padding its
    input had.

    `length` (B,) is the number of filled positions of each row, and `prefix` (B,) the number of them that
    attend to one another. `counters` are those of ops.attention, and `rotation` (2, S, D/2) is the table of
    the cosines and sines of all positions. The host knows `used`, the largest number of positions that any
    row has filled, so that no step reads beyond it. With `lengths_on_device`, `used` is the capacity from the
    start: the kernels read the length of each row themselves."""

    def __init__(
        self, config: TextConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device,
        lengths_on_device: bool = False,
    ):  # fmt: skip
        K, D = config.num_key_value_heads, config.head_dim
        shape = (config.num_hidden_layers, 2, batch, capacity, K, D)
        # (L, 2, B, S, K, D). On a CPU, zeros take no memory before they are used.
        self.keys_values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.prefix = torch.zeros(batch, dtype=torch.int64, device=device)
        self.counters = torch.zeros(batch * K, dtype=torch.int32, device=device)
        self.rotation = torch_ops.rope_table(capacity, D, config.rope_theta, device)
        self.steps = Steps()  # decode steps on a CPU
        self.capacity, self.lengths_on_device = capacity, lengths_on_device
        self.clear()

    def clear(self) -> None:
        """Forget the tokens so far. The lengths are kept, because the next prefill sets them."""
        self.used = self.capacity if self.lengths_on_device else 0

    def first(self, rows: int, used: int) -> "KVCache":
        """A cache of the first rows alone, in the memory of this one."""
        view, K = copy.copy(self), self.keys_values.shape[4]
        view.keys_values, view.counters = self.keys_values[:, :, :rows], self.counters[: rows * K]
        view.length, view.prefix = self.length[:rows], self.prefix[:rows]
        view.used = self.used if self.lengths_on_device else used
        return view

    def layer(self, i: int) -> tuple[Tensor, Tensor]:  # (B, used, K, D) twice
        """The keys and values of layer i, at the positions that are used."""
        keys, values = self.keys_values[i, :, :, : self.used].unbind(0)
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count the next `tokens` positions of every row as used. Raises ValueError if they do not fit."""
        if self.lengths_on_device:
            return
        if self.used + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {self.used} + {tokens} do not fit")
        self.used += tokens


def position_bytes(config: TextConfig, dtype: torch.dtype) -> int:
    """The bytes that a token takes in the cache of a row."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * dtype.itemsize
