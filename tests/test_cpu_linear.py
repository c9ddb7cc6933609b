"""Every way to compute a product on a CPU, at every number of features that no vector fits; and the threads
that it takes.

Continuous integration runs this file again for each instruction set that its CPU can imitate."""

import threading
from itertools import product

import pytest
import torch
from rule import DTYPES

from paligemma import cpu_linear, ops
from paligemma.checkpoint.quantize import quantized_rows
from paligemma.cpu_linear import LARGE, WAYS, Product, way
from paligemma.layers import QUANTIZED

FEATURES = [*range(1, 201), *(n + d for n in (256, 1024, 2048) for d in (-1, 0, 1, 8, 16)), 4304]
STORED = {**DTYPES, **QUANTIZED}


def rows_for(features: int) -> tuple[int, int]:
    """One row, and one of 2 to 20."""
    return 1, 2 + features % 19


def inputs(
    rows: int, features: int, outputs: int, dtype: str, stored: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(features)
    x = torch.randn(rows, features, generator=generator).to(DTYPES[dtype])
    weight = torch.randn(outputs, features, generator=generator)
    if stored in QUANTIZED:
        return x, *quantized_rows(weight, QUANTIZED[stored], DTYPES[dtype])
    return x, weight.to(STORED[stored]), None


def check(
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None,
) -> None:
    """Twice the rounding of the exact answer; in float32, sums of K terms."""
    exact = x.double() @ (weight.double() if scale is None else weight.double() * scale.double()[:, None]).T
    exact = exact if bias is None else exact + bias.double()
    assert (y.dtype, y.shape) == (x.dtype, exact.shape)
    size = exact.square().mean().sqrt()
    allowed = (
        1e-5 * size
        if x.dtype == torch.float32
        else 2 * (exact.to(x.dtype).double() - exact).square().mean().sqrt() + 2e-3 * size * (size < 1e-2)
    )
    error = (y.double() - exact).square().mean().sqrt()
    assert error <= allowed, f"{error:.3g} at {size:.3g}, K {x.shape[1]}, {len(x)} rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("chosen", WAYS, ids=lambda way: way.name)
def test_every_way_is_right_wherever_it_may_be_taken(chosen, stored, dtype):
    """Also where another one is the faster."""
    if stored in DTYPES and stored != dtype:
        return  # a weight has the dtype of x, or is 8-bit
    computed = 0
    for features in FEATURES:
        many, weight, scale = inputs(20, features, 21, dtype, stored)
        bias = torch.ones(21, dtype=DTYPES[dtype]) if features % 7 == 0 and scale is None else None
        for x in (many[:rows] for rows in rows_for(features)):
            if chosen.can(Product(*x.shape, 21, x.dtype, weight.dtype, bias is not None)):
                check(chosen.compute(x, weight, scale, bias), x, weight, scale, bias)
                computed += 1
    assert computed or not takes(chosen.name, stored, dtype)


def takes(name: str, stored: str, dtype: str) -> bool:
    """Whether a way is for these dtypes at all."""
    return {
        "numba": cpu_linear._numba_converts(STORED[stored]),
        "int8 kernel": (stored, dtype) == ("int8", "bfloat16"),
        "mv": stored == dtype,
        "widened": True,
        "torch": stored == dtype,
    }[name]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stored", STORED)
def test_every_product_is_right(stored, dtype, monkeypatch):
    """By the way that is chosen on this CPU."""
    if stored in DTYPES and stored != dtype:
        return
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    for features in FEATURES:
        many, weight, scale = inputs(20, features, 21, dtype, stored)
        for backend, rows in product(("torch", "numba"), rows_for(features)):
            x = many[:rows]
            with ops.use(backend):
                y = ops.linear(x, weight) if scale is None else ops.quantized_linear(x, weight, scale)
            check(y, x, weight, scale, None)


def test_a_way_is_chosen_by_what_was_measured(monkeypatch):
    half, whole, int8, e4m3 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn
    for multiplies, cases in {
        False: {
            ("mv", 1): half,
            ("torch", 2): half,
            ("torch", 11): half,
            ("widened", 12): half,
            ("torch", 12): whole,
            ("torch", 1): whole,
        },
        True: {("mv", 1): half, ("torch", 2): half, ("torch", 12): half},
    }.items():
        monkeypatch.setattr(cpu_linear, "multiplies", lambda _, multiplies=multiplies: multiplies)
        for (name, rows), dtype in cases.items():
            assert way(Product(rows, 2048, 2048, dtype, dtype)).name == name
        assert way(Product(1, 2048, 2048, half, half, bias=True)).name == "torch"
        assert [way(Product(rows, 2048, 2048, half, int8)).name for rows in (1, 3, 4)] == [
            "int8 kernel",
            "int8 kernel",
            "widened",
        ]
        assert way(Product(1, 2056, 2048, half, int8)).name == "widened"  # the kernel reads past such rows
        assert (
            way(Product(1, 2048, 2048, torch.float16, int8)).name
            == way(Product(1, 2048, 2048, half, e4m3)).name
            == "widened"
        )
        assert way(Product(1, LARGE, 1, half, int8, numba=True)).name == "numba"
        assert way(Product(2, LARGE, 1, half, int8, numba=True)).name == "int8 kernel"
        assert way(Product(1, LARGE - 32, 1, half, half, numba=True)).name == "mv"
    assert way(Product(12, 64, 64, torch.float64, torch.float64)).name == "torch"  # which nothing narrows


def test_one_thread_is_for_one_python_thread():
    before, other = torch.get_num_threads(), []
    try:
        torch.set_num_threads(2)
        with cpu_linear.one_thread():
            assert (torch.get_num_threads(), cpu_linear.threads()) == (1, 2)
            with cpu_linear.one_thread():
                assert (torch.get_num_threads(), cpu_linear.threads()) == (1, 2)
            assert (torch.get_num_threads(), cpu_linear.threads()) == (1, 2)
            thread = threading.Thread(
                target=lambda: other.append((torch.get_num_threads(), cpu_linear.threads()))
            )
            thread.start()
            thread.join()
        assert (torch.get_num_threads(), cpu_linear.threads()) == (2, 2)
        assert other == [(2, 2)]
        with pytest.raises(KeyError), cpu_linear.one_thread():
            raise KeyError
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_small_work_is_for_one_thread(monkeypatch):
    """A pass of the demo model; a token of a large one only where Numba's kernel, which has its own threads,
    computes its products."""
    from paligemma import load_hf_model

    model, _ = load_hf_model("demo", device="cpu")
    before, seen = torch.get_num_threads(), []

    def threads_in(tokens: int) -> int:
        with model.computing(tokens):
            seen.append(cpu_linear.threads())
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
