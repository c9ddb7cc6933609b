"""Saved checkpoints of quantised weights: the model that quantising at load gives, strictly, or an error."""

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import (
    GEMMA_2,
    GEMMA_2_SHAPES,
    WHOLE_GROUPS,
    batch,
    config_dict,
    random_weights,
    torch_inputs,
    write_checkpoint,
)
from command_line import assert_one_line, run
from conftest import ROOT
from hub_server import Hub
from safetensors.torch import load_file, save_file
from test_adapters import PREFIX
from test_hub import settings
from test_npz import tree

from benchmarks.random_checkpoint import config_for
from paligemma import (
    PaliGemmaError,
    arguments,
    compare,
    int4,
    load_hf_model,
    loading,
    memory,
    quantize,
    reference,
    serve,
)
from paligemma.checkpoint import reading, saving, writing
from paligemma.checkpoint.quantized import forms
from paligemma.checkpoint.stored import EMBEDDING, HEAD
from paligemma.config import PaliGemmaConfig
from paligemma.kv_cache import position_bytes
from paligemma.packing import is_packed
from paligemma.processor import Processor
from paligemma.quantization import FORMATS, Saved

KINDS = pytest.mark.parametrize("kind", FORMATS)
CODES = {"int8": "I8", "fp8": "F8_E4M3", "int4": "I32"}
UP = "language_model.model.layers.1.mlp.up_proj.weight"


def config(second: bool = False) -> dict:
    text = {**WHOLE_GROUPS["text"], **(GEMMA_2 if second else {})}
    return config_dict(text, **{name: value for name, value in WHOLE_GROUPS.items() if name != "text"})


def saved(model: Path, directory: Path, kind: str, *more: object) -> Path:
    args = [str(model), str(directory), "--quantize", kind, *map(str, more)]
    assert quantize.main(args) == 0
    return directory


@pytest.fixture(scope="module", params=["Gemma", "Gemma 2"])
def model(request, tmp_path_factory, tokenizer_model):
    path = tmp_path_factory.mktemp("float") / "model"
    return write_checkpoint(path, tokenizer_model, config=config(request.param == "Gemma 2"))


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer_model) -> dict[str, Path]:
    """A saved checkpoint of each format, for bfloat16; not to be changed."""
    root = tmp_path_factory.mktemp("saved")
    source = write_checkpoint(root / "model", tokenizer_model, config=config(), dtype="bfloat16")
    return {"model": source} | {kind: saved(source, root / kind, kind) for kind in FORMATS}


@pytest.fixture
def copied(made, tmp_path):
    """A function that copies a saved checkpoint, to be damaged."""
    return lambda kind: Path(shutil.copytree(made[kind], tmp_path / "copy"))


