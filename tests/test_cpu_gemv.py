"""The Numba kernels that decode on a CPU, against the reference's formula and in a whole model.

The shapes are not multiples of a vector's length.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding
import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint
from conftest import ROOT
from rule import DTYPES, arithmetic, check, given, random, tensor

from paligemma import PaliGemmaError, cpu_linear, cpu_threads, load_hf_model, ops
from paligemma.checkpoint.quantize import quantized_rows
from paligemma.layers import EIGHT_BITS
from paligemma.reference import layers

if importlib.util.find_spec("numba") is None:
    pytest.skip("numba is not installed", allow_module_level=True)

from paligemma.kernels import cpu_few_rows, cpu_int8, cpu_workers
from paligemma.kernels import cpu_gemv as module
from paligemma.kernels.cpu_vectors import LANES, MULTIPLIES_AND_ADDS

SHAPES = [(67, 33), (70, 2304), (71, 88), (257, 153), (1026, 16), (1024, 2048)]  # (N, K)


def kernels(rows: int, x: torch.dtype, weight: torch.dtype) -> list:
    """Every kernel that computes such products on this CPU."""
    few = [cpu_few_rows.cpu_few_rows] * cpu_few_rows.takes(rows, x, weight)
    return [module.cpu_gemv, *few, *[cpu_int8.cpu_int8] * cpu_int8.takes(x, weight)]


def new_process(code: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@pytest.fixture(autouse=True)
def products_of_any_size_are_large(monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 0)


@pytest.mark.parametrize("apart", [1, 3], ids=["side by side", "every third"])
@pytest.mark.parametrize("rows", [1, 2, 8, 13])
@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_product(dtype, N, K, rows, apart):
    every, weight = random(0, 1, rows, K * apart, dtype=dtype), random(1, N, K, dtype=dtype)
    x, operands = every[..., ::apart], (tensor(every, dtype)[..., ::apart], tensor(weight, dtype))
    with ops.use("numba"):
        value = ops.linear(*operands)
    assert (value.dtype, value.is_contiguous()) == (DTYPES[dtype], True)
    plain = torch.nn.functional.linear(*operands)
    check(value, lambda p: layers.linear(arithmetic(x, p), p), given(weight=weight), dtype, plain)


@pytest.mark.parametrize(("N", "K"), SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quantize", EIGHT_BITS)
@pytest.mark.parametrize("rows", [1, 4, 9])
def test_the_product_with_8_bit_weights(rows, quantize, dtype, N, K):
    x = random(0, rows, K, dtype=dtype)
    values, scale = quantized_rows(tensor(random(1, N, K), dtype), EIGHT_BITS[quantize], DTYPES[dtype])
    with ops.use("numba"):
        value = ops.quantized_linear(tensor(x, dtype), values, scale)
    weight = (values.double() * scale.double()[:, None]).numpy()
    check(value, lambda p: layers.linear(arithmetic(x, p), p), given(weight=weight), dtype)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (2, 7), (3, 33), (4, 16), (5, 40), (13, 64), (24, 97)])
@pytest.mark.parametrize("half", [False, True], ids=["float32 rows", "bfloat16 rows"])
@pytest.mark.parametrize("dtype", [*filter(cpu_linear._numba_converts, module.STORED)], ids=str)
def test_whole_numbers_are_summed_exactly(dtype, half, N, K):
    rng = np.random.default_rng(0)
    for rows in range(1, 18):
        x, weight = (torch.from_numpy(rng.integers(-8, 9, shape)).float() for shape in ((rows, K), (N, K)))
        operand = x.bfloat16() if half else x
        for kernel in kernels(rows, operand.dtype, dtype):
            assert torch.equal(kernel(operand, weight.to(dtype)), x @ weight.T), (kernel, rows)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("largest", [1e-30, 1e-20, 1.0, 1e20, 1e34])
def test_int8_beside_numbers_of_many_sizes(largest, rows, threads, monkeypatch):
    """The error is a small part of the largest number, and the result is finite at both ends of the range."""
    monkeypatch.setattr(cpu_workers, "threads", lambda: threads)
    K, rng = 670, np.random.default_rng(3)
    x = torch.from_numpy(rng.standard_normal((rows, K)) * 2.0 ** rng.integers(-14, 0, (rows, K)))
    x = (x / x.abs().max() * largest).bfloat16()
    weight = torch.from_numpy(rng.integers(-128, 128, (200, K), np.int8))
    true = x.double() @ weight.double().T
    for kernel in kernels(rows, x.dtype, weight.dtype):
        assert (kernel(x, weight).double() - true).abs().max() < 2.0**-14 * true.abs().max(), kernel


def test_int8_has_a_kernel_of_its_own(monkeypatch):
    """With AVX2, for rows of bfloat16."""
    calls, right = [], cpu_int8.cpu_int8
    monkeypatch.setattr(cpu_int8, "cpu_int8", lambda x, w: calls.append(x.dtype) or right(x, w))
    for dtype in DTYPES.values():
        x, weight = torch.ones(1, 80, dtype=dtype), torch.ones(4, 80, dtype=torch.int8)
        assert bool((cpu_linear.linear(x, weight, torch.ones(4, dtype=dtype), numba=True) == 80).all())
    assert calls == [torch.bfloat16] * (MULTIPLIES_AND_ADDS and LANES == 8)


def test_the_smallest_number_beside_int8():
    x, weight = torch.zeros(3, 128, dtype=torch.bfloat16), torch.arange(-128, 128).to(torch.int8)[:, None]
    x[:, 5] = 2.0**-126
    weight = weight.expand(-1, 128).contiguous()
    for kernel in kernels(3, x.dtype, weight.dtype):
        assert torch.equal(kernel(x, weight), weight[:, 5].float().mul(2.0**-126).expand(3, -1)), kernel


def test_the_largest_sums_of_int8():
    """Whole numbers of 16 bits are summed in 32 bits."""
    x = torch.full((3, 4096), 255.0).bfloat16()
    for value in (-128, 127):
        weight = torch.full((5, 4096), value, dtype=torch.int8)
        for kernel in kernels(3, x.dtype, weight.dtype):
            assert torch.equal(kernel(x, weight), torch.full((3, 5), 255.0 * 4096 * value)), kernel


@pytest.mark.parametrize("wrong", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("place", [0, 63, 640])
def test_what_is_not_finite_is_not_hidden(wrong, place):
    x, weight = torch.ones(3, 672, dtype=torch.bfloat16), torch.full((9, 672), -7, dtype=torch.int8)
    x[1, place] = wrong
    for kernel in kernels(3, x.dtype, weight.dtype):
        value = kernel(x, weight)
        assert not value[1].isfinite().any(), kernel
        assert value[[0, 2]].isfinite().all(), kernel


def test_vectors_without_bfloat16_instructions(monkeypatch):
    monkeypatch.setattr(module, "MULTIPLIES_BFLOAT16", False)
    x, weight = torch.ones(8, 97, dtype=torch.bfloat16), torch.full((13, 97), 2, dtype=torch.bfloat16)
    assert torch.equal(module.cpu_gemv(x, weight), torch.full((8, 13), 194.0))


def test_machine_code_is_that_of_the_settings():
    """The cache is one, whatever the length of vectors, of which 24 or 192 features fill other numbers."""
    code = """
