"""prefill_attention and decode_attention."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma.decode_state import bucket
from paligemma.kernels.decode_attention import decode_attention
from paligemma.kernels.prefill_attention import prefill_attention

from .case import Case, compiled
from .models import SIGLIP_HEADS


def prefill_case(
    shape: str, B: int, T: int, heads: tuple[int, int, int],
    S: int | None = None, limits=None, starts=None, scale=None, softcap=None,
) -> Case:  # fmt: skip
    """S: cached positions; None: T. limits, starts: see attention_case; None: queries see all positions."""
    S = S or T
    limits = limits or [[S] * T] * B
    return attention_case("prefill_attention", shape, T, S, heads, limits, starts, scale, softcap)


def decode_case(
    shape: str, lengths: list[int], S: int | None, heads: tuple[int, int, int],
    starts: list[int] | None = None, scale=None, softcap=None,
) -> Case:  # fmt: skip
    """lengths: cached positions of each row. S: positions of the cache, which decide the number of splits;
    None: as many as the model allocates for these lengths."""
    S = bucket(max(lengths)) if S is None else S
    limits, first = [[n] for n in lengths], None if starts is None else [[start] for start in starts]
    return attention_case("decode_attention", shape, 1, S, heads, limits, first, scale, softcap)


def attention_case(
    kernel: str, shape: str, T: int, S: int, heads: tuple[int, int, int],
    limits: list[list[int]], starts: list[list[int]] | None, scale: float | None, softcap: float | None,
) -> Case:  # fmt: skip
    """limits, starts: (B, T); query (b, t) sees the positions starts[b][t] <= s < limits[b][t].

    heads: H, K, D."""
    B, (H, K, D) = len(limits), heads
    scale = 1 / math.sqrt(D) if scale is None else scale
    first = starts or [[0] * T] * B
    rows = list(zip(first, limits, strict=True))
    seen = [(min(a), max(b)) for a, b in rows]  # for each row, the range that its queries see together
    pairs = sum(sum(b) - sum(a) for a, b in rows)  # of a query and a position that it sees
    longest = max(b for _, b in seen)  # no query sees a position from here on; only our kernel gets them
    masked, whole = pairs < B * T * longest, all(limit == longest for row in limits for limit in row)
    decode = kernel == "decode_attention"

    def make(device, dtype):
        q = torch.randn(B, T, H, D, device=device, dtype=dtype)
        k, v = torch.randn(2, B, S, K, D, device=device, dtype=dtype).unbind(0)
        if heads == SIGLIP_HEADS:  # q, k and v are parts of one tensor, as one product computes them
            q, k, v = torch.randn(B, T, 3 * H, D, device=device, dtype=dtype).split(H, dim=2)
        places = [torch.tensor(x, device=device) for x in (limits, starts) if x is not None]
        return q, k, v, *places, *([torch.zeros(B * K, dtype=torch.int32, device=device)] if decode else [])

    def others(attend: Callable) -> Callable:
        """attend, without the counters and without the positions that no query sees."""

        def visible_part(q, k, v, *rest):
            return attend(q, k[:, :longest], v[:, :longest], *(rest[:-1] if decode else rest))

        return visible_part

    def hide(q, k, v, *rest):
        for b, (start, limit) in enumerate(seen):
            for x in (k, v):
                x[b, :start] = x[b, limit:] = float("nan")

    options = {"scale": scale, "softcap": softcap}
    peers: dict[str, Callable[[], Callable]] = {}
    if whole and softcap is not None:
        peers["flex_attention"] = lambda: others(flex(**options))
    elif not masked:
        peers |= {
            f"SDPA {name}": partial(lambda name, scale: others(sdpa(name, scale)), name, scale)
            for name in ("flash", "cudnn", "efficient")
        }
    variant = f"H {H} K {K} D {D}{' softcap' * bool(softcap)}{' start' * bool(starts)}"
    variant += " T 1" * (T == 1 and not decode)
    run = run_decode_attention if decode else run_prefill_attention
    return Case(
        kernel, shape, variant, make, partial(run, options),
        others(partial(plain_attention, masked, **options)), others(partial(exact_attention, **options)),
        lambda itemsize: itemsize * D * (2 * B * T * H + 2 * K * sum(b - a for a, b in seen)),
        4 * H * D * pairs, peers, hide,
    )  # fmt: skip


def run_prefill_attention(options: dict, q, k, v, limit, start=None) -> Tensor:
    return prefill_attention(q, k, v, limit, start=start, **options)


def run_decode_attention(options: dict, q, k, v, limit, *rest: Tensor) -> Tensor:
    *start, counters = rest
    return decode_attention(q, k, v, limit, start=start[0] if start else None, counters=counters, **options)


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(scores / softcap), or the scores if there is no softcap."""
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def visible(limit: Tensor, start: Tensor | None, S: int) -> Tensor:  # (B, T), (B, T) -> (B, T, S)
    """Whether a query sees a position."""
    position = torch.arange(S, device=limit.device)
    seen = position < limit[:, :, None]
    return seen if start is None else seen & (position >= start[:, :, None])


def plain_attention(masked: bool, q, k, v, limit, start=None, *, scale: float, softcap) -> Tensor:
    """Attention as transformers' eager implementation computes it: it copies keys and values for every head,
    and its softmax is in float32."""
    G = q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2)))
    scores = capped(q @ k.transpose(2, 3) * scale, softcap)
    if masked:
        seen = visible(limit, start, k.shape[2])[:, None]
        scores = scores.masked_fill(~seen, torch.finfo(scores.dtype).min)
    p = scores.softmax(dim=-1, dtype=torch.float32).to(q.dtype)
    return (p @ v).transpose(1, 2).flatten(2)


def exact_attention(q, k, v, limit, start=None, *, scale: float, softcap: float | None) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    G, seen = q.shape[2] // k.shape[2], visible(limit, start, k.shape[1])
    out = torch.empty_like(q)
    for h in range(q.shape[2]):  # one head at a time, because the scores of 4112 tokens take 135 MB
        scores = capped(q[:, :, h] @ k[:, :, h // G].transpose(1, 2) * scale, softcap)
        out[:, :, h] = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ v[:, :, h // G]
    return out.flatten(2)


def sdpa(name: str, scale: float):
    """torch's scaled_dot_product_attention with the named backend."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {
        "flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION, "math": SDPBackend.MATH,
    }  # fmt: skip

    def run(q, k, v, limit):
        G = q.shape[2] // k.shape[2]
        if name == "efficient" and G > 1:  # it does not support grouped heads
            k, v, G = k.repeat_interleave(G, dim=2), v.repeat_interleave(G, dim=2), 1
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(backend[name]):
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=G > 1)
        return out.transpose(1, 2).flatten(2)

    return run


def flex(scale: float, softcap: float, compile: bool = True):
    """torch's flex_attention. Queries see all positions from `start` on."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(q, k, v, limit, start=None):
        def score_mod(score, b, h, q_index, kv_index):
            score = capped(score, softcap)
            return score if start is None else torch.where(kv_index >= start[b, q_index], score, -torch.inf)

        grouped = q.shape[2] != k.shape[2]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out: Any = flex_attention(q, k, v, score_mod=score_mod, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2).flatten(2)

    return compiled(run) if compile else run
