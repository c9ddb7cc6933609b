"""Two independent implementations: Hugging Face's transformers, and stored results of Google's own code."""

from types import SimpleNamespace

import conftest
import decoding
import numpy as np
import pytest
import torch
from checkpoints import (
    GEMMA_2_SHAPES,
    IMAGE_TOKEN,
    batch,
    config_dict,
    random_weights,
    torch_inputs,
    write_checkpoint,
)

from paligemma import load_hf_model, reference
from paligemma.compare import recording

# Logits here have an RMS of 1. In measurements two float32 implementations differed by 3e-5 at most, and by
# 3e-6 in relative RMS. The smallest of all mistakes (an eps of 1e-5, a theta of 10001) changes them by 1e-5.
MAX, RMS = 1e-4, 6e-6

SHAPES = {
    "multi-query": {},
    "grouped": {"text": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 20}},
    "multi-head": {  # 60 is not a multiple of the patch size, 14
        "text": {"num_key_value_heads": 4, "head_dim": 10},
        "vision": {"num_attention_heads": 1, "image_size": 60},
    },
    "8 heads to 1": {
        "text": {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 22, "rope_theta": 500.0}
    },
    "single layer": {  # 4 patches
        "text": {"num_hidden_layers": 1},
        "vision": {"num_hidden_layers": 1, "image_size": 28},
    },
    **GEMMA_2_SHAPES,
}


def open_both(directory, dtype: torch.dtype = torch.float32, *attentions: str) -> SimpleNamespace:
    from transformers import PaliGemmaForConditionalGeneration

    load = PaliGemmaForConditionalGeneration.from_pretrained
    theirs = {way: load(directory, dtype=dtype, attn_implementation=way) for way in attentions or ("eager",)}
    model, _ = load_hf_model(directory, device="cpu", dtype=dtype)
    truth = reference.load(directory)
    return SimpleNamespace(model=model, reference=truth, theirs=theirs, config=model.config)


@pytest.fixture(scope="module", params=SHAPES)
def both(request, tmp_path_factory, tokenizer_model) -> SimpleNamespace:
    config = config_dict(**SHAPES[request.param])
    directory = tmp_path_factory.mktemp("peer") / "model"
    write_checkpoint(directory, tokenizer_model, config=config)
    # transformers' "sdpa" attention leaves out the softcap.
    attentions = ("eager",) if request.param in GEMMA_2_SHAPES else ("eager", "sdpa")
    return open_both(directory, torch.float32, *attentions)


def three_logits(both: SimpleNamespace, inputs: dict, attention: str = "eager") -> list[np.ndarray]:
    """Logits of transformers, of the model and of the reference, at the valid positions."""
    valid = inputs["attention_mask"].astype(bool)
    with torch.no_grad():
        theirs = both.theirs[attention](**torch_inputs(inputs)).logits.float().numpy()
    ours = both.model(**torch_inputs(inputs)).numpy()
    return [logits[valid] for logits in (theirs, ours, both.reference.forward(**inputs))]


def rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


def assert_close(value: np.ndarray, expected: np.ndarray, most=MAX, relative_rms=RMS) -> None:
    assert value.shape == expected.shape
    error = value.astype(np.float64) - expected
    assert np.abs(error).max() <= most
    assert rms(error) <= relative_rms * rms(expected)


@pytest.mark.parametrize(("prompts", "suffixes", "padding"), [
    ([9], [0], "left"),
    ([9], [6], "left"),
    ([3, 12, 8], [0, 0, 0], "left"),
    ([3, 12, 8], [7, 0, 3], "left"),
    ([3, 12, 8], [7, 0, 3], "right"),
])  # fmt: skip
def test_logits_are_those_of_transformers(both, prompts, suffixes, padding):
    for attention in both.theirs:
        theirs, ours, truth = three_logits(both, batch(both.config, prompts, suffixes, padding), attention)
        assert 0.5 < rms(theirs) < 2
        assert_close(ours, theirs)
        assert_close(truth, theirs)


