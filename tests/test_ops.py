"""Every operation of ops.py against the reference's formula, in each dtype, at shapes that are not multiples
of a tile or a vector."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from rule import DEVICE, DTYPES, arithmetic, check, given, random, tensor
from torch import nn

from paligemma import cpu_linear, fused, ops, torch_ops
from paligemma.attention_range import visible
from paligemma.buffers import DecodeBuffers
from paligemma.checkpoint.quantize import quantized_rows
from paligemma.kernels import linear as linear_module
from paligemma.layers import QUANTIZED, Linear, RMSNorm
from paligemma.packing import pack
from paligemma.reference import gemma, layers

pytestmark = pytest.mark.parametrize("dtype", DTYPES)


@pytest.fixture(autouse=True, params=["torch", "triton"])
def backend(request):
    with ops.use(request.param):
        yield request.param


# with and without CPU instructions for the dtype, whichever this CPU has
@pytest.mark.parametrize("native", [False, True], ids=["widened", "native"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    ("rows", "size_in", "size_out"),
    [
        ((1,), 33, 1), ((2, 1), 88, 257), ((1, 17), 588, 72),
        ((1,), 4304, 1152), ((3, 5), 2048, 700), ((16,), 4304, 999),
    ],
)  # fmt: skip
def test_linear(dtype, rows, size_in, size_out, bias, native, monkeypatch):
    monkeypatch.setattr(cpu_linear, "multiplies", lambda _: native)
    times = 64 if size_out == 1 else 1  # the error of one number is a matter of luck
    x = random(0, times, *rows, size_in, dtype=dtype)
    arrays = {"weight": random(1, size_out, size_in, dtype=dtype)}
    if bias:
        arrays["bias"] = random(2, size_out, dtype=dtype)
    weights = [tensor(a, dtype) for a in arrays.values()]
    value = torch.stack([ops.linear(each, *weights) for each in tensor(x, dtype)])
    assert value.dtype == DTYPES[dtype]
    check(value, lambda p: layers.linear(arithmetic(x, p), p), given(**arrays), dtype)


@pytest.mark.parametrize("size", [88, 2048, 33])
def test_embed(dtype, size):
    weight, ids = random(0, 50, size, dtype=dtype), np.array([[3, 0, 49], [7, 7, 1]])

    def formula(p):
        return gemma.embed_tokens(ids, p, type("", (), {"hidden_size": size}))

    value = ops.embed(torch.from_numpy(ids).to(DEVICE), tensor(weight, dtype))
    check(value, formula, given(weight=weight), dtype)


@pytest.mark.parametrize("size", [33, 72, 1152, 2047, 2048, 2304, 3584, 4608])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_rms_norm(dtype, size, eps):
    x, weight = random(0, 3, 5, size, dtype=dtype, scale=0.3), random(1, size, dtype=dtype, scale=0.2)
    value = ops.rms_norm(tensor(x, dtype), tensor(weight, dtype), eps)
    check(value, lambda p: layers.rms_norm(arithmetic(x, p), p, eps), given(weight=weight), dtype)


@pytest.mark.parametrize("size", [33, 72, 1152, 2047])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_layer_norm(dtype, size, eps):
    x = random(0, 3, 5, size, dtype=dtype) + 2
    arrays = {"weight": random(1, size, dtype=dtype), "bias": random(2, size, dtype=dtype)}
    value = ops.layer_norm(tensor(x, dtype), *(tensor(a, dtype) for a in arrays.values()), eps)
    x = tensor(x, dtype).cpu().double().numpy()
    check(value, lambda p: layers.layer_norm(arithmetic(x, p), p, eps), given(**arrays), dtype)


@pytest.mark.parametrize("size", [33, 72, 1152, 2048])
@pytest.mark.parametrize("norm", ["rms_norm", "layer_norm"])
def test_norm_of_a_sum(dtype, norm, size):
    """The sum is rounded to the dtype before it is normalised."""
    x, residual = random(0, 3, 5, size, dtype=dtype), random(1, 3, 5, size, dtype=dtype, scale=0.3)
    arrays = {"weight": random(2, size, dtype=dtype, scale=0.2)}
    if norm == "layer_norm":
        arrays["bias"] = random(3, size, dtype=dtype)
    add_norm = {"rms_norm": ops.add_rms_norm, "layer_norm": ops.add_layer_norm}[norm]
    inputs = (tensor(a, dtype) for a in (x, residual, *arrays.values()))
    value, total = add_norm(*inputs, 1e-6)
    assert torch.equal(total, tensor(x, dtype) + tensor(residual, dtype))
    exact = total.cpu().double().numpy()
    check(value, lambda p: getattr(layers, norm)(arithmetic(exact, p), p, 1e-6), given(**arrays), dtype)


def test_gelu_tanh(dtype):
    x = random(0, 7, 301, dtype=dtype, scale=2)
    value = ops.gelu_tanh(tensor(x, dtype))
    check(value, lambda p: p.emit(layers.gelu_tanh(arithmetic(x, p))), given(), dtype)


def frozen(array: np.ndarray, dtype: str) -> nn.Parameter:
    return nn.Parameter(tensor(array, dtype), requires_grad=False)


@pytest.mark.parametrize(("rows", "size_in", "size_out"), [((2, 17), 33, 70), ((1, 16), 88, 257)])
def test_project_gelu(dtype, rows, size_in, size_out):
    x, module = random(0, *rows, size_in, dtype=dtype), Linear(size_in, size_out, bias=True)
    weight = random(1, size_out, size_in, dtype=dtype, scale=size_in**-0.5)
    bias = random(2, size_out, dtype=dtype)
    module.weight, module.bias = frozen(weight, dtype), frozen(bias, dtype)

    def formula(p):
        return p.emit(layers.gelu_tanh(layers.linear(arithmetic(x, p), p)))

    value = fused.project_gelu(tensor(x, dtype), module)
    check(value, formula, given(weight=weight, bias=bias), dtype)


@pytest.mark.parametrize("gelu", [False, True])
def test_the_kernel_computes_the_products_that_were_measured(dtype, gelu, backend, monkeypatch):
    """It does so for numbers of rows near the measured number, in the triton backend, on the chip of the
    measurement, and not in float32."""
    form, calls, kernel = linear_module.Form(16, 32, 32, 2, 4, 2), [], linear_module.linear
    monkeypatch.setattr(linear_module, "linear", lambda *args: calls.append(args[3]) or kernel(*args))
    module = Linear(72, 40, bias=True)
    arrays = {"weight": random(1, 40, 72, dtype=dtype, scale=72**-0.5), "bias": random(2, 40, dtype=dtype)}
    module.weight, module.bias = (frozen(a, dtype) for a in arrays.values())

    def product(rows: int, chip: int) -> list[linear_module.Form]:
        monkeypatch.setattr(linear_module, "FORMS", {(32, 40, 72): {chip: form}})
        calls.clear()
        x = random(0, 1, rows, 72, dtype=dtype)
        value = fused.project_gelu(tensor(x, dtype), module) if gelu else module(tensor(x, dtype))
        assert value.shape == (1, rows, 40)

        def formula(p):
            y = layers.linear(arithmetic(x, p), p)
            return p.emit(layers.gelu_tanh(y)) if gelu else y

        check(value, formula, given(**arrays), dtype)
        return list(calls)

    here = linear_module.architecture()
    expected = [form] if backend == "triton" and dtype != "float32" else []
    assert product(23, here) == product(45, here) == expected
    assert product(22, here) == product(46, here) == product(32, here + 1) == []
    with ops.without_fusion():
        assert product(32, here) == expected


def test_geglu(dtype):
    gate, up = random(0, 7, 301, dtype=dtype, scale=2), random(1, 7, 301, dtype=dtype)
    value = ops.geglu(tensor(gate, dtype), tensor(up, dtype))
    check(value, lambda p: p.emit(layers.gelu_tanh(arithmetic(gate, p)) * arithmetic(up, p)), given(), dtype)


@pytest.mark.parametrize(("H", "K", "D"), [(4, 1, 24), (8, 8, 6), (8, 2, 256)])
@pytest.mark.parametrize("start", [[0, 0], [4096, 17]])
def test_rope_rotates_and_fills_the_cache_at_each_rows_positions(dtype, H, K, D, start):
    B, T, S, theta = 2, 3, 4200, 10000.0
    q, k, v = (random(i, B, T, heads, D, dtype=dtype) for i, heads in enumerate((H, K, K)))
    k_cache, v_cache = torch.full((2, B, S, K, D), 7.0, dtype=DTYPES[dtype], device=DEVICE).unbind(0)
    positions = np.array(start)[:, None] + np.arange(T)
    rotation = torch_ops.rope_table(S, D, theta, DEVICE)[:, positions]
    places = torch.from_numpy(positions).to(DEVICE)
    rotated = ops.rope(*(tensor(x, dtype) for x in (q, k, v)), rotation, places, k_cache, v_cache)

    check(rotated, lambda p: p.emit(layers.rope(arithmetic(q, p), positions, theta)), given(), dtype)
    keys = k_cache[np.arange(B)[:, None], positions]
    check(keys, lambda p: p.emit(layers.rope(arithmetic(k, p), positions, theta)), given(), dtype)
    assert torch.equal(v_cache[np.arange(B)[:, None], positions], tensor(v, dtype))
    check_nothing_else_written(k_cache, v_cache, new=T)


def check_nothing_else_written(*caches: torch.Tensor, new: int) -> None:
    """Caches (B, S, K, D) that were full of 7 differ only at `new` positions of each row."""
    for cache in caches:
        B, S = cache.shape[:2]
        assert (cache == 7).all(dim=(2, 3)).sum() == B * (S - new), "other positions were written"


@pytest.mark.parametrize(("H", "K", "D"), [(4, 4, 24), (4, 1, 20), (8, 2, 72), (8, 1, 256)])
@pytest.mark.parametrize(
    ("start", "prefix", "T"),
    [
        ([0], [19], 19), ([0, 0], [12, 3], 12), ([0, 0], [5, 1], 11),
        ([18, 7], [6, 2], 1), ([0], [1], 1), ([3, 9], [2, 4], 4),
    ],
    ids=["prefix", "ragged prefix", "prefix and suffix", "one token", "first token", "four tokens"],
)  # fmt: skip
def test_attention(dtype, H, K, D, start, prefix, T, backend):
    B, S = len(start), 19
    q = random(0, B, T, H, D, dtype=dtype)
    k, v = (random(i, B, S, K, D, dtype=dtype) for i in (1, 2))
    limit = np.array([[max(prefix[b], start[b] + t + 1) for t in range(T)] for b in range(B)])
    positions = (torch.tensor(start)[:, None] + torch.arange(T)).to(DEVICE)
    mask = np.arange(S) < limit[:, :, None]
    seen = visible(positions, torch.tensor(prefix, device=DEVICE), S, on_host=backend == "torch")
    if backend == "torch":
        assert seen.everything == bool(mask.all())
        assert torch.equal(seen.mask(0, T, S).cpu(), torch.from_numpy(mask))
    value = ops.attention(*(tensor(x, dtype) for x in (q, k, v)), seen)

    def formula(p):
        return p.emit(layers.attention(*(arithmetic(x, p) for x in (q, k, v)), p, mask))

    check(value, formula, given(), dtype)


@pytest.mark.parametrize(
    ("window", "options"),
    [
        (None, {"softcap": 2.0}), (5, {"softcap": 0.7, "scale": 0.5}),
        (5, {"scale": 0.3}), (40, {"softcap": 3.0, "scale": 0.5}),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize(("start", "T"), [(0, 19), (18, 1)], ids=["prefill", "decode"])
def test_attention_of_gemma_2(dtype, window, start, T, options, backend, monkeypatch):
    """A window hides distant positions from the suffix; the prefix sees all of itself."""
    B, S, H, K, D, prefix = 2, start + T, 6, 2, 20, [12, 7]
    q = random(0, B, T, H, D, dtype=dtype, scale=2.0)
    k, v = (random(i, B, S, K, D, dtype=dtype) for i in (1, 2))
    position, at, ends = np.arange(S), start + np.arange(T)[:, None], np.array(prefix)[:, None, None]
    mask = (position < np.maximum(ends, at + 1)) & ((at < ends) | (position > at - (window or S)))
    positions = (start + torch.arange(T).expand(B, T)).to(DEVICE)
    seen = visible(positions, torch.tensor(prefix, device=DEVICE), S, window, backend == "torch")
    assert torch.equal(seen.mask(0, T, S).cpu(), torch.from_numpy(mask))
    assert seen.everything == (bool(mask.all()) and backend == "torch")

    def formula(p):
        inputs = (arithmetic(x, p) for x in (q, k, v))
        return p.emit(layers.attention(*inputs, p, mask, options.get("scale"), options.get("softcap")))

    check(ops.attention(*(tensor(x, dtype) for x in (q, k, v)), seen, **options), formula, given(), dtype)
    if backend == "torch":
        monkeypatch.setattr(torch_ops, "SCORES", 900)  # three tokens at a time, and a remainder
        check(ops.attention(*(tensor(x, dtype) for x in (q, k, v)), seen, **options), formula, given(), dtype)


@pytest.mark.parametrize("patches", [4, 16, 256])
@pytest.mark.parametrize(("H", "D"), [(4, 18), (2, 72)])
def test_attention_without_a_mask(dtype, patches, H, D):
    """Queries, keys and values are views of one product's output."""
    q, k, v = (random(i, 2, patches, H, D, dtype=dtype) for i in range(3))
    value = ops.attention(*tensor(np.concatenate([q, k, v], axis=2), dtype).split(H, dim=2))

    def formula(p):
        return p.emit(layers.attention(*(arithmetic(x, p) for x in (q, k, v)), p))

    check(value, formula, given(), dtype)


