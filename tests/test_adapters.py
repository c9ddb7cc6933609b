"""LoRA adapters, beside the peft library that writes them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from checkpoints import (
    GEMMA_2,
    batch,
    config_dict,
    random_weights,
    torch_inputs,
    train_tokenizer,
    write_checkpoint,
)
from command_line import assert_one_line, run
from safetensors.torch import load_file, save_file

from paligemma import PaliGemmaError, command, engines, generate, load_hf_model, reference
from paligemma.checkpoint.stored import EMBEDDING, HEAD

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def peft_model(directory, **options):
    """transformers' model with an adapter of random factors: an untrained one has zeros in B."""
    import peft
    from transformers import PaliGemmaForConditionalGeneration

    base = PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    torch.manual_seed(0)
    model = peft.get_peft_model(
        base, peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": PROJECTIONS, **options})
    )
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


PREFIX = "base_model.model."
OWN = PREFIX + "model.language_model.embed_tokens.weight", PREFIX + "lm_head.weight"


def renamed(name: str, form: str) -> str:
    if form == "no prefix":
        return name.removeprefix(PREFIX)
    return (
        name.replace("lora_A.", "lora_A.mine.").replace("lora_B.", "lora_B.mine.")
        if form == "a name"
        else name
    )


def rewrite(directory, change) -> None:
    """The tensors of an adapter, changed."""
    tensors = {name: x.clone() for name, x in load_file(directory / "adapter_model.safetensors").items()}
    save_file(
        {name: x.contiguous() for name, x in change(tensors).items()}, directory / "adapter_model.safetensors"
    )


@pytest.mark.parametrize(
    "form", ["no prefix", "a name", "the base's embedding", "a trained embedding", "float64"]
)
@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_files_in_other_forms(directory, tmp_path, form):
    """Each is what peft makes of the adapter; of names that peft would pass over, with nothing but a warning,
    what it made before."""
    import peft
    from transformers import PaliGemmaForConditionalGeneration

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
        base = PaliGemmaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        )
        theirs = peft.PeftModel.from_pretrained(base, adapter)
    with torch.no_grad():
        expected = theirs(**torch_inputs(inputs)).logits.numpy()[valid]
    assert np.abs(model(**torch_inputs(inputs)).numpy()[valid] - expected).max() < 1e-4
    assert np.abs(reference.load(directory, adapter=adapter).forward(**inputs)[valid] - expected).max() < 1e-4


@pytest.mark.parametrize("trained", [False, True])
def test_an_output_head_of_its_own(tmp_path, tokenizer_model, trained):
    """A LoRA of it, and what peft saves of the base beside it."""
    import peft
    from transformers import PaliGemmaForConditionalGeneration

    weights = random_weights(config_dict())
    generator = torch.Generator().manual_seed(0)
    weights[HEAD] = torch.randn(1664, 88, generator=generator) / 88**0.5
    config = config_dict(tie_word_embeddings=False)
    directory, adapter = (
        write_checkpoint(tmp_path / "model", tokenizer_model, weights=weights, config=config),
        tmp_path / "adapter",
    )
    peft_model(directory, target_modules=["lm_head", "q_proj"]).save_pretrained(adapter)
    saved = f"{PREFIX}lm_head.base_layer.weight"
    assert saved in load_file(adapter / "adapter_model.safetensors")
    if trained:
        rewrite(adapter, lambda t: t | {saved: torch.randn(1664, 88, generator=generator) / 88**0.5})
    base = PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    theirs = peft.PeftModel.from_pretrained(base, adapter)
    model, _ = load_hf_model(directory, device="cpu", dtype="float32", adapter=adapter)
    inputs = batch(model.config, [3], [4])
    with torch.no_grad():
        expected = theirs(**torch_inputs(inputs)).logits.numpy()
    assert np.abs(model(**torch_inputs(inputs)).numpy() - expected).max() < 1e-4
    assert np.abs(reference.load(directory, adapter=adapter).forward(**inputs) - expected).max() < 1e-4


def test_it_is_merged_before_it_is_rounded(directory, tmp_path):
    """The sum in float32, rounded once: W in bfloat16 first would lose what a small update adds."""
    peft_model(directory).save_pretrained(tmp_path / "adapter")
    exact = dict(
        load_hf_model(directory, device="cpu", dtype="float32", adapter=tmp_path / "adapter")[
            0
        ].named_parameters()
    )
    half = dict(
        load_hf_model(directory, device="cpu", dtype="bfloat16", adapter=tmp_path / "adapter")[
            0
        ].named_parameters()
    )
    rounded = reference.load(directory, dtype="bfloat16", adapter=tmp_path / "adapter").params
    for name, value in exact.items():
        if name != EMBEDDING:
            assert torch.equal(half[name], value.bfloat16()), name
            module, leaf = name.rsplit(".", 1)
            difference = (half[name].float() - torch.from_numpy((rounded / module)[leaf])).abs()
            assert (difference > 0).float().mean() < 1e-3, (
                name
            )  # ties, which float64 and float32 may break differently


