"""A decode step on a CPU: the kernels of its operations against float64, and against torch in whole models.

Where this CPU, or its imitation, lacks what a kernel needs, torch computes, and the same checks hold.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint
from decoding import append, logits_of_next, prefill
from torch import Tensor

from paligemma import cpu_linear, fused, int4, load_hf_model, ops
from paligemma.attention_range import AttentionRange
from paligemma.checkpoint.quantize import quantized
from paligemma.layers import QUANTIZED, Linear, RMSNorm, parameter
from paligemma.options import Sampling

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from paligemma.kernels import cpu_decode

HALF, EPS = torch.bfloat16, 1e-6
E, M, D = 256, 384, 64
FORMATS = [None, *(name for name, dtype in QUANTIZED.items() if cpu_decode.takes(dtype, 128, 128))]
ROWS = [1, 3, 16]


@pytest.fixture(autouse=True)
def products_of_any_size_are_large(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 0)


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(HALF)


def linear_of(size_in: int, size_out: int, quantize: str | None, seed: int) -> tuple[Linear, Tensor]:
    """A module, and its weight in float64."""
    linear, weight = Linear(size_in, size_out), random(seed, size_out, size_in) / size_in**0.5
    if quantize is None:
        linear.weight = parameter(*weight.shape, dtype=HALF)
        linear.weight.data = weight
        return linear, weight.double()
    values, scale = quantized(weight.float(), QUANTIZED[quantize], HALF)
    linear = Linear(size_in, size_out, quantize=quantize)
    linear.weight.data = values
    linear.weight_scale = parameter(*scale.shape, dtype=HALF)
    linear.weight_scale.data = scale
    if quantize == "int4":
        return linear, int4.dequantized(values, scale).double()
    return linear, values.double() * scale.double()[:, None]


def norm_of(size: int, seed: int) -> RMSNorm:
    norm = RMSNorm(size, EPS)
    norm.weight.data = random(seed, size) * 0.3
    return norm


def exact_norm(x: Tensor, norm: RMSNorm) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + EPS) * (1 + norm.weight.double())


def check(compute, exact: Tensor, kernel: str, monkeypatch) -> None:
    """The RMS error of this kernel, which is taken, is hardly larger than torch's. compute() -> the result in
    bfloat16."""
    errors, calls, right = [], [], getattr(cpu_decode, kernel)
    monkeypatch.setattr(cpu_decode, kernel, lambda *given: calls.append(1) or right(*given))
    with torch.no_grad():
        for backend in ("torch", "numba"):
            with ops.use(backend):
                y = compute()
            assert bool(calls) == (backend == "numba")
            assert (y.dtype, y.shape) == (HALF, exact.shape)
            errors.append((y.double() - exact).square().mean().sqrt())
    rounding = (exact.to(HALF).double() - exact).square().mean().sqrt()
    assert errors[1] <= max(1.1 * errors[0], 1.2 * rounding), (errors, rounding)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_norm_and_geglu(quantize, rows, monkeypatch):
    x, norm = random(0, rows, 1, E), norm_of(E, 1)
    (gate, wide_gate), (up, wide_up) = (linear_of(E, M, quantize, seed) for seed in (2, 3))
    normed = exact_norm(x, norm)
    exact = F.gelu(normed @ wide_gate.T, approximate="tanh") * (normed @ wide_up.T)
    check(lambda: fused.norm_geglu(x, norm, gate, up)[0], exact, "norm_geglu", monkeypatch)


@pytest.mark.parametrize("post", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_projection_and_residual_sum(quantize, rows, post, monkeypatch):
    x, residual = random(0, rows, 1, M), random(1, rows, 1, E)
    linear, wide = linear_of(M, E, quantize, 2)
    norm, before = norm_of(E, 3) if post else None, residual.clone()
    product = x.double() @ wide.T
    exact = residual.double() + (product if norm is None else exact_norm(product, norm))

    def compute() -> Tensor:
        y = fused.project_add(x, linear, residual, norm)
        assert isinstance(y, Tensor)
        return y

    check(compute, exact, "project_add", monkeypatch)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_projections_and_rotation(quantize, rows, heads, monkeypatch):
    x, norm = random(0, rows, 1, E), norm_of(E, 1)
    sizes = (4 * D, heads * D, heads * D)
    made = [linear_of(E, size, quantize, seed) for seed, size in enumerate(sizes, 2)]
    linears, wides = zip(*made, strict=True)
    angle = torch.rand(rows, 1, D // 2, generator=torch.Generator().manual_seed(9)) * 6
    rotation = torch.stack([angle.cos(), angle.sin()])
    positions = torch.arange(rows)[:, None] % 5 + 2
    normed = exact_norm(x, norm)
    q, k, v = ((normed @ wide.T).unflatten(-1, (-1, D)) for wide in wides)

    def rotated(y: Tensor) -> Tensor:
        first, second = y.chunk(2, dim=-1)
        cos, sin = rotation.double()[:, :, :, None]
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    for place, exact in enumerate((rotated(q), rotated(k), v)):

        def compute(place=place) -> Tensor:
            cache = torch.full((2, rows, 11, heads, D), 7.0, dtype=HALF)
            keys, values = cache[:, :, :9].unbind(0)
            out, total = fused.norm_qkv_rope(x, norm, linears, rotation, positions, keys, values)
            assert total is x
            row = torch.arange(rows)[:, None]
            assert bool((cache.sum(dim=(0, 3, 4)) != 7 * 2 * heads * D).sum() == rows)  # nothing else changed
            return (out, keys[row, positions], values[row, positions])[place]

        with monkeypatch.context() as patch:
            check(compute, exact, "norm_qkv_rope", patch)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [False, True], ids=["", "window"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
def test_attention(rows, heads, window, softcap, monkeypatch):
    q, cache = random(0, rows, 1, 4, D) * 2, random(1, 2, rows, 40, heads, D)
    keys, values = cache[:, :, :33].unbind(0)
    limit = (torch.arange(rows) * 7 % 33 + 1)[:, None]
    start = (limit - 5).clamp(min=0) if window else None
    scores = torch.einsum("bthd,bskd->bhks", q.double(), keys.double()) * 0.1
    group = torch.arange(4) // (4 // heads)
    scores = scores[:, torch.arange(4), group]  # (B, H, S)
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    inside = torch.arange(33) < limit
    inside = inside if start is None else inside & (torch.arange(33) >= start)
    weights = scores.masked_fill(~inside[:, None], -torch.inf).softmax(dim=-1)
    exact = torch.einsum("bhs,bshd->bhd", weights, values.double()[:, :, group]).flatten(1)[:, None]
    visible = AttentionRange(start, limit, start is None and bool((limit == 33).all()))
    check(lambda: ops.attention(q, keys, values, visible, 0.1, softcap), exact, "attention", monkeypatch)


def test_attention_to_large_scores_and_to_nan():
    q, cache = random(0, 1, 1, 4, D) * 1000, random(1, 2, 1, 40, 1, D)
    keys, values = cache[:, :, :33].unbind(0)
    visible = AttentionRange(None, torch.tensor([[33]]), True)
    with ops.use("numba"):
        y = ops.attention(q, keys, values, visible, 1.0)
        nearest = (q.double() @ keys[:, :, 0].double().transpose(1, 2)).argmax(dim=-1)[0, 0]
        assert torch.equal(y[0, 0].view(4, D), values[0, nearest, 0])
        cache[0, 0, 3, 0, 5] = torch.nan
        assert bool(ops.attention(q, keys, values, visible, 1.0).isnan().all())


@pytest.mark.parametrize("extra", [{}, {**GEMMA_2, "sliding_window": 7}], ids=["Gemma", "Gemma 2"])
@pytest.mark.parametrize("quantize", FORMATS)
def test_a_model(tmp_path, tokenizer_model, extra, quantize, monkeypatch):
    """The logits of rows of several lengths, step by step, are those of torch, but for the rounding."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}
    config = config_dict(text={**extra, **sizes}, vision={"projection_dim": 128}, projection_dim=128)
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config)
    calls, right = [], cpu_decode.norm_geglu
    monkeypatch.setattr(cpu_decode, "norm_geglu", lambda *given: calls.append(1) or right(*given))
    found = []
    for backend in ("torch", "numba"):
        model, _ = load_hf_model(
            directory, device="cpu", dtype="bfloat16", quantize=quantize, backend=backend
        )
        inputs = torch_inputs(batch(model.config, [3, 5, 4], [4, 1, 9]))
        logits, tokens = [], torch.arange(3)
        with torch.inference_mode():
            state = model.new_state(3, 64, graphed=False, sampled=False, scored=False)
            state.begin(Sampling(0.0, 1.0, None), 6)
            logits.append(prefill(model, state, *(inputs.get(name) for name in INPUTS)))
            for step in range(5):
                append(model, state, logits[-1], tokens + 10 * step + 3)
                logits.append(logits_of_next(model, state))
        found.append(torch.stack(logits))
        assert bool(calls) == (backend == "numba")
    apart = (found[1] - found[0]).square().mean(dim=(1, 2)).sqrt() / found[0].square().mean().sqrt()
    assert bool((apart < 0.05).all()), apart


