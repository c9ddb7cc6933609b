"""Every way to compute a product on a CPU, at sizes that fit no vector; the threads that a product takes; and
elementwise operations in blocks.

Continuous integration runs this file again for each instruction set that its CPU can imitate.
"""

import threading
from itertools import product

import pytest
import torch
from rule import DTYPES

from paligemma import cpu_blocks, cpu_linear, cpu_threads, int4, ops, torch_ops
from paligemma.checkpoint.quantize import quantized
from paligemma.cpu_linear import LARGE, WAYS, Product, way
from paligemma.layers import QUANTIZED

FEATURES = [*range(1, 201), *(n + d for n in (256, 1024, 2048) for d in (-1, 0, 1, 8, 16)), 4304]
STORED = {**DTYPES, **QUANTIZED}


def rows_for(features: int) -> tuple[int, int]:
    """Two numbers of rows: 1, and a number from 2 to 20."""
    return 1, 2 + features % 19


def features_of(stored: str) -> list[int]:
    return FEATURES if stored != "int4" else [K for K in FEATURES if K % int4.GROUP == 0]


def inputs(rows: int, features: int, outputs: int, dtype: str, stored: str) -> tuple:  # x, weight, scale
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(rows, features, generator=generator).to(DTYPES[dtype])
    weight = torch.randn(outputs, features, generator=generator)
    if stored in QUANTIZED:
        return x, *quantized(weight, QUANTIZED[stored], DTYPES[dtype])
    return x, weight.to(STORED[stored]), None


def check(y: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, scale=None, bias=None) -> None:
    """The RMS error is at most twice that of rounding the exact answer. In float32 it is that of a sum."""
    if weight.dtype == int4.STORED:
        wide = int4.dequantized(weight, scale).double()
    else:
        wide = weight.double() if scale is None else weight.double() * scale.double()[:, None]
    exact = x.double() @ wide.T
    exact = exact if bias is None else exact + bias.double()
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    size = exact.square().mean().sqrt()
    rounding = (exact.to(x.dtype).double() - exact).square().mean().sqrt()
    error = (y.double() - exact).square().mean().sqrt()
    allowed = 1e-5 * size if x.dtype == torch.float32 else 2 * rounding + 2e-3 * size * (size < 1e-2)
    assert error <= allowed, f"{error:.3g} at {size:.3g}, K {x.shape[1]}, {len(x)} rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("chosen", WAYS, ids=lambda way: way.name)
def test_every_way_is_right_wherever_it_may_be_taken(chosen, stored, dtype, monkeypatch):
    """A way is right for every product that it can compute, even if another way is faster."""
    if stored in DTYPES and stored != dtype:
        return  # a weight has the dtype of x, or is quantised
    computed = 0
    monkeypatch.setattr(cpu_blocks, "BLOCK", 1000)  # values of a weight that are widened at a time
    for features in features_of(stored):
        many, weight, scale = inputs(20, features, 21, dtype, stored)
        bias = torch.ones(21, dtype=DTYPES[dtype]) if features % 7 == 0 and scale is None else None
        for x in (many[:rows] for rows in rows_for(features)):
            if chosen.can(Product(*x.shape, 21, x.dtype, weight.dtype, bias is not None)):
                check(chosen.compute(x, weight, scale, bias), x, weight, scale, bias)
                computed += 1
    assert computed or not takes(chosen.name, stored, dtype)