def test_greedy_tokens_are_those_of_transformers(both):
    inputs, options = batch(both.config, [3, 12, 8], [0, 0, 0]), {"max_new_tokens": 14, "do_sample": False}

    def theirs(end: int, rows: slice = slice(None)) -> np.ndarray:
        given = torch_inputs({name: array[rows] for name, array in inputs.items()})
        generate = both.theirs["eager"].generate
        tokens = generate(**given, **options, eos_token_id=end, pad_token_id=0)
        return tokens[:, inputs["input_ids"].shape[1] :].numpy()

    def ours(end: int, rows: slice = slice(None)) -> np.ndarray:
        given = torch_inputs({name: array[rows] for name, array in inputs.items()})
        return both.model.generate(**given, **options, eos_token_id=end).numpy()

    never = IMAGE_TOKEN + 63  # no row generates this token
    tokens = theirs(never)
    assert tokens.shape == (3, 14)
    assert min(len(set(row)) for row in tokens.tolist()) >= 4, "a row that repeats itself shows nothing"
    assert np.array_equal(ours(never), tokens)

    # A token that only row 1 generates, first in the middle. The row ends there and is padded; others go on.
    others, row = tokens[[0, 2]], tokens[1].tolist()
    end = next(token for token in row[3:] if row.index(token) > 2 and (others != token).all())
    tokens = theirs(end)
    assert (tokens == 0).any(axis=1).tolist() == [False, True, False]
    assert np.array_equal(ours(end), tokens)
    assert np.array_equal(both.reference.generate(**inputs, **options, eos_token_id=end), tokens)

    # In a batch of this row alone, the token ends the whole output.
    alone = slice(1, 2)
    tokens = theirs(end, alone)
    assert tokens[0, -1] == end
    assert np.array_equal(ours(end, alone), tokens)


def test_full_attention_is_the_model_without_its_windows(tmp_path, tokenizer_model):
    config = config_dict(**GEMMA_2_SHAPES["Gemma 2, a window"])
    weights = random_weights(config)
    windowed = write_checkpoint(tmp_path / "windowed", tokenizer_model, config=config, weights=weights)
    config["text_config"]["sliding_window"] = 4096
    both = open_both(write_checkpoint(tmp_path / "full", tokenizer_model, config=config, weights=weights))
    inputs = batch(both.config, [3, 12], [7, 9])
    theirs, ours, _ = three_logits(both, inputs)
    valid = inputs["attention_mask"].astype(bool)
    full, _ = load_hf_model(windowed, device="cpu", dtype="float32", full_attention=True)
    assert np.array_equal(full(**torch_inputs(inputs)).numpy()[valid], ours)
    assert_close(reference.load(windowed, full_attention=True).forward(**inputs)[valid], theirs)
    model, _ = load_hf_model(windowed, device="cpu", dtype="float32")
    assert np.abs(model(**torch_inputs(inputs)).numpy()[valid] - theirs).max() > 0.01


@pytest.fixture(scope="module")
def quiet(tmp_path_factory, tokenizer_model) -> SimpleNamespace:
    """A model whose activations are so small that an eps matters, in both towers."""
    weights = random_weights(config_dict())
    for name in weights:
        if "embed" in name:
            weights[name] *= 3e-3
        elif "vision" in name and name.split(".")[-2] in ("out_proj", "fc2"):
            weights[name] *= 1e-2
    directory = tmp_path_factory.mktemp("peer") / "quiet"
    return open_both(write_checkpoint(directory, tokenizer_model, weights=weights))


def test_eps_is_that_of_transformers(quiet):
    theirs, ours, truth = three_logits(quiet, batch(quiet.config, [3, 12, 8], [7, 0, 3]))
    most = MAX * rms(theirs)  # the logits are as small as the embedding, their last factor
    assert_close(ours, theirs, most)
    assert_close(truth, theirs, most)


@pytest.fixture(scope="module")
def long(tiny) -> SimpleNamespace:
    return open_both(tiny)


@pytest.mark.parametrize(("prompt", "suffix"), [(1500, 0), (700, 800)])
def test_long_prompts(long, prompt, suffix):
    theirs, ours, truth = three_logits(long, batch(long.config, [prompt], [suffix]))
    # transformers computes angles in float32. Its relative error of 6e-8 is 1e-4 radians in angles of up to
    # 1500 radians, and causes an error of the same size in the logits.
    assert_close(truth, theirs, 20 * MAX, 1e-4)
    assert_close(ours, truth)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_less_exact_than_transformers(tmp_path, tokenizer_model, dtype):
    both = open_both(write_checkpoint(tmp_path / "model", tokenizer_model, dtype="bfloat16"), dtype)
    theirs, ours, truth = three_logits(both, batch(both.config, [3, 12, 8], [7, 0, 3]))
    assert rms(ours - truth) <= 1.5 * rms(theirs - truth)  # chance changes either by some ten percent


# The results of big_vision with the same weights in float32. The image, which has P positions, and the text
# are in separate arrays.

P = 16
# golden/README.md: the rounding of big_vision's float32 is 5.02e-5 at most, and 5e-6 in relative RMS.
GOLDEN_MAX, GOLDEN_RMS = 6e-5, 5e-6
ENGINES = [(name, engine) for name in ("tiny", "tiny2") for engine in ("reference", "model", "npz")]