import torch
from paligemma.kernels import cpu_many_rows
from paligemma.kernels.cpu_gemv import cpu_gemv
from paligemma.kernels.cpu_int4 import cpu_int4
assert cpu_gemv(torch.ones(1, 24), torch.ones(4, 24)).tolist() == [[24.0] * 4]
words = torch.full((4, 24), 0x99999999 - (1 << 32), dtype=torch.int32)  # all codes are 1
assert cpu_int4(torch.ones(1, 192), words, torch.ones(4, 6).bfloat16()).tolist() == [[192.0] * 4]
w = torch.ones(68, 264).bfloat16()
if cpu_many_rows.takes(w.dtype, w.dtype, 264, 68):
    for rows in range(20, 60):  # memory beyond an array would be damaged
        x = torch.ones(rows, 264).bfloat16()
        assert bool((cpu_many_rows.cpu_many_rows(x, w, None, None) == 264).all())
print("right")
"""
    name = llvmlite.binding.get_host_cpu_name()
    for settings in ({}, {"NUMBA_CPU_NAME": name}, {"NUMBA_ENABLE_AVX": "0"}, {}):
        done = new_process(code, env=os.environ | settings, timeout=200)
        assert done.stdout == "right\n", (settings, done.stderr)
        assert done.returncode == 0, (settings, done.stderr)


def test_machine_code_is_that_of_all_files(tmp_path):
    """Other files than that of the compiled function generate it."""
    package = tmp_path / "copied" / "kernels"
    package.mkdir(parents=True)
    (tmp_path / "copied" / "cpu_threads.py").write_text((ROOT / "paligemma" / "cpu_threads.py").read_text())
    for name in ("cpu_gemv.py", "cpu_vectors.py", "cpu_workers.py"):
        (package / name).write_text((ROOT / "kernels" / name).read_text())
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
import torch
from copied.kernels.cpu_gemv import cpu_gemv
print(cpu_gemv(torch.ones(1, 16), torch.ones(1, 16).bfloat16()).item())
"""
    assert new_process(code).stdout == "16.0\n"
    file = package / "cpu_vectors.py"
    file.write_text(file.read_text().replace("constant(word, 16)", "constant(word, 17)"))
    assert float(new_process(code).stdout) > 1e30