INPUTS = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")


def test_what_the_kernels_are_for(monkeypatch):
    x, weight, norm = random(0, 2, 1, 256), random(1, 32, 256), random(2, 256)

    def inside(x: Tensor, weight: Tensor, scale: Tensor | None = None, *others: Tensor) -> bool:
        return cpu_linear.decodes(x, [(weight, scale)], others)

    assert inside(x, weight, None, norm)
    assert not inside(x.float(), weight)
    assert not inside(random(0, 2, 2, 256), weight)
    assert not inside(random(0, 17, 1, 256), weight)
    assert not inside(random(0, 0, 1, 256), weight)
    assert not inside(random(0, 2, 1, 250), random(1, 32, 250))
    assert not inside(x, random(1, 31, 256))
    assert not inside(x, random(1, 256, 32).T)
    assert not inside(x, weight.float())
    assert not inside(x, weight.to(torch.int8), torch.ones(32))
    assert not inside(x, weight, None, norm.float())
    with torch.enable_grad():
        assert not inside(x.clone().requires_grad_(), weight)
        assert not inside(x, weight, None, norm.clone().requires_grad_())
    monkeypatch.setattr(cpu_linear, "LARGE", 1 << 30)
    assert not inside(x, weight)
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    monkeypatch.setattr(cpu_linear, "_forked", True)
    assert not inside(x, weight)


