"""Tests of the kernels beyond those of test_ops.py: windows, softcaps and scales, many splits, the tiles of
each chip, accesses outside of a buffer, unwritten memory, and the whole model. On a CPU the kernels run in
Triton's interpreter."""

import importlib
import shutil
from contextlib import contextmanager
from pathlib import Path

import decoding
import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint
from rule import DEVICE, DTYPES, arithmetic, check, given, random, tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks import cases, timing
from paligemma import load_hf_model, reference, torch_ops
from paligemma.kernels import gemv as gemv_module
from paligemma.kernels import gemv_tile as tile_module
from paligemma.kernels import linear as linear_module
from paligemma.kernels import prefill_attention as prefill_module
from paligemma.kernels.common import blocks_of
from paligemma.kernels.decode_attention import decode_attention, plan
from paligemma.kernels.geglu import geglu
from paligemma.kernels.layer_norm import add_layer_norm
from paligemma.kernels.linear import Form
from paligemma.kernels.prefill_attention import prefill_attention
from paligemma.kernels.rms_norm import add_rms_norm
from paligemma.kernels.rope import rope
from paligemma.options import Sampling
from paligemma.reference import layers

NAN = float("nan")
BAND = 4096  # values before and after a buffer


def guarded(x: torch.Tensor) -> torch.Tensor:
    """The same values between two bands of NaN, so that a read beyond the ends changes the result."""
    buffer = torch.full((x.numel() + 2 * BAND,), NAN, dtype=x.dtype, device=x.device)
    return buffer[BAND : BAND + x.numel()].view(x.shape).copy_(x)


@pytest.fixture
def outputs(monkeypatch):
    with guards(monkeypatch):
        yield


@contextmanager
def guards(monkeypatch):
    """Memory that a launcher allocates is between bands that must not change, and is NaN until it is
    written."""
    buffers, empty, new_empty = [], torch.empty, torch.Tensor.new_empty

    def allocate(*shape, dtype, device):
        shape = shape[0] if len(shape) == 1 and not isinstance(shape[0], int) else shape
        count = int(np.prod(shape))
        buffer = empty(count + 2 * BAND, dtype=dtype, device=device).fill_(7)
        buffers.append((buffer, count))
        return buffer[BAND : BAND + count].view(shape).fill_(NAN if dtype.is_floating_point else 0)

    def guarded_new_empty(x, *shape, dtype=None, device=None):
        if device:  # a call of the interpreter
            return new_empty(x, *shape, device=device)
        return allocate(*shape, dtype=dtype or x.dtype, device=x.device)

    def zeros(*shape, dtype, device):
        return allocate(*shape, dtype=dtype, device=device).zero_()

    monkeypatch.setattr(torch, "empty_like", lambda x: allocate(x.shape, dtype=x.dtype, device=x.device))
    monkeypatch.setattr(torch.Tensor, "new_empty", guarded_new_empty)
    monkeypatch.setattr(torch, "zeros", zeros)
    yield
    assert buffers
    for buffer, count in buffers:
        assert (buffer[:BAND] == 7).all(), "written before the beginning of a buffer"
        assert (buffer[BAND + count :] == 7).all(), "written after the end of a buffer"


def seen(start: np.ndarray, limit: np.ndarray, S: int) -> np.ndarray:  # (B, T) twice -> (B, T, S)
    return (np.arange(S) >= start[..., None]) & (np.arange(S) < limit[..., None])


def spoilt(x: np.ndarray, used: np.ndarray, dtype: str) -> torch.Tensor:
    """Keys or values (B, S, K, D) with NaN at the positions that no query of the row sees."""
    values = tensor(x, dtype)
    values[~torch.from_numpy(used).to(DEVICE)] = NAN
    return guarded(values)


