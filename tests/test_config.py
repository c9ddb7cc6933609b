"""The values of config.json: which are supported, which defaults absent ones have, and which are refused by
name."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from checkpoints import TINY, config_dict, write_checkpoint
from conftest import photo
from safetensors.torch import save_file

from paligemma import PaliGemmaError, load_hf_model, reference
from paligemma.config import PaliGemmaConfig, TextConfig, VisionConfig, read_json
from paligemma.fields import shown
from paligemma.processor import Processor

# config.json of google/paligemma-3b-pt-224; absent fields have the defaults of the classes that wrote it.
PUBLISHED = {
    "architectures": ["PaliGemmaForConditionalGeneration"], "bos_token_id": 2, "eos_token_id": 1,
    "hidden_size": 2048, "ignore_index": -100, "image_token_index": 257152, "model_type": "paligemma",
    "pad_token_id": 0, "projection_dim": 2048, "torch_dtype": "float32", "vocab_size": 257216,
    "text_config": {
        "hidden_size": 2048, "intermediate_size": 16384, "model_type": "gemma", "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "torch_dtype": "float32",
        "vocab_size": 257216,
    },
    "vision_config": {
        "hidden_size": 1152, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14,
        "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False,
    },
}  # fmt: skip
PALIGEMMA_3B = PaliGemmaConfig(
    VisionConfig(1152, 4304, 27, 16, image_size=224, patch_size=14, num_channels=3, layer_norm_eps=1e-6),
    TextConfig(
        2048, 16384, 18, 8, 1, 256, 257216, rms_norm_eps=1e-6, rope_theta=1e4, max_position_embeddings=8192,
        query_pre_attn_scalar=256,
    ),
    image_token_index=257152, bos_token_id=2, pad_token_id=0, eos_token_ids=(1,), torch_dtype="float32",
)  # fmt: skip


def changed(path: str, value: object) -> dict:
    """TINY with the value at a dotted path replaced."""
    config = config_dict()
    *sections, name = path.split(".")
    at = config
    for section in sections:
        at = at.setdefault(section, {})
    at[name] = value
    return config


def test_the_published_file_is_sparse():
    config = PaliGemmaConfig.from_dict(PUBLISHED)
    assert config == PALIGEMMA_3B
    assert (config.vision_config.head_dim, config.vision_config.num_patches) == (72, 256)


@pytest.mark.parametrize(("size", "patches"), [(224, 256), (448, 1024), (896, 4096), (230, 256)])
def test_patches(size, patches):
    config = PaliGemmaConfig.from_dict(config_dict(vision={"image_size": size}))
    assert config.vision_config.num_patches == patches


# config.json of google/paligemma2-3b-pt-224, in which even more is absent.
PUBLISHED_2 = {
    **PUBLISHED, "projection_dim": 2304, "torch_dtype": "bfloat16",
    "text_config": {
        "cache_implementation": "hybrid", "eos_token_id": [1, 107], "hidden_size": 2304,
        "intermediate_size": 9216, "model_type": "gemma2", "num_hidden_layers": 26, "num_image_tokens": 256,
        "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "torch_dtype": "bfloat16",
        "vocab_size": 257216,
    },
}  # fmt: skip


def test_paligemma_2():
    config = PaliGemmaConfig.from_dict(PUBLISHED_2, {"eos_token_id": 1})
    text = config.text_config
    assert text == TextConfig(
        2304, 9216, 26, 8, 4, 256, 257216, 1e-6, 1e4, 8192, query_pre_attn_scalar=256,
        post_norms=True, attn_logit_softcapping=50.0, final_logit_softcapping=30.0, sliding_window=4096,
    )  # fmt: skip
    assert [text.window(i) for i in range(4)] == [4096, None, 4096, None]
    assert config.eos_token_ids == (1,)
    sparse = {"model_type": "paligemma", "text_config": {"model_type": "gemma2"}, "vision_config": {}}
    assert PaliGemmaConfig.from_dict(sparse).text_config == replace(text, vocab_size=256000)


def paligemma_2(**text) -> PaliGemmaConfig:
    """PUBLISHED_2 with some values of text_config replaced."""
    return PaliGemmaConfig.from_dict({**PUBLISHED_2, "text_config": {**PUBLISHED_2["text_config"], **text}})


@pytest.mark.parametrize("name", ["attn_logit_softcapping", "final_logit_softcapping", "sliding_window"])
def test_null_switches_off_what_is_on_by_default(name):
    text = paligemma_2(**{name: None}).text_config
    assert getattr(text, name) is None
    assert text.window(1) is None
    assert (text.window(0) is None) == (name == "sliding_window")


SLIDING = ["sliding_attention"] * 25


@pytest.mark.parametrize("kinds", [SLIDING, [*SLIDING, "chunked_attention"], "full_attention", [[]] * 26, 5])
def test_layer_types_must_name_each_layer(kinds):
    says = "layer_types must name sliding_attention or full_attention for each of the 26 layers"
    with pytest.raises(PaliGemmaError, match=says):
        paligemma_2(layer_types=kinds)


def test_sections_win_over_the_top_level():
    stale = {
        "hidden_size": 1,
        "vocab_size": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "head_dim": 5,
    }
    stale |= {"image_size": 6, "rope_theta": 7.0}
    assert PaliGemmaConfig.from_dict({**PUBLISHED, **stale}) == PALIGEMMA_3B


def test_absent_fields_have_the_defaults_of_the_classes_that_wrote_the_file():
    config = PaliGemmaConfig.from_dict({"model_type": "paligemma", "text_config": {}, "vision_config": {}})
    assert config.vision_config == VisionConfig(768, 3072, 12, 12, 224, 16, 3, 1e-6)
    assert config.text_config == TextConfig(3072, 24576, 28, 16, 16, 256, 256000, 1e-6, 1e4, 8192, 256)
    assert config.image_token_index == 256000
    assert (config.bos_token_id, config.pad_token_id, config.eos_token_ids) == (2, 0, (1,))


def test_the_form_that_transformers_5_writes():
    text = {"rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}, "attention_bias": False}
    text |= {"attention_dropout": 0.0, "dtype": "bfloat16", "hidden_act": "gelu_pytorch_tanh"}
    text |= {"tie_word_embeddings": True, "use_bidirectional_attention": True, "use_cache": True}
    removed = dict.fromkeys(("torch_dtype", "image_token_index"))
    config = config_dict(text=text, **removed, dtype="bfloat16", image_token_id=1600, vocab_size=257152)
    read = PaliGemmaConfig.from_dict(config)
    assert (read.torch_dtype, read.image_token_index) == ("bfloat16", 1600)
    assert (read.text_config.rope_theta, read.text_config.vocab_size) == (500.0, 1664)


def test_rope_parameters_win_over_a_stale_rope_theta():
    config = changed("text_config.rope_parameters", {"rope_theta": 500, "rope_type": "default"})
    config["text_config"]["rope_theta"] = 10000.0
    assert PaliGemmaConfig.from_dict(config).text_config.rope_theta == 500.0


@pytest.mark.parametrize("act", ["gelu", "gelu_pytorch_tanh", "gelu_new", "gelu_fast", None])
def test_names_of_the_tanh_gelu(act):
    # Gemma's first files say "gelu" and mean the tanh form.
    PaliGemmaConfig.from_dict(changed("text_config.hidden_act", act))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("text_config.hidden_act", "silu"),
        ("text_config.hidden_activation", "gelu"),
        ("text_config.attention_bias", True),
        ("text_config.rope_scaling", {"type": "linear", "factor": 2.0}),
        ("text_config.rope_parameters.rope_type", "yarn"),
        ("text_config.rope_parameters.type", "linear"),
        ("text_config.model_type", "llama"),
        ("vision_config.hidden_act", "gelu"),
        ("vision_config.hidden_act", "quick_gelu"),
        ("vision_config.vision_use_head", True),
        ("vision_config.num_channels", 1),
        ("vision_config.model_type", "clip_vision_model"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("quantization_config", {"quant_method": "bitnet"}),
        ("quantization_config", {"bits": 4}),
        ("quantization_config", "int8"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(path, value):
    with pytest.raises(PaliGemmaError, match=rf"^config\.json: {path}\b.*not (implemented|supported)"):
        PaliGemmaConfig.from_dict(changed(path, value))


def test_another_decoder_is_refused_by_name():
    says = r"text_config\.model_type is 'gemma3', which is not implemented \(only 'gemma', 'gemma2'\)"
    with pytest.raises(PaliGemmaError, match=says):
        PaliGemmaConfig.from_dict(changed("text_config.model_type", "gemma3"))


OTHER_TYPES = ["llava", "gemma", "gemma3", "colpali", "PaliGemma", None, 5, ["paligemma"]]


@pytest.mark.parametrize("model_type", OTHER_TYPES)
def test_other_models_are_refused(model_type):
    with pytest.raises(PaliGemmaError, match=r"model_type is .*, not 'paligemma'"):
        PaliGemmaConfig.from_dict({**TINY, "model_type": model_type})


SIZES = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
INTEGERS = [
    *(f"{section}.{size}" for section in ("text_config", "vision_config") for size in SIZES),
    "text_config.num_key_value_heads", "text_config.head_dim", "text_config.vocab_size",
    "text_config.max_position_embeddings", "vision_config.image_size", "vision_config.patch_size",
    "vision_config.num_channels", "image_token_index", "bos_token_id", "pad_token_id",
]  # fmt: skip
NUMBERS = [
    "text_config.rms_norm_eps", "text_config.rope_theta", "text_config.rope_parameters.rope_theta",
    "vision_config.layer_norm_eps",
]  # fmt: skip


NOT_WHOLE = [True, 4.0, "4", -4, [4], {}, None, 1 << 31, 1 << 80, 10**400]


@pytest.mark.parametrize("value", NOT_WHOLE, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("path", INTEGERS)
def test_whole_numbers(path, value):
    defaults = {"bos_token_id": 2, "pad_token_id": 0}
    if value is None and path in defaults:
        assert getattr(PaliGemmaConfig.from_dict(changed(path, None)), path) == defaults[path]
        return
    with pytest.raises(PaliGemmaError, match=rf"^config\.json: {path} is .*whole number"):
        PaliGemmaConfig.from_dict(changed(path, value))


@pytest.mark.parametrize("path", [path for path in INTEGERS if path != "pad_token_id"])
def test_sizes_are_at_least_one(path):
    says = rf"^config\.json: {path} is 0; it must be a whole number from 1 to 2147483647"
    with pytest.raises(PaliGemmaError, match=says):
        PaliGemmaConfig.from_dict(changed(path, 0))


NOT_POSITIVE = [True, "1e-6", -1e-6, 0, [1e-6], None, float("nan"), float("inf"), 1e-31, 1e31, 10**400]


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=lambda value: repr(value)[:9])
@pytest.mark.parametrize("path", NUMBERS)
def test_positive_numbers(path, value):
    with pytest.raises(PaliGemmaError, match=rf"^config\.json: {path} is .*a number from 1e-30 to 1e\+30"):
        PaliGemmaConfig.from_dict(changed(path, value))


@pytest.mark.parametrize("value", [None, "false", 0])
def test_tied_is_true_or_false(value):
    says = rf"^config\.json: tie_word_embeddings is {value!r}; it must be true or false$"
    with pytest.raises(PaliGemmaError, match=says):
        PaliGemmaConfig.from_dict({**TINY, "tie_word_embeddings": value})


@pytest.mark.parametrize("value", [None, [], "gemma", 3])
@pytest.mark.parametrize("name", ["text_config", "vision_config"])
def test_sections_are_objects(name, value):
    with pytest.raises(PaliGemmaError, match=rf"^config\.json: {name} is .*must be an object"):
        PaliGemmaConfig.from_dict({**TINY, name: value})


@pytest.mark.parametrize("value", [["default"], "default", 3])
def test_rope_parameters_are_an_object(value):
    says = r"^config\.json: text_config\.rope_parameters is .*must be an object"
    with pytest.raises(PaliGemmaError, match=says):
        PaliGemmaConfig.from_dict(changed("text_config.rope_parameters", value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("text_config.head_dim", 23, "it must be even, as rotary embedding rotates pairs"),
        ("text_config.num_key_value_heads", 3, "it must be a divisor of num_attention_heads, 4"),
        ("vision_config.num_attention_heads", 5, "it must be a divisor of hidden_size, 72"),
        ("vision_config.patch_size", 57, "it must be at most image_size, 56"),
    ],
)
def test_values_that_contradict_each_other(path, value, message):
    with pytest.raises(PaliGemmaError, match=f"{path} is {value}; {message}"):
        PaliGemmaConfig.from_dict(changed(path, value))


def test_more_patches_than_positions():
    says = "image_size is 1274, which gives 8281 patches; the text model has 8192 positions"
    with pytest.raises(PaliGemmaError, match=says):
        PaliGemmaConfig.from_dict(changed("vision_config.image_size", 14 * 91))


@pytest.mark.parametrize(
    ("config", "generation", "ends"),
    [
        (7, None, (7,)), ([7, 8], None, (7, 8)), (7, {}, (7,)),
        (7, {"eos_token_id": 9}, (9,)), (7, {"eos_token_id": [1, 107]}, (1, 107)),
    ],
)  # fmt: skip
def test_generation_config_says_where_to_stop(config, generation, ends):
    assert PaliGemmaConfig.from_dict(config_dict(eos_token_id=config), generation).eos_token_ids == ends


def test_null_ids_are_those_of_the_text_config_or_gemmas():
    null = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    own = {"bos_token_id": 5, "eos_token_id": [6, 7], "pad_token_id": 8}
    for text, expected in ((null, (2, 0, (1,))), (own, (5, 8, (6, 7)))):
        config = config_dict()
        config.update(null)
        config["text_config"].update(text)
        made = PaliGemmaConfig.from_dict(config, {"eos_token_id": None})
        assert (made.bos_token_id, made.pad_token_id, made.eos_token_ids) == expected


NO_END_TOKENS = [True, 1.0, "1", -1, [1, "2"], [[1]], {"a": 1}, [], 1664, 1 << 80, [1, 10**400]]


@pytest.mark.parametrize("eos", NO_END_TOKENS, ids=lambda eos: repr(eos)[:9])
def test_end_tokens_are_in_the_vocabulary(eos):
    says = r"config\.json: eos_token_id is .*must be a token id or a list"
    with pytest.raises(PaliGemmaError, match=rf"^generation_{says}"):
        PaliGemmaConfig.from_dict(config_dict(), {"eos_token_id": eos})
    with pytest.raises(PaliGemmaError, match=f"^{says}"):
        PaliGemmaConfig.from_dict({**TINY, "eos_token_id": eos})


def test_load_reads_both_files(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert PaliGemmaConfig.load(tmp_path) == PALIGEMMA_3B
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [1, 107]}')
    assert PaliGemmaConfig.load(str(tmp_path)).eos_token_ids == (1, 107)


def test_a_directory_without_a_config(tmp_path):
    with pytest.raises(PaliGemmaError, match=r"has no config\.json"):
        PaliGemmaConfig.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read as JSON"),
        (b'{"model_type": ', "cannot be read as JSON"),
        (b"\xff\xfe{}", "cannot be read as JSON"),
        (b"[" * 100_000, "cannot be read as JSON"),
        (b"[]", "does not hold a JSON object"),
        (b"null", "does not hold a JSON object"),
    ],
    ids=lambda value: repr(value[:12]),
)
def test_files_that_are_not_a_json_object(tmp_path, content, message):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(PaliGemmaError, match=message):
        read_json(path)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (10**400, "1" + "0" * 76 + "..."), (10**5000, "a number of 16610 bits"), ("a\nb", r"'a\nb'"),
        ([0] * 99, "[0, 0"),
    ],
    ids=["", "", "", ""],
)  # fmt: skip
def test_a_value_in_a_message_is_short_and_in_one_line(value, text):
    assert shown(value).startswith(text)
    assert len(shown(value)) <= 80
    assert "\n" not in shown(value)


# Any value in any place

DELETED = object()
VALUES = [
    DELETED, None, True, False, 0, 1, -1, 2, 2.5, -0.5, 1 << 20, 1 << 31, 1 << 80, -(1 << 80), 10**400,
    1e-320, 1e39, 1e300, -1e300, float("nan"), float("inf"),
    "", "x", "(", "a\nb", "1", [], {}, [[]], [-1], [1 << 80], [None], {"": 1}, {"q_proj": -1}, {"(": 1},
]  # fmt: skip
MUTATIONS = 4  # the number of these values that are tried in each place
FILES = {
    "config.json": config_dict(
        text={
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "max_position_embeddings": 8192, "attention_bias": False,
            "hidden_act": "gelu", "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"},
        },
        vision={"layer_norm_eps": 1e-6, "num_channels": 3, "hidden_act": "gelu_pytorch_tanh"},
        eos_token_id=[1], tie_word_embeddings=True,
    ),
    "generation_config.json": {"eos_token_id": [1, 107], "max_new_tokens": 20},
    "preprocessor_config.json": {
        "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5], "image_seq_length": 16, "image_processor_type": "SiglipImageProcessor",
        "resample": 3, "rescale_factor": 1 / 255, "size": {"height": 56, "width": 56},
    },
    "adapter/adapter_config.json": {
        "alpha_pattern": {"q_proj": 3}, "base_model_name_or_path": "x", "bias": "none",
        "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True, "init_lora_weights": True,
        "layers_pattern": None, "layers_to_transform": [0], "lora_alpha": 8, "lora_dropout": 0.0,
        "modules_to_save": None, "peft_type": "LORA", "r": 4, "rank_pattern": {"q_proj": 2},
        "target_modules": ["q_proj"], "task_type": None, "use_dora": False, "use_rslora": False,
    },
}  # fmt: skip
# The form of transformers 5.
IMAGE_PROCESSOR = FILES["preprocessor_config.json"]
FILES["processor_config.json"] = {
    "image_processor": IMAGE_PROCESSOR, "processor_class": "PaliGemmaProcessor"
}  # fmt: skip


def places(value: object, path: tuple = ()) -> Iterator[tuple]:
    """The paths at which a JSON value can be changed, including the empty path to the whole value."""
    yield path
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield from places(value[key], (*path, key))


def mutated(value: object, path: tuple, new: object) -> object:
    """The value with `new` at that path, or without the entry if `new` is DELETED."""
    if not path:
        return new if new is not DELETED else {}
    changed = dict(value) if isinstance(value, dict) else list(value)
    if len(path) == 1 and new is DELETED:
        del changed[path[0]]
    else:
        changed[path[0]] = mutated(changed[path[0]], path[1:], new)
    return changed


@pytest.fixture(scope="module")
def with_everything(tmp_path_factory, tokenizer_model):
    """A checkpoint and an adapter, with every JSON file whose numbers are read."""
    directory = write_checkpoint(tmp_path_factory.mktemp("mutated") / "model", tokenizer_model)
    (directory / "adapter").mkdir()
    module = "base_model.model.language_model.model.layers.0.self_attn.q_proj"
    factors = {f"{module}.lora_A.weight": torch.ones(2, 88), f"{module}.lora_B.weight": torch.ones(96, 2)}
    save_file(factors, directory / "adapter/adapter_model.safetensors")
    for name, value in FILES.items():
        (directory / name).write_text(json.dumps(value))
    return directory


@pytest.mark.parametrize("name", FILES)
def test_any_value_in_any_place_is_used_or_refused_in_one_line(with_everything, tmp_path, name):
    rng, used, said, known = random.Random(name), 0, [], set()
    directory = shutil.copytree(with_everything, tmp_path / "model", copy_function=os.link)
    adapter = directory / "adapter"
    if name == "preprocessor_config.json":  # processor_config.json is read in its place
        (directory / "processor_config.json").unlink()
    (directory / name).unlink()
    for path in places(FILES[name]):
        for new in rng.sample(VALUES, MUTATIONS):
            (directory / name).write_text(json.dumps(mutated(FILES[name], path, new)))
            try:
                model = reference.load(directory, "float32", adapter=adapter)
                processor = Processor.load(directory, model.config)
                settings, stored = vars(processor) | {"tokenizer": None}, model.params.stored.values()
                kind = repr((model.config, settings, [x.update for x in stored]))
                if kind not in known:  # a change of a field that is not read gives the same model
                    known.add(kind)
                    inputs = processor.arrays("a", photo(30, 20))
                    model.generate(**inputs, max_new_tokens=1)
                    network, _ = load_hf_model(directory, device="cpu", dtype="float32", adapter=adapter)
                    network.generate(**inputs, max_new_tokens=2)
                used += 1
            except PaliGemmaError as error:
                said.append(str(error))
            except Exception as error:
                raise AssertionError(f"{name}: {'.'.join(map(str, path))} = {new!r}"[:200]) from error
    assert used > 5
    assert len(said) > 5
    assert [message for message in said if "\n" in message or len(message) > 600] == []
