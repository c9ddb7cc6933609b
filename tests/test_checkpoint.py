"""The tensors that a checkpoint directory may hold; others are refused by name before memory is allocated."""

import json
import os
import tracemalloc
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from checkpoints import LAYOUTS, TINY, config_dict, random_weights, rename, write_checkpoint, write_zeros
from safetensors.torch import load_file, save_file

from paligemma import PaliGemmaError, load_hf_model
from paligemma.checkpoint import parameters, safetensors_file
from paligemma.checkpoint.stored import EMBEDDING, HEAD, canonical_name, expected_shapes
from paligemma.config import PaliGemmaConfig

CONFIG = PaliGemmaConfig.from_dict(TINY)
NORM = "language_model.model.norm.weight"
INDEX = "model.safetensors.index.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def single(tmp_path, tokenizer_model) -> Path:
    return write_checkpoint(tmp_path / "single", tokenizer_model)


@pytest.fixture
def sharded(tmp_path, tokenizer_model) -> Path:
    return write_checkpoint(tmp_path / "sharded", tokenizer_model, shards=3)


def refused(directory: Path, message: str, config: PaliGemmaConfig = CONFIG) -> None:
    with pytest.raises(PaliGemmaError, match=message):
        parameters.tensors(directory, config)


def edit(file: Path, **tensors: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors of a file; `__` in a name stands for a dot."""
    stored = load_file(file)
    for name, value in tensors.items():
        stored.pop(name.replace("__", "."), None)
        if value is not None:
            stored[name.replace("__", ".")] = value
    save_file(stored, file)


def edit_index(directory: Path, **entries: object) -> None:
    index = json.loads((directory / INDEX).read_text())
    index["weight_map"].update({name.replace("__", "."): file for name, file in entries.items()})
    (directory / INDEX).write_text(json.dumps(index))


# Names


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_has_one_canonical_form(layout):
    for name in [*expected_shapes(CONFIG), HEAD]:
        assert canonical_name(rename(name, layout)) == name
        assert canonical_name(name) == name


OTHER_NAMES = [
    "custom_text_proj.weight",
    "model.model.norm.weight",
    "vision_model.encoder.layers.0.mlp.fc1.bias",
]


@pytest.mark.parametrize("name", [*OTHER_NAMES, "", "model."])
def test_other_names_do_not_become_parameters(name):
    assert canonical_name(name) not in expected_shapes(CONFIG)


def test_the_published_model_has_603_tensors():
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "image_size": 224,
    }  # fmt: skip
    text = {
        "hidden_size": 2048, "intermediate_size": 16384, "num_hidden_layers": 18, "num_attention_heads": 8,
        "head_dim": 256, "vocab_size": 257152,
    }  # fmt: skip
    shapes = expected_shapes(PaliGemmaConfig.from_dict(config_dict(text, vision)))
    assert len(shapes) == 603
    assert sum(map(prod, shapes.values())) == 2_923_335_408  # as counted in Google's own parameters


# Strict both ways


def test_each_parameter_is_found_once_at_its_place(single, sharded):
    for directory in (single, sharded):
        stored = parameters.tensors(directory, CONFIG)
        assert {name: tensor.shape for name, tensor in stored.items()} == expected_shapes(CONFIG)
        for name, value in random_weights(TINY).items():
            tensor = stored[name]
            data = tensor.file.read_bytes()[tensor.offset : tensor.offset + tensor.nbytes]
            assert data == value.numpy().tobytes()


def test_missing(single):
    edit(single / "model.safetensors", **{NORM: None, "vision_tower.vision_model.post_layernorm.bias": None})
    refused(single, rf"2 missing \({NORM}, vision_tower\.vision_model\.post_layernorm\.bias\)$")


def test_unexpected(single):
    edit(single / "model.safetensors", extra__weight=torch.zeros(2, 2))
    refused(single, r"1 unexpected \(extra\.weight\)$")


def test_missing_and_unexpected_are_listed_together_and_shortened(single):
    fewer = replace(CONFIG, text_config=replace(CONFIG.text_config, num_hidden_layers=2))
    refused(single, r"9 unexpected \((language_model\.model\.layers\.2\.[\w.]+(, )?){4} and 5 more\)$", fewer)
    edit(single / "model.safetensors", **{NORM: None})
    refused(single, r"1 missing \(.*\), 9 unexpected \(", fewer)


@pytest.mark.parametrize(
    "extra", [f"model.language_model.{name}" for name in ("norm.weight", "model.norm.weight")]
)
def test_one_parameter_under_two_names(single, extra):
    edit(single / "model.safetensors", **{extra: torch.zeros(88)})
    file = r"model\.safetensors"
    refused(single, rf"{file}: tensor '[\w.]+' is the same parameter as '[\w.]+' in {file}")


def test_one_parameter_in_two_shards(sharded):
    edit(sharded / SHARDS[0], **{NORM: torch.zeros(88)})
    both = rf"{SHARDS[0]} and {SHARDS[2]} both hold tensor '{NORM}'"
    refused(sharded, f"{both}, with different values: download them again")


@pytest.mark.parametrize("shape", [(87,), (88, 1), (1, 88), ()])
def test_misshapen(single, shape):
    edit(single / "model.safetensors", **{NORM: torch.zeros(shape)})
    shapes = rf"has shape \({', '.join(map(str, shape))},?\); config\.json asks for \(88,\)"
    refused(single, rf"model\.safetensors: tensor '{NORM}' {shapes}")


def test_transposed(single):
    name = "language_model.model.layers.0.mlp.gate_proj.weight"
    edit(single / "model.safetensors", **{name: random_weights(TINY)[name].T.contiguous()})
    refused(single, rf"'{name}' has shape \(88, 152\); config\.json asks for \(152, 88\)")


@pytest.mark.parametrize("dtype", ["I8", "F8_E4M3", "F8_E5M2", "I16", "U8", "BOOL"])
def test_dtypes_that_are_not_supported(single, dtype):
    shapes = expected_shapes(CONFIG).items()
    tensors = {name: (dtype if name == NORM else "F32", shape) for name, shape in shapes}
    write_zeros(single / "model.safetensors", tensors)
    refused(
        single, rf"model\.safetensors: tensor '{NORM}' is {dtype}; only F64, F32, F16, BF16 are supported"
    )


@pytest.mark.parametrize("rows", [1600, 1664])
@pytest.mark.parametrize("stated", [1600, 1664])
def test_the_64_rows_after_the_tokenizers_own_may_be_left_out(tmp_path, tokenizer_model, rows, stated):
    weights = random_weights(TINY)
    weights[EMBEDDING] = weights[EMBEDDING][:rows].clone()
    config = config_dict(text={"vocab_size": stated})
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config, weights=weights)
    assert parameters.tensors(directory, PaliGemmaConfig.from_dict(config))[EMBEDDING].shape == (rows, 88)


@pytest.mark.parametrize("shape", [(1599, 88), (1601, 88), (1665, 88), (1728, 88), (1600, 87), (1664, 89)])
def test_other_vocabularies_are_refused(single, shape):
    edit(single / "model.safetensors", **{EMBEDDING: torch.zeros(shape)})
    refused(single, r"embed_tokens\.weight' has shape .*; config\.json asks for \(1664, 88\)")


@pytest.mark.parametrize("name", ["lm_head.weight", "language_model.lm_head.weight", "model.lm_head.weight"])
def test_a_stored_head_is_the_embedding_or_a_parameter(single, monkeypatch, name):
    """Values are compared whatever the dtype: tensors that are equal in float16 need not be so in float32."""
    monkeypatch.setattr(safetensors_file, "CHUNK", 100_000)  # bytes; the embedding has 585,728
    embedding = random_weights(TINY)[EMBEDDING].half().float()
    other = embedding.clone()
    other[-1, -1] += 1  # its last bytes
    equal = (embedding.clone(), embedding.half(), embedding.double())
    for head, own in [*((head, False) for head in equal), (other, True), (embedding.bfloat16(), True)]:
        edit(single / "model.safetensors", **{name: head, EMBEDDING: embedding})
        stored = parameters.tensors(single, CONFIG)
        assert (HEAD in stored) == own
        assert not own or stored[HEAD].name == name
    for head in (embedding[:-1].clone(), embedding.to(torch.int8)):
        edit(single / "model.safetensors", **{name: head})
        refused(single, f"the output head '{name}' is ")


# Files


def test_no_weights(tmp_path):
    refused(tmp_path, r"has no model\.safetensors and no model\.safetensors\.index\.json$")


def test_pickles_are_never_opened(tmp_path):
    for name in ("pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"):
        (tmp_path / name).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    pickle = "a pickle, which is never opened: convert it to safetensors"
    refused(tmp_path, rf"pytorch_model-00001-of-00002\.bin, {pickle}")


@pytest.mark.parametrize("size", [0, 7, 8, 100, -1])
def test_truncated(single, size):
    file = single / "model.safetensors"
    os.truncate(file, size % file.stat().st_size)
    refused(single, r"model\.safetensors is not a whole safetensors file \(.*\): download it again")


def test_truncated_shard(sharded):
    os.truncate(sharded / SHARDS[1], (sharded / SHARDS[1]).stat().st_size - 1)
    refused(sharded, rf"{SHARDS[1]} is not a whole safetensors file \(.*\): download it again")


def test_missing_shard(sharded):
    (sharded / SHARDS[1]).unlink()
    refused(sharded, rf"lacks the shard {SHARDS[1]} that its index names: download it again")


def test_a_pointer_of_git_lfs(single):
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4950000000\n"
    (single / "model.safetensors").write_text(pointer)
    says = "it is git's pointer to the file: run 'git lfs pull' in .*single$"
    refused(single, rf"model\.safetensors is not a whole safetensors file: {says}")


@pytest.mark.parametrize(
    "content",
    [
        b"PK\x03\x04" * 8,
        (2**63).to_bytes(8, "little") + b"{}",
        (99_999_999).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (5).to_bytes(8, "little") + b"hello",
        (10_000).to_bytes(8, "little") + b"[" * 10_000,
    ],
    ids=lambda content: repr(content[:12]),
)
def test_files_of_another_kind(single, content):
    (single / "model.safetensors").write_bytes(content)
    refused(single, r"model\.safetensors is not a whole safetensors file")


def test_a_directory_in_place_of_a_file(tmp_path):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, r"model\.safetensors is not a whole safetensors file")


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "nested/dirs/x.safetensors",
        "./x.safetensors", "C:x.safetensors", "x.bin", "..", ".safetensors", "", "x.safetensors/",
        "x.safetensors\n", "*.safetensors", "[x].safetensors", "\0.safetensors", "\ud800.safetensors",
        "x" * 300 + ".safetensors", 5, None, True, [SHARDS[0]], {"file": SHARDS[0]},
    ],
    ids=lambda name: repr(name)[:24],
)  # fmt: skip
def test_an_index_names_plain_files(sharded, name):
    edit_index(sharded, **{NORM: name})
    refused(sharded, rf"^{INDEX} names the file .*, which is not a plain name that ends in \.safetensors$")


def test_an_index_that_its_shards_contradict(sharded):
    edit_index(sharded, **{NORM: SHARDS[0]})
    refused(sharded, rf"{SHARDS[0]} does not hold tensor '{NORM}', which {INDEX} says it does")


@pytest.mark.parametrize(
    "content",
    ["{}", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": ["x"]}', '{"weight_map": "x"}'],
)
def test_an_index_without_weight_map(tmp_path, content):
    (tmp_path / INDEX).write_text(content)
    refused(tmp_path, rf"{INDEX} has no weight_map")


def test_an_index_that_is_not_json(tmp_path):
    (tmp_path / INDEX).write_text("<html>")
    refused(tmp_path, rf"{INDEX} cannot be read as JSON")


# Refused before memory is allocated

HUGE = [10**9, 10**3]


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": HUGE, "data_offsets": [0, 4 * 10**12]},
        {"dtype": "F32", "shape": HUGE, "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [2**32, 2**32, 4], "data_offsets": [0, 8]},  # 0 bytes in 64-bit arithmetic
        {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
    ],
)
def test_a_header_that_claims_what_the_file_does_not_have(tmp_path, entry):
    text = json.dumps({NORM: entry}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    refused(tmp_path, r"model\.safetensors is not a whole safetensors file")


SIZES = {
    "text": ("vocab_size", "hidden_size", "intermediate_size", "head_dim", "num_hidden_layers"),
    "vision": ("intermediate_size", "image_size", "num_hidden_layers"),
}


@pytest.mark.parametrize(
    ("section", "name"), [(section, name) for section in SIZES for name in SIZES[section]]
)
def test_a_config_that_asks_for_too_much(single, section, name):
    (single / "config.json").write_text(json.dumps(config_dict(**{section: {name: 10**9}})))
    says = r"config\.json(: vision_config\.image_size is .* gives \d+ patches| asks for)"
    tracemalloc.start()
    try:
        with pytest.raises(PaliGemmaError, match=says):
            load_hf_model(single, dtype="float32")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # In bytes. Tensors are not traced, but no machine has the 4e11 bytes that these would take.
    assert peak < 10e6