def plain_attention(q, k, v, mask: np.ndarray, scale: float, softcap: float | None) -> torch.Tensor:
    """Attention in plain torch: products of values in the dtype, everything else in float32."""
    G = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(G, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bhts", q.float(), k.float()) * scale
    scores = scores if softcap is None else softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~torch.from_numpy(mask).to(q.device)[:, None], -torch.inf)
    p = scores.softmax(-1).to(q.dtype).float()
    return torch.einsum("bhts,bshd->bthd", p, v.float()).to(q.dtype).flatten(2)


def attention_case(dtype, B, T, S, H, K, D, start, limit, scale=None, softcap=None, size=1.0):
    q = random(0, B, T, H, D, dtype=dtype, scale=size)
    k, v = random(1, B, S, K, D, dtype=dtype, scale=size), random(2, B, S, K, D, dtype=dtype)
    mask = seen(start, limit, S)
    used = mask.any(axis=1)
    inputs = guarded(tensor(q, dtype)), spoilt(k, used, dtype), spoilt(v, used, dtype)
    plain = plain_attention(*(tensor(x, dtype) for x in (q, k, v)), mask, scale or D**-0.5, softcap)

    def formula(p):
        return p.emit(layers.attention(*(arithmetic(x, p) for x in (q, k, v)), p, mask, scale, softcap))

    return inputs, formula, plain


def positions(x: np.ndarray | list) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x), dtype=torch.int64, device=DEVICE)


def without_size(options: dict) -> dict:
    """The options of a launcher: `size` is only the scale of the inputs."""
    return {name: value for name, value in options.items() if name != "size"}


