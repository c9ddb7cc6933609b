"""LoRA adapters, compared with the peft library that writes them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from checkpoints import (
    GEMMA_2,
    WHOLE_GROUPS,
    batch,
    config_dict,
    random_weights,
    torch_inputs,
    train_tokenizer,
    write_checkpoint,
)
from command_line import assert_one_line, run
from safetensors.torch import load_file, save_file

from paligemma import PaliGemmaError, engines, generate, int4, load_hf_model, pictures, reference
from paligemma.checkpoint.stored import EMBEDDING, HEAD

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def base_of(directory):
    """transformers' model."""
    from transformers import PaliGemmaForConditionalGeneration

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    return PaliGemmaForConditionalGeneration.from_pretrained(directory, **options)


def peft_model(directory, **options):
    """transformers' model with an adapter of random factors: in an untrained adapter, B is zero."""
    import peft

    base = base_of(directory)
    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **options}
    model = peft.get_peft_model(base, peft.LoraConfig(**options))
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
    "a language model alone": {
        "target_modules": r".*language_model.*\.(gate_proj|q_proj)",
        "init_lora_weights": "gaussian",
    },
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


def test_an_adapter_is_merged_before_the_sum_is_quantised(tmp_path, tokenizer_model):
    base = write_checkpoint(tmp_path / "model", tokenizer_model, config=config_dict(**WHOLE_GROUPS))
    peft_model(base).save_pretrained(tmp_path / "adapter")
    options = {"device": "cpu", "dtype": "float32"}
    merged = load_hf_model(base, adapter=tmp_path / "adapter", **options)[0].state_dict()
    alone = load_hf_model(base, quantize="int4", **options)[0].state_dict()
    both = load_hf_model(base, adapter=tmp_path / "adapter", quantize="int4", **options)[0].state_dict()
    names = [name for name, value in both.items() if value.dtype == int4.STORED]
    assert len(names) == 7 * 3
    for name in names:
        words, scale = int4.quantized_groups(merged[name])
        assert torch.equal(both[name], words)
        assert torch.equal(both[f"{name}_scale"], scale)
        assert not torch.equal(both[name], alone[name])


PREFIX = "base_model.model."
OWN = PREFIX + "model.language_model.embed_tokens.weight", PREFIX + "lm_head.weight"


def renamed(name: str, form: str) -> str:
    if form == "no prefix":
        return name.removeprefix(PREFIX)
    if form == "a name":
        return name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")
    return name


def rewrite(directory, change) -> None:
    """Change the tensors of an adapter."""
    file = directory / "adapter_model.safetensors"
    tensors = {name: x.clone() for name, x in load_file(file).items()}
    save_file({name: x.contiguous() for name, x in change(tensors).items()}, file)


