"""4-bit weights: their layout, their values, their effect on the model, and the memory that they need."""

import json
import re
from pathlib import Path

import decoding
import numpy as np
import pytest
import rule
import torch
from checkpoints import (
    GEMMA_2,
    WHOLE_GROUPS,
    batch,
    config_dict,
    random_weights,
    torch_inputs,
    write_checkpoint,
)
from command_line import assert_one_line, run

from benchmarks import four_bits
from paligemma import PaliGemmaError, cpu_linear, demo, int4, load_hf_model, loading, reference, torch_ops
from paligemma.checkpoint.quantize import quantized
from paligemma.checkpoint.stored import EMBEDDING, HEAD
from paligemma.compare import Judge, recording
from paligemma.model import PaliGemma
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


def test_the_order_of_a_sum_decides_nothing():
    """Otherwise another CPU, or a GPU, would choose other scales. The numbers of each group are shuffled."""
    groups = torch.randn(20000, 32, generator=torch.Generator().manual_seed(2))
    order = torch.randperm(32, generator=torch.Generator().manual_seed(3))
    codes, scale = int4.least_squares(groups)
    shuffled, same = int4.least_squares(groups[:, order].contiguous())
    assert torch.equal(scale, same)
    assert torch.equal(codes[:, order], shuffled)


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


@DTYPES
def test_numba_chooses_the_same_codes_and_scales(dtype, monkeypatch):
    """To the bit: of groups of one number and of many, of ties, of zeros, and of the largest and smallest."""
    monkeypatch.setattr(cpu_linear, "LARGE", 0)
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(400, 256, generator=generator)
    weight[:100] *= torch.logspace(-38, 38, 100)[:, None]
    weight[100:200] *= torch.where(torch.rand(100, 256, generator=generator) < 1 / 64, 12, 1)
    weight[200:250] = torch.randint(-8, 9, (50, 256), generator=generator).float()  # ties, of both signs too
    weight[250] = 0
    weight[251], weight[252, ::2], weight[253, ::32] = 1, -3, -(2.0**-101)
    weight[254, 5], weight[255, 40], weight[256, 70] = torch.nan, torch.inf, -torch.inf
    weight = weight.to(dtype)
    words, scale = quantized(weight, int4.STORED, dtype)
    expected_words, expected = int4.quantized_groups(weight)
    if cpu_linear.kernels_run():
        from paligemma.kernels import cpu_quantize

        if cpu_quantize.takes(weight):
            calls = []
            monkeypatch.setattr(
                cpu_quantize, "cpu_quantize_groups", lambda w: calls.append(w) or (words, scale)
            )
            assert quantized(weight, int4.STORED, dtype) == (words, scale)
            assert len(calls) == 1
        assert cpu_quantize.takes(weight) == (
            cpu_quantize.MULTIPLIES_AND_ADDS and (dtype != torch.float16 or cpu_quantize.converts_halves())
        )
    assert torch.equal(scale.isnan(), expected.isnan())
    assert torch.equal(scale.nan_to_num().view(torch.int16), expected.nan_to_num().view(torch.int16))
    assert torch.equal(words, expected_words)
    part = weight[:, :64]  # not contiguous
    assert torch.equal(quantized(part, int4.STORED, dtype)[0], words[:, :8])


def test_the_format_is_closer_than_the_plain_rules():
    for kind, weights in four_bits.weights().items():
        error = {
            name: four_bits.relative([(numbers(weight), weight) for weight in weights])
            for name, (_, numbers) in four_bits.WAYS.items()
        }
        assert min(error, key=error.get) == "int4" or kind == "outliers", error
        assert error["int4"] < 0.87 * error["round to nearest"], error
        assert error["int4"] < 0.97 * error["Q4_0"], error


def test_a_group_that_is_not_finite_has_no_scale():
    weight = torch.ones(3, 64)
    weight[0, 5], weight[1, 40], weight[2, 63] = torch.nan, torch.inf, -torch.inf
    _, scale = int4.quantized_groups(weight)
    assert scale.isnan().tolist() == [[True, False], [False, True], [False, True]]


def rounded_checkpoint(path: Path, tokenizer_model: Path, model: PaliGemma, config: dict) -> Path:
    """The checkpoint of the numbers with which a quantised model computes, which float32 holds exactly."""
    parameters = dict(model.named_parameters())
    weights = {}
    for name, weight in parameters.items():
        scale = parameters.get(f"{name}_scale")
        if name.endswith("_scale"):
            continue
        if weight.dtype == torch.int32:
            numbers = plain.dequantized(weight.numpy(), scale.double().numpy())
            weights[name] = torch.from_numpy(numbers).float()
        else:
            weights[name] = weight.float() if scale is None else weight.float() * scale.float()[:, None]
    return write_checkpoint(path, tokenizer_model, config=config, weights=weights)


@pytest.fixture(scope="module", params=["Gemma", "Gemma 2"])
def directory(request, tmp_path_factory, tokenizer_model) -> Path:
    config = config_dict(**WHOLE_GROUPS)
    config["text_config"].update(GEMMA_2 if request.param == "Gemma 2" else {})
    path = tmp_path_factory.mktemp("groups") / "model"
    return write_checkpoint(path, tokenizer_model, config=config, dtype="bfloat16")


