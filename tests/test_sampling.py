"""Greedy, temperature and top-p: edges, ties, and the distribution."""

import numpy as np
import pytest
import torch

from paligemma import PaliGemmaError
from paligemma.config import check_sampling
from paligemma.reference.model import sample as reference_sample
from paligemma.sampling import Sampler, sample


def logits_of(*probabilities: float) -> torch.Tensor:
    return torch.tensor(probabilities, dtype=torch.float64).log()


def nucleus(logits: torch.Tensor, top_p: float) -> set[int]:
    """The tokens that any random number can give."""
    return {sample(logits, 1.0, top_p, u) for u in np.linspace(0, 1, 4001)[:-1]}


@pytest.mark.parametrize(
    ("probabilities", "top_p", "expected"),
    [
        ((0.5, 0.3, 0.2), 0.5, {0}),  # reached exactly: not one more
        ((0.5, 0.3, 0.2), 0.51, {0, 1}),
        ((0.1, 0.2, 0.3, 0.4), 0.4, {3}),
        ((0.1, 0.2, 0.3, 0.4), 0.41, {2, 3}),
        ((0.1, 0.2, 0.3, 0.4), 1.0, {0, 1, 2, 3}),
        ((0.25, 0.25, 0.25, 0.25), 0.5, {0, 1}),  # of equals the lower ids, and no tied third
        ((0.3, 0.3, 0.2, 0.2), 0.29, {0}),
        ((0.1, 0.9), 1e-9, {1}),
    ],
)
def test_top_p_keeps_the_fewest_that_reach_it(probabilities, top_p, expected):
    assert nucleus(logits_of(*probabilities), top_p) == expected


@pytest.mark.parametrize("temperature", [1e-310, 0.1, 0.8, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.9, 0.999999, 1.0])
def test_the_reference_draws_the_same(temperature, top_p):
    rng = np.random.default_rng(0)
    for u in (0.0, 0.2, 0.5, 0.9, 1 - 2**-53):
        logits = (5 * rng.standard_normal(3000)).astype(np.float32)
        logits[rng.integers(0, 3000, 50)] = logits.max()  # ties at the top
        assert sample(torch.from_numpy(logits), temperature, top_p, u) == reference_sample(logits, temperature, top_p, u)


def test_the_distribution_is_the_renormalised_nucleus():
    logits, draws = logits_of(0.05, 0.4, 0.15, 0.3, 0.1), 20000
    sampler = Sampler(1, temperature=0.7, top_p=0.9, seed=0)
    counts = np.bincount([int(sampler(logits[None])) for _ in range(draws)], minlength=5)
    weights = np.array([0.05, 0.4, 0.15, 0.3, 0.1]) ** (1 / 0.7)
    order = np.argsort(-weights)
    kept = order[: int((np.cumsum(weights[order]) / weights.sum() < 0.9).sum()) + 1]
    expected = np.zeros(5)
    expected[kept] = draws * weights[kept] / weights[kept].sum()
    assert counts[expected == 0].sum() == 0
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: passed by a right sampler in 999 of 1000 seeds, and by this one always


def test_rows_have_random_numbers_of_their_own():
    flat = torch.zeros(3, 1000)
    several = [Sampler(3, 1.0, 1.0, seed=5)(flat) for _ in range(2)]
    assert torch.equal(several[0], several[1])
    assert len(set(several[0].tolist())) == 3
    assert Sampler(1, 1.0, 1.0, seed=5)(flat[:1])[0] == several[0][0]
    assert len({int(Sampler(1, 1.0, 1.0, seed=None)(flat[:1])) for _ in range(4)}) > 1  # the same by chance: 1 in 10^9


def test_greedy_takes_the_lower_of_two_equals():
    assert Sampler(1, 0.0, 0.9, None)(torch.tensor([[1.0, 3.0, 3.0]])).tolist() == [1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1.0, 1.0), "max_new_tokens is 0"),
        ((1, -0.1, 1.0), "temperature is -0.1"),
        ((1, float("nan"), 1.0), "temperature is nan"),
        ((1, float("inf"), 1.0), "temperature is inf"),
        ((1, 1.0, 0.0), "top_p is 0.0"),
        ((1, 1.0, 1.1), "top_p is 1.1"),
        ((1, 1.0, float("nan")), "top_p is nan"),
    ],
)
def test_values_without_a_meaning_are_refused(arguments, message):
    with pytest.raises(PaliGemmaError, match=message):
        check_sampling(*arguments)
