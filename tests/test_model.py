"""The whole PyTorch model against the reference: every intermediate result, ragged batches, the cache."""

import re
import subprocess
import sys

import decoding
import numpy as np
import pytest
import torch
from checkpoints import (
    GEMMA_2,
    GEMMA_2_SHAPES,
    IMAGE_TOKEN,
    batch,
    config_dict,
    random_weights,
    torch_inputs,
    write_checkpoint,
)
from rule import DTYPES

from paligemma import PaliGemmaError, load_hf_model, reference
from paligemma.compare import Judge, recording

# What differs from the configuration TINY, by name. 60 is not a multiple of the patch size, 14. A shape
# without another image_size has 16 patches.
SHAPES = {
    "multi-query": {},
    "grouped": {"text": {"num_key_value_heads": 2, "head_dim": 20}},
    "H/K of 1": {"text": {"num_key_value_heads": 4}, "vision": {"image_size": 28}},  # 4 patches
    "H/K of 8": {"text": {"num_attention_heads": 8, "head_dim": 10}, "vision": {"image_size": 60}},
    "theta, eps": {"text": {"rope_theta": 500.0, "rms_norm_eps": 0.01}, "vision": {"layer_norm_eps": 0.01}},
    **GEMMA_2_SHAPES,
    "256 patches": {"text": {"num_hidden_layers": 1}, "vision": {"image_size": 224, "num_hidden_layers": 1}},
}


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory, tokenizer_model):
    config = config_dict(**SHAPES[request.param])
    return write_checkpoint(tmp_path_factory.mktemp("shape") / "model", tokenizer_model, config=config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("directory", SHAPES, indirect=True)
def test_every_result_keeps_the_rule(directory, dtype):
    model, _ = load_hf_model(directory, dtype=dtype)
    inputs = batch(model.config, [5, 7], [3, 1])  # without padding: results have the same positions in both
    candidate, yardstick = {}, {}
    with recording(model, candidate):
        logits = model(**torch_inputs(inputs))
    assert logits.dtype == torch.float32
    reference.load(directory, dtype=dtype).forward(**inputs, record=yardstick)
    judge = Judge(candidate, yardstick, dtype)
    reference.load(directory).forward(**inputs, record=judge)
    v, t = model.config.vision_config, model.config.text_config
    per_layer = 16 if t.post_norms else 13
    count = 8 + 12 * v.num_hidden_layers + per_layer * t.num_hidden_layers
    assert len(judge.lines) == count, "not every result was compared"
    assert judge.report() == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("directory", ["multi-query", "grouped", *GEMMA_2_SHAPES], indirect=True)
def test_ragged_batches_keep_the_rule(directory, dtype, padding):
    model, _ = load_hf_model(directory, dtype=dtype)
    inputs = batch(model.config, [1, 9, 4], [0, 2, 6], padding)
    valid = inputs["attention_mask"].astype(bool)
    candidate = {"logits": model(**torch_inputs(inputs)).numpy()[valid]}
    yardstick = {"logits": reference.load(directory, dtype=dtype).forward(**inputs)[valid]}
    judge = Judge(candidate, yardstick, dtype)
    judge["logits"] = reference.load(directory).forward(**inputs)[valid]
    assert judge.report() == 0


@pytest.mark.parametrize("directory", ["multi-query", "Gemma 2, a window"], indirect=True)
def test_the_kernels_keep_the_rule(directory):
    """The whole model on the kernels in Triton's interpreter: logits of a ragged batch, and greedy tokens."""
    model, _ = load_hf_model(directory, dtype="float32", backend="triton", device="cpu")
    inputs, truth = batch(model.config, [1, 9], [2, 6]), reference.load(directory)
    valid = inputs["attention_mask"].astype(bool)
    yardstick = {"logits": reference.load(directory, dtype="float32").forward(**inputs)[valid]}
    judge = Judge({"logits": model(**torch_inputs(inputs)).numpy()[valid]}, yardstick, "float32")
    judge["logits"] = truth.forward(**inputs)[valid]
    assert judge.report() == 0
    options = {"max_new_tokens": 5, "eos_token_id": -1}
    tokens = model.generate(**torch_inputs(inputs), **options)
    assert (tokens.numpy() == truth.generate(**inputs, **options)).all()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_padding_changes_nothing(tiny, padding):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = batch(model.config, [1, 9, 4], [0, 2, 6], padding)
    together, tokens = model(**torch_inputs(inputs)), model.generate(**torch_inputs(inputs), max_new_tokens=8)
    for b in range(3):
        valid = inputs["attention_mask"][b].astype(bool)
        row = {name: x[b : b + 1] for name, x in inputs.items()}
        alone = {name: x if name == "pixel_values" else x[:, valid] for name, x in row.items()}
        alone = torch_inputs(alone)
        # The tolerance is for float32 rounding: the sums are the same over tiles of other sizes.
        torch.testing.assert_close(together[b, valid], model(**alone)[0], atol=2e-5, rtol=0)
        assert (together[b, ~valid] == 0).all()
        assert torch.equal(model.generate(**alone, max_new_tokens=8)[0], tokens[b])


def test_tokens_of_the_padding_have_no_effect(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = torch_inputs(batch(model.config, [1, 9], [0, 2]))
    before = model(**inputs)
    inputs["input_ids"][inputs["attention_mask"] == 0] = IMAGE_TOKEN
    assert torch.equal(model(**inputs), before)


@pytest.mark.parametrize("suffixes", [[0, 0, 0], [3, 0, 1]])
@pytest.mark.parametrize("directory", ["multi-query", "grouped", "H/K of 8", *GEMMA_2_SHAPES], indirect=True)
def test_greedy_tokens_are_the_references(directory, suffixes):
    model, _ = load_hf_model(directory, dtype="float32")
    inputs = batch(model.config, [2, 8, 5], suffixes)
    expected = reference.load(directory).generate(**inputs, max_new_tokens=16, eos_token_id=-1)
    tokens = model.generate(**torch_inputs(inputs), max_new_tokens=16, eos_token_id=-1)
    assert len(np.unique(expected)) > 20, "these weights repeat few tokens, so the comparison shows nothing"
    assert (tokens.numpy() == expected).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_where_a_half_precision_token_differs_the_reference_was_undecided(tiny, dtype):
    model, _ = load_hf_model(tiny, dtype=dtype)
    inputs = batch(model.config, [2, 8, 5], [0, 0, 0])
    ids = inputs["input_ids"]
    tokens = model.generate(**torch_inputs(inputs), max_new_tokens=12, eos_token_id=-1).numpy()
    follow = {  # the answer is the suffix: one pass of the reference gives its logits at every step
        "input_ids": np.concatenate([ids, tokens], axis=1),
        "attention_mask": np.concatenate([inputs["attention_mask"], np.ones_like(tokens)], axis=1),
        "token_type_ids": np.concatenate([np.zeros_like(ids), np.ones_like(tokens)], axis=1),
        "pixel_values": inputs["pixel_values"],
    }
    steps = np.s_[:, ids.shape[1] - 1 : -1]
    truth, rounded = (reference.load(tiny, dtype=d).forward(**follow)[steps] for d in ("float64", dtype))
    best, chosen = truth.max(axis=-1), np.take_along_axis(truth, tokens[..., None], axis=-1)[..., 0]
    error = np.abs(rounded - truth).max(axis=-1)  # the dtype's error at each position
    assert (best - chosen <= 2 * error).all()


def test_prefill_and_decodes_are_the_recomputation_without_a_cache(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = batch(model.config, [2, 8], [4, 4], "right")
    types = inputs["token_type_ids"].astype(bool)
    expected = reference.load(tiny).forward(**inputs)
    prompt = {name: x if name == "pixel_values" else np.where(types, 0, x) for name, x in inputs.items()}
    prompt = [torch.from_numpy(prompt[name]) for name in ("input_ids", "pixel_values", "attention_mask")]
    state = model.new_state(2, 30)
    logits = decoding.prefill(model, state, *prompt)
    suffix = inputs["input_ids"][types].reshape(2, 4)
    for step in range(4):
        decoding.append(model, state, logits, torch.from_numpy(suffix[:, step]))
        logits = decoding.logits_of_next(model, state)
        for b in range(2):
            error = np.abs(logits[b].numpy() - expected[b, int(types[b].argmax()) + step]).max()
            assert error < 5e-5  # float32 rounding; a shift of one position causes 0.1 and more


def test_position_4096_is_right_in_bfloat16(tmp_path, tokenizer_model):
    """The text follows 4,096 patches. A rotary table in bfloat16 would be wrong by radians there."""
    vision = {"image_size": 896, "num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 24}
    config = config_dict(text={"num_hidden_layers": 2}, vision=vision)
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config)
    model, _ = load_hf_model(directory, dtype="bfloat16")
    model = model.to(torch.bfloat16)  # rounds every parameter and buffer
    inputs = batch(model.config, [6], [4])
    candidate, yardstick = {}, {}
    with recording(model, candidate):
        model(**torch_inputs(inputs))
    reference.load(directory, dtype="bfloat16").forward(**inputs, record=yardstick)
    judge = Judge(candidate, yardstick, "bfloat16")
    reference.load(directory).forward(**inputs, record=judge)
    assert judge.report() == 0


@pytest.mark.parametrize("text", [{}, GEMMA_2, {**GEMMA_2, "sliding_window": 1000}], ids=str)
def test_no_score_matrix_is_ever_whole(tmp_path, tokenizer_model, text):
    """At 896 pixels the scores of 8 heads are 540 MB in each of the two towers."""
    narrow = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 8}
    config = config_dict(text={**text, **narrow, "head_dim": 16}, vision={**narrow, "image_size": 896})
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config)
    code = f"""
import resource, torch
from paligemma import load_hf_model
model, _ = load_hf_model({str(directory)!r}, dtype="float32", device="cpu")
input_ids = torch.tensor([[{IMAGE_TOKEN}] * 4096 + [2, 30, 4]])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model.generate(input_ids, torch.zeros(1, 3, 896, 896), max_new_tokens=2, eos_token_id=-1)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""
    command = [sys.executable, "-c", code]
    grown = float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert grown < 300, f"memory grew by {grown:.0f} MB"


def counted(monkeypatch, owner, name: str) -> list:
    """A list that receives the first argument of each call of a method."""
    calls, original = [], getattr(owner, name)
    monkeypatch.setattr(owner, name, lambda self, x, *rest: calls.append(x) or original(self, x, *rest))
    return calls


def test_generate_does_no_work_twice(tiny, monkeypatch):
    """The vision tower runs once, and the head runs for one position a row. No pass follows the last token.

    The cache is allocated once.
    """
    from paligemma.gemma import LanguageModel, Model
    from paligemma.kv_cache import KVCache
    from paligemma.siglip import VisionModel

    model, _ = load_hf_model(tiny, dtype="float32")
    vision, passes = (counted(monkeypatch, owner, "forward") for owner in (VisionModel, Model))
    heads, layers = counted(monkeypatch, LanguageModel, "logits"), counted(monkeypatch, KVCache, "layer")
    caches, init = [], KVCache.__init__
    monkeypatch.setattr(KVCache, "__init__", lambda self, *rest: caches.append(self) or init(self, *rest))
    inputs = torch_inputs(batch(model.config, [2, 8], [0, 0]))
    tokens = model.generate(**inputs, max_new_tokens=5, eos_token_id=-1)
    assert tokens.shape == (2, 5)
    assert len(vision) == 1
    assert [x.shape[1] for x in passes] == [inputs["input_ids"].shape[1], 1, 1, 1, 1]
    assert [x.shape[:-1].numel() for x in heads] == [2] * 5
    assert len(caches) == 1
    assert len(layers) == 5 * 3
    assert caches[0].used == inputs["input_ids"].shape[1] + 4
    assert caches[0].keys_values.shape[3] == caches[0].used + 1  # one position is for the last token


def test_each_row_stops_at_its_own_end(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = torch_inputs(batch(model.config, [2, 8, 5], [0, 0, 0]))
    free = model.generate(**inputs, max_new_tokens=10, eos_token_id=-1)
    end = int(free[1, 2])
    expected = free.clone()
    for row in expected:
        stop = (row == end).nonzero()
        if len(stop):
            row[int(stop[0]) + 1 :] = model.config.pad_token_id
    assert not torch.equal(expected, free)
    tokens = model.generate(**inputs, max_new_tokens=10, eos_token_id=[end])
    assert torch.equal(tokens, expected[:, : tokens.shape[1]])
    arrays = {name: x.numpy() for name, x in inputs.items()}
    truth = reference.load(tiny).generate(**arrays, max_new_tokens=10, eos_token_id=end)
    assert (truth == tokens.numpy()).all()
    ends = [int(row[1]) for row in free]
    tokens = model.generate(**inputs, max_new_tokens=10, eos_token_id=ends)
    assert tokens.shape[1] <= 2, "tokens were computed after all rows had ended"


def test_sampling_is_reproducible_and_independent_of_batch_mates(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = torch_inputs(batch(model.config, [4, 4], [0, 0]))
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 0.9, "top_p": 0.95, "eos_token_id": -1}
    together = model.generate(**inputs, **options, seed=7)
    assert torch.equal(model.generate(**inputs, **options, seed=7), together)
    assert not torch.equal(model.generate(**inputs, **options, seed=8), together)
    first = {name: x[:1] for name, x in inputs.items()}
    assert torch.equal(model.generate(**first, **options, seed=7)[0], together[0])
    arrays = {name: x.numpy() for name, x in inputs.items()}
    assert (reference.load(tiny).generate(**arrays, **options, seed=7) == together.numpy()).all()


def test_temperature_zero_is_greedy(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = torch_inputs(batch(model.config, [4], [0]))
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=True, temperature=0.0)
    assert torch.equal(tokens, model.generate(**inputs, max_new_tokens=6))


PIXELS, ARRAY = (2, 3, 56, 56), "it must be a tensor, an array, or lists of one length"
BYTES = torch.zeros(PIXELS, dtype=torch.uint8)
REFUSED = [
    ({"pixel_values": None}, "for 0 images"),
    ({"pixel_values": torch.zeros(1, 3, 56, 56)}, "1 images"),
    ({"pixel_values": torch.zeros(2, 3, 56, 57)}, "(2, 3, 56, 57)"),
    ({"pixel_values": BYTES}, "pixel_values are torch.uint8; they must be floating-point"),
    ({"pixel_values": torch.full(PIXELS, torch.nan)}, "pixel_values hold NaN or infinity"),
    ({"pixel_values": torch.full(PIXELS, torch.inf)}, "pixel_values hold NaN or infinity"),
    ({"pixel_values": "a.jpg"}, f"pixel_values is 'a.jpg'; {ARRAY}"),
    ({"attention_mask": torch.zeros(2, 24)}, "no token"),
    ({"attention_mask": torch.ones(2, 23)}, "(2, 23)"),
    ({"attention_mask": torch.full((2, 24), 2)}, "attention_mask holds 2; it must hold 0 and 1 only"),
    ({"attention_mask": [[1] * 24, [1] * 23]}, "attention_mask is [[1, 1"),
    ({"token_type_ids": torch.tensor([[1] * 16 + [0] * 8] * 2)}, "prefix"),
    ({"token_type_ids": torch.full((2, 24), -1e9)}, "token_type_ids holds -1000000000.0"),
    ({"input_ids": torch.full((2, 24), 1600)}, "[24, 24]"),
    ({"input_ids": torch.tensor([[IMAGE_TOKEN] * 16 + [9999] * 8] * 2)}, "9999"),
    ({"input_ids": torch.zeros(0, 24, dtype=torch.int64)},
     "input_ids has shape (0, 24); it must be (B, T), with at least one row and one token"),
    ({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, "input_ids has shape (2, 0)"),
    ({"input_ids": torch.zeros(24, dtype=torch.int64)}, "input_ids has shape (24,)"),
    ({"input_ids": torch.zeros(2, 24)}, "input_ids are torch.float32; token ids are whole numbers"),
    ({"input_ids": None}, "input_ids is None; it must be a tensor"),
    ({"input_ids": [[1, 2], [3]]}, f"input_ids is [[1, 2], [3]]; {ARRAY}"),
    ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ({"max_new_tokens": 9000}, "8192"),
    ({"max_new_tokens": 10**400}, "8192"),
    ({"max_new_tokens": 1.5}, "max_new_tokens is 1.5; it must be a whole number of at least 1"),
    ({"max_new_tokens": None}, "max_new_tokens is None"),
    ({"max_new_tokens": True}, "max_new_tokens is True"),
    ({"temperature": float("nan"), "do_sample": True}, "temperature is nan"),
    ({"temperature": -1.0, "do_sample": False}, "temperature is -1.0"),
    ({"temperature": "0.5"}, "temperature is '0.5'; it must be 0 (greedy) or a positive number"),
    ({"temperature": 10**400}, "temperature is 1000"),
    ({"top_p": 0.0, "do_sample": True}, "top_p is 0.0"),
    ({"top_p": None}, "top_p is None; it must be above 0 and at most 1"),
    ({"do_sample": "no"}, "do_sample is 'no'; it must be True, False or None"),
    ({"seed": -1}, "seed is -1; it must be a whole number of at least 0"),
    ({"seed": 1.5}, "seed is 1.5"),
    ({"eos_token_id": 1664}, "eos_token_id is 1664; it must be a token id from 0 to 1663, or a list of them"),
    ({"eos_token_id": [1, 1 << 80]}, "eos_token_id is [1, 1208925819614629174706176]"),
    ({"eos_token_id": -2}, "eos_token_id is -2"),
    ({"eos_token_id": 1.5}, "eos_token_id is 1.5"),
    ({"log_probs": True}, "log_probs is True; it must be a list"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_inputs_that_do_not_fit_are_refused_by_name(tiny, change, message):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = batch(model.config, [8, 8], [0, 0])
    with pytest.raises(PaliGemmaError, match=re.escape(message)) as caught:
        model.generate(**torch_inputs(inputs) | change)
    assert "\n" not in str(caught.value)
    for_torch = isinstance(next(iter(change.values())), (list, str, torch.Tensor))
    if not for_torch or isinstance(change.get("input_ids"), torch.Tensor):
        with pytest.raises(PaliGemmaError):
            reference.load(tiny).generate(**inputs | change)


def test_arrays_and_lists_are_inputs_too(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = batch(model.config, [3, 8], [2, 0])
    options = {"max_new_tokens": np.int64(4), "seed": np.uint8(3), "eos_token_id": np.array([1])}
    logits, tokens = model(**torch_inputs(inputs)), model.generate(**torch_inputs(inputs), max_new_tokens=4)
    integers = {name: x.astype(np.int32) for name, x in inputs.items() if x.dtype == np.int64}
    strided = {"pixel_values": inputs["pixel_values"][..., ::-1][..., ::-1]}
    lists = {name: x.tolist() for name, x in inputs.items()}
    lists_of_tensors = {name: list(torch.from_numpy(x)) for name, x in inputs.items()}
    for given in (inputs, integers | strided, lists, lists_of_tensors):
        assert torch.equal(model(**given), logits)
        assert torch.equal(model.generate(**given, **options), tokens)


SAMPLED = {"top_p": 0.9, "seed": 3, "max_new_tokens": 8, "eos_token_id": -1}


@pytest.mark.parametrize(("given", "temperature"), [
    ({"temperature": 5}, 5), ({"temperature": 5.0, "do_sample": True}, 5),
    ({"temperature": 5, "do_sample": False}, 0), ({"temperature": np.float32(5)}, 5),
    ({"temperature": 0}, 0), ({"temperature": 0.0, "do_sample": True}, 0), ({"temperature": None}, 1),
    ({}, 1), ({"do_sample": True}, 1), ({"do_sample": False}, 0),
    ({"top_p": 1.0}, 0), ({"top_p": 1}, 0), ({"top_p": 1.0, "do_sample": True}, 1),
])  # fmt: skip
def test_what_asks_for_sampling(tiny, given, temperature):
    """A given temperature or top_p is never ignored in silence."""
    model, _ = load_hf_model(tiny, dtype="float32")
    inputs = batch(model.config, [4], [0])
    options = SAMPLED | given
    explicit = {name: value for name, value in options.items() if name != "do_sample"}
    steps = model.stream(**torch_inputs(inputs), **explicit | {"temperature": temperature})
    expected = torch.stack(list(steps), dim=1)
    assert torch.equal(model.generate(**torch_inputs(inputs), **options), expected)
    if len(given) == 1:
        assert (reference.load(tiny).generate(**inputs, **options) == expected.numpy()).all()


def test_a_weight_beyond_float16_is_not_damage(tmp_path, tokenizer_model):
    name, weights = "language_model.model.layers.1.input_layernorm.weight", random_weights(config_dict())
    weights[name][3] = 1e5
    directory = write_checkpoint(tmp_path / "large", tokenizer_model, weights=weights)
    half, single = (load_hf_model(directory, dtype=dtype)[0] for dtype in ("float16", "float32"))
    inputs = torch_inputs(batch(half.config, [4], [0]))
    overflow = f"the weights {name} overflow float16, whose largest number is 65504: use bfloat16 or float32"
    with pytest.raises(PaliGemmaError, match=overflow):
        half.generate(**inputs, max_new_tokens=2)
    single.generate(**inputs, max_new_tokens=2)
    with torch.no_grad():
        single.language_model.model.norm.weight[0] = torch.nan
    damaged = "the weights language_model.model.norm.weight hold NaN or infinity: the checkpoint is damaged"
    with pytest.raises(PaliGemmaError, match=damaged):
        single.generate(**inputs, max_new_tokens=2)


def test_text_alone(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    ids = np.array([[2, 50, 60, 4]])
    expected = reference.load(tiny).forward(ids, None)
    np.testing.assert_allclose(model(torch.from_numpy(ids)).numpy(), expected, atol=5e-5)  # float32 rounding