def weights(directory: Path) -> Path:
    return next(directory.glob("*.safetensors"))


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The bits of all parameters, and their dtypes by the number of columns."""
    return {name: x.detach().contiguous().view(torch.uint8) for name, x in model.state_dict().items()}


def assert_same_model(directory: Path, source: Path, kind: str, dtype: str, **more: object) -> None:
    ours, _ = load_hf_model(directory, device="cpu")
    theirs, _ = load_hf_model(source, device="cpu", dtype=dtype, quantize=kind, **more)
    assert ours.dtype == theirs.dtype
    a, b = state(ours), state(theirs)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    inputs = torch_inputs(batch(ours.config, [3, 9], [4, 0]))
    assert torch.equal(ours(**inputs), theirs(**inputs))


# The same model


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@KINDS
def test_it_is_the_model_that_quantising_at_load_gives(model, tmp_path, kind, dtype, capsys):
    directory = saved(model, tmp_path / "saved", kind, "--dtype", dtype)
    out, err = capsys.readouterr()
    assert out == f"{directory}\n"
    assert err.endswith(f"GB of weights, {kind} for {dtype}\n")
    assert_same_model(directory, model, kind, dtype)


def test_an_output_head_of_its_own(tmp_path, tokenizer_model):
    own = random_weights(config())
    own[HEAD] = own[EMBEDDING].flip(0).clone()
    untied = config() | {"tie_word_embeddings": False}
    source = write_checkpoint(tmp_path / "model", tokenizer_model, config=untied, weights=own)
    for kind in ("fp8", "int4"):
        assert_same_model(saved(source, tmp_path / kind, kind), source, kind, "bfloat16")


def test_googles_file(tmp_path, tokenizer_model):
    """Its config.json is made from the shapes in the file."""
    given = config(second=True)
    np.savez(tmp_path / "google.npz", **tree(given, random_weights(given)))
    (tmp_path / "tokenizer.model").write_bytes(tokenizer_model)
    directory = saved(tmp_path / "google.npz", tmp_path / "saved", "int4")
    assert_same_model(directory, tmp_path / "google.npz", "int4", "bfloat16")


def test_an_adapter_is_merged_with_its_tokenizer_and_image_settings(made, tmp_path, tokenizer_model):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    factors = {
        f"{PREFIX}model.language_model.layers.{i}.self_attn.q_proj.lora_{part}.weight":
        0.3 * torch.randn(*((4, 96) if part == "A" else (96, 4)), generator=generator)
        for i in range(3) for part in "AB"
    }  # fmt: skip
    save_file(factors, adapter / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(fields))
    (adapter / "tokenizer.model").write_bytes(tokenizer_model)
    added = {"added_tokens_decoder": {"1601": {"content": "<wow>", "special": False}}}
    (adapter / "tokenizer_config.json").write_text(json.dumps(added))
    (adapter / "processor_config.json").write_text('{"image_processor": {"image_mean": [0.1, 0.2, 0.3]}}')
    directory = saved(made["model"], tmp_path / "saved", "int8", "--adapter", adapter)
    assert_same_model(directory, made["model"], "int8", "bfloat16", adapter=adapter)
    plain, merged = (load_hf_model(path, device="cpu")[0] for path in (made["int8"], directory))
    assert not torch.equal(state(plain)[UP.replace("mlp.up", "self_attn.q")],
                           state(merged)[UP.replace("mlp.up", "self_attn.q")])  # fmt: skip
    ours, theirs = Processor.load(directory), Processor.load(made["model"], adapter=adapter)
    assert ours.tokenizer.encode("a <wow> cat") == theirs.tokenizer.encode("a <wow> cat")
    assert 1601 in ours.tokenizer.encode("a <wow> cat")
    assert ours.mean.tolist() == theirs.mean.tolist() != Processor.load(made["model"]).mean.tolist()


def test_a_tokenizer_elsewhere_is_copied(made, tmp_path):
    (tmp_path / "other.model").write_bytes((made["model"] / "tokenizer.model").read_bytes())
    shutil.copytree(made["model"], tmp_path / "model").joinpath("tokenizer.model").unlink()
    directory = saved(tmp_path / "model", tmp_path / "saved", "fp8", "--tokenizer", tmp_path / "other.model")
    assert load_hf_model(directory, device="cpu")[1].tokenizer.encode("a cat")


@pytest.mark.parametrize("text", [{}, GEMMA_2, *(shape["text"] for shape in GEMMA_2_SHAPES.values())])
def test_its_config_json_says_all_of_the_configuration(text):
    given = PaliGemmaConfig.from_dict(config_dict(text), {"eos_token_id": [1, 108]})
    kept = saving._config(given, Saved("int8", "float16"))
    again = PaliGemmaConfig.from_dict(json.loads(json.dumps(kept)))
    same = vars(again) | {"torch_dtype": given.torch_dtype, "quantization": given.quantization}
    assert same == vars(given)
    assert again.saved == Saved("int8", "float16")


@KINDS
def test_on_a_cpu_every_tensor_stays_in_its_file(made, kind, monkeypatch):
    monkeypatch.setattr(loading, "free_bytes", lambda _: 0)
    monkeypatch.setattr(reading, "_read_converted", None)
    monkeypatch.setattr(reading.quantize, "quantized", None)
    load_hf_model(made[kind], device="cpu")


@KINDS
def test_groups_that_one_product_reads_are_packed_for_the_kernels(model, tmp_path, kind):
    directory = saved(model, tmp_path / "saved", kind, "--dtype", "float32")
    ours, _ = load_hf_model(directory, device="cpu", dtype="float32", backend="triton")
    groups = list(ours.packable())
    assert len(groups) > 4
    assert all(is_packed(group) for group in groups)
    theirs, _ = load_hf_model(directory, device="cpu", backend="torch")
    a, b = state(ours), state(theirs)
    assert all(torch.equal(a[name], b[name]) for name in b)


def test_the_memory_of_a_device_is_checked_before_it_is_taken(made, monkeypatch):
    """On a GPU, all bytes of the files are needed, and a scale in float32 is not one in bfloat16."""
    for kind in FORMATS:
        size = sum(x.nbytes for x in reference.load(made[kind]).params.stored.values())
        monkeypatch.setattr(loading, "stays_mapped", lambda *_: False)
        monkeypatch.setattr(loading, "free_bytes", lambda _, size=size: size)
        load_hf_model(made[kind], device="cpu")
        monkeypatch.setattr(loading, "free_bytes", lambda _, size=size: size - 1)
        with pytest.raises(PaliGemmaError, match=r"^this model needs 0\.\d GB for its weights; cpu has"):
            load_hf_model(made[kind], device="cpu")


@KINDS
def test_the_reference_computes_with_the_weights_that_are_stored(made, tmp_path, tokenizer_model, kind):
    """A float64 checkpoint of the products code x scale, which torch computes, gives the same logits."""
    network, _ = load_hf_model(made[kind], device="cpu")
    wide = {}
    for name, x in network.named_parameters():
        scale = dict(network.named_parameters()).get(f"{name}_scale")
        if name.endswith("_scale"):
            continue
        if scale is None:
            wide[name] = x.double()
        elif scale.ndim == 1:
            wide[name] = x.double() * scale.double()[:, None]
        else:
            wide[name] = int4.dequantized(x, scale).double()
    path = write_checkpoint(
        tmp_path / "wide", tokenizer_model, config=config() | {"tie_word_embeddings": False}, weights=wide,
        dtype="float64",
    )  # fmt: skip
    inputs = batch(network.config, [3, 9], [4, 0])
    ours, theirs = reference.load(made[kind]), reference.load(path)
    assert np.abs(ours.forward(**inputs) - theirs.forward(**inputs)).max() < 1e-12
    assert np.array_equal((ours.params / "language_model" / "lm_head")["weight"], wide[HEAD].numpy())


@KINDS
def test_the_model_keeps_the_rule(made, image_file, kind, capsys):
    line = ["--model", str(made[kind]), "--image", str(image_file), "--prompt", "detect cat"]
    assert compare.main(line) == 0
    assert "0 exceed the rule" in capsys.readouterr().out


def test_compare_takes_the_dtype_of_a_saved_checkpoint(model, tmp_path, image_file, capsys):
    directory = saved(model, tmp_path / "saved", "int8", "--dtype", "float32")
    line = ["--model", str(directory), "--image", str(image_file), "--prompt", "detect cat"]
    assert compare.main(line) == 0
    out, err = capsys.readouterr()
    assert "0 exceed the rule" in out
    assert "in float32 ..." in err
    assert compare.main([*line, "--dtype", "bfloat16"]) == 1
    assert "was quantised for float32, not bfloat16" in capsys.readouterr().err


def test_the_interpreter_takes_the_dtype_of_a_saved_checkpoint(made, model, tmp_path, monkeypatch):
    """It refuses bfloat16, which is the default of float weights."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    directory = saved(model, tmp_path / "saved", "int8", "--dtype", "float32")
    network, _ = load_hf_model(directory, device="cpu", backend="triton")
    assert network.dtype == torch.float32
    for path in (made["int8"], model):
        with pytest.raises(PaliGemmaError, match=r"^Triton's interpreter computes bfloat16 wrongly"):
            load_hf_model(path, device="cpu", backend="triton")