FORMS = ["no prefix", "a name", "the base's embedding", "a trained embedding", "float64"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_files_in_other_forms(directory, tmp_path, form):
    """The logits are those of peft with the rewritten file, or with the original file for the form "a name",
    which peft ignores with only a warning."""
    import peft

    theirs, adapter = peft_model(directory), tmp_path / "adapter"
    theirs.save_pretrained(adapter, save_embedding_layers="embedding" in form)
    assert ("embedding" in form) == (set(OWN) <= load_file(adapter / "adapter_model.safetensors").keys())
    table = torch.randn(1664, 88, generator=torch.Generator().manual_seed(0)) / 88**0.5
    if form == "a trained embedding":
        rewrite(adapter, lambda t: t | {name: table.clone() for name in OWN})
    elif form == "float64":
        rewrite(adapter, lambda t: {name: x.double() for name, x in t.items()})
    else:
        rewrite(adapter, lambda t: {renamed(name, form): x for name, x in t.items()})
    model, _ = load_hf_model(directory, device="cpu", dtype="float32", adapter=adapter)
    inputs = batch(model.config, [3, 9], [4, 0])
    valid = inputs["attention_mask"].astype(bool)
    if form != "a name":
        theirs = peft.PeftModel.from_pretrained(base_of(directory), adapter)
    with torch.no_grad():
        expected = theirs(**torch_inputs(inputs)).logits.numpy()[valid]
    assert np.abs(model(**torch_inputs(inputs)).numpy()[valid] - expected).max() < 1e-4
    assert np.abs(reference.load(directory, adapter=adapter).forward(**inputs)[valid] - expected).max() < 1e-4


@pytest.mark.parametrize("trained", [False, True])
def test_an_output_head_of_its_own(tmp_path, tokenizer_model, trained):
    """A LoRA of the head, and the base's head, which peft saves in the same file."""
    import peft

    weights = random_weights(config_dict())
    generator = torch.Generator().manual_seed(0)
    weights[HEAD] = torch.randn(1664, 88, generator=generator) / 88**0.5
    config = config_dict(tie_word_embeddings=False)
    directory, adapter = tmp_path / "model", tmp_path / "adapter"
    write_checkpoint(directory, tokenizer_model, weights=weights, config=config)
    peft_model(directory, target_modules=["lm_head", "q_proj"]).save_pretrained(adapter)
    saved = f"{PREFIX}lm_head.base_layer.weight"
    assert saved in load_file(adapter / "adapter_model.safetensors")
    if trained:
        rewrite(adapter, lambda t: t | {saved: torch.randn(1664, 88, generator=generator) / 88**0.5})
    theirs = peft.PeftModel.from_pretrained(base_of(directory), adapter)
    model, _ = load_hf_model(directory, device="cpu", dtype="float32", adapter=adapter)
    inputs = batch(model.config, [3], [4])
    with torch.no_grad():
        expected = theirs(**torch_inputs(inputs)).logits.numpy()
    assert np.abs(model(**torch_inputs(inputs)).numpy() - expected).max() < 1e-4
    assert np.abs(reference.load(directory, adapter=adapter).forward(**inputs) - expected).max() < 1e-4


def test_it_is_merged_before_it_is_rounded(directory, tmp_path):
    """The sum is computed in float32 and rounded once: with W rounded to bfloat16 first, a small update would
    be lost."""
    adapter = tmp_path / "adapter"
    peft_model(directory).save_pretrained(adapter)
    exact, half = (
        dict(load_hf_model(directory, device="cpu", dtype=dtype, adapter=adapter)[0].named_parameters())
        for dtype in ("float32", "bfloat16")
    )
    rounded = reference.load(directory, dtype="bfloat16", adapter=adapter).params
    for name, value in exact.items():
        if name != EMBEDDING:
            assert torch.equal(half[name], value.bfloat16()), name
            module, leaf = name.rsplit(".", 1)
            difference = (half[name].float() - torch.from_numpy((rounded / module)[leaf])).abs()
            # float64 and float32 may round ties differently.
            assert (difference > 0).float().mean() < 1e-3, name


def test_the_command_line(directory, tmp_path, image_file):
    adapter = tmp_path / "adapter"
    peft_model(directory).save_pretrained(adapter)
    line = ["--model", directory, "--image", image_file, "--prompt", "caption en", "--no-sample"]
    line += ["--max-new-tokens", "6", "--dtype", "float32"]
    adapted = run(*line, "--adapter", adapter).text
    assert adapted == run(*line, "--adapter", adapter, "--backend", "reference").text
    assert adapted != run(*line).text

    def fails(path, message: str) -> None:
        assert_one_line(run(*line, "--adapter", path), message)

    file, lacks = (
        adapter / "adapter_model.safetensors",
        "has no adapter_config.json: it is not the directory of",
    )
    fails(tmp_path / "nowhere", "nowhere is neither a directory nor a hub id")
    fails(directory, f"{lacks} an adapter but that of a model")
    fails(tmp_path, f"{tmp_path} {lacks} an adapter: give {adapter}")
    fails(file, f"the adapter {file} is a file of an adapter: give its folder, --adapter {adapter}")
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("../../blobs/0123")
    fails(adapter, f"{file} is a link to ../../blobs/0123, which does not exist: download it again")


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_a_folder_with_a_model_and_an_adapter(directory, tmp_path):
    """transformers loads both; here the adapter has to be given."""
    both = tmp_path / "both"
    shutil.copytree(directory, both)
    peft_model(directory).save_pretrained(both)
    inputs = batch(reference.load(directory).config, [3], [4])
    with torch.no_grad():
        expected = base_of(both)(**torch_inputs(inputs)).logits
    model, _ = load_hf_model(both, device="cpu", dtype="float32", adapter=both)
    assert np.abs(model(**torch_inputs(inputs)).numpy() - expected.numpy()).max() < 1e-4
    says = (
        f"{both} holds a model and an adapter: give --model {both} --adapter {both} to merge them, or delete"
    )
    for load in (load_hf_model, reference.load):
        with pytest.raises(PaliGemmaError, match=f"^{re.escape(says)}"):
            load(both)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_base_model_is_the_adapters(directory, tmp_path, image_file, backend, capsys):
    adapter = tmp_path / "adapter"
    peft_model(directory).save_pretrained(adapter)
    line = ["--image", image_file, "--prompt", "caption en", "--no-sample", "--max-new-tokens", "3", "--json"]
    line += ["--backend", backend, "--adapter", adapter]
    alone, given = run(*line), run(*line, "--model", directory)
    assert (alone.code, given.code) == (0, 0), alone.err + given.err
    assert json.loads(alone.out)["tokens"] == json.loads(given.out)["tokens"]
    assert json.loads(alone.out)["model"] == str(directory)
    assert "was trained on" not in alone.err + given.err
    if backend == "reference":
        return
    model, _ = load_hf_model(device="cpu", adapter=adapter)
    base, _ = load_hf_model(directory, device="cpu")
    assert torch.equal(model.get_parameter(EMBEDDING), base.get_parameter(EMBEDDING))
    with pytest.raises(PaliGemmaError, match=r"^no model: give a hub id"):
        load_hf_model(device="cpu")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    unnamed = (
        f"{path} has no base_model_name_or_path: give the model that the adapter was trained on with --model"
    )
    away = (
        f"the adapter {adapter} was trained on /content/base, which is not here: give that model with --model"
    )
    for name, message in ((None, unnamed), ("/content/base", away)):
        path.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(PaliGemmaError) as caught:
            load_hf_model(device="cpu", adapter=adapter)
        assert str(caught.value) == message
    capsys.readouterr()
    other = f"the adapter {adapter} was trained on google/base; it is merged into {directory}\n"
    for name, says in (("google/base", other), (f"someone/{directory.name}", "")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": name}))
        load_hf_model(directory, device="cpu", adapter=adapter)
        assert capsys.readouterr().err == says


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "tokenizer.model"])
def test_the_tokenizer_and_the_image_settings_of_an_adapter(tmp_path, image_file, old, capsys):
    """Trainers save them with an adapter, and transformers reads them from its folder."""
    from transformers import GemmaTokenizer

    config = config_dict(image_token_index=1601, text={"vocab_size": 1665})
    adapter = tmp_path / "adapter"
    directory = write_checkpoint(tmp_path / "model", train_tokenizer("<mask>"), config=config)
    peft_model(directory).save_pretrained(adapter)
    before = load_hf_model(directory, device="cpu", adapter=adapter)[1]
    peer = GemmaTokenizer.from_pretrained(directory)
    peer.add_tokens(["<image>", "<invoice>"])
    if old:
        (adapter / "added_tokens.json").write_text(json.dumps({"<image>": 1601, "<invoice>": 1602}))
        capsys.readouterr()
        load_hf_model(directory, device="cpu", adapter=adapter)
        alone = "adapter has added_tokens.json and neither tokenizer.model nor tokenizer.json"
        assert f"{alone}: the model's tokenizer is used" in capsys.readouterr().err
        shutil.copy(directory / "tokenizer.model", adapter)
    else:
        peer.save_pretrained(adapter)
    settings = json.loads((directory / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.1, 0.2, 0.3]
    (adapter / "preprocessor_config.json").write_text(json.dumps(settings))
    _, processor = load_hf_model(directory, device="cpu", adapter=adapter)
    ids = processor.tokenizer.encode("read <invoice> a")
    assert ids != before.tokenizer.encode("read <invoice> a")
    assert [processor.tokenizer.piece(i) for i in ids].count("<invoice>") == 1
    if not old:
        assert ids == peer.encode("read <invoice> a", add_special_tokens=False)
    assert processor.mean.ravel().tolist() == pytest.approx([0.1, 0.2, 0.3])
    _, processor = load_hf_model(directory, device="cpu", adapter=adapter, tokenizer=directory)
    assert processor.tokenizer.encode("read <invoice> a") == before.tokenizer.encode("read <invoice> a")
    arguments = ["--model", directory, "--image", image_file, "--prompt", "read <invoice>", "--no-sample"]
    arguments += ["--adapter", adapter]
    for backend, engine in (("torch", engines.torch_engine), ("reference", engines.reference_engine)):
        args = generate.parse_args([*map(str, arguments), "--backend", backend])
        generate.choose_model(args)
        tokenizer = engine(args, pictures.read_images(args.image)).processor.tokenizer
        assert tokenizer.encode("read <invoice> a") == ids


@pytest.fixture
def adapter(directory, tmp_path):
    """An intact adapter, for tests that damage it."""
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
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for name, value in {
        "peft_type": "IA3", "use_dora": True, "modules_to_save": ["lm_head"], "bias": "all",
        "lora_bias": True, "fan_in_fan_out": True, "init_lora_weights": "pissa",
        "layer_replication": [[0, 2]], "target_parameters": ["mlp.weight"], "lora_alpha": "8",
        "alpha_pattern": {"(": 2}, "kasa_config": {"beta": 1}, "monteclora_config": {"n": 2},
        "velora_config": {"n": 2},
        "use_rslora": "no", "r": 0, "rank_pattern": -1, "layers_to_transform": "1", "layers_pattern": 3,
        "target_modules": 5, "exclude_modules": [1],
    }.items():  # fmt: skip
        path.write_text(json.dumps(config | {name: value}))
        assert name in refused(directory, adapter)
    for pattern in (".*" * 10 + "X", "(a+)+b", "x{99999999999}"):
        path.write_text(json.dumps(config | {"alpha_pattern": {pattern: 2}}))
        assert "alpha_pattern" in refused(directory, adapter)
    for name in ("lora_alpha", "r"):
        path.write_text(json.dumps(config | {name: 10**400}))
        assert f"{name} is 1000" in refused(directory, adapter)
    path.write_text("{")
    assert "cannot be read as JSON" in refused(directory, adapter)


ELSEWHERE = r"and its adapter_config\.json does not"
CONTRADICTIONS = [  # of an adapter of rank 4 on q_proj in each of 3 layers
    ({"r": 8}, r"the rank .* is 8; its tensors have 4"),
    ({"rank_pattern": {"q_proj": 2}}, r"the rank .* is 2; its tensors have 4"),
    ({"rank_pattern": {r"layers\.1\.self_attn\.q_proj": 7}}, r"the rank .*layers\.1\.self_attn.* is 7"),
    ({"rank_pattern": {"q_proj": -1}}, r"rank_pattern\.q_proj is -1; it must be a whole number"),
    ({"alpha_pattern": {"q_proj": 1e300}}, r"alpha_pattern\.q_proj is 1e\+300; it must be a number"),
    ({"target_modules": ["k_proj"]}, rf"adapt '.*q_proj', {ELSEWHERE}"),
    ({"target_modules": r".*vision.*\.q_proj"}, rf"adapt '.*q_proj', {ELSEWHERE}"),
    ({"target_modules": "("}, "target_modules has '.*', which is not a regular expression"),
    ({"exclude_modules": ["q_proj"]}, rf"adapt '.*q_proj', {ELSEWHERE}"),
    ({"layers_to_transform": [0, 2]}, rf"adapt '.*layers\.1\.self_attn\.q_proj', {ELSEWHERE}"),
    ({"layers_to_transform": 0}, rf"adapt '.*layers\.[12]\.self_attn\.q_proj', {ELSEWHERE}"),
    ({"layers_to_transform": [0, 1, 2], "layers_pattern": "h"}, rf"adapt '.*q_proj', {ELSEWHERE}"),
    ({"layers_to_transform": [0, 1, 2], "layers_pattern": "("},
     "layers_pattern has .*, which is not a regular expression"),
    ({"layers_to_transform": [0, 1, 2], "target_modules": ".*q_proj"},
     r"layers_to_transform is \[0, 1, 2\]; it must be null"),
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
        {"rank_pattern": {"k_proj": 2}}, {"rank_pattern": None},
        {"layers_to_transform": [0, 1, 2], "layers_pattern": "layers"},
        {"layers_to_transform": [0, 1, 2, 3]}, {"layers_to_transform": []}, {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "nothing"]}, {"exclude_modules": r".*lm_head"},
        {"target_modules": r"(?:.*?layers.*?q_proj.*?)|(?:.*nothing)"},
    ):  # fmt: skip
        path.write_text(json.dumps(config | change))
        reference.load(directory, adapter=adapter)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_what_an_adapter_leaves_out_is_told(directory, adapter, capsys):
    """peft warns of both and continues."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    layers = ", ".join(f"model.language_model.layers.{i}.self_attn.k_proj" for i in range(2)) + " and 1 more"
    lacks = (
        f"nothing for 3 of the layers that adapter_config.json adapts ({layers}): they stay as in the model"
    )
    lacks = f"{adapter}/adapter_model.safetensors has {lacks}\n"
    unknown = f"{path} has 'some_new_switch', which peft 0.21 does not have: ignored\n"
    for change, says in (
        ({}, ""), ({"init_lora_weights": "Gaussian", "some_new_switch": None}, ""),
        ({"some_new_switch": True}, unknown), ({"target_modules": None}, ""),
        ({"target_modules": r".*\.q_proj|model\.language_model.*k_proj"}, lacks),
        ({"target_modules": "(.*q_proj)+"}, ""),
        ({"target_modules": ["q_proj", "k_proj"], "exclude_modules": r".*vision.*k_proj"}, lacks),
    ):  # fmt: skip
        path.write_text(json.dumps(config | change))
        capsys.readouterr()
        reference.load(directory, adapter=adapter)
        assert capsys.readouterr().err == says


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("lm_head", "it adapts 'lm_head', and the model ties its output head to its embedding"),
        ("patch_embedding", "patch_embedding', a convolution"),
    ],
)
def test_layers_of_another_kind_are_named(directory, tmp_path, target, message):
    peft_model(directory, target_modules=["q_proj", target]).save_pretrained(tmp_path / "adapter")
    says = f"{message}, which is not implemented: merge the adapter with peft"
    assert says in refused(directory, tmp_path / "adapter")


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_an_adapter_of_mlx(directory, tmp_path):
    config = {"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 16}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (tmp_path / "adapters.safetensors").write_bytes(b"x")
    remedy = "fuse it with its model with mlx_vlm, or train one with peft"
    said = refused(directory, tmp_path)
    assert said == f"{tmp_path} holds an adapter of MLX, which is not supported: {remedy}"


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_an_adapter_of_another_model_is_refused(directory, adapter, tmp_path, tokenizer_model):
    wider = write_checkpoint(
        tmp_path / "wider", tokenizer_model, config=config_dict(text={"hidden_size": 96})
    )
    said = refused(wider, adapter)
    assert "for 'model.language_model.layers.0.self_attn.q_proj', which is (96, 96) here" in said
    assert "here: it was trained on another model" in said
    shallow = write_checkpoint(
        tmp_path / "shallow", tokenizer_model, config=config_dict(text={"num_hidden_layers": 2})
    )
    said = refused(shallow, adapter)
    assert "layers.2.self_attn.q_proj', which is not a linear layer of this model" in said


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_tensors_that_are_not_understood_are_refused(directory, adapter):
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

    def assert_refused(tensors: dict, message: str) -> None:
        save_file({name: x.clone() for name, x in tensors.items()}, file)
        assert message in refused(directory, adapter)

    table = random_weights(config_dict())[EMBEDDING]
    again = OWN[0].replace(".weight", ".base_layer.weight")
    embedding = f"{PREFIX}model.language_model.embed_tokens"
    other_names = {
        name.replace("model.language_model.", "language_model.model."): x for name, x in whole.items()
    }
    trained = "an embedding or an output head that was trained"
    many = {
        name.replace(".weight", f".{own}.weight"): x for name, x in whole.items() for own in ("mine", "other")
    }
    for tensors, message in (
        (whole | {OWN[0]: table, OWN[1]: table + 1}, f"are {trained}, and the model ties these: merge"),
        (whole | {OWN[0]: table + 1}, f"is {trained}"),
        (whole | {OWN[1]: table + 1}, f"is {trained}"),
        (whole | {OWN[0]: torch.zeros(1665, 88)},
         "with shape (1665, 88); the model's is (1664, 88): the vocabulary was changed"),
        (whole | {OWN[0]: table, again: table}, "embed_tokens.weight' is the same parameter as"),
        (whole | {f"{embedding}.lora_embedding_A": table}, "embed_tokens.lora_embedding_A' is not part of"),
        (many, "holds several adapters (mine, other)"),
        (whole | {f"{module}.lora_A.weight": torch.ones(4, 88, dtype=torch.int8)},
         f"{module}.lora_A.weight' is I8; only F64, F32, F16, BF16 are supported"),
        (whole | {f"{module}.lora_magnitude_vector": torch.ones(96)},
         "lora_magnitude_vector' is not part of a LoRA"),
        ({name: x for name, x in whole.items() if name != f"{module}.lora_B.weight"},
         "has only lora_A of its two factors"),
        (whole | {f"{embedding}.lora_{x}.weight": torch.ones(1, 1) for x in "AB"},
         "embed_tokens', which is not a linear layer"),
        (whole | other_names, "adapts language_model.model.layers.0.self_attn.q_proj.weight twice"),
        ({}, "holds no tensor"),
    ):  # fmt: skip
        assert_refused(tensors, message)
    file.write_bytes(b"hello")
    assert "is not a whole safetensors file" in refused(directory, adapter)
    shutil.move(file, adapter / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which is never opened" in refused(directory, adapter)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_the_error_for_a_damaged_adapter_names_the_tensor(directory, adapter, bad):
    file = adapter / "adapter_model.safetensors"
    whole = {name: x.clone() for name, x in load_file(file).items()}
    table = random_weights(config_dict())[EMBEDDING]
    for name in (min(whole), max(whole), OWN[0]):
        damaged = {n: x.clone() for n, x in whole.items()}
        if name in OWN:
            damaged |= {n: table.clone() for n in OWN}
            damaged[OWN[1]][1, 2] = bad
        damaged[name][1, 2] = bad
        save_file(damaged, file)
        said = []
        inputs = batch(reference.load(directory).config, [3], [0])
        for quantize in (None, "int8", "fp8"):
            with pytest.raises(PaliGemmaError) as caught:
                load_hf_model(directory, device="cpu", adapter=adapter, quantize=quantize)
            said.append(str(caught.value))
        with pytest.raises(PaliGemmaError) as caught:
            reference.load(directory, adapter=adapter).forward(**inputs)
        says = f"{file}: {name!r} holds NaN or infinity: the adapter is damaged"
        assert {*said, str(caught.value)} == {says}
