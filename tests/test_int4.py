"""4-bit weights: their layout, their values, their effect on the model, and the memory that they need."""

import numpy as np
import pytest
import torch

from paligemma import int4
from paligemma.reference import int4 as plain

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def random_codes(rows: int, features: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 16, (rows, features), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize(("rows", "features"), [(1, 32), (5, 96), (70, 2048)])
def test_the_plain_unpacker_reads_what_is_packed(rows, features):
    codes = random_codes(rows, features)
    words = int4.pack(codes)
    assert (words.dtype, words.shape) == (torch.int32, (rows, features // 8))
    assert np.array_equal(plain.codes(words.numpy()), codes.numpy())
    assert torch.equal(int4.unpack(words), codes)


def test_the_words_of_a_group_hold_neighbouring_codes():
    codes = torch.full((1, 64), 0, dtype=torch.uint8)
    codes[0, 32:36] = torch.tensor([1, 2, 3, 4])
    codes[0, 36:40] = torch.tensor([5, 6, 7, 8])
    assert int4.pack(codes)[0].tolist() == [0, 0, 0, 0, 0x51, 0x62, 0x73, 0x84]


@DTYPES
def test_the_numbers_are_those_of_the_plain_formula(dtype):
    words = int4.pack(random_codes(9, 160))
    scale = torch.randn(9, 5, generator=torch.Generator().manual_seed(1)).bfloat16()
    expected = torch.from_numpy(plain.dequantized(words.numpy(), scale.double().numpy()))
    assert torch.equal(expected.float().double(), expected)  # float32 holds them
    memory = torch.empty(9, 160, dtype=dtype)
    given = int4.dequantized(words, scale, dtype, memory)
    assert given.data_ptr() == memory.data_ptr()
    assert torch.equal(given, expected.to(dtype))
    assert torch.equal(int4.dequantized(words, scale, dtype), expected.to(dtype))


def brute_force(group: np.ndarray) -> float:
    """The least squared error over all bfloat16 scales that give the extreme a code of 5.5 to 10."""
    extreme = group[np.abs(group).argmax()]
    bits = np.array([-extreme / 10, -extreme / 5.5], np.float32).view(np.uint32) >> 16
    scales = (np.arange(bits[0], bits[1] + 2, dtype=np.uint32) << 16).view(np.float32).astype(np.float64)
    scales = np.concatenate([scales, -scales])[:, None]
    numbers = np.clip(np.round(group / scales), -8, 7) * scales
    return ((numbers - group) ** 2).sum(axis=1).min()


@DTYPES
def test_scales_and_codes_have_nearly_the_least_squared_error(dtype, monkeypatch):
    monkeypatch.setattr(int4, "BLOCK", 16 * 64)  # 16 rows at a time, and then 2
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 64, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    weight[:, 7] *= 10
    weight[3] = -weight[2]
    weight = weight.to(dtype)
    weight[8, :32] = 0
    words, scale = int4.quantized_groups(weight)
    assert (words.dtype, words.shape) == (torch.int32, (50, 8))
    assert (scale.dtype, scale.shape) == (torch.bfloat16, (50, 2))
    groups, numbers = weight.double().view(100, 32), int4.dequantized(words, scale).double().view(100, 32)
    assert bool((numbers[16] == 0).all())
    others = torch.arange(100) != 16
    groups, numbers, steps = groups[others], numbers[others], scale.double().view(100, 1)[others]
    # Each code is the nearest for its scale. The quotient is computed in float32.
    nearest = (groups / steps).round().clamp(-8, 7) * steps
    assert bool(((numbers - groups).abs() <= (nearest - groups).abs() + 1e-6 * steps.abs()).all())
    errors = (numbers - groups).square().sum(dim=1).numpy()
    ratio = errors / [brute_force(group) for group in groups.numpy()]
    assert ratio.min() >= 1 - 1e-6
    assert ratio.max() <= 1.1
    assert ratio.mean() <= 1.01


def test_a_group_that_is_not_finite_has_no_scale():
    weight = torch.ones(3, 64)
    weight[0, 5], weight[1, 40], weight[2, 63] = torch.nan, torch.inf, -torch.inf
    _, scale = int4.quantized_groups(weight)
    assert scale.isnan().tolist() == [[True, False], [False, True], [False, True]]
