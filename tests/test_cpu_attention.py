"""Attention of many rows on a CPU.

Every test computes in the way that is chosen on this CPU: the Numba kernel if the CPU multiplies bfloat16 in
AVX-512, and torch otherwise.
"""

import importlib.util

import pytest
import torch
from torch import Tensor

from paligemma import cpu_linear, ops
from paligemma.attention_range import AttentionRange

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from paligemma.kernels import cpu_attention, cpu_workers

HALF = torch.bfloat16
# (B, T, H, K, D, S): tiles of 2 and 3 vectors; numbers of rows, keys and features that fill none of these
SHAPES = [
    (1, 32, 1, 1, 32, 16), (1, 256, 2, 2, 72, 256), (1, 67, 8, 1, 256, 67), (2, 19, 8, 4, 34, 13),
    (3, 33, 2, 2, 8, 1), (1, 100, 4, 2, 10, 31), (2, 3, 8, 1, 48, 300), (1, 17, 3, 3, 30, 9),
    (5, 80, 1, 1, 64, 2),
]  # fmt: skip


@pytest.fixture(autouse=True)
def attention_of_any_size_is_large(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE_ATTENTION", 0)


def random(B: int, T: int, H: int, K: int, D: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((B, T, H, D), (B, S, K, D), (B, S, K, D))
    q, k, v = (torch.randn(shape, generator=generator).to(HALF) for shape in shapes)
    return q, k, v


def attention(
    q: Tensor, k: Tensor, v: Tensor, visible: AttentionRange | None = None, scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:  # fmt: skip
    with ops.use("numba"):
        return ops.attention(q, k, v, visible, scale, softcap)


def formula(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, softcap: float | None = None
) -> Tensor:
    """In float64."""
    group = q.shape[2] // k.shape[2]
    keys, values = (x.double().repeat_interleave(group, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.double(), keys) * (scale or q.shape[-1] ** -0.5)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    return torch.einsum("bhts,bshd->bthd", scores.softmax(dim=-1), values).flatten(2)


def check(y: Tensor, exact: Tensor) -> None:
    """The RMS error is at most 1.6 times that of rounding the exact answer. It has two parts: the rounding of
    the answer, and that of the softmax, which is about as large."""
    assert (y.dtype, y.shape) == (HALF, exact.shape)
    assert y.is_contiguous()
    rounding = (exact.to(HALF).double() - exact).square().mean().sqrt()
    error = (y.double() - exact).square().mean().sqrt()
    assert error <= 1.6 * rounding, f"{error / rounding:.3g} times the error of rounding"


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("scale", "softcap"), [(None, None), (0.7, None), (0.5, 2.0), (None, 50.0)])
def test_attention(shape, scale, softcap):
    q, k, v = random(*shape)
    check(attention(q, k, v, None, scale, softcap), formula(q, k, v, scale, softcap))


def codes(K: int, S: int) -> Tensor:
    """(S, K, 32) of -1 and 1. All differ."""
    bits = (torch.arange(K * S).view(K, S).T[..., None] >> torch.arange(32)) & 1
    return 2 * bits - 1


@pytest.mark.parametrize("size", [8.0, 2.0**60, 2.0**115])
def test_each_query_finds_its_key(size):
    """A query is its key times a number so large that the result is the value of that key alone."""
    for B, T, H, K, S in ((2, 50, 4, 2, 41), (1, 131, 2, 2, 128), (1, 17, 8, 1, 7)):
        generator = torch.Generator().manual_seed(0)
        k = codes(K, S)[None].expand(B, -1, -1, -1).to(HALF)
        v = torch.randn(B, S, K, 32, generator=generator).to(HALF)
        found = torch.randint(S, (B, T, H), generator=generator)
        batch, head = torch.arange(B)[:, None, None], torch.arange(H) // (H // K)
        q = k[batch, found, head] * size
        y = attention(q, k, v, scale=8.0)
        assert torch.equal(y, v[batch, found, head].flatten(2))


@pytest.mark.parametrize("softcap", [None, 20.0])
@pytest.mark.parametrize("size", [2.0**-60, 40.0, 2.0**50])
def test_scores_of_every_size(size, softcap):
    q, k, v = random(2, 40, 4, 2, 24, 37)
    q = q * size
    check(attention(q, k, v, softcap=softcap), formula(q, k, v, softcap=softcap))


@pytest.mark.parametrize("shift", [-3000.0, 3000.0])
def test_the_sum_of_a_softmax_is_1(shift):
    """Whatever is added to all scores of a query."""
    q, k, v = random(1, 40, 2, 1, 16, 23)
    q[..., 0], k[..., 0], v[:] = shift, 4, 1
    y = attention(q, k, v)
    assert bool(((y - 1).abs() <= 2.0**-8).all())


def test_keys_and_values_of_a_cache():
    """The memory around them holds NaN."""
    for B, T, H, K, D, S in SHAPES:
        q, k, v = random(B, T, H, K, D, S)
        cache = torch.full((2, 2, B + 1, S + 5, K, D), torch.nan, dtype=HALF)
        cache[1, :, :B, :S] = torch.stack([k, v])
        keys, values = cache[1, :, :B, :S].unbind(0)
        assert torch.equal(attention(q, keys, values), attention(q, k, v))


def test_queries_keys_and_values_anywhere_in_memory():
    B, T, H, K, D = 2, 21, 4, 2, 26
    memory = torch.randn(1 + B * T * (H + 2 * K) * D, generator=torch.Generator().manual_seed(1)).to(HALF)
    for side in (slice(1, None), slice(0, -1)):
        q, k, v = memory[side].view(B, T, H + 2 * K, D).split([H, K, K], dim=2)
        check(attention(q, k, v), formula(q, k, v))
    q, k, v = memory[1:].view(B, T, D, H + 2 * K).transpose(2, 3).split([H, K, K], dim=2)
    check(attention(q, k, v), formula(q, k, v))


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_nan_stays_nan_where_it_belongs(softcap):
    given = random(2, 40, 4, 2, 16, 21)
    clean = attention(*given, softcap=softcap).unflatten(2, (4, 16))
    for nan in (torch.nan, torch.tensor(0x7FFF).short().view(HALF), torch.tensor(-1).short().view(HALF)):
        q, k, v = (x.clone() for x in given)
        q[0, 3, 1, 5] = nan
        y = attention(q, k, v, softcap=softcap).unflatten(2, (4, 16))
        assert bool(y[0, 3, 1].isnan().all())
        y[0, 3, 1] = clean[0, 3, 1]
        assert torch.equal(y, clean)
        for s in (0, 7, 20):
            q, k, v = (x.clone() for x in given)
            k[1, s, 1, 2], v[0, s, 0, 3] = nan, nan
            y = attention(q, k, v, softcap=softcap).unflatten(2, (4, 16))
            assert bool(y[1, :, 2:].isnan().all())
            assert bool(y[0, :, :2, 3].isnan().all())
            y[1, :, 2:], y[0, :, :2, 3] = clean[1, :, 2:], clean[0, :, :2, 3]
            assert torch.equal(y, clean)


def test_infinite_values():
    q, k, v = random(1, 40, 4, 2, 16, 21)
    clean = attention(q, k, v)
    for s in (0, 19, 20):
        some = v.clone()
        some[0, s, 1, 3] = torch.inf
        y = attention(q, k, some).unflatten(2, (4, 16))
        assert bool((y[:, :, 2:, 3] == torch.inf).all())
        y[:, :, 2:, 3] = clean.unflatten(2, (4, 16))[:, :, 2:, 3]
        assert torch.equal(y.flatten(2), clean)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads, monkeypatch):
    """Each takes tiles of its own."""
    before = [attention(*random(*shape)) for shape in SHAPES]
    monkeypatch.setattr(cpu_workers, "threads", lambda: threads)
    for shape, y in zip(SHAPES, before, strict=True):
        assert torch.equal(attention(*random(*shape)), y)


def test_masks():
    q, k, v = random(2, 20, 4, 2, 16, 20)
    limit = torch.arange(1, 21).expand(2, -1)
    y = attention(q, k, v, AttentionRange(None, limit))
    for t in range(20):
        check(y[:, t : t + 1].contiguous(), formula(q[:, t : t + 1], k[:, : t + 1], v[:, : t + 1]))
    everything = AttentionRange(None, torch.full((2, 20), 20), everything=True)
    assert torch.equal(attention(q, k, v, everything), attention(q, k, v))


def test_gradients_pass():
    q, k, v = (x.requires_grad_() for x in random(1, 20, 4, 2, 16, 20))
    attention(q, k, v).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
        assert bool((x.grad != 0).any())


def test_the_kernel_is_for_cpus_that_it_is_the_fastest_on(monkeypatch):
    chosen = []
    monkeypatch.setattr(cpu_attention, "cpu_attention", lambda *given: chosen.append(given))

    def kernel(
        B: int = 1, T: int = 20, H: int = 4, K: int = 2, D: int = 16, S: int = 20, *, backend: str = "numba",
        dtype: torch.dtype = HALF, visible: AttentionRange | None = None, scale: float | None = None,
        trained: bool = False,
    ) -> bool:  # fmt: skip
        q, k, v = (x.to(dtype) for x in random(B, T, H, K, D, S))
        chosen.clear()
        with ops.use(backend):
            ops.attention(q, k, v.requires_grad_(trained), visible, scale)
        return bool(chosen)

    monkeypatch.setattr(cpu_attention, "MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(cpu_attention, "MULTIPLIES_TILES", False)
    assert kernel()
    assert kernel(T=9)
    assert not kernel(T=8)
    assert not kernel(D=17)
    assert not kernel(D=cpu_attention.PANEL - 2)
    assert not kernel(dtype=torch.float32)
    assert not kernel(dtype=torch.float16)
    assert not kernel(scale=-1.0)
    assert not kernel(trained=True)
    limit = torch.full((1, 20), 20)
    assert not kernel(visible=AttentionRange(None, limit))
    assert kernel(visible=AttentionRange(None, limit, everything=True))
    assert not kernel(backend="torch")
    assert not kernel(backend="auto")
    for module, attribute, value in (
        (cpu_linear, "LARGE_ATTENTION", 20 * 20 * 4 * 16 + 1), (cpu_linear, "_forked", True),
        (cpu_attention, "MULTIPLIES_TILES", True), (cpu_attention, "MULTIPLIES_BFLOAT16", False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setattr(module, attribute, value)
            assert not kernel()
