"""LoRA adapters, beside the peft library that writes them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, batch, config_dict, torch_inputs, write_checkpoint
from command_line import assert_one_line, run
from safetensors.torch import load_file, save_file

from paligemma import PaliGemmaError, load_hf_model, reference
from paligemma.checkpoint import EMBEDDING

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(directory, **options):
    """transformers' model with an adapter of random factors: an untrained one has zeros in B."""
    import peft
    from transformers import PaliGemmaForConditionalGeneration

    base = PaliGemmaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")
    torch.manual_seed(0)
    model = peft.get_peft_model(base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **options}))
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.normal_(0, 0.15)
    return model


ADAPTERS = {
    "every projection": {},
    "rslora": {"use_rslora": True, "r": 8, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "rank_pattern": {"o_proj": 2, r"layers\.1\.mlp\.up_proj": 7},
        "alpha_pattern": {"q_proj": 20, r"language_model.*down_proj": 3, r"layers\.0\.self_attn\.k_proj": 11},
    },
    "vision tower and projector": {"target_modules": ["fc1", "out_proj", "linear"]},
    "some layers": {
        "target_modules": ["q_proj", "gate_proj"],
        "layers_to_transform": [0, 2],
        "layers_pattern": "layers",
        "exclude_modules": ["encoder.layers.0.self_attn.q_proj"],
    },
    "a language model alone": {"target_modules": r".*language_model.*\.(gate_proj|q_proj)", "init_lora_weights": "gaussian"},
}


@pytest.fixture(scope="module", params=["Gemma", "Gemma 2"])
def directory(request, tmp_path_factory, tokenizer_model):
    config = config_dict(text={} if request.param == "Gemma" else GEMMA_2)
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", tokenizer_model, config=config)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_logits_are_those_of_peft(directory, tmp_path, kind):
    theirs = peft_model(directory, **ADAPTERS[kind])
    theirs.save_pretrained(tmp_path / "adapter")
    model, _ = load_hf_model(directory, device="cpu", dtype="float32", adapter=tmp_path / "adapter")
    inputs = batch(model.config, [3, 9], [4, 0])
    valid = inputs["attention_mask"].astype(bool)
    with torch.no_grad():
        expected = theirs.merge_and_unload()(**torch_inputs(inputs)).logits.numpy()[valid]
    truth = reference.load(directory, adapter=tmp_path / "adapter").forward(**inputs)[valid]
    base = reference.load(directory).forward(**inputs)[valid]
    assert np.abs(base - truth).max() > 0.05, "the adapter changes nothing"
    assert np.abs(truth - expected).max() < 1e-4
    assert np.abs(model(**torch_inputs(inputs)).numpy()[valid] - expected).max() < 1e-4


def test_it_is_merged_before_it_is_rounded(directory, tmp_path):
    """The sum in float32, rounded once: W in bfloat16 first would lose what a small update adds."""
    peft_model(directory).save_pretrained(tmp_path / "adapter")
    exact = dict(load_hf_model(directory, device="cpu", dtype="float32", adapter=tmp_path / "adapter")[0].named_parameters())
    half = dict(load_hf_model(directory, device="cpu", dtype="bfloat16", adapter=tmp_path / "adapter")[0].named_parameters())
    rounded = reference.load(directory, dtype="bfloat16", adapter=tmp_path / "adapter").params
    for name, value in exact.items():
        if name != EMBEDDING:
            assert torch.equal(half[name], value.bfloat16()), name
            module, leaf = name.rsplit(".", 1)
            difference = (half[name].float() - torch.from_numpy((rounded / module)[leaf])).abs()
            assert (difference > 0).float().mean() < 1e-3, name  # ties, which float64 and float32 may break differently


def test_the_command_line(directory, tmp_path, image_file):
    peft_model(directory).save_pretrained(tmp_path / "adapter")
    line = ["--model", directory, "--image", image_file, "--prompt", "caption en", "--no-sample", "--max-new-tokens", "6", "--dtype", "float32"]
    adapted = run(*line, "--adapter", tmp_path / "adapter").text
    assert adapted == run(*line, "--adapter", tmp_path / "adapter", "--backend", "reference").text
    assert adapted != run(*line).text
    assert_one_line(run(*line, "--adapter", tmp_path / "nowhere"), "nowhere is neither a directory nor a hub id")
    assert_one_line(run(*line, "--adapter", directory), "has no adapter_config.json: it is not the directory of an adapter")


@pytest.fixture
def adapter(directory, tmp_path):
    """A whole one, to be damaged."""
    peft_model(directory, target_modules=["q_proj"]).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def refused(directory, adapter) -> str:
    with pytest.raises(PaliGemmaError) as caught:
        load_hf_model(directory, device="cpu", adapter=adapter)
    assert "\n" not in str(caught.value)
    with pytest.raises(PaliGemmaError, match="adapter"):
        reference.load(directory, adapter=adapter)
    return str(caught.value)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_what_would_come_out_wrong_is_refused_by_name(directory, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, value in {
        "peft_type": "IA3", "use_dora": True, "modules_to_save": ["lm_head"], "bias": "all", "lora_bias": True, "fan_in_fan_out": True,
        "init_lora_weights": "pissa", "layer_replication": [[0, 2]], "target_parameters": ["mlp.weight"], "lora_alpha": "8", "alpha_pattern": {"(": 2},
        "use_rslora": "no", "r": 0, "rank_pattern": -1, "layers_to_transform": "1", "layers_pattern": 3, "target_modules": 5, "exclude_modules": [1],
    }.items():  # fmt: skip
        (adapter / "adapter_config.json").write_text(json.dumps(config | {name: value}))
        assert name in refused(directory, adapter)
    for pattern in (".*" * 10 + "X", "(a+)+b", "x{99999999999}"):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"alpha_pattern": {pattern: 2}}))
        assert "alpha_pattern" in refused(directory, adapter)
    for name in ("lora_alpha", "r"):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {name: 10**400}))
        assert f"{name} is 1000" in refused(directory, adapter)
    (adapter / "adapter_config.json").write_text("{")
    assert "cannot be read as JSON" in refused(directory, adapter)