def test_files_of_limited_size(made, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "LARGEST", 200_000)
    directory = saved(made["model"], tmp_path / "saved", "int4")
    files = sorted(path.name for path in directory.glob("*.safetensors"))
    assert len(files) > 3
    assert files == [f"paligemma-int4-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    sizes = [(directory / name).stat().st_size for name in files]
    assert sum(sizes) == writing.file_bytes(forms_of(made["model"], "int4"))
    assert_same_model(directory, made["model"], "int4", "bfloat16")
    (directory / files[1]).unlink()
    refused(directory, f"^{directory} lacks {files[1]}; it holds {files[0]}, .*: copy the directory again")
    shutil.copy(directory / files[0], directory / "paligemma-int4-00001-of-00001.safetensors")
    refused(directory, f"lacks {files[1]}")


def forms_of(model: Path, kind: str) -> dict:
    stored = reference.load(model).params.stored
    return forms({name: x.shape for name, x in stored.items()}, "bfloat16", kind)


def test_each_value_is_aligned(made):
    for kind in FORMATS:
        for tensor in reference.load(made[kind]).params.stored.values():
            size = {"I8": 1, "F8_E4M3": 1, "BF16": 2, "F32": 4, "I32": 4}[tensor.dtype]
            assert tensor.offset % size == 0


def test_one_tensor_at_a_time_is_in_memory(made, tmp_path, monkeypatch):
    alive, most = [], 0

    def watched(*args):
        nonlocal most
        for name, value in reading.read_each(*args):
            alive.append(weakref.ref(value))
            most = max(most, sum(ref() is not None for ref in alive))
            yield name, value

    monkeypatch.setattr(saving, "read_each", watched)
    saved(made["model"], tmp_path / "saved", "int8")
    assert len(alive) > 60
    assert most <= 4  # codes, scales, what they were made from, and the tensor before


# Everywhere a model is named


def test_the_command_lines(made, image_file, tmp_path):
    line = ["--image", image_file, "--prompt", "caption en", "--no-sample", "--max-new-tokens", "4"]
    for kind in FORMATS:
        plain = run("--model", made[kind], *line)
        same = run("--model", made[kind], *line, "--quantize", kind)
        assert plain.text == same.text == run("--model", made["model"], *line, "--quantize", kind).text
        assert f"{made[kind]} holds {kind} weights already: --quantize can be left out" in same.err
    exact = run("--model", made["int4"], *line, "--backend", "reference", "--dtype", "bfloat16")
    assert exact.code == 0
    shutil.copy(image_file, tmp_path / "a.png")
    out = ["--out", tmp_path / "out.jsonl", "--no-sample", "--max-new-tokens", "4", "--prompt", "caption en"]
    done = run("--model", made["int4"], "--images", tmp_path, *out, module="paligemma.batch")
    assert done.code == 0, done.err
    assert json.loads((tmp_path / "out.jsonl").read_text())["text"]


def test_the_name_of_a_saved_checkpoint_has_its_format(made, tmp_path):
    def name(path: Path, *more: str) -> str:
        args = serve.parse_args(["--model", str(path), *more])
        return arguments.model_name(args, args.adapter)

    for kind in FORMATS:
        assert name(made[kind]) == name(made[kind], "--quantize", kind) == f"{made[kind]} ({kind})"
    assert name(made["model"]) == str(made["model"])
    assert name(made["model"], "--quantize", "fp8") == f"{made['model']} (fp8)"
    assert name(made["int4"], "--quantize", "int8") == f"{made['int4']} (int8)", "which loading refuses"
    assert name(tmp_path / "none") == str(tmp_path / "none")
    assert name(tmp_path / ("x" * 300)) == str(tmp_path / ("x" * 300))


def test_an_output_of_batch_belongs_to_one_format(made, tmp_path, image_file):
    """Repeating the format is no other model; another checkpoint under the same path is."""
    path, out = Path(shutil.copytree(made["int8"], tmp_path / "model")), tmp_path / "out.jsonl"
    line = ["--model", path, "--images", image_file.parent, "--prompt", "x", "--max-new-tokens", "2"]
    line += ["--out", out, "--device", "cpu"]
    assert run(*line, module="paligemma.batch").code == 0
    again = run(*line, "--quantize", "int8", module="paligemma.batch")
    assert (again.code, again.err) == (0, f"{out} has all 1 answers\n")
    shutil.rmtree(path)
    shutil.copytree(made["int4"], path)
    message = f"line 1 is an answer of the model {path} (int8), not of {path} (int4):"
    assert_one_line(run(*line, module="paligemma.batch"), message)


def test_a_model_of_the_hub(made, tmp_path, image_file):
    with Hub() as hub:
        files = {path.name: path.read_bytes() for path in made["fp8"].iterdir()}
        hub.repositories["someone/saved"] = {
            "main": files | {"paligemma-int8-00001-of-00001.safetensors": b""}
        }
        env = settings(hub, tmp_path / "home")
        line = ["--image", image_file, "--prompt", "caption en", "--no-sample", "--max-new-tokens", "2"]
        done = run("--model", "someone/saved", *line, env=env)
        assert done.code == 0, done.err
        assert done.text == run("--model", made["fp8"], *line).text
        fetched = {file for _, file in hub.fetched()}
        assert "paligemma-fp8-00001-of-00001.safetensors" in fetched
        assert "paligemma-int8-00001-of-00001.safetensors" not in fetched


@KINDS
def test_transformers_refuses_it(made, kind):
    """It would take codes for weights, with a warning."""
    import transformers

    for of in (transformers.AutoModelForImageTextToText, transformers.PaliGemmaForConditionalGeneration):
        with pytest.raises(OSError, match=r"no file named model\.safetensors"):
            of.from_pretrained(made[kind])


# Refusals of damaged or mislabelled checkpoints


def refused(directory: Path, message: str, **options: object) -> None:
    """The model and the reference refuse it with the same message."""
    for load in (
        lambda: load_hf_model(directory, device="cpu", **options),
        lambda: reference.load(directory),
    ):
        with pytest.raises(PaliGemmaError, match=message):
            load()


def edit(directory: Path, **changes: torch.Tensor | None) -> None:
    """Replace, add or (None) remove tensors; `up` is the name UP, `scale` that of its scales."""
    names = {"up": UP, "scale": f"{UP}_scale", "norm": "language_model.model.norm.weight"}
    tensors = load_file(weights(directory))
    for key, value in changes.items():
        tensors.pop(names.get(key, key), None)
        if value is not None:
            tensors[names.get(key, key)] = value
    save_file(tensors, weights(directory))


def other_scale(directory: Path, value: torch.Tensor) -> None:
    edit(directory, scale=value)


STRICT = {
    "a tensor is missing": ("int8", {"norm": None}, r"in int8: 1 missing \([\w.]+\.norm\.weight\)"),
    "scales are missing": ("int4", {"scale": None}, rf"in int4: 1 missing \({UP}_scale\)"),
    "a tensor is unexpected": ("fp8", {"extra": torch.zeros(2)}, r"in fp8: 1 unexpected \(extra\)"),
    "a float tensor": ("int8", {"up": torch.zeros(160, 96)}, rf"'{UP}' is F32 with shape .*; config\.json "
                       r"\(int8 for bfloat16\) asks for I8 with shape \(160, 96\)"),
    "an int8 tensor among int4": ("int4", {"up": torch.zeros(160, 96, dtype=torch.int8)},
                                  rf"'{UP}' is I8 .* asks for I32 with shape \(160, 12\)"),
    "an int4 tensor among int8": ("int8", {"up": torch.zeros(160, 12, dtype=torch.int32)}, rf"'{UP}' is I32"),
    "an fp8 tensor among int8": ("int8", {"up": torch.zeros(160, 96).to(torch.float8_e4m3fn)}, "is F8_E4M3"),
    "another shape": ("int4", {"up": torch.zeros(160, 11, dtype=torch.int32)}, r"with shape \(160, 11\)"),
    "scales of another dtype": ("int8", {"scale": torch.ones(160)}, rf"'{UP}_scale' is F32 .* asks for BF16"),
    "a scale a row for groups": ("int4", {"scale": torch.ones(160).bfloat16()},
                                 rf"'{UP}_scale' is BF16 with shape \(160,\).* \(160, 3\)"),
    "another dtype of the rest": ("int8", {"norm": torch.zeros(96)}, r"norm\.weight' is F32.*asks for BF16"),
}  # fmt: skip


@pytest.mark.parametrize("case", STRICT)
def test_it_is_strict(copied, case):
    kind, changes, message = STRICT[case]
    directory = copied(kind)
    edit(directory, **changes)
    refused(directory, message)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@KINDS
def test_scales_that_are_not_numbers(copied, kind, bad):
    directory = copied(kind)
    scale = load_file(weights(directory))[f"{UP}_scale"]
    scale.view(-1)[7] = bad
    edit(directory, scale=scale)
    with pytest.raises(
        PaliGemmaError, match=rf"'{UP}_scale' holds NaN or infinity: the checkpoint is damaged"
    ):
        load_hf_model(directory, device="cpu")
    network = reference.load(directory)
    with pytest.raises(
        PaliGemmaError, match=r"up_proj\.weight' holds NaN or infinity: the checkpoint is dam"
    ):
        network.forward(**batch(network.config, [3], [0]))


@pytest.mark.parametrize("bits", [0x7F, 0xFF])
def test_e4m3_codes_that_are_not_numbers(copied, bits):
    directory = copied("fp8")
    codes = load_file(weights(directory))[UP]
    codes.view(torch.uint8)[3, 5] = bits
    edit(directory, up=codes)
    with pytest.raises(PaliGemmaError, match=rf"'{UP}' holds NaN or infinity: the checkpoint is damaged"):
        load_hf_model(directory, device="cpu")
    network = reference.load(directory)
    with pytest.raises(PaliGemmaError, match=rf"'{UP}' holds NaN or infinity"):
        network.forward(**batch(network.config, [3], [0]))


ONE, OTHER = (f"paligemma-{kind}-00001-of-00001.safetensors" for kind in ("int8", "int4"))
FILES = {
    "cut off": (
        lambda d: os.truncate(weights(d), weights(d).stat().st_size - 1),
        "not a whole safetensors file .*: copy the directory again, or make it again",
    ),
    "none": (lambda d: weights(d).unlink(), rf"lacks {ONE}; it holds no such file"),
    "the files of another format": (
        lambda d: weights(d).rename(d / OTHER),
        rf"lacks {ONE}; it holds {OTHER}: copy the directory again",
    ),
    "files of two formats": (
        lambda d: shutil.copy(weights(d), d / OTHER), "several checkpoints",
    ),
    "files of two savings": (
        lambda d: [shutil.copy(d / ONE, d / f"paligemma-int8-0000{i}-of-00002.safetensors") for i in (1, 2)],
        "several checkpoints",
    ),
    "a float checkpoint's config.json": (
        lambda d: rewrite(d, None), rf"has no model\.safetensors .*it holds {ONE}, .*has lost its quantiz",
    ),
    "float weights beside them": (
        lambda d: shutil.copy(weights(d), d / "model.safetensors"),
        r"holds model\.safetensors beside weights in int8: remove one of them",
    ),
    "more layers than tensors": (
        lambda d: rewrite_text(d, num_hidden_layers=2**20), r"config\.json asks for 1048576 layers",
    ),
}  # fmt: skip


def rewrite(directory: Path, quantization: object) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | {"quantization_config": quantization}
    path.write_text(json.dumps(fields))


def rewrite_text(directory: Path, **text: object) -> None:
    fields = json.loads((directory / "config.json").read_text())
    fields["text_config"] |= text
    (directory / "config.json").write_text(json.dumps(fields))


@pytest.mark.parametrize("case", FILES)
def test_its_files(copied, case):
    directory = copied("int8")
    FILES[case][0](directory)
    refused(directory, FILES[case][1])


LABELS = {
    "a later version": ({"version": 2}, r"version is 2; this paligemma reads version 1: update it"),
    "no version": ({"version": None}, "version is None; this paligemma reads version 1"),
    "another format": ({"format": "int4"}, "bits is 8; it must be 4 for int4 in bfloat16"),
    "an unknown format": ({"format": "int2"}, "format is 'int2'; it must be one of int8, fp8, int4"),
    "a list": ({"format": ["int8"]}, r"format is \['int8'\]"),
    "other groups": ({"group_size": 32}, "group_size is 32; it must be null for int8 in bfloat16"),
    "another dtype": (
        {"dtype": "float32"},
        "scale_dtype is 'bfloat16'; it must be \"float32\" for int8 in float32",
    ),
    "another dtype of scales": (
        {"scale_dtype": "float32"},
        "scale_dtype is 'float32'; it must be \"bfloat16\"",
    ),
    "a number of another type": ({"bits": 8.0}, r"bits is 8\.0; it must be 8"),
    "an unknown field": ({"desc_act": True}, "has the unknown field 'desc_act'"),
}


@pytest.mark.parametrize("case", LABELS)
def test_its_quantization_config(copied, case):
    directory, (changes, message) = copied("int8"), LABELS[case]
    fields = json.loads((directory / "config.json").read_text())["quantization_config"]
    rewrite(directory, fields | changes)
    refused(directory, rf"^config\.json: quantization_config.*{message}")
    rewrite(directory, {name: value for name, value in fields.items() if name != "head"})
    refused(directory, r"quantization_config\.head is missing: make the checkpoint again")


def test_another_dtype_in_its_config_json(copied):
    directory = copied("int8")
    fields = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(fields | {"torch_dtype": "float32"}))
    refused(directory, "torch_dtype is 'float32'; it must be 'bfloat16', as quantization_config.dtype is")