NARROW = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


@pytest.mark.parametrize("dtype", [*filter(cpu_linear._numba_converts, NARROW)], ids=str)
def test_every_value_of_a_weight(dtype):
    count, bits = (1 << 16, torch.int16) if dtype.itemsize == 2 else (1 << 8, torch.int8)
    weight = torch.arange(count).to(bits).view(dtype)
    weight = weight[weight.float().isfinite()][:, None]
    for columns, one in ((1, 0), (64, 37), (65, 64)):  # the second in a vector, the others beside all vectors
        x = torch.zeros(3, columns)
        x[:, one] = 1
        value = module.cpu_gemv(x, weight.expand(-1, columns).contiguous())
        assert torch.equal(value, weight.T.float().expand(3, -1))


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("dtype", [*filter(cpu_linear._numba_converts, EIGHT_BITS.values())], ids=str)
def test_every_value_of_an_8_bit_weight_beside_bfloat16(dtype, rows):
    """The smallest e4m3 numbers too, whose bits moved to bfloat16 would count as 0."""
    weight = torch.arange(256).to(torch.int8).view(dtype)
    weight = weight[weight.float().isfinite()][:, None].expand(-1, 161).contiguous()
    for one in (0, 37, 127, 128, 160):
        x = torch.zeros(rows, 161, dtype=torch.bfloat16)
        x[:, one] = torch.arange(rows) - 0.5
        for kernel in kernels(rows, x.dtype, dtype):
            assert torch.equal(kernel(x, weight), x[:, one, None].float() * weight[:, 0].float())


