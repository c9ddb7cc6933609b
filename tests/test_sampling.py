"""Temperature and top-p: edges, ties, the distribution, and the reference's tokens.

All of it holds for the CPU's function and for the kernels in Triton's interpreter.
"""

import importlib
import itertools
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from rule import DEVICE

from benchmarks.cases.norm_head import LOWEST, sort_keys
from paligemma import PaliGemmaError, ops, sampling
from paligemma.buffers import SAMPLING_SCRATCH, DecodeBuffers, SamplingBuffers
from paligemma.kernels import top_p_histogram, top_p_search
from paligemma.options import Sampling, token_count
from paligemma.reference.layers import softmax
from paligemma.reference.model import sample as reference_sample
from paligemma.sampling import uniform

# NumPy gives these warnings in Triton's interpreter.
INTERPRETER_WARNINGS = "ignore:overflow encountered", "ignore:invalid value encountered in cast"
pytestmark = pytest.mark.filterwarnings(*INTERPRETER_WARNINGS)
backends = pytest.mark.parametrize("backend", ["torch", "triton"])
BELOW_1 = 1 - 2**-53


def logits_of(*probabilities: float) -> np.ndarray:
    return np.log(np.array(probabilities)).astype(np.float32)


def draw(logits: np.ndarray, temperature: float, top_p: float, u, backend: str) -> list[int]:
    """One token for each u. Every u has its row of the logits, or all have the same one."""
    u = torch.atleast_1d(torch.as_tensor(u, dtype=torch.float64, device=DEVICE))
    rows = np.broadcast_to(logits, (len(u), np.shape(logits)[-1])).copy(order="C")
    rows = torch.from_numpy(rows).to(DEVICE)
    B, V = rows.shape
    best, number = torch.full((B, 64), LOWEST, device=DEVICE), torch.arange(B, device=DEVICE) % 3
    if B <= 16:  # norm_head writes these keys; for more rows sample computes them
        best[:, 5] = sort_keys(rows, torch.arange(V, device=DEVICE)).amax(dim=1)
    numbers = torch.full((B, 3), torch.nan, dtype=torch.float64, device=DEVICE)
    numbers[torch.arange(B, device=DEVICE), number] = u  # the other numbers are for other tokens
    state = torch.zeros(B, SAMPLING_SCRATCH, dtype=torch.int64, device=DEVICE)
    options = {"dtype": torch.float64, "device": DEVICE}
    temperature_, top_p_ = (torch.full((B,), float(x), **options) for x in (temperature, top_p))
    buffers = DecodeBuffers(None, number, None, None, None, None, None, best)
    with ops.use(backend):
        tokens = ops.sample(rows, buffers, SamplingBuffers(temperature_, top_p_, numbers, state))
    assert not state.any()
    assert backend == "torch" or (best == LOWEST).all()
    return tokens.tolist()


def allowed(logits: np.ndarray, temperature: float, top_p: float, u: float) -> set[int]:
    """The reference's token, and its neighbours in the order of probability if rounding decides between them.

    It decides if u or the end of the nucleus is near to a boundary: the sums of the kernels are wrong by up
    to V 2^-44 of the largest weight, and those of the reference by their own rounding.
    """
    logits = logits.astype(np.float64)
    with np.errstate(over="ignore"):
        probabilities = softmax((logits - logits.max()) / temperature)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    slack = len(logits) * (2.0**-44 * probabilities.max() + 2.0**-52)
    least, most = (min(int(np.searchsorted(cumulative, top_p + x)), len(order) - 1) for x in (-slack, slack))
    first = np.searchsorted(cumulative, u * cumulative[least] - slack, side="right")
    last = np.searchsorted(cumulative, u * cumulative[most] + slack, side="right")
    found = {int(token) for token in order[min(first, most) : min(last, most) + 1]}
    assert reference_sample(logits, temperature, top_p, u) in found
    return found


def check(logits: np.ndarray, temperature: float, top_p: float, u, backend: str) -> float:
    """Assert that each row's token is allowed. -> The share of rows for which only one token is allowed."""
    tokens = draw(logits, temperature, top_p, u, backend)
    rows = np.broadcast_to(logits, (len(u), np.shape(logits)[-1]))
    sets = [allowed(row, temperature, top_p, x) for row, x in zip(rows, u, strict=True)]
    wrong = [(row, tokens[row], found) for row, found in enumerate(sets) if tokens[row] not in found]
    assert not wrong, f"(row, token, allowed): {wrong[:5]}"
    return sum(len(found) == 1 for found in sets) / len(sets)