def test_a_label_of_the_other_format_on_these_tensors(copied):
    """All of the label is that of int4, and the files have its name."""
    directory = copied("int8")
    rewrite(directory, Saved("int4", "bfloat16").config())
    weights(directory).rename(directory / "paligemma-int4-00001-of-00001.safetensors")
    refused(directory, r"is I8 with shape .*\(int4 for bfloat16\) asks for I32")


def test_an_npz_file_beside_its_config_json(made, tmp_path):
    shutil.copy(made["int8"] / "config.json", tmp_path)
    given = config()
    np.savez(tmp_path / "a.npz", **tree(given, random_weights(given)))
    refused(
        tmp_path / "a.npz",
        r"config\.json beside .*a\.npz is that of int8 weights, but an \.npz file has float",
    )


# Other uses than it is for


def test_another_format_another_dtype_and_an_adapter(made, tmp_path):
    path = made["int8"]
    with pytest.raises(
        PaliGemmaError, match=rf"^{path} holds int8 weights, not fp8: leave out --quantize, or qu"
    ):
        load_hf_model(path, device="cpu", quantize="fp8")
    again = r"python -m paligemma\.quantize MODEL DIR --quantize int8 --dtype float32$"
    with pytest.raises(PaliGemmaError, match=rf"^{path} was quantised for bfloat16, not float32: .*{again}"):
        load_hf_model(path, device="cpu", dtype="float32")
    assert load_hf_model(path, device="cpu", dtype=torch.bfloat16, quantize="int8")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 1, "target_modules": "x"})
    )
    save_file({"x": torch.zeros(1)}, adapter / "adapter_model.safetensors")
    merged = rf"no adapter can be merged: .*--quantize int8 --adapter {adapter}$"
    with pytest.raises(PaliGemmaError, match=merged):
        load_hf_model(path, device="cpu", adapter=adapter)
    with pytest.raises(PaliGemmaError, match=merged):
        reference.load(path, adapter=adapter)