def test_few_rows_have_a_kernel_of_their_own(monkeypatch):
    """2 to 16 rows of bfloat16, on a CPU that multiplies bfloat16."""
    calls, half = [], torch.bfloat16
    monkeypatch.setattr(
        cpu_few_rows, "cpu_few_rows", lambda x, w: calls.append(len(x)) or module.cpu_gemv(x, w)
    )
    for multiplies in (False, True):
        monkeypatch.setattr(cpu_few_rows, "MULTIPLIES_BFLOAT16", multiplies)
        for dtype, stored in ((half, half), (half, torch.int8), (torch.float16, torch.int8)):
            for rows in (1, 2, 16, 17):
                x, weight = torch.ones(rows, 8, dtype=dtype), torch.ones(4, 8, dtype=stored)
                scale = torch.ones(4, dtype=dtype) if stored == torch.int8 else None
                assert bool((cpu_linear.linear(x, weight, scale, numba=True) == 8).all())
        assert calls == [2, 16, 2, 16] * multiplies


def test_nothing_is_read_after_the_end_of_a_matrix():
    """Each matrix ends where memory begins that may not be read."""
    code = """
import ctypes, mmap, torch
from paligemma.kernels import cpu_few_rows, cpu_gemv, cpu_int8, cpu_many_rows
area, end = mmap.mmap(-1, 129 * mmap.PAGESIZE), 128 * mmap.PAGESIZE
start = ctypes.addressof(ctypes.c_char.from_buffer(area))
assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(start + end), mmap.PAGESIZE, 0) == 0
def at_the_end(tensor):
    size = tensor.numel() * tensor.itemsize
    place = torch.frombuffer(area, dtype=tensor.dtype, count=tensor.numel(), offset=end - size)
    return place.view_as(tensor).copy_(tensor)
few, half = cpu_few_rows.cpu_few_rows, torch.bfloat16
many = lambda x, w: cpu_many_rows.cpu_many_rows(x, w, None, None)
e4m3 = [torch.float8_e4m3fn] * cpu_gemv.converts_halves()
for stored, dtype in ((torch.float32, torch.float32), *((w, half) for w in (half, torch.int8, *e4m3))):
    for rows in (1, 2, 4, 7, 16):
        for N, K in ((13, 7), (9, 64), (13, 97), (8, 128), (17, 161)):
            x, weight = torch.ones(rows, K, dtype=dtype), torch.ones(N, K).to(stored)
            others = [few] * cpu_few_rows.takes(rows, dtype, stored)
            others += [cpu_int8.cpu_int8] * cpu_int8.takes(dtype, stored)
            for kernel in [cpu_gemv.cpu_gemv] + others:
                assert (kernel(x, at_the_end(weight)) == K).all()
                assert (kernel(at_the_end(x), weight) == K).all()
    for rows, N, K in ((17, 8, 34), (31, 45, 64), (50, 9, 160), (16, 33, 4302)):
        if cpu_many_rows.takes(dtype, stored, K, N):
            x, weight = torch.zeros(rows, K, dtype=dtype), torch.ones(N, K).to(stored)
            x[:, -7:] = 1
            assert (many(x, at_the_end(weight)) == 7).all()
            assert (many(at_the_end(x), weight) == 7).all()
print("read")
"""
    done = new_process(code)
    assert done.stdout == "read\n", (done.returncode, done.stderr)


@pytest.mark.parametrize("extra", [{}, GEMMA_2], ids=["Gemma", "Gemma 2"])
@pytest.mark.parametrize("quantize", [None, *EIGHT_BITS])
def test_a_model_says_the_same(tmp_path, tokenizer_model, extra, quantize, monkeypatch):
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config_dict(text=extra))
    calls, answers, right = [], [], module.cpu_gemv
    monkeypatch.setattr(module, "cpu_gemv", lambda x, w: calls.append((*x.shape, *w.shape)) or right(x, w))
    for backend in ("torch", "numba"):
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", quantize=quantize, backend=backend)
        assert not calls
        inputs = torch_inputs(batch(model.config, [3], [4]))
        answers.append(model.generate(**inputs, max_new_tokens=8, eos_token_id=-1))
    assert torch.equal(*answers)
    layer_count = model.config.text_config.num_hidden_layers
    if quantize == "fp8" and not module.converts_halves():
        alone = {outputs for rows, _, outputs, _ in calls if rows == 1}
        assert alone <= {model.config.text_config.vocab_size}
        return
    per_token = 7 * layer_count + 1
    alone = [shape for shape in calls if shape[0] == 1]
    assert len(alone) == 1 + 7 * per_token  # the head for the first of 8 tokens, every matrix for the others