OPTIONS = {
    "plain": {},
    "small softcap": {"softcap": 5.0, "size": 3.0},
    "softcap of Gemma 2": {"softcap": 50.0},
    "scale": {"scale": 144**-0.5},
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("H", "K", "D", "window", "options"),
    [(8, 1, 256, window, "plain") for window in (None, 1, 40, 329)]
    + [(4, 2, 72, window, options) for window in (None, 40) for options in OPTIONS],
)
def test_decode_attention(dtype, H, K, D, window, options, outputs):
    """Row lengths that end in the first split, at a boundary and in the last split. Positions that no query
    may see are NaN."""
    options = OPTIONS[options]
    length, S = np.array([[1], [32], [33], [330]]), 330
    start = np.zeros_like(length) if window is None else np.maximum(length - window, 0)
    splits, per_split = plan(len(length) * K, S)
    assert 4 < splits <= 16
    assert splits * per_split >= S
    (q, k, v), formula, plain = attention_case(dtype, 4, 1, S, H, K, D, start, length, **options)
    given_start = None if window is None else positions(start)
    value = decode_attention(q, k, v, positions(length), start=given_start, **without_size(options))
    check(value, formula, given(), dtype, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_attention_over_a_short_cache_is_one_split(dtype, outputs):
    length = np.array([[7], [30]])
    assert plan(2, 30)[0] == 1
    (q, k, v), formula, plain = attention_case(dtype, 2, 1, 30, 4, 1, 24, 0 * length, length)
    check(decode_attention(q, k, v, positions(length)), formula, given(), dtype, plain)


CHIPS = [80, 90, 100] if DEVICE.type == "cpu" else [10 * torch.cuda.get_device_capability()[0]]


PREFILLS = [
    (*heads, chip, dtype, "plain")
    for heads in ((8, 1, 256), (4, 2, 128), (2, 2, 72), (4, 2, 24))
    for chip in CHIPS
    for dtype in DTYPES
    if dtype != "float32" or chip == CHIPS[0]  # all chips use the same tile in float32
]
PREFILLS += [(4, 2, 128, CHIPS[-1], dtype, name) for name in OPTIONS if name != "plain" for dtype in DTYPES]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize(("H", "K", "D", "chip", "dtype", "options"), PREFILLS)
def test_prefill_attention_with_the_tiles_of_each_chip(
    dtype, H, K, D, chip, window, options, outputs, monkeypatch
):
    """The queries are the last 20 of 130 positions. Some rows are shorter, and the last 15 positions are a
    causal suffix. Positions that no query may see are NaN."""
    options = OPTIONS[options]
    monkeypatch.setattr(prefill_module, "architecture", lambda: chip)
    T, S = 20, 130
    lengths, t = np.array([[3], [65], [130]]), np.arange(T)
    limit = np.clip(lengths - T + 1 + t, np.maximum(lengths - 15, 1), lengths)
    start = 0 * limit if window is None else np.clip(limit - window, 0, limit - 1)
    (q, k, v), formula, plain = attention_case(dtype, 3, T, S, H, K, D, start, limit, **options)
    given_start = None if window is None else positions(start)
    value = prefill_attention(q, k, v, positions(limit), start=given_start, **without_size(options))
    check(value, formula, given(), dtype, plain)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("S", [1, 64, 130])
def test_prefill_attention_without_limits_sees_all(S, chip, outputs, monkeypatch):
    monkeypatch.setattr(prefill_module, "architecture", lambda: chip)
    limit = np.full((2, 5), S)
    (q, k, v), formula, plain = attention_case("bfloat16", 2, 5, S, 4, 2, 72, 0 * limit, limit)
    check(prefill_attention(q, k, v, None), formula, given(), "bfloat16", plain)


WITHOUT_TMA = DEVICE.type == "cuda" and torch.cuda.get_device_capability() < (9, 0)


@pytest.mark.skipif(WITHOUT_TMA, reason="this GPU has no TMA")
def test_descriptors_are_used_where_the_chip_and_the_layout_allow(monkeypatch):
    used = []

    def descriptor(*args):
        used.append(args)
        return TensorDescriptor(*args)

    monkeypatch.setattr(prefill_module, "TensorDescriptor", descriptor)
    monkeypatch.setattr(prefill_module, "architecture", lambda: 90)

    def descriptors(D: int, dtype: str) -> int:
        used.clear()
        q, k, v = (torch.randn(1, 64, 2, D, device=DEVICE).to(DTYPES[dtype]) for _ in range(3))
        prefill_attention(q, k, v, None)
        return len(used)

    assert descriptors(64, "bfloat16") == 2
    assert descriptors(72, "bfloat16") == 4
    assert descriptors(20, "bfloat16") == 0, "a row of 40 bytes is not aligned"
    assert descriptors(64, "float32") == 0
    monkeypatch.setattr(prefill_module, "architecture", lambda: 80)
    assert descriptors(64, "bfloat16") == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 33, 2047, 2049])
def test_elementwise_kernels_stay_in_their_buffers(size, dtype, outputs):
    x, y = (guarded(tensor(random(i, 3, size), dtype)) for i in range(2))
    weight, bias = (guarded(tensor(random(i, size), dtype)) for i in range(2))
    assert geglu(x, y).isfinite().all()
    for result in (*add_rms_norm(x, y, weight, 1e-6), *add_layer_norm(x, y, weight, bias, 1e-6)):
        assert result.isfinite().all()


@pytest.mark.parametrize(("H", "K", "D"), [(8, 1, 256), (3, 3, 20), (6, 2, 24)])
def test_rope_stays_in_its_buffers(H, K, D, outputs):
    """Three tokens in the last places of each row; the rest of the caches stays NaN."""
    B, T, S = 2, 3, 9
    q, k, v = (guarded(tensor(random(i, B, T, heads, D), "bfloat16")) for i, heads in enumerate((H, K, K)))
    caches = [guarded(torch.full((B, S, K, D), NAN, dtype=torch.bfloat16, device=DEVICE)) for _ in range(2)]
    places = positions([[6, 7, 8], [5, 6, 7]])
    rotation = guarded(torch_ops.rope_table(S, D, 10000.0, DEVICE)[:, places])
    assert rope(q, k, v, rotation, places, *caches).isfinite().all()
    for cache in caches:
        filled = cache.isfinite().all(dim=(2, 3))
        assert filled.sum() == B * T
        assert filled.gather(1, places).all()
        if DEVICE.type == "cpu":
            whole = torch.frombuffer(bytearray(cache.untyped_storage()), dtype=torch.bfloat16)
            assert whole.isnan().sum() == 2 * BAND + B * (S - T) * K * D


