"""next_token: the second step of the argmax, and the inputs of the next pass."""

import math

import torch
from torch import Tensor

from paligemma.kernels.next_token import next_token

from .case import Case
from .norm_head import LOWEST, PLACES, chosen, sort_keys


def next_case(
    shape: str, B: int, E: int, D: int, V: int, window: int | None = None, given: bool = False
) -> Case:
    """`run` first restores the state that the kernel changes.

    given: the kernel gets the tokens; otherwise it gets the first step of their argmax, and if there are
    several rows, the last row has a NaN among its logits."""
    N, S = 9, 320
    sizes = (B * PLACES, N * B, B, B, B, B)

    def make(device, dtype):
        index = torch.randint(V, (B, PLACES), device=device)
        logits = torch.randn(B, PLACES, device=device)
        logits[1:][-1:, 5] = math.nan
        row = torch.arange(B, device=device)
        best, said = sort_keys(logits, index).flatten(), torch.full((N * B,), -7, device=device)
        saved = torch.cat([best, said, row % N, (S - 2) * (row + 1) // B, row, row])
        angle = torch.randn(S, D // 2, device=device)
        table, rope = torch.randn(V, E, device=device, dtype=dtype), torch.stack([angle.cos(), angle.sin()])
        return saved, saved.clone(), table, rope, index[:, 0].contiguous()

    def parts(state: Tensor) -> tuple[Tensor, ...]:
        best, said, count, *columns = state.split(sizes)  # columns: position, limit, start
        return best.view(B, PLACES), said.view(N, B), count, *(x.view(B, 1) for x in columns)

    def run(saved: Tensor, state: Tensor, *others: Tensor):
        return alone(saved, state.copy_(saved), *others)

    def alone(saved: Tensor, state: Tensor, table: Tensor, rope: Tensor, tokens: Tensor):
        best, said, count, position, limit, start = parts(state)
        x, rotation = table.new_empty(B, 1, E), rope.new_empty(2, B, 1, D // 2)
        chosen_tokens, start = tokens if given else None, start if window else None
        places = said, count, position, limit, start
        next_token(chosen_tokens, best, *places, window or 0, x, rotation, table, rope)
        return x, rotation, state

    def formula(saved: Tensor, state: Tensor, table: Tensor, rope: Tensor, tokens: Tensor):
        best, said, count, position, limit, start = parts(state.copy_(saved))
        token = tokens if given else chosen(best)
        if not given:
            best.fill_(LOWEST)
        said[count, torch.arange(B, device=said.device)] = token
        count += 1
        position += 1
        limit.copy_(position + 1)
        if window:
            start.copy_((limit - window).clamp_(min=0))
        x = table[token.clamp(min=0)[:, None]]
        x = x * math.sqrt(E) if x.dtype == torch.float64 else (x.float() * math.sqrt(E)).to(x.dtype)
        return x, rope[:, position], state

    def exact(saved: Tensor, state: Tensor, table: Tensor, rope: Tensor, tokens: Tensor):
        return formula(saved, state, table.double(), rope.double(), tokens)

    return Case(
        "next_token", shape, f"E {E} D {D}{' window' * bool(window)}{' given' * given}", make, run, formula,
        exact, lambda itemsize: B * (2 * E * itemsize + 16 * PLACES + 8 * D + 40),
        weights=lambda *inputs: inputs[2:4], alone=alone,
    )  # fmt: skip