@pytest.mark.parametrize("dtype", rule.DTYPES)
def test_every_result_of_the_model_keeps_the_rule(directory, tmp_path, tokenizer_model, dtype):
    """The truth is the reference with the numbers that the codes and scales stand for."""
    model, _ = load_hf_model(directory, device="cpu", dtype=dtype, quantize="int4")
    config = json.loads((directory / "config.json").read_text())
    rounded = rounded_checkpoint(tmp_path, tokenizer_model, model, config)
    inputs = batch(model.config, [5, 7], [3, 1])
    candidate, yardstick = {}, {}
    with recording(model, candidate):
        model(**torch_inputs(inputs))
    reference.load(rounded, dtype=dtype).forward(**inputs, record=yardstick)
    judge = Judge(candidate, yardstick, dtype)
    reference.load(rounded).forward(**inputs, record=judge)
    assert {"logits", "language_model.model.layers.2.mlp.down_proj"} <= {line.name for line in judge.lines}
    assert judge.report() == 0


def test_greedy_tokens_are_the_references(directory, tmp_path, tokenizer_model, monkeypatch):
    monkeypatch.setattr(cpu_linear, "LARGE", 0)  # of small products too
    models = {
        backend: load_hf_model(directory, device="cpu", dtype="float32", quantize="int4", backend=backend)[0]
        for backend in ("torch", "numba")
    }
    config = json.loads((directory / "config.json").read_text())
    truth = reference.load(rounded_checkpoint(tmp_path, tokenizer_model, models["torch"], config))
    inputs, options = batch(truth.config, [3, 9], [4, 0]), {"max_new_tokens": 6, "eos_token_id": -1}
    expected = truth.generate(**inputs, **options)
    for backend, model in models.items():
        assert np.array_equal(model.generate(**torch_inputs(inputs), **options).numpy(), expected), backend


def test_the_head_is_int8_and_what_is_not_the_decoders_stays(directory):
    model, _ = load_hf_model(directory, device="cpu", quantize="int4")
    kinds = {name: value.dtype for name, value in model.named_parameters()}
    in_words = {name for name, dtype in kinds.items() if dtype == torch.int32}
    projections = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    projections += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    layers = [f"language_model.model.layers.{n}" for n in range(3)]
    assert in_words == {f"{layer}.{name}.weight" for layer in layers for name in projections}
    assert kinds[HEAD] == torch.int8
    assert {dtype for name, dtype in kinds.items() if name not in {*in_words, HEAD}} == {torch.bfloat16}


def test_a_matrix_without_whole_groups_is_refused_by_name(tiny):
    name = re.escape("language_model.model.layers.0.self_attn.q_proj.weight has shape (96, 88)")
    with pytest.raises(PaliGemmaError, match=f"^{name}: int4 needs columns in multiples of 32; use int8$"):
        load_hf_model(tiny, device="cpu", quantize="int4")


def test_the_command_line(tiny):
    line = ["--image", demo.SAMPLES / "shapes.png", "--no-sample", "--quantize", "int4", "--prompt"]
    found = run(*line, "detect red circle", "--model", "demo", "--max-new-tokens", "7")
    assert found.code == 0
    assert found.text.startswith("<loc")
    refused = run(*line, "caption en", "--model", tiny)
    assert_one_line(refused, "has shape (96, 88): int4 needs columns in multiples of 32; use int8")


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(directory, monkeypatch):
    network, _ = load_hf_model(directory, device="cpu", dtype="float32", quantize="int4")
    needed = sum(value.nbytes for value in network.parameters())
    monkeypatch.setattr(loading, "free_bytes", lambda _: needed)
    load_hf_model(directory, device="cpu", dtype="float32", quantize="int4")
    monkeypatch.setattr(loading, "free_bytes", lambda _: needed - 1)
    with pytest.raises(PaliGemmaError, match=r"this model needs 0\.0 GB for its weights"):
        load_hf_model(directory, device="cpu", dtype="float32", quantize="int4")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damaged_weights_are_named_as_in_the_files(tmp_path, tokenizer_model, bad):
    config = config_dict(**WHOLE_GROUPS)
    for name in ("language_model.model.layers.1.mlp.up_proj.weight", EMBEDDING):
        damaged = random_weights(config)
        damaged[name][3, 5] = bad
        directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config, weights=damaged)
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", quantize="int4")
        with pytest.raises(PaliGemmaError) as caught:
            model.generate(**torch_inputs(batch(model.config, [3], [0])), max_new_tokens=2)
        assert str(caught.value) == f"the weights {name} hold NaN or infinity: the checkpoint is damaged"


@DTYPES
def test_the_product_of_a_gpu_for_many_rows(dtype):
    """It rounds each number of the weight to the dtype of x; sums are float32."""
    generator = torch.Generator().manual_seed(0)
    x = (20 * torch.randn(5, 16384, generator=generator)).to(dtype)
    words, scale = int4.quantized_groups(0.02 * torch.randn(70, 16384, generator=generator))
    exact = x.double() @ int4.dequantized(words, scale).double().T
    error = (torch_ops.quantized_linear(x, words, scale).double() - exact).square().mean().sqrt()
    size, rounding = (y.square().mean().sqrt() for y in (exact, exact.to(dtype).double() - exact))
    assert error <= (1e-5 * size if dtype == torch.float32 else 2 * rounding)


def test_the_kernels_compute_what_torch_does(tmp_path, tokenizer_model):
    config = config_dict(**WHOLE_GROUPS)
    config["text_config"] |= {**GEMMA_2, "num_hidden_layers": 1}
    directory, logits = write_checkpoint(tmp_path / "model", tokenizer_model, config=config), []
    for backend in ("torch", "triton"):
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", quantize="int4", backend=backend)
        state = model.new_state(2, 8)
        state.cache.length.fill_(-1)
        decoding.append(model, state, torch.zeros(2, 1000), torch.tensor([5, 900]))
        logits.append(decoding.logits_of_next(model, state))
    # float32 rounding at logits of RMS 1
    torch.testing.assert_close(*logits, atol=5e-5, rtol=0)
