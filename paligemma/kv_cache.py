"""Keys and values of the tokens seen so far: allocated once, written in place, never copied or grown."""

import torch
from torch import Tensor

from . import ops
from .config import TextConfig


class KVCache:
    """Room for `capacity` positions in each of B rows. Rows start at position 0, whatever padding their input had.

    `length` (B,) is how many positions of each row are filled and `prefix` (B,) how many of these see one another; `rotation` is the table
    of rotary angles. The host knows `used`, the most that any row has filled, so that no step reads past it; with `whole` that is all of
    it, from the start, for kernels that look at each row's length themselves."""

    def __init__(self, config: TextConfig, batch: int, capacity: int, dtype: torch.dtype, device: torch.device, whole: bool = False):
        shape = (config.num_hidden_layers, 2, batch, capacity, config.num_key_value_heads, config.head_dim)
        self.keys_values = torch.zeros(shape, dtype=dtype, device=device)  # (L, 2, B, S, K, D); on a CPU zeros cost nothing until touched
        self.length = torch.zeros(batch, dtype=torch.int64, device=device)
        self.prefix = torch.zeros(batch, dtype=torch.int64, device=device)
        self.tickets = torch.zeros(batch * config.num_key_value_heads, dtype=torch.int32, device=device)  # of ops.attention
        self.rotation = ops.rope_table(capacity, config.head_dim, config.rope_theta, device)  # (2, S, D/2)
        self.capacity, self.whole, self.used = capacity, whole, capacity if whole else 0

    def layer(self, i: int) -> tuple[Tensor, Tensor]:  # (B, used, K, D) twice
        """Keys and values of layer i, as far as they are used."""
        keys, values = self.keys_values[i, :, :, : self.used].unbind(0)
        return keys, values

    def advance(self, tokens: int) -> None:
        """Make the next `tokens` positions of every row part of what is used. Raises when they do not fit."""
        if self.whole:
            return
        if self.used + tokens > self.capacity:
            raise ValueError(f"the cache holds {self.capacity} positions; {self.used} + {tokens} do not fit")
        self.used += tokens