def test_an_older_gpu_is_told_to_take_int8(made, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "RTX 3090")
    with pytest.raises(PaliGemmaError, match=r"^fp8 needs a GPU of compute capability 8\.9 or later"):
        load_hf_model(made["fp8"], device="cuda", backend="torch")


# The command


def left(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_where_it_does_not_write(made, tmp_path, capsys):
    model = Path(shutil.copytree(made["model"], tmp_path / "model"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    (tmp_path / "link").symlink_to(model)
    before = left(tmp_path), left(model)
    for directory, message in {
        tmp_path / "full": "is not empty: give the name of a new directory",
        tmp_path / "full" / "file": "is a file: give the name of a new directory",
        model: "is not empty", model / "saved": f"is in {model}, which is read: give a directory outside it",
        tmp_path / "link" / "saved": f"is in {model}, which is read",
        tmp_path / "none" / "saved": "the directory above it is missing or read-only",
        tmp_path / ("x" * 300): "cannot be made (File name too long): give another name",
        Path("/"): "is where a disk is mounted: give a new directory inside it",
    }.items():  # fmt: skip
        assert quantize.main([str(model), str(directory), "--quantize", "int8"]) == 1
        out, err = capsys.readouterr()
        assert (out, err.count("\n")) == ("", 1)
        assert f"error: {directory} " in err
        assert message in err
    assert (left(tmp_path), left(model)) == before
    (tmp_path / "empty").mkdir()
    saved(model, tmp_path / "empty", "int8")
    assert left(tmp_path) == sorted([*before[0], "empty"])


def test_what_it_does_not_quantise(made, tiny, tmp_path, capsys):
    assert quantize.main([str(made["int8"]), str(tmp_path / "a"), "--quantize", "int8"]) == 1
    assert f"{made['int8']} holds int8 weights already: give the float model" in capsys.readouterr().err
    assert quantize.main([str(tiny), str(tmp_path / "a"), "--quantize", "int4"]) == 1
    assert "int4 needs columns in multiples of 32; use int8" in capsys.readouterr().err
    assert left(tmp_path) == []


@KINDS
def test_a_damaged_model_is_not_saved(made, tmp_path, capsys, kind):
    model = Path(shutil.copytree(made["model"], tmp_path / "model"))
    tensors = load_file(weights(model))
    tensors[UP][3, 5] = torch.nan
    save_file(tensors, weights(model))
    assert quantize.main([str(model), str(tmp_path / "a"), "--quantize", kind]) == 1
    assert "mlp.up_proj.weight' of " in (said := capsys.readouterr().err)
    assert "holds NaN or infinity: the checkpoint is damaged" in said
    assert left(tmp_path) == ["model"]


def test_the_disk_that_is_measured_is_that_of_the_target(made, tmp_path, monkeypatch):
    (tmp_path / "large").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "large" / "saved")
    asked, usage = [], shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(Path(path)) or usage(path))
    assert quantize.main([str(made["model"]), str(tmp_path / "link"), "--quantize", "int8"]) == 0
    assert asked == [tmp_path / "large"]


def test_wrong_usage(made, tmp_path):
    for args in ([], ["--quantize", "int2"]):
        done = run(made["model"], tmp_path / "a", *args, module="paligemma.quantize")
        assert_one_line(done, "--quantize", "--help", code=2)
    assert_one_line(
        run(made["model"], "", "--quantize", "int8", module="paligemma.quantize"), "empty", code=2
    )


def test_a_run_that_is_interrupted_leaves_nothing(made, tmp_path, monkeypatch, capsys):
    write, count = writing.Writer.write, 0

    def interrupted(*args):
        nonlocal count
        count += 1
        if count == 20:
            assert len(left(tmp_path)) == 1  # what was written so far
            raise KeyboardInterrupt
        write(*args)

    monkeypatch.setattr(writing.Writer, "write", interrupted)
    assert quantize.main([str(made["model"]), str(tmp_path / "saved"), "--quantize", "int8"]) == 130
    assert capsys.readouterr() == ("", "\ninterrupted\n")
    assert left(tmp_path) == []


@pytest.mark.skipif(sys.platform == "win32", reason="sets a limit of POSIX")
def test_a_disk_that_refuses_leaves_nothing(made, tmp_path, monkeypatch, capsys):
    args = [str(made["model"]), str(tmp_path / "saved"), "--quantize", "int8"]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))  # bytes of a file
    try:
        code = quantize.main(args)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'saved'} cannot be written (File too large)\n"
    assert left(tmp_path) == []

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(saving.os, "fsync", full)
    assert quantize.main(args) == 1
    assert "is full, and nothing was kept: free some space, or give" in capsys.readouterr().err
    assert left(tmp_path) == []


