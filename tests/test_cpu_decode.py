"""A decode step on a CPU: the kernels of its operations against float64, and whole models against torch."""

import copy
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint
from decoding import append, logits_of_next, prefill
from torch import Tensor

from paligemma import cpu_linear, cpu_step, fused, int4, load_hf_model, ops
from paligemma.attention_range import AttentionRange
from paligemma.checkpoint.quantize import quantized
from paligemma.decode_state import DecodeState
from paligemma.layers import QUANTIZED, Linear, RMSNorm, parameter
from paligemma.options import Sampling

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from paligemma.kernels.cpu_decode import Calls, takes
from paligemma.kernels.cpu_workers import own_threads

HALF, EPS = torch.bfloat16, 1e-6
E, M, D = 256, 384, 64
FORMATS = [None, *(name for name, dtype in QUANTIZED.items() if takes(dtype, 128))]
ROWS = [1, 2, 3, 8, 16]


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


def check(
    by_torch: Callable[[], Tensor], add: Callable[[Calls], Tensor], exact: Tensor, dtype: torch.dtype = HALF
) -> None:
    """The RMS error of the kernels is hardly larger than torch's, each time that they run. add(calls) -> the
    memory of the result, which is rounded to bfloat16, in a dtype."""
    with torch.no_grad(), ops.use("torch"):
        y = by_torch()
    with own_threads() as threads:
        calls = Calls(len(exact), threads)
        out = add(calls)
        results = []
        for _ in range(3):
            calls.run()
            results.append(out.clone().view(exact.shape))
    errors = [(each.double() - exact).square().mean().sqrt() for each in (y, *results)]
    assert (results[0].dtype, y.dtype, y.shape) == (dtype, dtype, exact.shape)
    assert torch.equal(results[0], results[0].to(HALF).to(dtype))
    rounding = (exact.to(HALF).double() - exact).square().mean().sqrt()
    assert max(errors) <= max(1.1 * errors[0], 1.2 * rounding), (errors, rounding)
    assert torch.equal(results[0], results[2])


def of(norm: RMSNorm) -> tuple[Tensor, float]:
    return norm.weight, norm.eps


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_norm_and_geglu(quantize, rows):
    x, norm = random(0, rows, 1, E), norm_of(E, 1)
    (gate, wide_gate), (up, wide_up) = (linear_of(E, M, quantize, seed) for seed in (2, 3))
    normed = exact_norm(x, norm)
    exact = F.gelu(normed @ wide_gate.T, approximate="tanh") * (normed @ wide_up.T)
    check(
        lambda: fused.norm_geglu(x, norm, gate, up)[0],
        lambda calls: calls.norm_geglu(x[:, 0], of(norm), gate.stored, up.stored),
        exact,
    )


@pytest.mark.parametrize("rows", ROWS)
def test_weights_of_two_formats(rows):
    x, norm = random(0, rows, 1, E), norm_of(E, 1)
    (gate, wide_gate), (up, wide_up) = linear_of(E, M, None, 2), linear_of(E, M, "int8", 3)
    normed = exact_norm(x, norm)
    check(
        lambda: fused.norm_geglu(x, norm, gate, up)[0],
        lambda calls: calls.norm_geglu(x[:, 0], of(norm), gate.stored, up.stored),
        F.gelu(normed @ wide_gate.T, approximate="tanh") * (normed @ wide_up.T),
    )