def test_the_command_line(directory, tmp_path, image_file):
    peft_model(directory).save_pretrained(tmp_path / "adapter")
    line = [
        "--model",
        directory,
        "--image",
        image_file,
        "--prompt",
        "caption en",
        "--no-sample",
        "--max-new-tokens",
        "6",
        "--dtype",
        "float32",
    ]
    adapted = run(*line, "--adapter", tmp_path / "adapter").text
    assert adapted == run(*line, "--adapter", tmp_path / "adapter", "--backend", "reference").text
    assert adapted != run(*line).text
    assert_one_line(
        run(*line, "--adapter", tmp_path / "nowhere"), "nowhere is neither a directory nor a hub id"
    )
    assert_one_line(
        run(*line, "--adapter", directory),
        "has no adapter_config.json: it is not the directory of an adapter but that of a model",
    )
    assert_one_line(
        run(*line, "--adapter", tmp_path),
        f"{tmp_path} has no adapter_config.json: it is not the directory of an adapter: give {tmp_path}/adapter",
    )
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    assert_one_line(
        run(*line, "--adapter", file),
        f"the adapter {file} is a file of an adapter: give its folder, --adapter {tmp_path}/adapter",
    )
    file.rename(tmp_path / "elsewhere")
    file.symlink_to("../../blobs/0123")
    assert_one_line(
        run(*line, "--adapter", tmp_path / "adapter"),
        f"{file} is a link to ../../blobs/0123, which does not exist: download it again",
    )


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_a_folder_with_a_model_and_an_adapter(directory, tmp_path):
    """transformers loads both; here that is asked for."""
    from transformers import PaliGemmaForConditionalGeneration

    both = tmp_path / "both"
    shutil.copytree(directory, both)
    peft_model(directory).save_pretrained(both)
    inputs = batch(reference.load(directory).config, [3], [4])
    with torch.no_grad():
        expected = PaliGemmaForConditionalGeneration.from_pretrained(
            both, dtype=torch.float32, attn_implementation="eager"
        )(**torch_inputs(inputs)).logits
    model, _ = load_hf_model(both, device="cpu", dtype="float32", adapter=both)
    assert np.abs(model(**torch_inputs(inputs)).numpy() - expected.numpy()).max() < 1e-4
    for load in (load_hf_model, reference.load):
        with pytest.raises(
            PaliGemmaError,
            match=rf"^{both} holds a model and an adapter: give --model {both} --adapter {both} to merge them, or delete",
        ):
            load(both)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_the_base_model_is_the_adapters(directory, tmp_path, image_file, backend, capsys):
    adapter = tmp_path / "adapter"
    peft_model(directory).save_pretrained(adapter)
    line = [
        "--image",
        image_file,
        "--prompt",
        "caption en",
        "--no-sample",
        "--max-new-tokens",
        "3",
        "--json",
        "--backend",
        backend,
        "--adapter",
        adapter,
    ]
    alone, given = run(*line), run(*line, "--model", directory)
    assert (alone.code, given.code) == (0, 0), alone.err + given.err
    assert json.loads(alone.out)["tokens"] == json.loads(given.out)["tokens"]
    assert json.loads(alone.out)["model"] == str(directory)
    assert "was trained on" not in alone.err + given.err
    if backend == "reference":
        return
    model, _ = load_hf_model(device="cpu", adapter=adapter)
    assert torch.equal(
        model.get_parameter(EMBEDDING), load_hf_model(directory, device="cpu")[0].get_parameter(EMBEDDING)
    )
    with pytest.raises(PaliGemmaError, match=r"^no model: give a hub id"):
        load_hf_model(device="cpu")
    config = json.loads((adapter / "adapter_config.json").read_text())
    for name, message in (
        (
            None,
            f"{adapter}/adapter_config.json has no base_model_name_or_path: give the model that the adapter was trained on with --model",
        ),
        (
            "/content/base",
            f"the adapter {adapter} was trained on /content/base, which is not here: give that model with --model",
        ),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        with pytest.raises(PaliGemmaError) as caught:
            load_hf_model(device="cpu", adapter=adapter)
        assert str(caught.value) == message
    capsys.readouterr()
    for name, says in (
        ("google/base", f"the adapter {adapter} was trained on google/base; it is merged into {directory}\n"),
        (f"someone/{directory.name}", ""),
    ):
        (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
        load_hf_model(directory, device="cpu", adapter=adapter)
        assert capsys.readouterr().err == says


@pytest.mark.parametrize("old", [False, True], ids=["tokenizer.json", "tokenizer.model"])
def test_the_tokenizer_and_the_image_settings_of_an_adapter(tmp_path, image_file, old, capsys):
    """Trainers save them beside an adapter; transformers reads them there."""
    from transformers import GemmaTokenizer

    config = config_dict(image_token_index=1601, text={"vocab_size": 1665})
    directory = write_checkpoint(tmp_path / "model", train_tokenizer("<mask>"), config=config)
    peft_model(directory).save_pretrained(tmp_path / "adapter")
    before = load_hf_model(directory, device="cpu", adapter=tmp_path / "adapter")[1]
    peer = GemmaTokenizer.from_pretrained(directory)
    peer.add_tokens(["<image>", "<invoice>"])
    if old:
        (tmp_path / "adapter" / "added_tokens.json").write_text(
            json.dumps({"<image>": 1601, "<invoice>": 1602})
        )
        capsys.readouterr()
        load_hf_model(directory, device="cpu", adapter=tmp_path / "adapter")
        assert (
            "adapter has added_tokens.json and neither tokenizer.model nor tokenizer.json: the model's tokenizer is used"
            in capsys.readouterr().err
        )
        shutil.copy(directory / "tokenizer.model", tmp_path / "adapter")
    else:
        peer.save_pretrained(tmp_path / "adapter")
    settings = json.loads((directory / "preprocessor_config.json").read_text()) | {
        "image_mean": [0.1, 0.2, 0.3]
    }
    (tmp_path / "adapter" / "preprocessor_config.json").write_text(json.dumps(settings))
    _, processor = load_hf_model(directory, device="cpu", adapter=tmp_path / "adapter")
    ids = processor.tokenizer.encode("read <invoice> a")
    assert ids != before.tokenizer.encode("read <invoice> a")
    assert [processor.tokenizer.piece(i) for i in ids].count("<invoice>") == 1
    if not old:
        assert ids == peer.encode("read <invoice> a", add_special_tokens=False)
    assert processor.mean.ravel().tolist() == pytest.approx([0.1, 0.2, 0.3])
    _, processor = load_hf_model(directory, device="cpu", adapter=tmp_path / "adapter", tokenizer=directory)
    assert processor.tokenizer.encode("read <invoice> a") == before.tokenizer.encode("read <invoice> a")
    arguments = [
        "--model",
        directory,
        "--image",
        image_file,
        "--prompt",
        "read <invoice>",
        "--adapter",
        tmp_path / "adapter",
        "--no-sample",
    ]
    for backend, engine in (("torch", engines.torch_engine), ("reference", engines.reference_engine)):
        args = generate.parse_args([*map(str, arguments), "--backend", backend])
        generate.choose_model(args)
        assert (
            engine(args, command.read_image(args.image)).processor.tokenizer.encode("read <invoice> a") == ids
        )


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
        "kasa_config": {"beta": 1}, "monteclora_config": {"n": 2}, "velora_config": {"n": 2},
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
def test_what_an_adapter_leaves_out_is_told(directory, adapter, capsys):
    """peft warns of both and goes on."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    layers = (
        "language_model.layers.0.self_attn.k_proj, model.language_model.layers.1.self_attn.k_proj and 1 more"
    )
    lacks = f"{adapter}/adapter_model.safetensors has nothing for 3 of the layers that adapter_config.json adapts (model.{layers}): they stay as in the model\n"
    unknown = f"{path} has 'some_new_switch', which peft 0.21 does not have: ignored\n"
    for change, says in (
        ({}, ""), ({"init_lora_weights": "Gaussian", "some_new_switch": None}, ""), ({"some_new_switch": True}, unknown),
        ({"target_modules": r".*\.q_proj|model\.language_model.*k_proj"}, lacks), ({"target_modules": None}, ""), ({"target_modules": "(.*q_proj)+"}, ""),
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
        (
            "lm_head",
            "it adapts 'lm_head', and the model ties its output head to its embedding, which is not implemented: merge the adapter with peft",
        ),
        (
            "patch_embedding",
            "patch_embedding', a convolution, which is not implemented: merge the adapter with peft",
        ),
    ],
)
def test_layers_of_another_kind_are_named(directory, tmp_path, target, message):
    peft_model(directory, target_modules=["q_proj", target]).save_pretrained(tmp_path / "adapter")
    assert message in refused(directory, tmp_path / "adapter")


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_an_adapter_of_mlx(directory, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        '{"fine_tune_type": "lora", "lora_parameters": {"rank": 8, "scale": 20.0}, "num_layers": 16}'
    )
    (tmp_path / "adapters.safetensors").write_bytes(b"x")
    assert (
        refused(directory, tmp_path)
        == f"{tmp_path} holds an adapter of MLX, which is not supported: fuse it with its model with mlx_vlm, or train one with peft"
    )


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_an_adapter_of_another_model_is_refused(directory, adapter, tmp_path, tokenizer_model):
    wider = write_checkpoint(
        tmp_path / "wider", tokenizer_model, config=config_dict(text={"hidden_size": 96})
    )
    assert (
        "for 'model.language_model.layers.0.self_attn.q_proj', which is (96, 96) here: it was trained on another model"
        in refused(wider, adapter)
    )
    shallow = write_checkpoint(
        tmp_path / "shallow", tokenizer_model, config=config_dict(text={"num_hidden_layers": 2})
    )
    assert "layers.2.self_attn.q_proj', which is not a linear layer of this model" in refused(
        shallow, adapter
    )


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
def test_tensors_that_are_not_understood_are_refused(directory, adapter):
    file = adapter / "adapter_model.safetensors"
    whole = load_file(file)
    module = "base_model.model.model.language_model.layers.0.self_attn.q_proj"

    def message(tensors: dict) -> str:
        save_file({name: x.clone() for name, x in tensors.items()}, file)
        return refused(directory, adapter)

    def with_own(*values: torch.Tensor) -> dict:
        return whole | dict(zip(OWN, values, strict=True))

    table = random_weights(config_dict())[EMBEDDING]
    assert "are an embedding or an output head that was trained, and the model ties these: merge" in message(
        with_own(table, table + 1)
    )
    assert "is an embedding or an output head that was trained" in message(whole | {OWN[0]: table + 1})
    assert "is an embedding or an output head that was trained" in message(whole | {OWN[1]: table + 1})
    assert "with shape (1665, 88); the model's is (1664, 88): the vocabulary was changed" in message(
        whole | {OWN[0]: torch.zeros(1665, 88)}
    )
    assert "embed_tokens.weight' is the same parameter as" in message(
        whole | {OWN[0]: table, OWN[0].replace(".weight", ".base_layer.weight"): table}
    )
    assert "embed_tokens.lora_embedding_A' is not part of" in message(
        whole | {f"{PREFIX}model.language_model.embed_tokens.lora_embedding_A": table}
    )
    assert "holds several adapters (mine, other)" in message(
        {
            name.replace(".weight", f".{own}.weight"): x
            for name, x in whole.items()
            for own in ("mine", "other")
        }
    )
    assert f"{module}.lora_A.weight' is I8; only F64, F32, F16, BF16 are supported" in message(
        whole | {f"{module}.lora_A.weight": torch.ones(4, 88, dtype=torch.int8)}
    )
    assert "lora_magnitude_vector' is not part of a LoRA" in message(
        whole | {f"{module}.lora_magnitude_vector": torch.ones(96)}
    )
    assert "has only lora_A of its two factors" in message(
        {name: x for name, x in whole.items() if name != f"{module}.lora_B.weight"}
    )
    assert "embed_tokens', which is not a linear layer" in message(
        whole
        | {
            f"base_model.model.model.language_model.embed_tokens.lora_{x}.weight": torch.ones(1, 1)
            for x in "AB"
        }
    )
    assert "adapts language_model.model.layers.0.self_attn.q_proj.weight twice" in message(
        whole
        | {
            name.replace(
                "base_model.model.model.language_model.", "base_model.model.language_model.model."
            ): x
            for name, x in whole.items()
        }
    )
    assert "holds no tensor" in message({})
    file.write_bytes(b"hello")
    assert "is not a whole safetensors file" in refused(directory, adapter)
    shutil.move(file, adapter / "adapter_model.bin")
    assert "adapter_model.bin is a pickle, which is never opened" in refused(directory, adapter)


@pytest.mark.parametrize("directory", ["Gemma"], indirect=True)
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_damaged_adapter_is_told_as_such(directory, adapter, bad):
    file = adapter / "adapter_model.safetensors"
    whole = {name: x.clone() for name, x in load_file(file).items()}
    table = random_weights(config_dict())[EMBEDDING]
    for name in (min(whole), max(whole), OWN[0]):
        damaged = {n: x.clone() for n, x in whole.items()} | (
            {n: table.clone() for n in OWN} if name in OWN else {}
        )
        damaged[name][1, 2] = bad
        if name in OWN:
            damaged[OWN[1]][1, 2] = bad
        save_file(damaged, file)
        said = []
        inputs = batch(reference.load(directory).config, [3], [0])
        for quantize in (None, "int8", "fp8"):
            with pytest.raises(PaliGemmaError) as caught:
                load_hf_model(directory, device="cpu", adapter=adapter, quantize=quantize)
            said.append(str(caught.value))
        with pytest.raises(PaliGemmaError) as caught:
            reference.load(directory, adapter=adapter).forward(**inputs)
        assert {*said, str(caught.value)} == {
            f"{file}: {name!r} holds NaN or infinity: the adapter is damaged"
        }
