"""Keys and values of the tokens so far: allocated once, written in place, never copied or grown."""

import torch
from torch import Tensor

from . import torch_ops
from .config import TextConfig


class KVCache:
    """Room for `capacity` positions in each of B rows. Every row starts at position 0, whatever padding its
    input had.

    `length` (B,) counts the filled positions of each row, and `prefix` (B,) those of them that attend to one
    another; `rotation` is the table of rotary angles. The host knows `used`, the largest number of positions
    that any row has filled, so that no step reads beyond it. With `lengths_on_device` that is the capacity
    from the start: the kernels look at each row's length themselves."""

    def __init__(
        self,
        config: TextConfig,
        batch: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        lengths_on_device: bool = False,
    ):
        shape = (config.num_hidden_layers, 2, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.keys_values = torch.zeros(
            shape, dtype=dtype, device=device
        )  # (L, 2, B, S, K, D); on a CPU zeros cost nothing until touched
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.prefix = torch.zeros(batch, dtype=torch.int64, device=device)
        self.counters = torch.zeros(
            batch * config.num_key_value_heads, dtype=torch.int32, device=device
        )  # of ops.attention
        self.rotation = torch_ops.rope_table(
            capacity, config.head_dim, config.rope_theta, device
        )  # (2, S, D/2)
        self.capacity, self.lengths_on_device = capacity, lengths_on_device
        self.clear()

    def clear(self) -> None:
        """Forget the tokens so far. The lengths stay as they are: a prefill sets them."""
        self.used = self.capacity if self.lengths_on_device else 0

    def layer(self, i: int) -> tuple[Tensor, Tensor]:  # (B, used, K, D) twice
        """Keys and values of layer i, at the positions that are used."""
        keys, values = self.keys_values[i, :, :, : self.used].unbind(0)
        return keys, values

    def advance(self, tokens: int) -> None:
        """Count the next `tokens` positions of every row as used. Raises ValueError when they do not fit."""
        if self.lengths_on_device:
            return
        if self.used + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {self.used} + {tokens} do not fit")
        self.used += tokens