CONTRADICTIONS = [  # of an adapter of rank 4 on q_proj in each of 3 layers
    ({"r": 8}, r"the rank .* is 8; its tensors have 4"),
    ({"rank_pattern": {"q_proj": 2}}, r"the rank .* is 2; its tensors have 4"),
    ({"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7}}, r"the rank .*layers\.1\.self_attn.* is 7"),
    ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\.q_proj is -1; it must be a whole number"),
    ({"alpha_pattern": {"q_proj": 1e300}}, r"alpha_pattern\.q_proj is 1e\+300; it must be a number"),
    ({"target_modules": ["k_proj"]}, r"adapt '.*q_proj', and its adapter_config\.json does not"),
    ({"target_modules": r".*vision.*\.q_proj"}, r"adapt '.*q_proj', and its adapter_config\.json does not"),
    ({"target_modules": "("}, "target_modules has '.*', which is not a regular expression"),
    ({"exclude_modules": ["q_proj"]}, r"adapt '.*q_proj', and its adapter_config\.json does not"),
    ({"layers_to_transform": [0, 2]}, r"adapt '.*layers\.1\.self_attn\.q_proj', and its adapter_config\.json does not"),
    ({"layers_to_transform": 0}, r"adapt '.*layers\.[12]\.self_attn\.q_proj', and its adapter_config\.json does not"),
    ({"layers_to_transform": [0, 1, 2], "layers_pattern": "h"}, r"adapt '.*q_proj', and its adapter_config\.json does not"),
    ({"layers_to_transform": [0, 1, 2], "layers_pattern": "("}, "layers_pattern has .*, which is not a regular expression"),
    ({"layers_to_transform": [0, 1, 2], "target_modules": ".*q_proj"}, r"layers_to_transform is \[0, 1, 2\]; it must be null"),
    ({"layers_pattern": "layers"}, "layers_pattern is 'layers'; it must be null"),
]  # fmt: skip


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_a_configuration_that_contradicts_the_tensors_is_refused(directory, adapter):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for change, message in CONTRADICTIONS:
        path.write_text(json.dumps(config | change))
        assert re.search(message, refused(directory, adapter)), change
    for change in (
        {"rank_pattern": {"k_proj": 2}}, {"rank_pattern": None}, {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1, 2, 3]}, {"layers_to_transform": []}, {"target_modules": "all-linear"}, {"target_modules": ["q_proj", "nothing"]},
        {"exclude_modules": r".*lm_head"}, {"target_modules": r"(?:.*?layers.*?q_proj.*?)|(?:.*nothing)"},
    ):  # fmt: skip
        path.write_text(json.dumps(config | change))
        reference.load(directory, adapter=adapter)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_an_adapter_of_another_model_is_refused(directory, adapter, tmp_path, tokenizer_model):
    wider = write_checkpoint(tmp_path / "wider", tokenizer_model, config=config_dict(text={"hidden_size": 96}))
    assert "for 'model.language_model.layers.0.self_attn.q_proj', which is (96, 96) here: it was trained on another model" in refused(wider, adapter)
    shallow = write_checkpoint(tmp_path / "shallow", tokenizer_model, config=config_dict(text={"num_hidden_layers": 2}))
    assert "layers.2.self_attn.q_proj', which is no linear layer of this model" in refused(shallow, adapter)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_tensors_that_are_not_understood_are_refused(directory, adapter):
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

    def message(tensors: dict) -> str:
        save_file({name: x.clone() for name, x in tensors.items()}, file)
        return refused(directory, adapter)

    assert "lora_magnitude_vector' is not part of a LoRA" in message(whole | {f"{module}.lora_magnitude_vector": torch.ones(96)})
    assert "has only lora_A of its two factors" in message({name: x for name, x in whole.items() if name != f"{module}.lora_B.weight"})
    assert "embed_tokens', which is no linear layer" in message(
        whole | {f"base_model.model.model.language_model.embed_tokens.lora_{x}.weight": torch.ones(1, 1) for x in "AB"}
    )
    assert "adapts language_model.model.layers.0.self_attn.q_proj.weight twice" in message(
        whole | {name.replace("base_model.model.model.language_model.", "base_model.model.language_model.model."): x for name, x in whole.items()}
    )
    assert "holds no tensor" in message({})
    file.write_bytes(b"hello")
    assert "is not a whole safetensors file" in refused(directory, adapter)
    shutil.move(file, adapter / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which is never opened" in refused(directory, adapter)
