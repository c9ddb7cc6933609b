"""Products of more rows than those of a decode step, on a CPU, with the GELU and the GeGLU that follow them.

Every test computes in the way that is chosen on this CPU: for bfloat16, by the Numba kernel for many rows in
pairs if the CPU multiplies them in AVX-512, in float32 if it has AVX2, and by torch otherwise.
"""

import importlib.util

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from paligemma import cpu_linear, int4, ops
from paligemma.checkpoint.quantize import quantized
from paligemma.cpu_linear import MANY_ROWS, Product, way
from paligemma.layers import QUANTIZED

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from paligemma.kernels import cpu_many_rows, cpu_workers

HALF = torch.bfloat16
STORED = {"bfloat16": HALF, **QUANTIZED}
# (rows, features, outputs): the tiles and panels that are not whole, one and several blocks of features
SHAPES = [(17, 32, 8), (48, 2048, 40), (49, 96, 31), (100, 1312, 33), (65, 4096, 9), (272, 1280, 160)]
ODD_FEATURES = [(33, 34, 12), (20, 588, 100), (40, 4304, 72), (18, 2, 40), (18, 33, 40)]


@pytest.fixture(autouse=True)
def products_of_any_size_are_large(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 0)


def weight_of(outputs: int, features: int, stored: str, seed: int) -> tuple[Tensor, Tensor | None, Tensor]:
    """A weight, its scale, and the numbers that they mean in float64."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, features, generator=generator) / features**0.5
    if stored in ("bfloat16", "float16", "float32"):
        weight = weight.to(getattr(torch, stored))
        return weight, None, weight.double()
    codes, scale = quantized(weight, STORED[stored], HALF)
    if stored == "int4":
        return codes, scale, int4.dequantized(codes, scale).double()
    return codes, scale, codes.double() * scale.double()[:, None]


@pytest.fixture
def in_float32(monkeypatch):
    """As on a CPU without instructions for bfloat16 and float16."""
    monkeypatch.setattr(cpu_many_rows, "MULTIPLIES_BFLOAT16", False)
    monkeypatch.setattr(cpu_many_rows, "multiplies", lambda dtype: False)


def rows_of(rows: int, features: int) -> Tensor:
    return torch.randn(rows, features, generator=torch.Generator().manual_seed(7)).to(HALF)


def linear(x: Tensor, weight: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    return cpu_linear.linear(x, weight, scale, bias, numba=True)


def roundings(x: Tensor, weight: Tensor, apart: float) -> float:
    """How many times the error of rounding it an answer may have: `apart` if torch rounds between the
    operations, which the kernel does not. 4-bit weights are rounded too."""
    product = Product(*x.shape, len(weight), x.dtype, weight.dtype, numba=True)
    once = 1.1 if way(product).name == MANY_ROWS else apart
    return once + 1.5 if weight.dtype == int4.STORED else once


def check(y: Tensor, exact: Tensor, times: float) -> None:
    """The RMS error is at most `times` that of rounding the exact answer."""
    assert y.shape == exact.shape
    assert y.is_contiguous()
    rounding = (exact.to(y.dtype).double() - exact).square().mean().sqrt()
    error = (y.double() - exact).square().mean().sqrt()
    assert error <= times * rounding, f"{error / rounding:.3g} times the error of rounding"


@pytest.mark.parametrize(("rows", "features", "outputs"), SHAPES + ODD_FEATURES)
@pytest.mark.parametrize("stored", STORED)
def test_products(stored, rows, features, outputs):
    if stored == "int4" and features % int4.GROUP:
        return
    weight, scale, wide = weight_of(outputs, features, stored, 1)
    x, bias = rows_of(rows, features), None
    if stored == "bfloat16":
        bias = torch.linspace(-2, 3, outputs).to(HALF)
    exact = x.double() @ wide.T + (0 if bias is None else bias.double())
    y = linear(x, weight, scale, bias)
    assert y.dtype == HALF
    check(y, exact, roundings(x, weight, 1.1))


@pytest.mark.usefixtures("in_float32")
@pytest.mark.parametrize(
    ("rows", "features", "outputs"), [SHAPES[0], SHAPES[3], (272, 1312, 300), *ODD_FEATURES]
)
@pytest.mark.parametrize("stored", [*STORED, "float16", "float32"])
def test_products_in_float32(stored, rows, features, outputs):
    """All weights are exact in float32: int4 too, unlike in bfloat16."""
    if features % (int4.GROUP if stored == "int4" else 1):
        return
    weight, scale, wide = weight_of(outputs, features, stored, 1)
    other, other_scale, other_wide = weight_of(outputs, features, stored, 2)
    bias = torch.linspace(-2, 3, outputs).to(HALF)
    x = rows_of(rows, features)
    exact, up = x.double() @ wide.T, x.double() @ other_wide.T
    for dtype in (HALF, torch.float16, torch.float32):
        times = 1 + features**0.5 if dtype == torch.float32 else 1.1  # sums in float32 are not exact
        kind = Product(rows, features, outputs, dtype, weight.dtype, numba=True)
        if way(kind).name != MANY_ROWS:
            assert features < 16 or not cpu_many_rows.MULTIPLIES_AND_ADDS or kind.x == kind.weight
            continue
        check(linear(x.to(dtype), weight, scale, bias), exact + bias.double(), times)
        gate = F.gelu(exact, approximate="tanh")
        y = cpu_linear.linear_geglu(x.to(dtype), (weight, scale), (other, other_scale), numba=True)
        check(y, gate * up, times)


@pytest.mark.parametrize(("rows", "features", "outputs"), SHAPES)
@pytest.mark.parametrize("stored", STORED)
def test_geglu(stored, rows, features, outputs):
    gate, up = (weight_of(outputs, features, stored, seed) for seed in (1, 2))
    x = rows_of(rows, features)
    y = cpu_linear.linear_geglu(x, gate[:2], up[:2], numba=True)
    exact = F.gelu(x.double() @ gate[2].T, approximate="tanh") * (x.double() @ up[2].T)
    check(y, exact, roundings(x, gate[0], 3.5))


@pytest.mark.parametrize(("rows", "features", "outputs"), [*SHAPES, (256, 1152, 88)])
def test_gelu(rows, features, outputs):
    weight, _, wide = weight_of(outputs, features, "bfloat16", 1)
    x, bias = rows_of(rows, features), torch.linspace(-9, 9, outputs).to(HALF)
    with ops.use("numba"):
        y = ops.linear(x, weight, bias, gelu=True)
    exact = F.gelu(x.double() @ wide.T + bias.double(), approximate="tanh")
    check(y, exact, roundings(x, weight, 2))


def test_gelu_of_every_size():
    """Of numbers of both signs from 2^-20 to 2^127, relative to the answer unless it is near 0."""
    weight = torch.zeros(16, 32, dtype=HALF)
    weight[:, 0] = 1
    size = torch.cat([torch.logspace(-20, 127, 1000, base=2), torch.linspace(0.01, 12, 2000)]).to(HALF)
    values = torch.cat([size, -size])
    x = torch.zeros(len(values), 32, dtype=HALF)
    x[:, 0] = values
    y = cpu_linear.linear(x, weight, None, torch.zeros(16, dtype=HALF), gelu=True, numba=True)
    exact = F.gelu(values.double(), approximate="tanh")[:, None]
    assert bool(((y.double() - exact).abs() <= 2.0**-8 * exact.abs() + 1e-6).all())


def test_whole_numbers_are_summed_exactly():
    """Each row of the weight is another, so that rows in the wrong place would show."""
    generator = torch.Generator().manual_seed(0)
    for rows, features, outputs in (SHAPES[3], SHAPES[4], ODD_FEATURES[1]):
        x, weight = (
            torch.randint(-1, 2, shape, generator=generator)
            for shape in ((rows, features), (outputs, features))
        )
        exact = (x.double() @ weight.double().T).to(HALF)
        for stored in (HALF, torch.int8) if features % 32 == 0 else (HALF,):
            scale = torch.ones(outputs, dtype=HALF) if stored == torch.int8 else None
            assert torch.equal(linear(x.to(HALF), weight.to(stored), scale), exact)


def test_every_value_of_an_8_bit_weight():
    for stored in (torch.int8, torch.float8_e4m3fn):
        weight = torch.arange(256).to(torch.int8).view(stored)
        weight = weight[weight.float().isfinite()][:, None].expand(-1, 64).contiguous()
        for one in (0, 37, 63):
            x = torch.zeros(17, 64, dtype=HALF)
            x[:, one] = torch.arange(17) - 8
            y = linear(x, weight, torch.ones(len(weight), dtype=HALF))
            assert torch.equal(y, (x[:, one, None].float() * weight[:, 0].float()).to(HALF))


def test_what_is_not_finite_stays_so():
    x, weight = torch.ones(40, 64, dtype=HALF), torch.ones(24, 64, dtype=HALF)
    x[3, 5], weight[7, 2], weight[9, 33] = torch.nan, torch.inf, -torch.inf
    y = linear(x, weight)
    assert bool(y[3].isnan().all())
    assert y[0, 7] == torch.inf
    assert y[39, 9] == -torch.inf
    kept = y[[0, 39]][:, [0, 23]]
    assert bool((kept == 64).all())
    assert not cpu_linear.linear_geglu(x, (weight, None), (weight, None), numba=True)[:, 7].isfinite().any()
    x, weight = torch.ones(17, 34, dtype=HALF), torch.ones(8, 34, dtype=HALF)
    weight[0, 2], weight[1, 28] = torch.inf, torch.inf  # of features that the last vector has once more
    assert linear(x, weight)[5, :3].tolist() == [torch.inf, torch.inf, 34]


def test_a_bias_that_is_a_view():
    x, weight = rows_of(20, 64), weight_of(24, 64, "bfloat16", 1)[0]
    every = torch.arange(48).float()
    y = linear(x, torch.zeros_like(weight), None, every[::2].to(HALF))
    assert torch.equal(y, every[::2].to(HALF).expand(20, -1))
    assert torch.equal(linear(x, torch.zeros_like(weight), None, every[::2]), y)


def test_no_rows():
    weight = weight_of(24, 64, "bfloat16", 1)[0]
    assert linear(torch.empty(0, 64, dtype=HALF), weight).shape == (0, 24)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads(threads, monkeypatch):
    """Each takes blocks of outputs of its own."""
    weight, _, _ = weight_of(333, 1312, "bfloat16", 1)
    x, before = rows_of(60, 1312), linear(rows_of(60, 1312), weight)
    monkeypatch.setattr(cpu_workers, "threads", lambda: threads)
    assert torch.equal(linear(x, weight), before)


def test_rows_that_begin_anywhere():
    weight, _, wide = weight_of(24, 64, "bfloat16", 1)
    memory = rows_of(1, 64 * 65 + 1)[0]
    for x in (memory[1:].view(65, 64), memory[:-1].view(65, 64)[1:], memory[: 64 * 64].view(64, 64).T):
        check(linear(x, weight), x.double() @ wide.T, 1.1)


def test_the_kernel_is_for_cpus_that_it_is_the_fastest_on(monkeypatch):
    def name(rows: int, x: torch.dtype, weight: torch.dtype, features: int = 2048, **of: bool) -> str:
        return way(Product(rows, features, 2048, x, weight, **{"numba": True, **of})).name

    monkeypatch.setattr(cpu_many_rows, "MULTIPLIES_BFLOAT16", True)
    monkeypatch.setattr(cpu_many_rows, "MULTIPLIES_TILES", False)
    for stored in STORED.values():
        assert name(17, HALF, stored) == MANY_ROWS
        assert name(16, HALF, stored) != MANY_ROWS
        assert name(17, HALF, stored, numba=False) != MANY_ROWS
        assert name(17, HALF, stored, plain=False) != MANY_ROWS
    assert name(17, torch.float32, torch.float32) != MANY_ROWS
    assert name(17, HALF, HALF, 2047) != MANY_ROWS
    assert name(17, HALF, torch.int8, 2046) != MANY_ROWS
    monkeypatch.setattr(cpu_linear, "LARGE", 1 << 30)
    assert name(17, HALF, HALF) != MANY_ROWS
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    for pairs, tiles, by_torch, by_float32, fastest in [
        (True, False, True, True, True),
        (True, True, True, True, False),
        (False, False, False, True, True),
        (False, False, False, False, False),
        (False, False, True, True, False),
    ]:
        monkeypatch.setattr(cpu_many_rows, "MULTIPLIES_BFLOAT16", pairs)
        monkeypatch.setattr(cpu_many_rows, "MULTIPLIES_TILES", tiles)
        monkeypatch.setattr(cpu_many_rows, "MULTIPLIES_AND_ADDS", by_float32)
        monkeypatch.setattr(cpu_many_rows, "multiplies", lambda dtype, answer=by_torch: answer)
        monkeypatch.setattr(cpu_many_rows, "converts_halves", lambda: True)
        assert (name(17, HALF, HALF) == MANY_ROWS) == fastest
        assert (name(17, torch.float16, torch.int8) == MANY_ROWS) == (by_float32 and not by_torch)


def test_gradients_pass_through_gelu_and_geglu():
    x = rows_of(20, 64).requires_grad_()
    weight, other = weight_of(40, 64, "bfloat16", 1)[0], weight_of(40, 64, "bfloat16", 2)[0]
    cpu_linear.linear_geglu(x, (weight, None), (other, None), numba=True).sum().backward()
    bias, scale = torch.zeros(40, dtype=HALF), torch.ones(40, dtype=HALF)
    cpu_linear.linear(x, weight, None, bias, gelu=True, numba=True).sum().backward()
    assert x.grad is not None
    assert bool(x.grad.isfinite().all())
    assert bool((x.grad != 0).any())
    x = x.detach()
    cpu_linear.linear(x, weight, None, bias.requires_grad_(), numba=True).sum().backward()
    cpu_linear.linear(x, weight.to(torch.int8), scale.requires_grad_(), numba=True).sum().backward()
    for given in (bias, scale):
        assert given.grad is not None