def few_rows(R: int, post: bool, quantize: str | None) -> dict[str, cases.Case]:
    """The products of a decode, at sizes that are not multiples of a block. For several rows, 256 features
    are two blocks of 128. One row has more outputs: the error of 20 numbers varies between CPUs, on which
    torch adds in other orders."""
    every = [
        cases.qkv_case("", R, 256, (2, 1, 18), post, quantize),
        cases.project_case("", R, 256, 35, not post, quantize),
        cases.gate_up_case("", R, 256, 20 if R > 1 else 148, post, quantize),
    ]
    if quantize != "int4":
        every += [cases.head_case("", R, 33, 50, post, quantize, 3.0, begins=True)]
    return {case.kernel: case for case in every}


def check_case(case: cases.Case, dtype: str) -> None:
    """Run the kernel with inputs between bands of NaN, and compare every value of every output with the
    exact one."""
    torch.manual_seed(0)
    inputs = case.make(DEVICE, DTYPES[dtype])
    plain, exact = (timing.tensors(f(*(x.clone() for x in inputs))) for f in (case.plain, case.exact))
    plain, exact = case.seen(*plain), case.seen(*exact)
    between_bands = (guarded(x) if x.is_floating_point() else x for x in inputs)
    results = case.seen(*timing.tensors(case.run(*between_bands)))
    for value, yardstick, truth in zip(results, plain, exact, strict=True):
        if not truth.is_floating_point():
            assert torch.equal(value, truth)
            continue
        expected = truth.cpu().numpy()
        check(value, lambda p, expected=expected: p.emit(arithmetic(expected, p)), given(), dtype, yardstick)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("R", "post", "quantize"),
    [
        (1, False, None), (1, True, "int8"), (1, True, "fp8"),
        (3, True, None), (16, False, "int8"), (16, False, "fp8"),
        (1, True, "int4"), (3, False, "int4"), (16, True, "int4"),
    ],
)  # fmt: skip
def test_products_of_few_rows_with_the_tiles_of_a_chip(dtype, R, post, quantize, outputs, monkeypatch):
    monkeypatch.setattr(tile_module, "architecture", lambda: 90)
    for case in few_rows(R, post, quantize).values():
        check_case(case, dtype)


@pytest.mark.parametrize(
    ("R", "N", "K", "quantize"),
    [
        (1, 3584, 1024, "int8"), (1, 3585, 2048, "fp8"), (1, 3584, 3072, "int8"),  # output projections
        (1, 8192, 512, "fp8"), (1, 8193, 1536, "int8"), (1, 8192, 2048, "fp8"), (2, 8192, 768, "int8"),  # qkv
        (16, 4096, 64, None), (16, 4096, 128, None), (9, 4097, 384, None),
    ],
)  # fmt: skip
def test_wide_products_with_the_tiles_of_a_chip(R, N, K, quantize, monkeypatch):
    """As many features as the first tile has, as both tiles have, and more."""
    monkeypatch.setattr(tile_module, "architecture", lambda: 90)
    tile = tile_module.Tile.of(R, N, K, torch.bfloat16, torch.int8 if quantize else torch.bfloat16)
    assert tile.rows > 1
    assert tile.second == (tile.first if tile.first < K else 0)
    check_case(cases.project_case("", R, K, N, True, quantize), "bfloat16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("R", "N", "K"),
    [
        (1, 37, 32), (1, 9, 5632), (1, 9, 12320),  # by FMA
        (1, 70, 96), (1, 64, 1024), (1, 70, 1632), (2, 35, 1120), (5, 35, 416), (16, 35, 160),  # by tl.dot
    ],
)  # fmt: skip
def test_4_bit_products_with_the_tiles_of_a_chip(dtype, R, N, K, monkeypatch):
    """Features of one tile, of two and of more, most of which are not multiples of a tile."""
    monkeypatch.setattr(tile_module, "architecture", lambda: 90)
    monkeypatch.setattr(tile_module, "MANY", 64)
    tile = tile_module.Tile.of(R, N, K, DTYPES[dtype], torch.int32)
    assert (tile.rows > 1) == (R > 1 or (N >= 64 and dtype != "float32"))
    check_case(cases.project_case("", R, K, N, True, "int4"), dtype)


