"""The Numba kernel of 4-bit weights, against the reference's formula.

Most widths are not multiples of a vector of words, which has 4 groups on some CPUs and 2 on others.
"""

import importlib.util
import itertools
import os

import numpy as np
import pytest
import torch
from rule import DTYPES, arithmetic, check, given, random, tensor

from paligemma.int4 import GROUP, pack
from paligemma.reference import int4, layers

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from test_cpu_gemv import new_process

from paligemma.kernels import cpu_int4 as module
from paligemma.kernels import cpu_operand, cpu_workers

SHAPES = [(67, 32), (70, 2304), (33, 96), (257, 160), (5, 128), (1024, 2048)]  # (N, K)


def random_weight(N: int, K: int) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(1)
    codes = torch.from_numpy(rng.integers(0, 16, (N, K), np.uint8))
    return pack(codes), tensor(random(2, N, K // GROUP), "bfloat16")


@pytest.mark.parametrize("rows", [1, 5, 20])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product(dtype, N, K, rows):
    x, (words, scale) = random(0, rows, K, dtype=dtype), random_weight(N, K)
    value = module.cpu_int4(tensor(x, dtype), words, scale)
    assert value.dtype == torch.float32
    weight = int4.dequantized(words.numpy(), scale.float().numpy())
    check(value.to(DTYPES[dtype]), lambda p: layers.linear(arithmetic(x, p), p), given(weight=weight), dtype)


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("largest", [1e-30, 1e-20, 1.0, 1e20, 1e36])
def test_sizes_of_x_that_differ_within_a_word(largest, rows):
    """The error is a small part of the largest number, and the result is finite at both ends of the range."""
    K, rng = 640, np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((rows, K)) * 2.0 ** rng.integers(-14, 0, (rows, K)))
    x = (x / x.abs().max() * largest).bfloat16()
    codes = torch.from_numpy(rng.integers(0, 16, (9, K), np.uint8))
    value = module.cpu_int4(x, pack(codes), torch.full((9, K // GROUP), 2.0**-10).bfloat16())
    true = x.double() @ (codes.double() - 8).T * 2.0**-10
    assert (value.double() - true).abs().max() < 2.0**-14 * true.abs().max()


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("place", [0, 63, 640])
def test_what_is_not_finite_is_not_hidden(wrong, place):
    x, (words, scale) = torch.ones(3, 672, dtype=torch.bfloat16), random_weight(9, 672)
    x[1, place] = wrong
    value = module.cpu_int4(x, words, scale)
    codes = int4.dequantized(words.numpy(), np.ones(scale.shape, np.float32))[:, place]
    assert not value[1, torch.from_numpy(codes != 0)].isfinite().any()
    assert value[[0, 2]].isfinite().all()


@pytest.mark.parametrize("pairs", [True, False], ids=["bfloat16 if the CPU multiplies it", "float32"])
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_whole_numbers_are_summed_exactly(dtype, pairs, monkeypatch):
    multiplies = pairs and cpu_operand.MULTIPLIES_BFLOAT16
    monkeypatch.setattr(cpu_operand, "MULTIPLIES_BFLOAT16", multiplies)
    rng = np.random.default_rng(0)
    sizes = itertools.product(range(GROUP, 10 * GROUP, GROUP), (1, 3, 4, 6, 13, 70))
    for (K, N), rows, threads in zip(sizes, itertools.cycle(range(1, 18)), itertools.cycle((1, 2, 3, 4))):
        x = torch.from_numpy(rng.integers(-8, 9, (rows, K))).float()
        codes = torch.from_numpy(rng.integers(0, 16, (N, K), np.uint8))
        scale = torch.from_numpy(rng.choice([-2.0, -0.5, 0.0, 0.25, 1.0, 4.0], (N, K // GROUP)))
        weight = (codes.double() - 8) * scale.repeat_interleave(GROUP, 1)
        monkeypatch.setattr(cpu_workers, "threads", lambda n=threads: n)
        value = module.cpu_int4(x.to(dtype), pack(codes), scale.bfloat16())
        assert torch.equal(value.double(), x.double() @ weight.T), (N, K, rows, threads)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
def test_every_code_in_every_place(dtype):
    K = 11 * GROUP  # groups in whole vectors, and after them
    places = torch.arange(K) + torch.arange(K) // 16  # 16 places apart, codes differ
    codes = (torch.arange(19)[:, None] + places).remainder(16).to(torch.uint8)
    scale = tensor(random(0, 19, K // GROUP), "bfloat16")
    weight = int4.dequantized(pack(codes).numpy(), scale.float().numpy())
    value = module.cpu_int4(torch.eye(K, dtype=dtype), pack(codes), scale)
    assert np.array_equal(value.T.numpy(), weight)


def test_rows_that_are_apart():
    every, (words, scale) = torch.randn(6, 3 * 160), random_weight(40, 160)
    x = every[::2, ::3]
    assert torch.equal(module.cpu_int4(x, words, scale), module.cpu_int4(x.contiguous(), words, scale))


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("tiles", [0, 1, 16, 17, 1000, 4096])
def test_parts_are_all_tiles_and_get_shorter(tiles, threads):
    ends = module.ends_of_parts(tiles, threads)
    parts = np.diff(ends, prepend=0)
    assert parts.sum() == tiles
    assert (parts > 0).all()
    assert (np.diff(parts) <= 0).all()
    assert (parts <= max(module.TAKEN, tiles // (2 * threads))).all()
    assert (parts[-threads:] <= module.TAKEN).all()


@pytest.mark.skipif(os.name != "posix", reason="this system has no mprotect")
def test_it_does_not_read_past_the_end():
    """Each operand ends where memory that cannot be read begins."""
    code = """
import ctypes, mmap, torch
from paligemma.kernels.cpu_int4 import cpu_int4
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
def at_the_end(values):
    size = -(-values.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert libc.mprotect(ctypes.c_void_p(start + size), ctypes.c_size_t(page), 0) == 0
    placed = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=size - values.nbytes)
    return placed.view(values.shape).copy_(values)
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for K in range(32, 320, 32):
        for N, rows in ((1, 1), (5, 3)):
            x = torch.ones(rows, K, dtype=dtype)
            words = torch.full((N, K // 8), 0x11111111, dtype=torch.int32)
            scale = torch.ones(N, K // 32, dtype=torch.bfloat16)
            value = cpu_int4(*map(at_the_end, (x, words, scale)))
            assert torch.equal(value, torch.full((rows, N), -7.0 * K)), (dtype, K, N, rows)
print("all")
"""
    done = new_process(code)
    assert (done.returncode, done.stdout) == (0, "all\n"), done.stderr