def test_space_is_checked_before_it_is_taken(made, tmp_path, monkeypatch, capsys):
    size = writing.file_bytes(forms_of(made["model"], "int8"))
    args = [str(made["model"]), str(tmp_path / "saved"), "--quantize", "int8"]
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=size + saving.SIDE - 1))
    monkeypatch.setattr(saving, "_appearing", None)  # is not reached
    assert quantize.main(args) == 1
    assert "GB free: free some space, or give a directory on another disk" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * size + saving.SIDE))
    table = 1664 * (96 + 2)  # bytes of the 8-bit copy of the embedding and of its scales, the largest of all
    monkeypatch.setattr(saving, "free_memory", lambda: table - 1)
    assert quantize.main(args) == 1
    assert (
        "quantising this model needs 0.0 GB of memory; this machine has 0.0 GB free"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(saving, "free_memory", lambda: table)
    with pytest.raises(TypeError):  # it goes on
        quantize.main(args)


def test_help_imports_neither_torch_nor_numpy():
    probe = """if True:
        import sys, paligemma.quantize
        try:
            paligemma.quantize.main(["--help"])
        except SystemExit:
            pass
        sys.exit(bool({"torch", "numpy", "PIL", "huggingface_hub"} & set(sys.modules)))
    """
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, check=False)
    assert done.returncode == 0
    for option in ("MODEL", "DIR", "--quantize", "--dtype", "--adapter", "--tokenizer", "--revision"):
        assert option in done.stdout.decode()