def takes(name: str, stored: str, dtype: str) -> bool:
    """Whether a way is for these dtypes at all."""
    if name == "numba":
        return stored != "int4" and cpu_linear._numba_converts(STORED[stored])
    if name == "int8 kernel":
        return (stored, dtype) == ("int8", "bfloat16")
    if name == "in bfloat16":
        return stored in ("int8", "fp8") and dtype == "bfloat16" and cpu_linear.multiplies(torch.bfloat16)
    if name == cpu_linear.MANY_ROWS:
        return cpu_linear._takes_many_rows(Product(20, 2048, 21, DTYPES[dtype], STORED[stored]))
    if stored == "int4" or name.startswith("4-bit"):
        return stored == "int4" and name.startswith("4-bit")
    return {"widened": True, "mv": stored == dtype, "torch": stored == dtype}[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
def test_every_product_is_right(stored, dtype, monkeypatch):
    """The product is computed in the way that is chosen on this CPU."""
    if stored in DTYPES and stored != dtype:
        return
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    for features in features_of(stored):
        many, weight, scale = inputs(20, features, 21, dtype, stored)
        for backend, rows in product(("torch", "numba"), rows_for(features)):
            x = many[:rows]
            with ops.use(backend):
                y = ops.linear(x, weight) if scale is None else ops.quantized_linear(x, weight, scale)
            check(y, x, weight, scale)


@pytest.mark.parametrize("rows", [33, 64, 65])
def test_many_rows_of_int8(rows):
    x, weight, scale = inputs(rows, 2048, 37, "bfloat16", "int8")
    check(ops.quantized_linear(x, weight, scale), x, weight, scale)


@pytest.mark.parametrize("numba", [False, True])
@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_4_bit_products_with_a_bias(dtype, rows, numba, monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    generator = torch.Generator().manual_seed(0)
    words, scale = int4.quantized_groups(torch.randn(24, 64, generator=generator))
    x, bias = torch.randn(rows, 64, generator=generator).to(dtype), torch.linspace(-100, 100, 24).to(dtype)
    exact = x.double() @ int4.dequantized(words, scale).double().T + bias.double()
    y = cpu_linear.linear(x, words, scale, bias, numba=numba and cpu_linear.kernels_run())
    assert y.dtype == dtype
    assert bool(((y.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * 100).all())


def test_a_way_is_chosen_by_what_was_measured(monkeypatch):
    half, single, int8, e4m3 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
    without = {1: "mv", 2: "torch", 11: "torch", 12: "widened"}  # the CPU does not multiply in bfloat16
    for multiplies, chosen in {False: without, True: {1: "mv", 2: "torch", 12: "torch"}}.items():
        monkeypatch.setattr(cpu_linear, "multiplies", lambda _, multiplies=multiplies: multiplies)
        monkeypatch.setattr(cpu_linear, "in_avx512", lambda: False)
        monkeypatch.setattr(cpu_linear, "has_avx512", lambda multiplies=multiplies: multiplies)
        for rows, name in chosen.items():
            assert way(Product(rows, 2048, 2048, half, half)).name == name
        for rows in (1, 12):
            assert way(Product(rows, 2048, 2048, single, single)).name == "torch"
        assert way(Product(1, 2048, 2048, half, half, bias=True)).name == "torch"
        most = 64 if multiplies else 3
        many = "in bfloat16" if multiplies else "widened"
        for rows, name in {1: "int8 kernel", most: "int8 kernel", most + 1: many}.items():
            assert way(Product(rows, 2048, 2048, half, int8)).name == name
        assert way(Product(1, 2056, 2048, half, int8)).name == many  # the kernel reads past such rows
        assert way(Product(1, 2048, 2048, torch.float16, int8)).name == "widened"
        assert way(Product(1, 2048, 2048, half, e4m3)).name == many
        assert way(Product(1, LARGE, 1, half, int8, numba=True)).name == "numba"
        assert way(Product(16, LARGE, 1, half, half, numba=True)).name == "numba"
        assert way(Product(17, LARGE, 1, half, half, numba=True)).name != "numba"
        assert way(Product(2, LARGE, 1, half, int8, numba=False)).name == "int8 kernel"
        assert way(Product(1, LARGE - 32, 1, half, half, numba=True)).name == "mv"
        for rows, name in {1: "4-bit kernel", 16: "4-bit kernel", 17: "4-bit widened"}.items():
            assert way(Product(rows, LARGE, 1, half, int4.STORED, numba=True)).name == name
        for rows in (1, 17):
            assert way(Product(rows, LARGE, 1, single, int4.STORED)).name == "4-bit widened"
    monkeypatch.setattr(cpu_linear, "has_avx512", lambda: True)
    monkeypatch.setattr(cpu_linear, "multiplies", lambda _: False)
    for rows, name in {32: "int8 kernel", 33: "widened"}.items():
        assert way(Product(rows, 2048, 2048, half, int8)).name == name
    monkeypatch.setattr(cpu_linear, "multiplies", lambda _: True)
    monkeypatch.setattr(cpu_linear, "in_avx512", lambda: True)
    assert way(Product(1, 2048, 2048, half, half)).name == "torch"
    assert way(Product(1, 2048, 2048, torch.float16, torch.float16)).name == "mv"
    assert way(Product(12, 64, 64, torch.float64, torch.float64)).name == "torch"  # float64 is never narrowed


def test_one_thread_is_for_one_python_thread():
    def threads() -> tuple[int, int]:
        return torch.get_num_threads(), cpu_threads.threads()

    before, other = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        with cpu_threads.one_thread():
            assert threads() == (1, 2)
            with cpu_threads.one_thread():
                assert threads() == (1, 2)
            assert threads() == (1, 2)
            thread = threading.Thread(target=lambda: other.append(threads()))
            thread.start()
            thread.join()
        assert threads() == (2, 2)
        assert other == [(2, 2)]
        with pytest.raises(KeyError), cpu_threads.one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_small_work_is_for_one_thread(monkeypatch):
    """One thread computes a pass of the demo model.

    One thread computes a token of a large model only where Numba's kernel, which has its own threads,
    computes the products.
    """
    from paligemma import load_hf_model

    model, _ = load_hf_model("demo", device="cpu")
    before, seen = torch.get_num_threads(), []

    def threads_in(tokens: int) -> int:
        with model.computing(tokens):
            seen.append(cpu_threads.threads())
            return torch.get_num_threads()

    try:
        torch.set_num_threads(2)
        assert [threads_in(1), threads_in(200), threads_in(10_000)] == [1, 1, 2]
        model.size, model.backend = 3_000_000_000, "torch"
        assert [threads_in(1), threads_in(200)] == [2, 2]
        model.backend = "numba"
        assert [threads_in(1), threads_in(2), threads_in(200)] == [1, 2, 2]
        assert set(seen) == {2}
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("shape", [(5, 11, 33), (2, 15, 60), (1, 1, 6000)])
def test_elementwise_blocks(shape, monkeypatch):
    """Rows that fill no block, and rows that are longer than one; `up` is a view of a larger tensor."""
    generator = torch.Generator().manual_seed(0)
    gate = torch.randn(shape, generator=generator).bfloat16()
    up = torch.randn(*shape[:-1], 2 * shape[-1], generator=generator).bfloat16()[..., shape[-1] :]
    with torch.no_grad():
        whole = torch_ops.geglu(gate, up), torch_ops.gelu_tanh(up)
        monkeypatch.setattr(torch_ops, "BLOCK", 100)
        assert torch.equal(torch_ops.geglu(gate, up), whole[0])
        assert torch.equal(torch_ops.gelu_tanh(up), whole[1])