# The operations of a block, each of which is one kernel in a decode


class Stream:
    """The residual stream: x or, if `pending`, x + norm(branch), a sum that a decode computes later."""

    def __init__(self, dtype: str, rows: tuple[int, ...], size: int, pending: bool, backend: str):
        self.arrays = [random(i, *rows, size, dtype=dtype, scale=2.0) for i in range(1 + pending)]
        self.post = random(3, size, dtype=dtype, scale=0.3)
        x, *branch = (tensor(a, dtype) for a in self.arrays)
        self.x = x
        if pending:  # with the sums of squares of the rows, which the product before it returns
            squares = branch[0].float().square().sum(dim=-1).view(-1, 1)
            self.x = fused.DeferredResidual(x, branch[0], norm(RMSNorm, self.post, dtype), squares)
        if backend == "torch" or np.prod(rows) > 16:  # no kernel computes this sum later
            self.x = fused.resolve(self.x)

    def exact(self, p):
        x, *branch = (arithmetic(a, p) for a in self.arrays)
        return p.emit(x + layers.rms_norm(branch[0], with_weight(self.post, p), EPS)) if branch else x


EPS = 1e-6


def norm(kind: type[nn.Module], weight: np.ndarray, dtype: str) -> nn.Module:
    module = kind(len(weight), EPS)
    module.weight = frozen(weight, dtype)
    return module