def test_other_tensors_are_left_to_torch():
    """Norms and residuals in float32, a bias, a residual for all rows, and caches in other memory."""
    x, residual, linear = random(0, 2, 1, E), random(1, 2, 1, E), linear_of(E, E, None, 2)[0]
    norm, single = norm_of(E, 3), norm_of(E, 3)
    single.weight.data = norm.weight.data.float()
    biased = linear_of(E, E, None, 2)[0]
    biased.bias = parameter(E, dtype=HALF)
    biased.bias.data = torch.full((E,), 3.0, dtype=HALF)
    cases = [
        lambda: fused.norm_geglu(x, single, linear, linear)[0],
        lambda: fused.project_add(x, linear, residual.float(), None),
        lambda: fused.project_add(x, biased, residual, None),
        lambda: fused.project_add(x, linear, residual[:1], None),
    ]
    cache = random(4, 2, 2, 40, 1, D)
    for keys, values in (cache[:, :1, :33].expand(-1, 2, -1, -1, -1), cache[:, :, 5:33], cache[:, :, ::2]):
        visible = AttentionRange(None, torch.tensor([[11], [9]]))
        q = random(5, 2, 1, 4, D)
        cases.append(lambda keys=keys, values=values, v=visible, q=q: ops.attention(q, keys, values, v, 0.1))
    with torch.no_grad():
        for case in cases:
            with ops.use("torch"):
                right = case()
            with ops.use("numba"):
                y = case()
            assert isinstance(y, Tensor)
            assert isinstance(right, Tensor)
            assert (y.dtype, y.shape) == (right.dtype, right.shape)
            assert (y.double() - right.double()).abs().max() < 0.05 * right.double().abs().max()


def test_positions_beyond_the_cache():
    x, norm = random(0, 1, 1, E), norm_of(E, 1)
    linears = [linear_of(E, size, None, 2)[0] for size in (4 * D, D, D)]
    cache, rotation = torch.zeros(2, 2, 1, 8, 1, D, dtype=HALF), torch.ones(2, 1, 1, D // 2)
    keys, values = cache[0].unbind(0)
    with torch.no_grad(), ops.use("numba"), pytest.raises(IndexError, match="position 9"):
        fused.norm_qkv_rope(x, norm, linears, rotation, torch.tensor([[9]]), keys, values)
    assert not cache.any()
    q, known = random(5, 1, 1, 4, D), random(6, 2, 1, 8, 1, D)
    with ops.use("numba"):
        y, whole = (
            ops.attention(q, *known[:, :, :6].unbind(0), AttentionRange(None, torch.tensor([[n]])), 0.1)
            for n in (8, 6)
        )
    assert torch.equal(y, whole)


def test_hooks_see_each_module():
    """Without fusion, every module computes its own output."""
    gate, up = linear_of(E, M, None, 2)[0], linear_of(E, M, None, 3)[0]
    seen = []
    gate.register_forward_hook(lambda *_: seen.append("gate"))
    with torch.no_grad(), ops.use("numba"), ops.without_fusion():
        fused.norm_geglu(random(0, 1, 1, E), norm_of(E, 1), gate, up)
    assert seen == ["gate"]
