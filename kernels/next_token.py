"""The work between two steps of a decode: append a token to each row, and write the input of the next step.

    token = argmax of the logits, or a given token;   output_ids[output_length] = token;   position += 1
    x = table[token] sqrt(E);   rotation = cosines and sines of the position
    limit = position + 1;   start = max(limit - window, 0)

One program computes one row. Every tensor that it changes keeps its address, so that all tokens need the same
launches. norm_head.py has left partial argmaxes as 64-bit keys: the largest key belongs to the largest logit,
and to the first of equal logits. This kernel resets them. If a logit is NaN or infinite, the token is -1.
Reads E x itemsize bytes of the table, and writes as many to x."""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .common import dependent, launch_dependents, wait_for_dependencies
from .norm_head import INFINITE, LAST, LOWEST


@triton.jit(do_not_specialize=["B", "S"])
def next_token_kernel(
    argmax_ptr, token_ptr, output_ids_ptr, length_ptr, position_ptr, limit_ptr, start_ptr,
    x_ptr, rotation_ptr, table_ptr, rope_ptr, factor, window, B, S, E: tl.constexpr, HALF: tl.constexpr,
    BLOCK_E: tl.constexpr, BLOCK_HALF: tl.constexpr, SLOTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    launch_dependents(PDL)
    wait_for_dependencies(PDL)
    b = tl.program_id(0)
    if token_ptr is None:
        slot = b * SLOTS + tl.arange(0, SLOTS)
        best = tl.max(tl.load(argmax_ptr + slot), axis=0)
        tl.store(argmax_ptr + slot, tl.full([SLOTS], LOWEST, tl.int64))
        token = LAST - (best & LAST)
        token = tl.where((best >> 32) >= INFINITE, -1, token)
    else:
        token = tl.load(token_ptr + b)
    output_length = tl.load(length_ptr + b)
    tl.store(output_ids_ptr + output_length * B + b, token)
    tl.store(length_ptr + b, output_length + 1)
    position = tl.load(position_ptr + b) + 1
    tl.debug_barrier()  # every warp reads the position before one writes it
    tl.store(position_ptr + b, position)
    tl.store(limit_ptr + b, position + 1)
    if start_ptr is not None:
        tl.store(start_ptr + b, tl.maximum(position + 1 - window, 0))
    i = tl.arange(0, BLOCK_HALF)
    for part in range(2):
        angle = tl.load(rope_ptr + part * S * HALF + position * HALF + i, mask=i < HALF, other=0.0)
        tl.store(rotation_ptr + (part * B + b) * HALF + i, angle, mask=i < HALF)
    row = table_ptr + tl.maximum(token, 0) * E
    for first in range(0, E, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        value = tl.load(row + e, mask=e < E, other=0.0).to(tl.float32) * factor
        tl.store(x_ptr + b * E + e, value.to(x_ptr.dtype.element_ty), mask=e < E)


def next_token(
    tokens: Tensor | None, argmax_scratch: Tensor, output_ids: Tensor, output_length: Tensor,
    position: Tensor, limit: Tensor, start: Tensor | None, window: int,
    x: Tensor, rotation: Tensor, table: Tensor, rope: Tensor,
) -> None:  # fmt: skip
    """tokens (B,) int64, or None for the argmax in argmax_scratch (B, slots) int64; output_ids (N, B),
    output_length (B,), position, limit, start (B, 1) int64; x (B, 1, E); rotation (2, B, 1, D/2) float32;
    table (V, E) of x's dtype; rope (2, S, D/2) float32. All are contiguous; output_length is below N, and
    position below S - 1."""
    (B, _, E), (S, half) = x.shape, rope.shape[1:]
    assert argmax_scratch.shape[:1] == (B,)
    assert tokens is None or tokens.shape == (B,)
    assert output_ids.shape[1:] == (B,)
    assert output_length.shape == (B,)
    assert all(y is None or y.shape == (B, 1) for y in (position, limit, start))
    integers = (tokens, argmax_scratch, output_ids, output_length, position, limit, start)
    assert all(y is None or y.dtype == torch.int64 for y in integers)
    assert rotation.shape == (2, B, 1, half)
    assert rotation.dtype == rope.dtype == torch.float32
    assert table.shape[1:] == (E,)
    assert table.dtype == x.dtype
    assert all(y is None or y.is_contiguous() for y in (*integers, x, rotation, table, rope))
    next_token_kernel[(B,)](
        argmax_scratch, tokens, output_ids, output_length, position, limit, start, x, rotation, table, rope,
        math.sqrt(E), window, B, S,
        E=E, HALF=half, BLOCK_E=min(1024, triton.next_power_of_2(E)), BLOCK_HALF=triton.next_power_of_2(half),
        SLOTS=argmax_scratch.shape[1], num_warps=4, PDL=dependent(), launch_pdl=dependent(),
    )  # fmt: skip