LINEARS = {  # rows, input features, output features, splits
    "partial tiles": (17, 72, 40, 1),
    "two splits": (40, 161, 33, 2),
    "four splits": (33, 33 * 7, 70, 4),  # the last split ends in the middle of a tile
    "fewer blocks than splits": (3, 40, 5, 4),
    "more tiles than a group": (300, 33, 34, 1),
    "whole tiles": (32, 64, 32, 2),
}


def check_linear(dtype: str, which: str, bias: bool, gelu: bool) -> None:
    rows, size_in, size_out, splits = LINEARS[which]
    case = cases.linear_case("", rows, size_in, size_out, Form(16, 32, 32, 2, 4, splits), bias, gelu)
    check_case(case, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("which", LINEARS)
@pytest.mark.parametrize(("bias", "gelu"), [(False, False), (True, True)], ids=["plain", "bias and GELU"])
def test_linear(dtype, which, bias, gelu, outputs):
    check_linear(dtype, which, bias, gelu)


MEASURED = [tile._replace(splits=splits) for tile in cases.TILES for splits in (1, 4)]


@pytest.mark.parametrize("chip", CHIPS[:2])  # without TMA and with
@pytest.mark.parametrize("form", MEASURED, ids=str)
def test_linear_with_the_tiles_that_are_measured(form, chip, outputs, monkeypatch):
    monkeypatch.setattr(linear_module, "architecture", lambda: chip)
    check_case(cases.linear_case("", 130, 264, 72, form, True), "float16")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [1, 2, 3, 5, 9])
@pytest.mark.parametrize(("R", "quantize"), [(1, None), (1, "int8"), (2, "fp8"), (9, "int8"), (16, None)])
def test_products_of_so_many_tiles(dtype, R, quantize, tiles, monkeypatch):
    """A kernel loads two tiles before the wait and the others in a loop. The number of outputs is odd, a
    block has 32 of them, and the last tile is not full. A norm needs the whole row before the product: one
    row may have at most two tiles, and more tiles need tl.dot."""
    K = 128 * tiles - 3
    of = tile_module.Tile(1 if R == 1 else 16, 32, 128, 128 if tiles > 1 else 0, 4)
    monkeypatch.setattr(tile_module.Tile, "of", lambda *args: of)
    check_case(cases.project_case("", R, K, 37, R % 2 == 1, quantize), dtype)
    if R == 1 and tiles > 2:
        of = of._replace(rows=16)
    check_case(cases.gate_up_case("", R, K, 69, R % 2 == 1, quantize), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "case", [case for case in cases.odd() if case.kernel == "next_token"], ids=lambda case: case.shape
)
def test_between_two_tokens(dtype, case, outputs):
    check_case(case, dtype)


@pytest.mark.parametrize(
    "case", [case for case in cases.odd() if case.kernel.startswith("top_p")], ids=lambda case: case.name
)
def test_sampling(case, outputs):
    check_case(case, "float32")