def with_weight(weight: np.ndarray, p):
    return replace(given(weight=weight), dtype=p.dtype)


def linears(
    dtype: str, size_in: int, *sizes: int, quantize: str | None
) -> tuple[tuple[Linear, ...], list[np.ndarray]]:
    """Layers whose weights are packed, and the exact values of the weights."""
    modules, exact = tuple(Linear(size_in, size) for size in sizes), []
    for i, module in enumerate(modules):
        weight = random(10 + i, len(module.weight), size_in, dtype=dtype, scale=size_in**-0.5)
        module.weight = frozen(weight, dtype)
        if quantize:
            values, scale = quantized_rows(module.weight, QUANTIZED[quantize], DTYPES[dtype])
            module.weight = nn.Parameter(values, requires_grad=False)
            module.weight_scale = nn.Parameter(scale, requires_grad=False)
            weight = (values.double() * scale.double()[:, None]).cpu().numpy()
        exact.append(weight)
    pack(modules)
    return modules, exact


FEW = pytest.mark.parametrize(
    ("rows", "size", "pending", "quantize"),
    [
        ((1, 1), 33, False, None), ((1, 1), 384, True, None), ((1, 1), 384, False, "int8"),
        ((1, 1), 384, False, "fp8"), ((5, 1), 384, True, "int8"), ((5, 1), 384, True, "fp8"),
        ((16, 1), 33, False, None), ((2, 3), 33, True, None), ((17, 1), 33, True, None),
    ],
    ids=str,
)  # fmt: skip