def test_auto_takes_it_and_torch_does_not(tiny, monkeypatch):
    for backend, taken in (("auto", "numba"), ("numba", "numba"), ("torch", "torch")):
        assert load_hf_model(tiny, device="cpu", backend=backend)[0].backend == taken
    monkeypatch.setattr(cpu_linear, "LARGE", 1 << 30)
    assert load_hf_model(tiny, device="cpu")[0].backend == "torch"  # no product is large enough
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    monkeypatch.setitem(sys.modules, "numba", None)  # it cannot be imported
    assert load_hf_model(tiny, device="cpu")[0].backend == "torch"
    message = r"backend numba needs the package numba \(.*numba.*\): install numba, or"
    with pytest.raises(PaliGemmaError, match=message):
        load_hf_model(tiny, device="cpu", backend="numba")


def test_what_it_cannot_do_is_left_to_torch(monkeypatch):
    weight, x = torch.randn(40, 30), torch.randn(1, 30)
    monkeypatch.setattr(module, "cpu_gemv", lambda *_: pytest.fail("the kernel ran"))
    with ops.use("numba"):
        ops.linear(x.double(), weight.double())
        ops.linear(x, torch.randn(30, 40).t())
        ops.linear(x.clone().requires_grad_(), weight).sum().backward()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_process_computes():
    code = """
import os, torch
from paligemma import cpu_linear, ops
cpu_linear.LARGE = 0
def one():
    with ops.use('numba'): return ops.linear(torch.ones(1, 64), torch.ones(64, 64)).sum().item()
assert one() == 4096
child = os.fork()
if child == 0: os._exit(0 if one() == 4096 else 1)
print(os.waitpid(child, 0)[1])
"""
    done = new_process(code, timeout=100)
    assert done.stdout == "0\n", done.stderr


def test_a_full_disk_keeps_no_machine_code(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    full.py_func = module.products.py_func
    monkeypatch.setattr(module, "products", full)
    module.uncached.cache_clear()
    assert module.cpu_gemv(torch.ones(1, 32), torch.ones(2, 32)).tolist() == [[32.0, 32.0]]


def test_two_threads_at_once():
    x, weight = torch.randn(1, 2000), torch.randn(500, 2000)
    exact = x @ weight.T
    with ThreadPoolExecutor(4) as pool:
        for value in pool.map(lambda _: module.cpu_gemv(x, weight), range(200)):
            torch.testing.assert_close(value, exact, atol=1e-3, rtol=0)


def test_it_needs_no_place_to_keep_its_machine_code(tmp_path):
    """It runs in a container that may write neither beside the file nor under a home directory."""
    code = """
import torch
from numba.core import caching
caching.CacheImpl._locator_classes = []
from paligemma.kernels.cpu_gemv import cpu_gemv
print(cpu_gemv(torch.ones(2, 3), torch.ones(2, 3)).tolist())
"""
    done = new_process(code, cwd=tmp_path)
    assert done.stdout == "[[3.0, 3.0], [3.0, 3.0]]\n", done.stderr


def test_threads_are_those_of_torch():
    """The same inside `one_thread`, which limits only torch's own operations."""
    import numba

    weight, before = torch.ones(1 << 10, 1 << 9), torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with ops.use("numba"), cpu_threads.one_thread():
                assert torch.get_num_threads() == 1
                assert bool((ops.linear(torch.ones(1, 1 << 9), weight) == 1 << 9).all())
            assert numba.get_num_threads() == min(threads, numba.config.NUMBA_NUM_THREADS)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
