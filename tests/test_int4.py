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