@FEW
@pytest.mark.parametrize(("H", "K", "D"), [(4, 2, 34)])
def test_norm_qkv_rope(dtype, rows, size, pending, quantize, H, K, D, backend):
    (B, T), S, theta = rows, 40, 100.0
    stream, weight = Stream(dtype, rows, size, pending, backend), random(4, size, dtype=dtype, scale=0.3)
    projections, exact = linears(dtype, size, H * D, K * D, K * D, quantize=quantize)
    positions = np.arange(B)[:, None] * 2 % 30 + np.arange(T)
    k_cache, v_cache = torch.full((2, B, S, K, D), 7.0, dtype=DTYPES[dtype], device=DEVICE).unbind(0)
    rotation = torch_ops.rope_table(S, D, theta, DEVICE)[:, positions]
    module, places = norm(RMSNorm, weight, dtype), torch.from_numpy(positions).to(DEVICE)
    q, x = fused.norm_qkv_rope(stream.x, module, projections, rotation, places, k_cache, v_cache)

    def project(which: int, heads: int, turns: bool):
        def formula(p):
            normed = layers.rms_norm(stream.exact(p), with_weight(weight, p), EPS)
            y = layers.linear(normed, with_weight(exact[which], p)).reshape(B, T, heads, D)
            return p.emit(layers.rope(y, positions, theta)) if turns else y

        return formula

    row = np.arange(B)[:, None]
    check(q, project(0, H, True), given(), dtype)
    check(k_cache[row, positions], project(1, K, True), given(), dtype)
    check(v_cache[row, positions], project(2, K, False), given(), dtype)
    check(x, stream.exact, given(), dtype)
    check_nothing_else_written(k_cache, v_cache, new=T)