# How much memory a model needs


def test_the_table_of_the_readme():
    names = {"PaliGemma 3B": "paligemma-3b", "PaliGemma 2 3B": "paligemma2-3b"}
    names |= {f"PaliGemma 2 {size}": f"paligemma2-{size.lower()}" for size in ("10B", "28B")}
    text = (ROOT / "README.md").read_text()
    cards = re.search(r"smallest GPU of ([\d, and]+) GB", text)
    assert cards
    assert tuple(map(int, re.findall(r"\d+", cards[1]))) == memory.CARDS
    for title, model in names.items():
        row = re.search(rf"^\| {title} \|(.*)\|$", text, re.MULTILINE)
        assert row, title
        for cell, kinds in zip(row[1].split("|"), ((None,), ("int8", "fp8"), ("int4",)), strict=True):
            for kind in kinds:
                configs = [
                    PaliGemmaConfig.from_dict(config_for(size, "bfloat16", model)) for size in (224, 448, 896)
                ]
                needed = [memory.needed_bytes(config, "bfloat16", kind) for config in configs]
                fitting = {memory.smallest_card(size) for size in needed}
                assert len(fitting) == 1  # the same card for every resolution
                least, most = (f"{size / 1e9:.1f}" for size in (needed[0], needed[-1]))
                assert cell.strip() == f"{least} to {most}: {fitting.pop()} GB"


def test_the_cards():
    assert memory.smallest_card(8 * 2**30 - memory.RESERVED) == 8
    assert memory.smallest_card(8 * 2**30 - memory.RESERVED + 1) == 12
    assert memory.smallest_card(80 * 2**30) is None


@pytest.mark.parametrize("second", [False, True])
def test_the_memory_of_an_answer_holds_its_cache(second):
    given = PaliGemmaConfig.from_dict(config(second))
    tokens = 40
    taken = tokens * position_bytes(given.text_config, torch.bfloat16)
    t, v = given.text_config, given.vision_config
    hidden = max(tokens * (4 * t.hidden_size + 3 * t.intermediate_size),
                 v.num_patches * (6 * v.hidden_size + 2 * v.intermediate_size))  # fmt: skip
    assert memory.answer_bytes(given, "bfloat16", tokens) == taken + 2 * hidden