@pytest.fixture(scope="module", params=ENGINES, ids="-".join)
def google(request) -> SimpleNamespace:
    """Google's results, and those of an engine by the same names."""
    name, engine = request.param
    directory = conftest.data(f"golden/{name}")
    with np.load(directory / "golden.npz") as archive:
        golden = SimpleNamespace(**{name: archive[name] for name in archive.files if name != "meta_json"})
    B = len(golden.text)
    image = np.full((B, P), 515)
    inputs = {
        "input_ids": np.concatenate([image, golden.text], axis=1).astype(np.int64),
        "pixel_values": np.ascontiguousarray(golden.image.transpose(0, 3, 1, 2)),
        "attention_mask": np.concatenate([np.ones((B, P), np.int64), golden.mask_input], axis=1),
        "token_type_ids": np.concatenate([np.zeros((B, P), np.int64), golden.mask_ar], axis=1),
    }
    valid, valid_text = inputs["attention_mask"].astype(bool), golden.mask_input.astype(bool)
    record = {}
    if engine == "reference":
        ours = reference.load(directory)
        logits = ours.forward(**inputs, record=record)
        tokens = ours.generate(**inputs, max_new_tokens=12)
        decoded = recomputed(ours, inputs, golden.greedy_tokens)
    else:
        file = directory / "params.npz" if engine == "npz" else directory
        ours, _ = load_hf_model(file, device="cpu", dtype="float32")
        with recording(ours, record):
            logits = ours(**torch_inputs(inputs)).numpy()
        tokens = ours.generate(**torch_inputs(inputs), max_new_tokens=12).numpy()
        decoded = stepped(ours, inputs, golden.greedy_tokens)
    vision = "vision_tower.vision_model"
    results = {
        "vit_with_posemb": record[f"{vision}.embeddings"],
        "vit_block_out": np.stack([record[f"{vision}.encoder.layers.{i}"] for i in range(3)]),
        "vit_encoded": record[f"{vision}.post_layernorm"],
        "img_embeds": record["multi_modal_projector.linear"],
        "text_embeds": record["language_model.model.embed_tokens"][:, P:][valid_text],
        "full_logits": logits[valid][:, :515],  # only Hugging Face's checkpoint has the 64 rows after these
        "text_logits": logits[:, P:][valid_text][:, :515],
        "decode_logits": decoded[..., :515],
    }
    masks = {"text_embeds": valid_text, "text_logits": valid_text, "full_logits": valid}
    expected = {name: getattr(golden, name) for name in results}
    expected |= {name: expected[name][mask] for name, mask in masks.items()}
    cap = ours.config.text_config.final_logit_softcapping
    if cap is not None:  # Google's code leaves it out in these two; ours has it, as transformers has
        assert np.abs(expected["text_logits"]).max() > cap, "the softcap changes little"
        for uncapped in (expected["text_logits"], expected["decode_logits"][:, 0]):
            uncapped[...] = cap * np.tanh(uncapped / cap)
    exact = engine == "reference"
    return SimpleNamespace(golden=golden, results=results, expected=expected, tokens=tokens, exact=exact)


def recomputed(ours: reference.Reference, inputs: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The logits for each of these tokens, from one pass with the tokens as the suffix."""
    rows = []
    for b, valid in enumerate(inputs["attention_mask"].astype(bool)):
        ids = np.concatenate([inputs["input_ids"][b, valid], tokens[b]])
        types = np.concatenate([inputs["token_type_ids"][b, valid], np.ones_like(tokens[b])])
        logits = ours.forward(ids[None], inputs["pixel_values"][b : b + 1], token_type_ids=types[None])
        rows.append(logits[0, valid.sum() - 1 : -1])
    return np.stack(rows)


def stepped(ours, inputs: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    """The same logits from a prefill and a decode step for each token."""
    names = ("input_ids", "pixel_values", "attention_mask", "token_type_ids")
    given, steps = [torch.from_numpy(inputs[name]) for name in names], tokens.shape[1]
    state = ours.new_state(len(tokens), given[0].shape[1] + steps)
    logits = [decoding.prefill(ours, state, *given)]
    for step in range(steps - 1):
        decoding.append(ours, state, logits[-1], torch.from_numpy(tokens[:, step]).long())
        logits.append(decoding.logits_of_next(ours, state))
    return torch.stack(logits, dim=1).numpy()


VISION_RESULTS = ["vit_with_posemb", "vit_block_out", "vit_encoded", "img_embeds"]
TEXT_RESULTS = ["text_embeds", "full_logits", "text_logits", "decode_logits"]


@pytest.mark.parametrize("name", VISION_RESULTS + TEXT_RESULTS)
def test_results_are_googles(google, name):
    slack = 1 if google.exact else 2  # the float32 model's own rounding is as large
    if "logits" not in name:
        slack /= 4  # the rounding is smaller before the decoder
    assert_close(google.results[name], google.expected[name], slack * GOLDEN_MAX, slack * GOLDEN_RMS)


def test_greedy_tokens_are_googles(google):
    assert np.array_equal(google.tokens, google.golden.greedy_tokens)