@FEW
@pytest.mark.parametrize("M", [70])
def test_norm_geglu(dtype, rows, size, pending, quantize, M, backend):
    stream, weight = Stream(dtype, rows, size, pending, backend), random(4, size, dtype=dtype, scale=0.3)
    modules, exact = linears(dtype, size, M, M, quantize=quantize)

    def formula(p):
        normed = layers.rms_norm(stream.exact(p), with_weight(weight, p), EPS)
        gate, up = (layers.linear(normed, with_weight(w, p)) for w in exact)
        return p.emit(layers.gelu_tanh(gate) * up)

    hidden, x = fused.norm_geglu(stream.x, norm(RMSNorm, weight, dtype), *modules)
    check(hidden, formula, given(), dtype)
    check(x, stream.exact, given(), dtype)


@FEW
def test_project_add(dtype, rows, size, pending, quantize, backend):
    x, residual = random(0, *rows, size, dtype=dtype), random(1, *rows, 70, dtype=dtype)
    post = random(2, 70, dtype=dtype, scale=0.3)
    (module,), (exact,) = linears(dtype, size, 70, quantize=quantize)

    def formula(p):
        branch = layers.linear(arithmetic(x, p), with_weight(exact, p))
        if pending:
            branch = layers.rms_norm(branch, with_weight(post, p), EPS)
        return p.emit(arithmetic(residual, p) + branch)

    post_norm = norm(RMSNorm, post, dtype) if pending else None
    value = fused.project_add(tensor(x, dtype), module, tensor(residual, dtype), post_norm)
    check(fused.resolve(value), formula, given(), dtype)