@backends
@pytest.mark.parametrize(("probabilities", "top_p", "expected"), [
    ((0.5, 0.25, 0.25), 0.5, {0}),  # the first token reaches top_p exactly
    ((0.5, 0.3, 0.2), 0.51, {0, 1}),
    ((0.1, 0.2, 0.3, 0.4), 0.39, {3}),
    ((0.1, 0.2, 0.3, 0.4), 0.41, {2, 3}),
    ((0.1, 0.2, 0.3, 0.4), 1.0, {0, 1, 2, 3}),
    ((0.25, 0.25, 0.25, 0.25), 0.5, {0, 1}),  # of equal tokens the lower ids, and no third one
    ((0.3, 0.3, 0.2, 0.2), 0.29, {0}),
    ((0.1, 0.9), 1e-9, {1}),
    ((0.1, 0.9), 1e-300, {1}),
])  # fmt: skip
def test_top_p_keeps_the_fewest_that_reach_it(probabilities, top_p, expected, backend):
    u = [*np.linspace(0, 1, 400 if backend == "torch" else 12)[:-1], BELOW_1]
    assert set(draw(logits_of(*probabilities), 1.0, top_p, u, backend)) == expected


def spread_out(rng: np.random.Generator, rows: int, size: int) -> np.ndarray:
    """Random logits. Every second row has ties at the top.

    Row 5 is constant, row 6 has few values, and row 7 has zeros of both signs.
    """
    logits = (5 * rng.standard_normal((rows, size))).astype(np.float32)
    logits[::2, rng.integers(0, size, 50)] = logits[::2].max(axis=1, keepdims=True)
    logits[5], logits[6] = 1.5, logits[6].round()
    logits[7] = np.where(rng.random(size) < 0.5, np.float32(-0.0), np.float32(0))
    return logits


TEMPERATURES, NUCLEI = (1e-310, 0.1, 0.8, 3.0, 1e30), (1e-6, 0.3, 0.9, 0.999999, 1.0)
DRAWS = [("torch", *pair) for pair in itertools.product(TEMPERATURES, NUCLEI)]
OTHER_NUCLEI = (0.9, 1.0, 1e-6, 0.3, 0.999999)
DRAWS += [("triton", *pair) for pair in zip(TEMPERATURES * 2, NUCLEI + OTHER_NUCLEI, strict=True)]


@pytest.mark.parametrize(("backend", "temperature", "top_p"), DRAWS)
def test_the_reference_draws_the_same_tokens(temperature, top_p, backend):
    rng = np.random.default_rng(0)
    u = [0.0, 0.2, 0.47, 0.9, BELOW_1, *rng.random(35 if backend == "torch" else 4)]
    alone = check(spread_out(rng, len(u), 3000), temperature, top_p, u, backend)
    assert alone > 0.6 or temperature == 1e30, "rounding decides too many of these tokens"


@backends
@pytest.mark.parametrize(("temperature", "top_p"), [(0.8, 0.9), (5.0, 1.0)])
def test_the_whole_vocabulary(temperature, top_p, backend):
    rng = np.random.default_rng(1)
    logits = (2 * rng.standard_normal((1, 257216))).astype(np.float32)
    assert check(logits, temperature, top_p, rng.random(1), backend) == 1


finite = st.floats(-(2.0**127), 2.0**127, width=32) | st.sampled_from([0.0, -0.0, 1.0, 1.015625, -64.0, 30.0])
rows_of = st.lists(finite, min_size=1, max_size=12)
probability = st.floats(0, 1, exclude_min=True) | st.just(1.0)


