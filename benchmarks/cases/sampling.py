"""top_p_histogram and top_p_search: sampling by top-p, in three launches."""

import math
from functools import partial

import torch
from torch import Tensor

from paligemma.kernels.top_p_histogram import SCRATCH, top_p_histogram
from paligemma.kernels.top_p_search import top_p_search

from .case import Case
from .norm_head import LOWEST, PLACES, sort_keys


def sampling_cases(B: int, V: int) -> list[Case]:
    """A case for each of the three launches that sample a token of V logits for B rows: the histogram, the
    first and the second search.

    `run` first restores the state that the kernel changes. Half of the logits are rounded, so that many are
    equal. If there are several rows, the last row has a NaN among its logits. `plain` and `exact` find the
    tokens by sorting."""
    sizes = B * SCRATCH.value, B * PLACES, B, B * V, B

    def parts(state: Tensor) -> tuple[Tensor, ...]:
        masses, best, count, room, tokens = state.split(sizes)
        return masses.view(B, -1), best.view(B, PLACES), count, room.view(B, V), tokens

    def make(launches: int, device, dtype):
        """The inputs of launch `launches` (0 to 2). The state is as earlier launches leave it."""
        logits = 3 * torch.randn(B, V, device=device)
        logits[:, ::2] = logits[:, ::2].round()
        logits[1:][-1:, 5] = math.nan
        best = torch.full((B, PLACES), LOWEST, device=device)
        best[:, 3] = sort_keys(logits, torch.arange(V, device=device)).amax(dim=1)
        masses = torch.zeros(B, SCRATCH.value, device=device, dtype=torch.int64)
        count = torch.arange(B, device=device)
        room, tokens = torch.full((B, V), -7, device=device), torch.full((B,), -7, device=device)
        saved = torch.cat([x.flatten() for x in (masses, best, count, room, tokens)])
        ends = ((0.8, 1.2), (0.9, 0.7))  # of the temperatures and of the nuclei of the rows
        temperature, top_p = (torch.linspace(*x, B, device=device, dtype=torch.float64) for x in ends)
        given = logits, temperature, top_p, torch.rand(B, B, device=device, dtype=torch.float64)
        for launch in range(launches):
            expected(launch, saved, *given)
        return saved, saved.clone(), *given

    def alone(launch: int, saved, state, logits, temperature, top_p, uniform):
        masses, best, count, room, tokens = parts(state)
        if launch == 0:
            top_p_histogram(logits, best, temperature, masses)
        else:
            out = tokens if launch == 2 else None
            top_p_search(logits, best, temperature, top_p, uniform, count, masses, room, out)
        return masses, best, tokens

    def expected(launch: int, state, logits, temperature, top_p, uniform) -> None:
        """Change the state as the launch does, except for `room`, the list of candidates."""
        masses, best, count, _, tokens = parts(state)
        finite = logits.isfinite().all(dim=1)
        peak = best.amax(dim=1) >> 32
        peak = torch.where(finite, peak ^ ((peak >> 63) & 0x7FFFFFFF), 0).int().view(torch.float32)[:, None]
        weights = ((logits.double() - peak) / temperature[:, None]).exp() * 2.0**43
        weights = weights.round().nan_to_num().long() * finite[:, None]
        order = logits.sort(dim=1, descending=True, stable=True).indices
        reached = weights.gather(1, order).cumsum(dim=1)
        nucleus = (top_p[:, None] * reached[:, -1:]).ceil().long()
        nucleus = reached.gather(1, torch.searchsorted(reached, nucleus).clamp(max=V - 1))
        bins = ((peak - logits) * 64).nan_to_num().clamp(0, 4095).long()
        if launch == 0:
            masses[:, :4096].scatter_add_(1, bins, weights)
        elif launch == 1:
            last = torch.searchsorted(reached, nucleus).clamp(max=V - 1)
            inside = (bins == bins.gather(1, order.gather(1, last))) & finite[:, None]
            masses[:, 4096], masses[:, 4098] = inside.sum(dim=1), -(-V // 2048)
            masses[:, 4100] = nucleus[:, 0]
        else:
            u = uniform.gather(1, count[:, None])
            index = torch.searchsorted(reached, (u * nucleus).long(), right=True).clamp(max=V - 1)
            tokens.copy_(torch.where(finite, order.gather(1, index)[:, 0], -1))
            masses.zero_()
            best.fill_(LOWEST)

    def formula(launch: int, saved: Tensor, state: Tensor, *given: Tensor):
        expected(launch, state.copy_(saved), *given)
        return state

    def run(launch: int, saved: Tensor, state: Tensor, *given: Tensor):
        alone(launch, saved, state.copy_(saved), *given)
        return state

    def seen(state: Tensor):
        """The state without the list of candidates, whose order is not defined. Weights are rounded to 2^-20,
        so that the last bits of an exponential make no difference."""
        masses, best, count, _, tokens = parts(state)
        weights, counts = torch.cat([masses[:, :4096], masses[:, 4100:]], dim=1), masses[:, 4096:4100]
        return (weights + (1 << 22)) >> 23, counts, best, count, tokens

    names = ("top_p_histogram", ""), ("top_p_search", " first"), ("top_p_search", " second")
    return [
        Case(
            kernel, f"{B} x {V}{which}", f"V {V}{which}", partial(make, launch), partial(run, launch),
            partial(formula, launch), partial(formula, launch), lambda itemsize: B * (4 * V + 8 * 4096),
            seen=seen, alone=partial(alone, launch),
        )
        for launch, (kernel, which) in enumerate(names)
    ]  # fmt: skip