@pytest.mark.parametrize("post", [False, True], ids=["", "normed"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_projection_and_residual_sum(quantize, rows, post):
    x, residual = random(0, rows, 1, M), random(1, rows, 1, E)
    linear, wide = linear_of(M, E, quantize, 2)
    norm, before = norm_of(E, 3) if post else None, residual.clone()
    product = x.double() @ wide.T
    exact = residual.double() + (product if norm is None else exact_norm(product, norm))

    def by_torch() -> Tensor:
        y = fused.project_add(x, linear, residual, norm)
        assert isinstance(y, Tensor)
        return y

    def add(calls: Calls) -> Tensor:
        return calls.project_add(x[:, 0], linear.stored, residual[:, 0], norm and of(norm))

    check(by_torch, add, exact)
    assert torch.equal(residual, before)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", [name for name in FORMATS if name != "int4"])
def test_norm_and_head(quantize, rows):
    x, norm, (head, wide) = random(0, rows, 1, E), norm_of(E, 1), linear_of(E, 1037, quantize, 2)
    check(
        lambda: fused.norm_head(x, norm, *head.stored, None),
        lambda calls: calls.norm_head(x[:, 0], of(norm), head.stored),
        exact_norm(x, norm) @ wide.T,
        torch.float32,
    )


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("quantize", FORMATS)
def test_projections_and_rotation(quantize, rows, heads):
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

    row = torch.arange(rows)[:, None]
    caches = [torch.full((2, rows, 11, heads, D), 7.0, dtype=HALF) for _ in range(2)]

    def by_torch() -> Tensor:
        return fused.norm_qkv_rope(x, norm, linears, rotation, positions, *caches[0])[0]

    def add(calls: Calls) -> Tensor:
        places = rotation[:, :, 0].contiguous(), positions[:, 0].contiguous()
        return calls.norm_qkv_rope(x[:, 0], of(norm), [each.stored for each in linears], *places, *caches[1])

    check(by_torch, add, rotated(q))
    for name, exact in enumerate((rotated(k), v)):
        errors = [(cache[name][row, positions] - exact).square().mean().sqrt() for cache in caches]
        rounding = (exact.to(HALF).double() - exact).square().mean().sqrt()
        assert errors[1] <= max(1.1 * errors[0], 1.2 * rounding), (errors, rounding)
        changed = (caches[1][name] != 7).any(dim=3).any(dim=2)
        assert changed.nonzero().tolist() == [[r, int(positions[r])] for r in range(rows)]


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [False, True], ids=["", "window"])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rows", ROWS)
def test_attention(rows, heads, window, softcap):
    q, cache = random(0, rows, 1, 4, D) * 2, random(1, 2, rows, 33, heads, D)
    keys, values = cache.unbind(0)
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
    first = torch.zeros(rows, dtype=torch.int64) if start is None else start[:, 0].contiguous()
    ranges = first, limit[:, 0].contiguous()
    check(
        lambda: ops.attention(q, keys, values, visible, 0.1, softcap),
        lambda calls: calls.attention(q[:, 0], keys, values, *ranges, 0.1, softcap),
        exact,
    )


def test_attention_to_large_scores_and_to_nan():
    q, cache = random(0, 1, 4, D) * 1000, random(1, 2, 1, 40, 1, D)
    with own_threads() as threads:
        calls = Calls(1, threads)
        y = calls.attention(q, *cache, torch.tensor([0]), torch.tensor([33]), 1.0, None)
        calls.run()
        nearest = (q.double() @ cache[0, :, :33, 0].double().transpose(1, 2)).argmax(dim=-1)[0]
        assert torch.equal(y.view(4, D), cache[1, 0, nearest, 0])
        cache[0, 0, 3, 0, 5] = torch.nan
        calls.run()
        assert bool(y.isnan().all())


INPUTS = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
SIZES = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_attention_heads": 4}


@pytest.fixture
def checkpoint_of(tmp_path, tokenizer_model):
    """A function that writes a model whose sizes the kernels take."""

    def write(**text):
        config = config_dict(text={**SIZES, **text}, vision={"projection_dim": 128}, projection_dim=128)
        return write_checkpoint(tmp_path / "model", tokenizer_model, config=config)

    return write


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """The rows of each run of the kernels."""
    rows, right = [], Calls.run
    monkeypatch.setattr(Calls, "run", lambda calls: rows.append(calls.rows) or right(calls))
    return rows


def logits_of(model, lengths, steps: int = 5) -> Tensor:  # (steps + 1, B, V)
    """The logits of rows of several lengths, step by step, after the same tokens."""
    B = len(lengths[0])
    inputs = torch_inputs(batch(model.config, *lengths))
    state = model.new_state(B, 64, graphed=False, sampled=False, scored=False)
    state.begin(Sampling(0.0, 1.0, None), steps + 1)
    logits = [prefill(model, state, *(inputs.get(name) for name in INPUTS))]
    for step in range(steps):
        append(model, state, logits[-1], torch.arange(B) + 10 * step + 3)
        logits.append(logits_of_next(model, state))
    return torch.stack(logits)


ROWS_OF = {1: ([5], [4]), 3: ([3, 5, 4], [4, 1, 9])}  # lengths of prefixes and suffixes


@pytest.mark.parametrize("rows", ROWS_OF)
@pytest.mark.parametrize("extra", [{}, {**GEMMA_2, "sliding_window": 7}], ids=["Gemma", "Gemma 2"])
@pytest.mark.parametrize("quantize", FORMATS)
def test_a_model(checkpoint_of, extra, quantize, rows, runs):
    """The logits are those of torch, but for the rounding."""
    directory, found = checkpoint_of(**extra), []
    for backend in ("torch", "numba"):
        model, _ = load_hf_model(
            directory, device="cpu", dtype="bfloat16", quantize=quantize, backend=backend
        )
        with torch.inference_mode():
            found.append(logits_of(model, ROWS_OF[rows]))
        assert runs == ([rows] * 5 if backend == "numba" else [])
    apart = (found[1] - found[0]).square().mean(dim=(1, 2)).sqrt() / found[0].square().mean().sqrt()
    assert bool((apart < 0.05).all()), apart


def test_when_the_modules_compute(checkpoint_of, runs, monkeypatch):
    """Without graphs, or fusion, or with gradients, the modules compute, and their hooks are called."""
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    seen, layer = [], model.language_model.model.layers[1]
    layer.register_forward_hook(lambda *_: seen.append(1))

    def taken() -> bool:
        runs.clear()
        seen.clear()
        logits_of(model, ROWS_OF[3], steps=2)
        assert len(seen) == (1 if runs else 3)  # the prefill, and the steps of the modules
        return bool(runs)

    with torch.no_grad():
        assert taken()
        model.graphs = False
        assert not taken()
        model.graphs = True
        with ops.without_fusion():
            assert not taken()
        with torch.enable_grad():
            assert not taken()
        monkeypatch.setattr(cpu_linear, "_forked", True)
        assert not taken()
        monkeypatch.setattr(cpu_linear, "_forked", False)
        model.float()
        assert not taken()
        model.bfloat16()
        assert taken()
        monkeypatch.setattr(cpu_linear, "LARGE", 1 << 30)
        assert not taken()


@pytest.fixture
def listed(monkeypatch) -> list[int]:
    """The rows of each step whose calls were listed."""
    rows, right = [], cpu_step.CpuStep.__init__
    monkeypatch.setattr(
        cpu_step.CpuStep, "__init__", lambda step, *given: rows.append(given[2]) or right(step, *given)
    )
    return rows


def begun(model, rows: int) -> DecodeState:
    """A state with a prompt, and one token after it."""
    state = model.new_state(rows, 64, graphed=False, sampled=False, scored=False)
    start(model, state)
    return state


def start(model, state: DecodeState) -> None:
    state.begin(Sampling(0.0, 1.0, None), 20)
    rows = len(state.row)
    inputs = torch_inputs(batch(model.config, *ROWS_OF[rows]))
    append(model, state, prefill(model, state, *(inputs.get(name) for name in INPUTS)), torch.arange(rows))


def further(model, state: DecodeState, tokens: int = 1) -> Tensor:
    """The logits after some more tokens."""
    for token in range(tokens):
        logits = logits_of_next(model, state)
        append(model, state, logits, torch.arange(len(state.row)) + 11 * token)
    return logits


def test_calls_are_listed_once(checkpoint_of, listed, runs):
    """For each number of rows, and again if a parameter has moved."""
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    other, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        state = begun(model, 3)
        first = further(model, state, 3)
        assert (listed, runs) == ([3], [3] * 3)
        further(model, state.first(2, state.cache.used), 2)
        further(model, state)
        assert listed == [3, 2]
        assert not torch.equal(first, further(model, state))

        for parameter in other.language_model.model.layers.parameters():
            parameter.data += 1
        changed = {name: y.clone() for name, y in other.state_dict().items()}
        right = further(other, begun(other, 3))
        for move in (
            lambda: model.load_state_dict(changed, assign=True),
            lambda: model.float().bfloat16(),
            lambda: model.share_memory(),
        ):
            state = begun(model, 3)
            further(model, state)
            start(model, state)
            listed.clear()
            move()
            start(model, state)
            assert torch.equal(further(model, state, 2), further(model, begun(model, 3), 2))
            assert listed == [3, 3]
        assert torch.equal(further(model, begun(model, 3)), right)
        unchanged, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
        state = begun(model, 3)
        further(model, state)
        start(unchanged, state)
        assert torch.equal(further(unchanged, state, 3), first)


@pytest.mark.parametrize("what", ["norm", "weight of the head", "head", "softcap"])
def test_a_step_has_the_present_head(checkpoint_of, what):
    model, _ = load_hf_model(checkpoint_of(**GEMMA_2), device="cpu", dtype="bfloat16")
    language = model.language_model
    decoder = language.model
    with torch.no_grad():
        state = begun(model, 3)
        before = further(model, state)
        if what == "norm":
            decoder.norm.weight = parameter(128, dtype=HALF)
            decoder.norm.weight.data = random(3, 128)
        elif what == "softcap":
            language.softcap = None
        else:
            if what == "head":
                decoder.embed_tokens = copy.deepcopy(decoder.embed_tokens)
            decoder.embed_tokens.weight = parameter(*language.head.weight.shape, dtype=HALF)
            decoder.embed_tokens.weight.data = random(4, *language.head.weight.shape)
        start(model, state)
        found = further(model, state)
        assert not torch.equal(found, before)
        assert torch.equal(found, further(model, begun(model, 3)))


def test_a_copy_of_a_state(checkpoint_of):
    """It writes to its own memory."""
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        state = begun(model, 3)
        further(model, state)
        copied = copy.deepcopy(state)
        assert not copied.cache.steps
        right = further(model, state, 2)
        assert torch.equal(further(model, copied, 2), right)


def test_logits_are_those_of_their_own_token(checkpoint_of):
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        state, held = begun(model, 3), []
        for _ in range(2):
            y = further(model, state)
            held.append((y, y.clone()))
    assert all(torch.equal(y, before) for y, before in held)
    assert not torch.equal(held[0][0], held[1][0])


def test_a_state_that_begins_again(checkpoint_of):
    """A window that the first prompt has left does not limit the second; nor do limits beyond the cache."""
    extra = {**GEMMA_2, "sliding_window": 30}
    model, _ = load_hf_model(checkpoint_of(**extra), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        state = begun(model, 1)
        assert state.cache.used < 27
        first = [further(model, state) for _ in range(9)]
        assert state.cache.used > 30
        start(model, state)
        assert all(torch.equal(further(model, state), logits) for logits in first)
        start(model, state)
        state.buffers.limit.fill_(1 << 40)
        beyond = further(model, state)
        start(model, state)
        state.buffers.limit.fill_(64)
        assert torch.equal(further(model, state), beyond)


def test_other_modes_and_threads(checkpoint_of, listed):
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    before = torch.get_num_threads()
    with torch.no_grad():
        right = further(model, begun(model, 3), 3)
        state = begun(model, 3)
        with torch.inference_mode():
            further(model, state)
        try:
            torch.set_num_threads(1)
            further(model, state)
        finally:
            torch.set_num_threads(before)
        assert len(listed) == 2 + (before > 1)
        with ThreadPoolExecutor(2) as pool:
            together = [pool.submit(alone, model) for _ in range(2)]
        assert all(torch.equal(each.result(), right) for each in together)


@torch.no_grad()
def alone(model) -> Tensor:
    return further(model, begun(model, 3), 3)


def test_several_tokens_are_left_to_the_modules(checkpoint_of, runs):
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    decoder, vocabulary = model.language_model, model.config.text_config.vocab_size
    state = model.new_state(3, 8, graphed=False, sampled=False, scored=False)
    with torch.no_grad(), ops.use("numba"):
        positions = decoder.model.next_positions(state.cache, 2)
        y = decoder.next(random(0, 3, 2, 128), state.cache, positions, state.buffers.argmax_scratch)
    assert y.shape == (3, 2, vocabulary)
    assert not runs


def test_weights_that_the_kernels_do_not_take(checkpoint_of):
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    language = model.language_model
    layers, last, head = language.model.layers, language.model.norm, language.head
    cache = model.new_state(1, 64, graphed=False, sampled=False, scored=False).cache
    linear, norm = layers[0].mlp.up_proj, layers[1].input_layernorm

    def inside() -> bool:
        return cpu_step.decodes(cpu_step.Decoder(layers, last, head, None), cache, HALF)

    assert inside()
    for module, name, other in [
        (linear, "weight", linear.weight.float()),
        (linear, "weight", linear.weight.t().contiguous().t()),
        (linear, "bias", random(0, 256)),
        (linear, "weight_scale", torch.ones(256)),
        (norm, "weight", norm.weight.float()),
        (last, "weight", last.weight.float()),
        (head, "weight", head.weight.float()),
        (head, "weight", head.weight.t().contiguous().t()),
        (head, "weight_scale", torch.ones(len(head.weight))),
    ]:
        before = getattr(module, name)
        setattr(module, name, torch.nn.Parameter(other, requires_grad=False))
        assert not inside()
        setattr(module, name, before)
        assert inside()


def test_positions_beyond_the_cache(checkpoint_of):
    """Nothing is written."""
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        state = model.new_state(2, 8, graphed=False, sampled=False, scored=False)
        state.cache.length[1] = 8
        state.buffers.limit.fill_(1)
        with pytest.raises(IndexError, match="position 8 is not one of the 8"):
            logits_of_next(model, state)
    assert not state.cache.keys_values.any()


def test_rows_of_one_cache(checkpoint_of, runs):
    """The first rows of a cache are computed alone, in its memory."""
    model, _ = load_hf_model(checkpoint_of(), device="cpu", dtype="bfloat16")
    with torch.no_grad():
        found = []
        for alone in (False, True):
            state = model.new_state(3, 64, graphed=False, sampled=False, scored=False)
            state.begin(Sampling(0.0, 1.0, None), 6)
            inputs = torch_inputs(batch(model.config, *ROWS_OF[3]))
            logits = prefill(model, state, *(inputs.get(name) for name in INPUTS))
            for rows in (3, 2, 1, 3) if alone else (3, 3, 3, 3):
                view = state.first(rows, state.cache.used)
                append(model, view, logits[:rows], torch.arange(rows) + 7)
                logits = logits_of_next(model, view)
            found.append(logits[0])
    assert runs == [3, 3, 3, 3, 3, 2, 1, 3]
    assert (found[1] - found[0]).abs().max() < 0.05 * found[0].abs().max()