any_temperature = st.floats(1e-310, 1e300) | st.floats(0.1, 5)
FIXED = settings(deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def any_logits(backend: str):
    @given(rows_of, any_temperature, probability, st.floats(0, 1, exclude_max=True))
    @example([3e38, -3e38], 1e37, 1.0, BELOW_1)
    @example([-0.0, 0.0, -0.0], 1.0, 0.5, 0.0)
    @settings(FIXED, max_examples=300 if backend == "torch" else 25)
    def test(logits, temperature, top_p, u):
        check(np.array(logits, np.float32), temperature, top_p, [u], backend)

    return test


@backends
def test_any_logits(backend):
    any_logits(backend)()


@backends
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("rows", [3, 17])
def test_a_logit_that_is_not_finite_is_reported_and_changes_no_other_row(bad, rows, backend):
    rng = np.random.default_rng(2)
    logits, u = rng.standard_normal((rows, 60)).astype(np.float32), rng.random(rows)
    expected = draw(logits, 0.8, 0.9, u, backend)
    logits[1, 7] = bad
    assert draw(logits, 0.8, 0.9, u, backend) == [expected[0], -1, *expected[2:]]
    for row, token in enumerate([expected[0], -1, expected[2]]):
        assert draw(logits[row], 0.8, 0.9, u[row], backend) == [token]


FIVE = (0.05, 0.4, 0.15, 0.3, 0.1)


def distance(tokens: list[int], temperature: float, top_p: float) -> float:
    """The largest difference between the shares of the five tokens and the renormalised nucleus."""
    weights = np.array(FIVE) ** (1 / temperature)
    order = np.argsort(-weights)
    kept = order[: int((np.cumsum(weights[order]) / weights.sum() < top_p).sum()) + 1]
    expected = np.zeros(5)
    expected[kept] = weights[kept] / weights[kept].sum()
    return float(np.abs(np.bincount(tokens, minlength=5) / len(tokens) - expected).max())


@pytest.mark.parametrize(("backend", "n"), [("torch", 1000), ("triton", 40)])
def test_the_distribution_is_the_renormalised_nucleus(backend, n):
    """n equidistant numbers draw each token as often as its share says, except for one number at each end."""
    u = (np.arange(n) + 0.5) / n
    assert distance(draw(logits_of(*FIVE), 0.7, 0.9, u, backend), 0.7, 0.9) <= 1 / n
    if backend == "triton":
        return
    for temperature, top_p in ((0.75, 0.9), (0.7, 1.0), (0.7, 0.6)):
        wrong = distance(draw(logits_of(*FIVE), temperature, top_p, u, "torch"), 0.7, 0.9)
        assert wrong > 1 / n, "the test misses wrong options"
    for numbers in (u**1.1, u.round(decimals=1) % 1):
        wrong = distance(draw(logits_of(*FIVE), 0.7, 0.9, numbers, "torch"), 0.7, 0.9)
        assert wrong > 1 / n, "the test misses numbers that are not uniform"


def test_random_numbers_draw_the_distribution():
    u = uniform(0, 1, 20000)[0].tolist()
    tokens = [reference_sample(logits_of(*FIVE), 0.7, 0.9, x) for x in u]
    assert distance(tokens, 0.7, 0.9) < 4 * (0.25 / len(u)) ** 0.5  # four standard deviations


def show_mistakes(backend: str) -> None:
    """Check a few rows that show the mistakes below.

    They have ties, zeros of both signs, exact sums, u at both ends, and a bin with more tokens than a chunk.
    """
    rng = np.random.default_rng(3)
    logits = spread_out(rng, 9, 700)
    u = [0.0, 0.3, BELOW_1, *rng.random(6)]
    for temperature, top_p in ((0.8, 0.9), (3.0, 1.0)):
        check(logits, temperature, top_p, u, backend)
    assert set(draw(logits_of(*[0.25] * 4), 1.0, 0.5, [0.0, 0.6, BELOW_1], backend)) == {0, 1}
    assert draw(logits_of(0.5, 0.5), 1.0, 1.0, [0.0, 0.5, BELOW_1], backend) == [0, 1, 1]


MISTAKES = {  # the planted mistake -> the file, the right code and the wrong code
    "higher ids first": ("top_p_search", "(LAST - v.to(tl.int64))", "v.to(tl.int64)"),
    "-0 is less than 0": ("top_p_search", "tl.where(logits == 0, 0.0, logits)", "logits"),
    "one token more than reaches top_p":
        ("top_p_search", "target.to(tl.float64) < share", "target.to(tl.float64) <= share"),
    "no more than u": ("top_p_search", "nucleus - 1) + 1", "nucleus - 1)"),
    "u of another row": ("top_p_search", "uniform_ptr + b * N", "uniform_ptr"),
    "u of another token": ("top_p_search", "b * N + tl.load(length_ptr + b)", "b * N"),
    "u of all tokens instead of the nucleus":
        ("top_p_search", "nucleus.to(tl.float64)).to(tl.int64)",
         "tl.max(upto, axis=0).to(tl.float64)).to(tl.int64)"),
    "a nucleus within its bin": ("top_p_search", "before_bin + sums", "sums"),
    "one chunk only": ("top_p_search", "range(CHUNK, count, CHUNK)", "range(count, count, CHUNK)"),
    "a token without its own weight":
        ("top_p_search", "numbers[None, :] >= pivots", "numbers[None, :] > pivots"),
    "one list for both searches": ("top_p_search", "LENGTHS + DRAWS", "LENGTHS"),
    "a state that is not reset":
        ("top_p_search", "scratch_ptr + bins, tl.zeros([BINS], tl.int64)", "scratch_ptr + bins, upto"),
    "no temperature":
        ("top_p_histogram", "peak.to(tl.float64)) / temperature", "peak.to(tl.float64)) * 1.0"),
    "bins in the reverse order": ("top_p_histogram", "(peak - logits) * 64", "(logits - peak + 200) * 16"),
    "one logit too many":
        ("top_p_histogram", "mask=(v < length) & (weights > 0)", "mask=(v > 0) & (weights > 0)"),
}  # fmt: skip


def test_without_a_mistake_the_check_passes():
    for backend in ("torch", "triton"):
        show_mistakes(backend)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_kernels_is_caught(mistake, tmp_path, monkeypatch):
    file, right, wrong = MISTAKES[mistake]
    package = f"planted_top_p_{list(MISTAKES).index(mistake)}"
    shutil.copytree(Path(top_p_search.__file__).parent, tmp_path / package)
    source = (tmp_path / package / f"{file}.py").read_text()
    assert right in source
    (tmp_path / package / f"{file}.py").write_text(source.replace(right, wrong))
    monkeypatch.syspath_prepend(tmp_path)
    for module in (top_p_histogram, top_p_search):
        name = module.__name__.split(".")[-1]
        monkeypatch.setattr(module, name, getattr(importlib.import_module(f"{package}.{name}"), name))
    with pytest.raises(AssertionError):
        show_mistakes("triton")


@pytest.mark.parametrize(("right", "wrong"), [
    ("descending=True, stable=True", "descending=False"),
    ("math.ceil(top_p * total)", "math.floor(top_p * total) + 1"),
    ("nucleus - 1) + 1", "nucleus - 1)"),
    ("u * nucleus", "u * total"),
    ("+ (upto[b] - mass[b])", "+ upto[b]"),
    (".div_(temperature)", ""),
])  # fmt: skip
def test_a_mistake_on_the_cpu_is_caught(right, wrong, monkeypatch):
    source = Path(sampling.__file__).read_text()
    assert source.count(right) == 1
    planted = types.ModuleType("planted_sampling")
    exec(source.replace(right, wrong), planted.__dict__)
    monkeypatch.setattr(sampling, "sample", planted.sample)
    with pytest.raises((AssertionError, IndexError)):
        show_mistakes("torch")


def test_each_row_has_its_own_random_numbers():
    three = uniform(5, 3, 1000)
    assert torch.equal(three, uniform(5, 3, 1000))
    assert torch.equal(three[:1], uniform(5, 1, 1000))
    assert three[:, 0].unique().numel() == 3
    rng = np.random.default_rng([5, 2])
    assert three[2, :3].tolist() == [rng.random() for _ in range(3)]
    assert not torch.equal(uniform(None, 1, 4), uniform(None, 1, 4))


def checked(max_new_tokens, *sampling) -> tuple[int, Sampling]:
    return token_count(max_new_tokens), Sampling(*sampling)


@pytest.mark.parametrize(("arguments", "message"), [
    ((0, 1.0, 1.0), "max_new_tokens is 0"),
    ((1, -0.1, 1.0), "temperature is -0.1"),
    ((1, float("nan"), 1.0), "temperature is nan"),
    ((1, float("inf"), 1.0), "temperature is inf"),
    ((1, 1.0, 0.0), "top_p is 0.0"),
    ((1, 1.0, 1.1), "top_p is 1.1"),
    ((1, 1.0, float("nan")), "top_p is nan"),
    ((1, 1.0, 1.0, -1), "seed is -1"),
    ((1, 1.0, 1.0, True), "seed is True"),
])  # fmt: skip
def test_values_without_a_meaning_are_refused(arguments, message):
    with pytest.raises(PaliGemmaError, match=message):
        checked(*arguments)