MISTAKES = {  # the kernel's file, the right text, the wrong text, and the launcher that shows the mistake
    "a norm without its + 1":
        ("gemv_input", "z * (1 + tl.load(norm_ptr", "z * (0 + tl.load(norm_ptr", "norm_geglu"),
    "a branch without its norm": ("gemv_input", "* branch_scale * (1 + post)", "* (1 + post)", "norm_head"),
    "a feature too many": ("gemv", "inside &= k < K", "inside &= k <= K", "norm_head"),
    "half of the squares": ("gemv_input", "(part < PARTS)", "(part < PARTS // 2)", "norm_geglu"),
    "squares of all but the first output":
        ("project_add", "tl.where(inside, out", "tl.where(inside & (n > 0), out", "project_add"),
    "the first tile twice":
        ("gemv", "block, FIRST, K, BLOCK_N, SECOND", "block, 0, K, BLOCK_N, SECOND", "project_add"),
    "a later tile not used": (
        "gemv", "at compile time\n                    out += ", "\n                    out += 0 * ",
        "project_add",
    ),
    "a later tile twice": (
        "gemv", "first, K, BLOCK_N, FIRST, ALL_WANTED, GROUPS\n                )",
        "first - FIRST, K, BLOCK_N, FIRST, ALL_WANTED, GROUPS\n                )", "project_add",
    ),
    "up for gate": ("norm_geglu", "j % 2 * M + m, m < M", "(j + 1) % 2 * M + m, m < M", "norm_geglu"),
    "the scale of another row":
        ("gemv", "tl.load(scale_ptr + n,", "tl.load(scale_ptr + n // 2,", "project_add"),
    "the position of another row": (
        "norm_qkv_rope", "tl.load(position_ptr + r,", "tl.load(position_ptr + r // 2,", "norm_qkv_rope",
    ),
    "rotation of neighbours": (
        "norm_qkv_rope", "(2 * HALF) + j % 2 * HALF + i", "(2 * HALF) + 2 * i + j % 2", "norm_qkv_rope",
    ),
    "no softcap": ("norm_head", "capped(logits, softcap, tl.float32)", "logits", "norm_head"),
}  # fmt: skip