@FEW
@pytest.mark.parametrize("softcap", [None, 3.0])
def test_norm_head(dtype, rows, size, pending, quantize, softcap, backend):
    stream, weight = Stream(dtype, rows, size, pending, backend), random(4, size, dtype=dtype, scale=0.3)
    (head,), (exact,) = linears(dtype, size, 101, quantize=quantize)

    def formula(p):
        normed = layers.rms_norm(stream.exact(p), with_weight(weight, p), EPS)
        logits = layers.linear(normed, with_weight(exact, p))
        return p.emit(logits if softcap is None else layers.softcap(logits, softcap))

    value = fused.norm_head(stream.x, norm(RMSNorm, weight, dtype), head.weight, head.weight_scale, softcap)
    assert value.dtype == torch.float32
    check(value, formula, given(), dtype)


def buffers_for(B: int, size: int, D: int, window: int | None, dtype: str) -> DecodeBuffers:
    """The buffers of rows that have 2 output tokens each and are at positions 5, 6, ..."""

    def filled(value: float, *shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=DEVICE)

    return DecodeBuffers(
        output_ids=filled(-7, 9, B),
        output_length=filled(2, B),
        x=filled(torch.nan, B, 1, size, dtype=DTYPES[dtype]),
        position=filled(5, B, 1) + torch.arange(B, device=DEVICE)[:, None],
        rotation=filled(torch.nan, 2, B, 1, D // 2, dtype=torch.float32),
        limit=filled(-7, B, 1),
        start=None if window is None else filled(-7, B, 1),
        argmax_scratch=filled(-(1 << 63), B, 64),
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("B", [3, 19])
@pytest.mark.parametrize("how", ["argmax", "given", "equal", "nan", "inf", "-inf", "negative"])
def test_next_token(dtype, B, window, how, backend):
    size, V, S, D = 33, 101, 40, 18
    x, weight = random(0, B, size, dtype=dtype), random(1, size, dtype=dtype, scale=0.3)
    table, head = random(2, V, size, dtype=dtype), random(3, V, size, dtype=dtype)
    if how == "equal":
        head[:] = head[0]
    elif how == "negative":
        head[:] = -np.sign(x[:1]) * np.abs(head)
    elif how != "argmax":
        head[7] = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}.get(how, head[7])
    state, rotation = buffers_for(B, size, D, window, dtype), torch_ops.rope_table(S, D, 10000.0, DEVICE)
    inputs = tensor(x, dtype), norm(RMSNorm, weight, dtype), tensor(head, dtype), None, None
    logits = fused.norm_head(*inputs, state.argmax_scratch)
    tokens = torch.arange(B, device=DEVICE) + 3 if how == "given" else None
    if tokens is not None:
        state.argmax_scratch.fill_(-(1 << 63))  # with given tokens the head starts no argmax
    for _ in range(2):
        ops.next_token(logits, tokens, state, tensor(table, dtype), rotation, window)
        cleared = bool((state.argmax_scratch == -(1 << 63)).all())
        assert cleared or tokens is not None, "the next argmax would include this one"
        fused.norm_head(*inputs, state.argmax_scratch)

    values, said = logits.cpu().numpy(), np.arange(B) + 3
    if tokens is None:
        said = np.where(np.isfinite(values).all(axis=1), values.argmax(axis=1), -1)
    assert (said < 0).all() == (how in ("nan", "inf", "-inf"))
    assert state.output_ids.tolist() == [[-7] * B] * 2 + [said.tolist()] * 2 + [[-7] * B] * 5
    assert state.output_length.tolist() == [4] * B
    position = np.arange(B) + 7
    assert state.position[:, 0].tolist() == position.tolist()
    assert state.limit[:, 0].tolist() == (position + 1).tolist()
    assert state.start is None or state.start[:, 0].tolist() == np.maximum(position + 1 - 9, 0).tolist()
    assert torch.equal(state.rotation[:, :, 0], rotation[:, torch.from_numpy(position).to(DEVICE)])
    rows, config = said.clip(min=0), type("", (), {"hidden_size": size})
    check(state.x[:, 0], lambda p: gemma.embed_tokens(rows, p, config), given(weight=table), dtype)
