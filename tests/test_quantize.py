"""8-bit weights, int8 and e4m3: their values, their effect on the model, and the memory that they need."""

import decoding
import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, batch, config_dict, random_weights, torch_inputs, write_checkpoint
from command_line import run

from paligemma import (
    PaliGemmaError,
    cpu_blocks,
    cpu_linear,
    load_hf_model,
    loading,
    machine,
    ops,
    reference,
    torch_ops,
)
from paligemma.checkpoint import quantize as quantization
from paligemma.checkpoint.quantize import quantized, quantized_rows
from paligemma.checkpoint.stored import EMBEDDING, HEAD
from paligemma.demo.evaluate import answers, held_out, score, trials
from paligemma.layers import EIGHT_BITS, QUANTIZED

CPU = torch.device("cpu")
KINDS = pytest.mark.parametrize("quantize", EIGHT_BITS)


@pytest.fixture(scope="module", params=["Gemma", "Gemma 2"])
def directory(request, tmp_path_factory, tokenizer_model):
    config = config_dict(text={} if request.param == "Gemma" else GEMMA_2)
    path = tmp_path_factory.mktemp("wide") / "model"
    return write_checkpoint(path, tokenizer_model, config=config, dtype="bfloat16")


def steps(numbers: torch.Tensor, quantize: str) -> torch.Tensor:
    """The distance to the next number of this kind: 1 for int8. e4m3 has 3 bits after the point, and steps of
    2^-9 below 2^-6."""
    if quantize == "int8":
        return torch.ones_like(numbers)
    return torch.exp2(numbers.abs().clamp(min=2**-6).log2().floor() - 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@KINDS
def test_rows_are_rounded_to_the_nearest_number_of_the_kind(dtype, quantize, monkeypatch):
    monkeypatch.setattr(quantization, "BLOCK", 16 * 33)  # 16 rows at a time, and then 2
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 33, generator=generator) * torch.logspace(-3, 3, 50)[:, None]
    weight[7] = 0
    weight[8, 1:] *= 1e-5  # one large number, and numbers below e4m3's smallest exponent
    stored, largest = EIGHT_BITS[quantize], {"int8": 127, "fp8": 448}[quantize]
    quantized, scale = quantized_rows(weight, stored, dtype)
    kept = dtype if dtype == torch.bfloat16 else torch.float32
    assert (quantized.dtype, scale.dtype, quantized.shape, scale.shape) == (stored, kept, weight.shape, (50,))
    scale = scale.float()[:, None]
    error = (quantized.float() * scale - weight).abs()
    # Half a step; the rounding of the scale may cut off the largest value of a row.
    half, cut_off = 0.5 * steps(weight / scale, quantize) * (1 + 1e-6), largest * torch.finfo(kept).eps
    assert bool((error <= (half + cut_off) * scale + 1e-12).all())
    assert bool((quantized.float()[7] == 0).all())
    most = quantized.float().abs().amax(dim=1)
    assert bool((most <= largest).all())
    last_step = steps(torch.tensor(largest - 0.5), quantize)
    assert bool((most[[*range(7), *range(8, 50)]] >= largest - last_step).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("stored", EIGHT_BITS.values(), ids=str)
def test_numba_chooses_the_same_values_and_scales(stored, dtype, monkeypatch):
    """To the bit: of every size, of ties, of all values of the 8 bits, and of numbers between them."""
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(300, 300, generator=generator)
    weight[:100] *= torch.logspace(-44, 38, 100)[:, None]
    weight[100:200] = torch.randint(-254, 255, (100, 300), generator=generator) / 2  # halves, up to 127
    weight[100:200, 0] = 127
    weight[200:230] = 448 * 2 ** (-18 * torch.rand(30, 300, generator=generator))
    weight[200:230, 1] = 448
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float().nan_to_num()
    weight[230, :256], weight[231, :255] = every, (every[1:] + every[:-1]) / 2  # and the ties between them
    weight[231, 299], weight[232], weight[233] = 448, 0, -0.0
    weight = weight.to(dtype).nan_to_num()
    for part in (weight, weight[:, :16].contiguous(), weight[:, :250], weight[:, 3:].contiguous()):
        values, scale = quantized(part, stored, dtype)
        expected_values, expected = quantized_rows(part, stored, dtype)
        assert (values.dtype, scale.dtype) == (expected_values.dtype, expected.dtype)
        assert torch.equal(scale, expected)
        assert torch.equal(values.view(torch.int8), expected_values.view(torch.int8))
    assert quantized(torch.full((2, 32), torch.nan, dtype=dtype), stored, dtype)[1].isnan().all()
    if cpu_linear.kernels_run():
        from paligemma.kernels import cpu_quantize

        calls = []
        monkeypatch.setattr(cpu_quantize, "cpu_quantize_rows", lambda *given: calls.append(given))
        quantized(weight, stored, dtype)
        assert len(calls) == cpu_quantize.takes(weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@KINDS
def test_the_product_in_the_dtype_of_the_weights(dtype, quantize):
    """The product that a GPU computes for many rows. Products of integers and activations would overflow
    float16."""
    generator = torch.Generator().manual_seed(0)
    x = (20 * torch.randn(5, 16384, generator=generator)).to(dtype)
    given = 0.02 * torch.randn(70, 16384, generator=generator)
    weight, scale = quantized_rows(given, EIGHT_BITS[quantize], dtype)
    exact = x.double() @ (weight.double() * scale.double()[:, None]).T
    error = (torch_ops.quantized_linear(x, weight, scale).double() - exact).square().mean().sqrt()
    rounding = (exact.to(dtype).double() - exact).square().mean().sqrt()
    assert error <= 4 * rounding  # the weight is rounded too


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_every_8_bit_number_is_widened_exactly(dtype, wide):
    numbers = torch.arange(256).to(torch.int8).view(dtype)
    numbers = numbers[numbers.float().isfinite()][:, None]
    memory = torch.empty(300, 1, dtype=wide)
    assert torch.equal(cpu_blocks.widened(numbers, memory).float(), numbers.float())


@KINDS
def test_only_the_language_models_matrices_are_quantized(directory, quantize):
    model, _ = load_hf_model(directory, device="cpu", quantize=quantize)
    for name, value in model.named_parameters():
        norm_or_scale = "norm" in name or name.endswith("scale")
        linear = name.startswith("language_model.model.layers") and not norm_or_scale
        assert value.dtype == (EIGHT_BITS[quantize] if linear or name == HEAD else torch.bfloat16), name
    plain = dict(load_hf_model(directory, device="cpu")[0].named_parameters())
    assert torch.equal(model.get_parameter(EMBEDDING), plain[EMBEDDING])
    head = model.get_parameter(HEAD).float() * model.get_parameter(f"{HEAD}_scale").float()[:, None]
    allowed = {"int8": 0.01, "fp8": 2**-4}[quantize]  # e4m3: half of one of the 8 steps between powers of 2
    assert (head - plain[EMBEDDING].float()).abs().max() <= allowed * plain[EMBEDDING].float().abs().max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@KINDS
def test_the_model_computes_with_the_rounded_weights(directory, tmp_path, tokenizer_model, dtype, quantize):
    """A checkpoint that holds the rounded matrices gives the same logits."""
    model, _ = load_hf_model(directory, device="cpu", dtype=dtype, quantize=quantize)
    parameters = {name: x.float() for name, x in model.named_parameters()}
    rounded = {
        name: x * parameters[f"{name}_scale"][:, None] if f"{name}_scale" in parameters else x
        for name, x in parameters.items()
    }
    head = rounded.pop(HEAD)
    rounded = {name: x.contiguous() for name, x in rounded.items() if not name.endswith("_scale")}
    inputs = torch_inputs(batch(model.config, [3, 9], [4, 0]))
    config = config_dict(text={} if not model.config.text_config.post_norms else GEMMA_2)
    path = write_checkpoint(tmp_path / "rounded", tokenizer_model, config=config, weights=rounded)
    plain, _ = load_hf_model(path, device="cpu", dtype="float32")
    embedding, table = plain.language_model.model.embed_tokens, rounded[EMBEDDING]
    embedding.forward = lambda ids: ops.embed(ids, table)
    embedding.weight = torch.nn.Parameter(head, requires_grad=False)  # the head, which shares this module
    expected = plain(**inputs)
    error = (model(**inputs) - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    assert error < (1e-5 if dtype == "float32" else 0.04)  # 0.04: twice the error of bfloat16 arithmetic


@KINDS
def test_the_kernels_multiply_them_as_they_are(directory, quantize):
    logits = []
    for backend in ("torch", "triton"):
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", quantize=quantize, backend=backend)
        state = model.new_state(2, 8)
        state.cache.length.fill_(-1)
        for tokens in ([5, 900], [77, 6]):
            decoding.append(model, state, torch.zeros(2, 1000), torch.tensor(tokens))
            logits.append(decoding.logits_of_next(model, state))
    # float32 rounding at logits of RMS 1
    torch.testing.assert_close(logits[:2], logits[2:], atol=5e-5, rtol=0)


def test_the_demo_model_is_as_good():
    asked, said = trials(held_out(60, 31), 31), {}
    for quantize in (None, *QUANTIZED):
        said[quantize] = answers(*load_hf_model("demo", device="cpu", quantize=quantize), asked)
    scores = {quantize: score(asked, texts) for quantize, texts in said.items()}
    for quantize in QUANTIZED:
        rows = zip(said[None], said[quantize], asked, strict=True)
        words = [a == b for a, b, trial in rows if trial.boxes is None]
        assert np.mean(words) >= 0.97  # not of coordinates, which may move by one of 1024
        assert all(abs(scores[None][goal] - scores[quantize][goal]) <= 0.02 for goal in scores[None]), scores


def test_the_command_line(directory, image_file):
    line = ["--model", directory, "--image", image_file, "--prompt", "caption en"]
    line += ["--no-sample", "--max-new-tokens", "4", "--quantize"]
    for quantize in EIGHT_BITS:
        assert run(*line, quantize).text
    wrong = run(*line, "int2")
    assert wrong.code == 2
    assert "--quantize: invalid choice: 'int2'" in wrong.err
    both = run(*line, "int8", "--backend", "reference")
    assert both.code == 2
    assert "--backend reference quantises nothing; leave out --quantize, or save the weights" in both.err
    with pytest.raises(
        PaliGemmaError, match=r"quantize is 'fp4'; it must be one of int8, fp8, int4, or None"
    ):
        load_hf_model(directory, device="cpu", quantize="fp4")


def test_an_older_gpu_is_told_to_take_int8(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    message = r"^fp8 needs a GPU of compute capability 8\.9 or later, which RTX 3090 is not: use int8$"
    with pytest.raises(PaliGemmaError, match=message):
        load_hf_model(tiny, device="cuda", quantize="fp8")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(directory, image_file, monkeypatch):
    stored = reference.load(directory).params.stored
    decoder = [name for name in stored if "layers" in name and name.startswith("language")]
    matrices = {name for name in decoder if len(stored[name].shape) == 2}
    count = {name: int(np.prod(tensor.shape)) for name, tensor in stored.items()}
    total, rest = sum(count.values()), sum(n for name, n in count.items() if name not in matrices)
    eight = sum(count[name] + 4 * stored[name].shape[0] for name in (*matrices, EMBEDDING))
    needed = {
        ("float32", None): 4 * total, ("float16", None): 2 * total,
        ("float16", "int8"): 2 * rest + eight, ("float16", "fp8"): 2 * rest + eight,
    }  # fmt: skip
    message = r"this model needs 0\.0 GB for its weights; cpu has 0\.0 GB free"
    for (dtype, quantize), size in needed.items():
        monkeypatch.setattr(loading, "free_bytes", lambda _, size=size: size)
        load_hf_model(directory, device="cpu", dtype=dtype, quantize=quantize)
        monkeypatch.setattr(loading, "free_bytes", lambda _, size=size: size - 1)
        with pytest.raises(PaliGemmaError, match=message):
            load_hf_model(directory, device="cpu", dtype=dtype, quantize=quantize)
    monkeypatch.setattr(loading, "free_bytes", lambda _: 0)
    load_hf_model(directory, device="cpu", dtype="bfloat16")  # its weights stay in the file


def test_free_memory_is_plausible():
    assert 1e8 < machine.free_memory() < 1e13


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@KINDS
def test_damaged_weights_are_named_as_in_the_files(tmp_path, tokenizer_model, quantize, bad):
    for name in ("language_model.model.layers.1.mlp.up_proj.weight", EMBEDDING):
        damaged = random_weights(config_dict())
        damaged[name][3, 5] = bad
        damaged[name][7] = bad
        directory = write_checkpoint(tmp_path / "model", tokenizer_model, weights=damaged)
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", quantize=quantize)
        with pytest.raises(PaliGemmaError) as caught:
            model.generate(**torch_inputs(batch(model.config, [3], [0])), max_new_tokens=2)
        assert str(caught.value) == f"the weights {name} hold NaN or infinity: the checkpoint is damaged"