def plant(file: str, right: str, wrong: str, launcher: str, package: str, tmp_path, monkeypatch) -> None:
    """Put a mistake into a copy of the kernels, and let the cases of the launcher use this copy."""
    shutil.copytree(Path(gemv_module.__file__).parent, tmp_path / package)
    source = (tmp_path / package / f"{file}.py").read_text()
    assert source.count(right) == 1
    (tmp_path / package / f"{file}.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    wrong_launcher = getattr(importlib.import_module(f"{package}.{launcher}"), launcher)
    monkeypatch.setattr(f"benchmarks.cases.{launcher}.{launcher}", wrong_launcher)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_a_product_is_caught(mistake, tmp_path, monkeypatch):
    file, right, wrong, launcher = MISTAKES[mistake]
    package = f"planted_{list(MISTAKES).index(mistake)}"
    plant(file, right, wrong, launcher, package, tmp_path, monkeypatch)
    monkeypatch.setattr(importlib.import_module(f"{package}.gemv_tile"), "architecture", lambda: 90)
    with pytest.raises(AssertionError, match=r"relative RMS|torch\.equal"):
        check_case(few_rows(3, True, "fp8" if "scale" in mistake else None)[launcher], "float32")


BIAS = """    if bias_ptr is not None:
        acc += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)
"""
GELU = """    if GELU:
        acc = gated(acc, 1.0)
"""
OFF, UNWRITTEN = "relative RMS", "relative RMS nan"
LINEAR_MISTAKES = {  # the right text, the wrong text, and the product and the words that show the mistake
    "a split skipped": ("tl.static_range(SPLITS)", "tl.static_range(1, SPLITS)", "four splits", OFF),
    "a split that continues to the end": ("tl.minimum(begin + per_split, K)", "K", "two splits", OFF),
    "a split too short":
        ("per_split * form.features,", "per_split * form.features - form.features,", "two splits", OFF),
    "the bias in every split": ("bias if splits == 1 else None, parts", "bias, parts", "two splits", OFF),
    "GELU of every split": ("GELU=gelu and splits == 1", "GELU=gelu", "two splits", OFF),
    "GELU before the bias": (BIAS + GELU, GELU + BIAS, "partial tiles", OFF),
    "a feature too many":
        ("(m < M)[:, None] & (here < K)", "(m < M)[:, None] & (here <= K)", "two splits", UNWRITTEN),
    "a row too many": (
        "mask=(m < M)[:, None] & (n < N)", "mask=(m <= M)[:, None] & (n < N)",
        "partial tiles", "after the end",
    ),
    "a tile that no program computes": ("within % group)", "within % GROUP)", "partial tiles", UNWRITTEN),
    "the first group twice":
        ("first_m = tile // (GROUP * tiles_n) * GROUP", "first_m = 0", "more tiles than a group", UNWRITTEN),
}  # fmt: skip


@pytest.mark.parametrize("mistake", LINEAR_MISTAKES)
def test_a_mistake_in_a_linear_layer_is_caught(mistake, tmp_path, monkeypatch):
    right, wrong, which, words = LINEAR_MISTAKES[mistake]
    package = f"planted_linear_{list(LINEAR_MISTAKES).index(mistake)}"
    plant("linear", right, wrong, "linear", package, tmp_path, monkeypatch)
    with pytest.raises(AssertionError, match=words), guards(monkeypatch):
        check_linear("float32", which, True, True)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    """The names of the launches on a GPU, in turn: kernels, and operations of torch other than views and the
    allocation of empty memory."""
    names, run = [], GridExecutor.__call__

    class Others(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            aliases = [returned.alias_info for returned in func._schema.returns]
            view = any(alias and not alias.is_write for alias in aliases)
            names.extend([] if view or "empty" in func.name() else [func.name()])
            return func(*args, **(kwargs or {}))

    def launch(self, *args, **kwargs):
        names.append(self.fn.__name__)
        with torch.utils._python_dispatch._disable_current_modes():
            run(self, *args, **kwargs)

    monkeypatch.setattr(GridExecutor, "__call__", launch)
    with Others():
        yield names


CPU_ONLY = pytest.mark.skipif(DEVICE.type != "cpu", reason="counts the launches of the interpreter")


@CPU_ONLY
def test_a_token_is_five_launches_a_layer_and_the_head(tmp_path, tokenizer_model, launched):
    """One more launch prepares the next token. That makes 92 with the 18 layers of PaliGemma 3B, and 3 more
    if tokens are sampled. Gemma 2 has the same number of launches in a layer."""
    for name, text in (("Gemma", {}), ("Gemma 2", GEMMA_2)):
        directory = write_checkpoint(tmp_path / name, tokenizer_model, config=config_dict(text=text))
        model, _ = load_hf_model(directory, dtype="float32", backend="triton", device="cpu")
        state = model.new_state(1, 8)
        decoding.append(model, state, torch.zeros(1, 1000), torch.tensor([5]))
        launched.clear()
        with model.computing(1):
            model.next_step(state)
        found = list(launched)
        layer = ["norm_qkv_rope_kernel", "decode_attention_kernel", "project_add_kernel"]
        layer += ["norm_geglu_kernel", "project_add_kernel"]
        token = layer * model.config.text_config.num_hidden_layers + ["norm_head_kernel"]
        assert found == [*token, "next_token_kernel"]
        assert (state.cache.counters == 0).all()
        assert (state.buffers.argmax_scratch == -(1 << 63)).all()
        state = model.new_state(1, 8, sampled=True)
        state.begin(Sampling(0.8, 0.9, seed=0), 2)
        decoding.append(model, state, torch.zeros(1, 1000), torch.tensor([5]))
        launched.clear()
        with model.computing(1):
            model.next_step(state)
        sampling = ["top_p_histogram_kernel", "top_p_search_kernel", "top_p_search_kernel"]
        assert launched == [*token, *sampling, "next_token_kernel"]
        assert (state.sampling.scratch == 0).all()
        assert (state.buffers.argmax_scratch == -(1 << 63)).all()


class Anything(dict):
    """One form for the products of all shapes."""

    def get(self, shape, default=None):
        return {0: Form(16, 32, 32, 1, 4)}


@CPU_ONLY
def test_a_prefill_is_seven_launches_a_layer_of_siglip_and_nine_of_gemma(
    tmp_path, tokenizer_model, launched, monkeypatch
):
    """For PaliGemma 3B that makes 27 x 7 + 18 x 9 = 351, and 29 before, between and after the layers. In this
    test every product is one kernel, as on a GPU."""
    monkeypatch.setattr(linear_module, "FORMS", Anything())
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config_dict())
    model, _ = load_hf_model(directory, dtype="float16", backend="triton", device="cpu")
    inputs = torch_inputs(batch(model.config, [20], [0]))
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    (rows, _), state = model.unpad(ids, pixels), model.new_state(1, 64)
    launched.clear()
    with model.computing(rows.input_ids.numel()):
        model.first_step(state, rows, pixels)
    found = [name for name in launched if name != "aten::_unsafe_view"]
    siglip = ["layer_norm_kernel", "linear_kernel", "prefill_attention_kernel", "linear_kernel"]
    siglip += ["layer_norm_kernel", "linear_kernel", "linear_kernel"]
    gemma = ["rms_norm_kernel", "linear_kernel", "rope_kernel", "prefill_attention_kernel", "linear_kernel"]
    gemma += ["rms_norm_kernel", "linear_kernel", "geglu_kernel", "linear_kernel"]
    vision = siglip * model.config.vision_config.num_hidden_layers
    text = gemma * model.config.text_config.num_hidden_layers
    begin, between = found.index(siglip[0]), found.index(gemma[0])
    assert found[begin : begin + len(vision)] == vision
    assert found[between : between + len(text)] == text
    after_vision, after_text = found[begin + len(vision) : between], found[between + len(text) :]
    assert (begin, len(after_vision), len(after_text)) == (15, 6, 8)
    assert after_vision[:2] == ["layer_norm_kernel", "linear_kernel"]
    assert after_text[-2:] == ["norm_head_kernel", "next_token_kernel"]


def test_rows_are_cut_into_blocks_that_divide_them():
    blocks = {
        2048: (1, 1024), 2304: (4, 256), 3584: (2, 512), 4608: (2, 512),
        1152: (8, 128), 72: (8, 128), 33: (16, 64), 2047: (1, 1024),
    }  # fmt: skip
    assert {E: blocks_of(E) for E in blocks} == blocks


@pytest.mark.skipif(DEVICE.type == "cpu", reason="needs a GPU: test_model.py has this for the interpreter")
def test_the_whole_model_agrees_with_the_reference(tmp_path, tokenizer_model):
    config = config_dict(text={"num_key_value_heads": 2, "head_dim": 20})
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config)
    model, _ = load_hf_model(directory, dtype="float32", backend="triton", device=DEVICE.type)
    inputs = batch(model.config, [2, 8], [3, 0])
    valid = inputs["attention_mask"].astype(bool)
    truth = reference.load(directory)
    logits = model(**torch_inputs(inputs)).cpu().numpy()
    assert np.abs(logits - truth.forward(**inputs))[valid].max() < 5e-5  # float32 rounding at logits of RMS 1
    expected = truth.generate(**inputs, max_new_tokens=3, eos_token_id=-1)
    tokens = model.generate(**torch_inputs(inputs), max_new_tokens=3, eos_token_id=-1)
    assert (tokens.cpu().numpy() == expected).all()
