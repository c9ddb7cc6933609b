"""Folders that trainers, merges, caches, clones and converters leave: each loads as transformers loads it, or
the error says what it is."""

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import decoding
import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, batch, config_dict, random_weights, torch_inputs, write_checkpoint
from safetensors.torch import load_file, save_file

from paligemma import PaliGemmaError, engines, generate, load_hf_model, loading, pictures, reference
from paligemma.checkpoint.stored import EMBEDDING, HEAD
from paligemma.layers import EIGHT_BITS

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
LAYER = "language_model.model.layers.0"
FREQUENCIES = 10000.0 ** (-torch.arange(12) / 12)  # for a head size of 24
POSITIONS = torch.arange(16)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_model) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "model", tokenizer_model)


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, tokenizer_model) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("base") / "sharded", tokenizer_model, shards=3)


@pytest.fixture
def copy(base, tmp_path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "model"))


def edit(directory: Path, change: Callable[[dict], object], file: str = SINGLE) -> None:
    """Change the tensors of a file."""
    tensors = load_file(directory / file)
    change(tensors)
    save_file(tensors, directory / file, metadata={"format": "pt"})


def put(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Add or replace tensors."""
    edit(directory, lambda t: t.update(tensors))


def configure(directory: Path, file: str = "config.json", text: dict | None = None, **values) -> None:
    config = json.loads((directory / file).read_text())
    config.update(values)
    config.get("text_config", {}).update(text or {})
    (directory / file).write_text(json.dumps(config))


def other_head(seed: int = 1) -> torch.Tensor:
    return torch.randn(1664, 88, generator=torch.Generator().manual_seed(seed)) / 88**0.5


def encode(directory: Path, encoding: str) -> None:
    for file in directory.glob("*.json"):
        file.write_bytes(file.read_text().encode(encoding))


def whole_shards(directory: Path) -> None:
    (directory / SINGLE).unlink()
    tensors = random_weights(config_dict())
    names = list(tensors)
    for i in range(2):
        file = directory / f"model-0000{i + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in names[i::2]}, file)


def twice(directory: Path, change: float = 0.0) -> None:
    """Two shards with an index; one tensor is in both, changed in the second."""
    whole_shards(directory)
    files = sorted(file.name for file in directory.glob("model-*"))
    tensors = [load_file(directory / file) for file in files]
    index = {name: file for file, held in zip(files, tensors, strict=True) for name in held}
    shared = next(name for name in tensors[0] if name.endswith("q_proj.weight"))
    edit(directory, lambda t: t.update({shared: tensors[0][shared] + change}), files[1])
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))


# Folders that load

FREQUENCY = f"{LAYER}.self_attn.rotary_emb.inv_freq"
POSITION = "vision_tower.vision_model.embeddings.position_ids"
LEFT_BEHIND = [
    {"quant_method": "bitsandbytes", "load_in_4bit": True},
    {"load_in_8bit": True},
    {"quant_method": "gptq", "bits": 4},
]
ROPE = {"rope_type": "default", "rope_theta": 500.0}
LOADED = {
    "the head alone": lambda d: edit(d, lambda t: t.update({HEAD: t.pop(EMBEDDING)})),
    "a head of its own": lambda d: put(d, {HEAD: other_head()}),
    "a head of its own, and config.json says so": lambda d: (
        put(d, {HEAD: other_head()}), configure(d, tie_word_embeddings=False)
    ),
    "not tied, and equal": lambda d: (
        edit(d, lambda t: t.update({HEAD: t[EMBEDDING].clone()})), configure(d, tie_word_embeddings=False)
    ),
    "not tied, by the section that does not count": lambda d: configure(
        d, text={"tie_word_embeddings": False}
    ),
    "a head in bfloat16": lambda d: edit(d, lambda t: t.update({HEAD: t[EMBEDDING].bfloat16()})),
    "buffers": lambda d: put(d, {FREQUENCY: FREQUENCIES, POSITION: POSITIONS}),
    "buffers in 16 bits": lambda d: put(d, {
        FREQUENCY: FREQUENCIES.half(), "model.language_model.rotary_emb.inv_freq": FREQUENCIES.bfloat16()
    }),
    "float64": lambda d: edit(d, lambda t: t.update({name: value.double() for name, value in t.items()})),
    "null ids": lambda d: configure(d, bos_token_id=None, eos_token_id=None, pad_token_id=None),
    "bidirectional attention": lambda d: configure(d, text={"use_bidirectional_attention": False}),
    "both names of the image's token": lambda d: configure(d, image_token_id=1600),
    "a tensor in two shards": lambda d: twice(d),
    "rope_scaling": lambda d: configure(d, text={"rope_scaling": {"type": "default"}, "rope_theta": 700.0}),
    "rope_scaling and its theta": lambda d: configure(d, text={"rope_scaling": ROPE, "rope_theta": 700.0}),
    "rope_scaling wins": lambda d: configure(
        d, text={"rope_scaling": {"type": "default"}, "rope_parameters": ROPE}
    ),
}  # fmt: skip
# transformers refuses these, but loads the folder without the peculiarity: a byte order mark, an absent
# index, a quantization_config.
LOADED_HERE = {
    "UTF-8 with a byte order mark": lambda d: encode(d, "utf-8-sig"),
    "UTF-16": lambda d: encode(d, "utf-16"),
    "shards without an index": whole_shards,
    **{
        f"quantization_config {kind}": lambda d, kind=kind: configure(d, quantization_config=kind)
        for kind in LEFT_BEHIND
    },
}


def peer_logits(directory: Path, inputs: dict) -> np.ndarray:
    from transformers import PaliGemmaForConditionalGeneration

    options = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = PaliGemmaForConditionalGeneration.from_pretrained(directory, **options)
    with torch.no_grad():
        return model(**torch_inputs(inputs)).logits.numpy()


def assert_equal_to(directory: Path, theirs: Path) -> np.ndarray:
    """Check that the logits of the model and of the reference from a folder are those of transformers from
    another one, and return these."""
    model, _ = load_hf_model(directory, device="cpu", dtype="float32")
    inputs = batch(model.config, [3, 9], [4, 0])
    valid = inputs["attention_mask"].astype(bool)
    expected = peer_logits(theirs, inputs)[valid]
    assert 0.5 < np.sqrt(np.mean(expected**2)) < 2
    assert np.abs(model(**torch_inputs(inputs)).numpy()[valid] - expected).max() < 1e-4  # as in test_peers.py
    assert np.abs(reference.load(directory).forward(**inputs)[valid] - expected).max() < 1e-4
    return expected


@pytest.mark.parametrize("kind", LOADED)
def test_it_loads_as_in_transformers(copy, kind):
    LOADED[kind](copy)
    assert_equal_to(copy, copy)


@pytest.mark.parametrize("kind", LOADED_HERE)
def test_it_loads_as_the_folder_that_was_meant(copy, base, kind, capsys):
    LOADED_HERE[kind](copy)
    assert_equal_to(copy, base)
    told = capsys.readouterr().err.splitlines()
    method = "gptq" if "gptq" in kind else "bitsandbytes"
    says = f"{copy}: config.json has a quantization_config ({method})"
    says += ", but the weights are float and are used as they are"
    times = 2 if "quantization" in kind else 0  # the model and the reference
    assert [line for line in told if "quantization" in line] == [says] * times


@pytest.mark.parametrize("family", ["Gemma", "Gemma 2"])
def test_a_head_of_its_own_decodes(tmp_path, tokenizer_model, family, image_file):
    """Greedy tokens of transformers, the model on each backend, and the reference."""
    from transformers import PaliGemmaForConditionalGeneration

    config = config_dict(text={} if family == "Gemma" else GEMMA_2)
    weights = random_weights(config)
    weights[HEAD] = 3 * other_head()
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config, weights=weights)
    inputs = batch(load_hf_model(directory, device="cpu")[0].config, [5], [0])
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": 1663}
    peer = PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    sequences = peer.generate(**torch_inputs(inputs), **options, pad_token_id=0).numpy()
    expected = sequences[:, inputs["input_ids"].shape[1] :]
    assert len(set(expected[0].tolist())) > 3
    for backend in ("torch", "triton"):
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", backend=backend)
        assert np.array_equal(model.generate(**torch_inputs(inputs), **options).numpy(), expected), backend
    assert np.array_equal(reference.load(directory).generate(**inputs, **options), expected)


@pytest.fixture(scope="module")
def own_head(tmp_path_factory, tokenizer_model) -> Path:
    weights = random_weights(config_dict())
    weights[HEAD] = other_head()
    directory = tmp_path_factory.mktemp("own") / "model"
    return write_checkpoint(directory, tokenizer_model, weights=weights, dtype="bfloat16")


@pytest.mark.parametrize("quantize", [None, *EIGHT_BITS])
def test_a_head_of_its_own_is_read_once_and_quantized_itself(own_head, image_file, quantize, monkeypatch):
    model, _ = load_hf_model(own_head, device="cpu", quantize=quantize)
    head, table = model.get_parameter(HEAD), model.get_parameter(EMBEDDING)
    assert table.dtype == torch.bfloat16
    scale = 1 if quantize is None else model.get_parameter(f"{HEAD}_scale").float()[:, None]
    allowed = {None: 0, "int8": 0.01, "fp8": 2**-4}[quantize] * other_head().abs().max()
    assert (head.float() * scale - other_head().bfloat16().float()).abs().max() <= allowed
    inputs = batch(model.config, [3, 9], [4, 0])
    valid = inputs["attention_mask"].astype(bool)
    truth = torch.from_numpy(reference.load(own_head).forward(**inputs)[valid])
    difference = model(**torch_inputs(inputs))[torch.from_numpy(valid)] - truth
    error = difference.square().mean().sqrt() / truth.square().mean().sqrt()
    assert error < {None: 0.04, "int8": 0.1, "fp8": 0.2}[quantize]  # with the embedding as the head: 1.4
    line = ["--model", str(own_head), "--image", str(image_file), "--prompt", "caption en", "--device", "cpu"]
    args = generate.parse_args(line)
    args.quantize, args.temperature = quantize, 0.0
    monkeypatch.setattr(engines, "LIMITED", 0)  # of small models too, say the rate
    read = engines.torch_engine(args, pictures.read_images(args.image)).bytes_per_token
    assert read == sum(p.nbytes for p in model.language_model.parameters()) - table.nbytes


@pytest.mark.parametrize("quantize", [None, *EIGHT_BITS])
def test_a_head_of_its_own_takes_memory(own_head, monkeypatch, quantize):
    network, _ = load_hf_model(own_head, device="cpu", dtype="float32", quantize=quantize)
    needed = sum(p.nbytes for p in network.parameters())
    monkeypatch.setattr(loading, "free_bytes", lambda _: needed)
    load_hf_model(own_head, device="cpu", dtype="float32", quantize=quantize)
    monkeypatch.setattr(loading, "free_bytes", lambda _: needed - 1)
    with pytest.raises(PaliGemmaError, match=r"this model needs 0\.0 GB"):
        load_hf_model(own_head, device="cpu", dtype="float32", quantize=quantize)


@pytest.mark.parametrize("quantize", EIGHT_BITS)
def test_the_kernels_take_a_quantized_head_of_its_own(own_head, quantize):
    logits = []
    for backend in ("torch", "triton"):
        model, _ = load_hf_model(own_head, device="cpu", dtype="float32", quantize=quantize, backend=backend)
        state = model.new_state(2, 8)
        state.cache.length.fill_(-1)
        decoding.append(model, state, torch.zeros(2, 1000), torch.tensor([5, 900]))
        logits.append(decoding.logits_of_next(model, state))
    torch.testing.assert_close(*logits, atol=5e-5, rtol=0)  # as in test_quantize.py


def test_the_newer_of_two_image_settings_wins(copy):
    from transformers import SiglipImageProcessorPil

    nested = json.loads((copy / "preprocessor_config.json").read_text())
    nested |= {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}
    (copy / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    image = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    ours = load_hf_model(copy, device="cpu")[1].arrays("a", image)["pixel_values"]
    theirs = SiglipImageProcessorPil.from_pretrained(copy)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(ours, theirs)
    # transformers 4 wrote a processor_config.json without an image processor.
    old = {"image_processor": None, "image_seq_length": 16}
    (copy / "processor_config.json").write_text(json.dumps(old))
    ours = load_hf_model(copy, device="cpu")[1].arrays("a", image)["pixel_values"]
    again = SiglipImageProcessorPil.from_pretrained(copy)(image, return_tensors="np")["pixel_values"]
    assert np.array_equal(ours, again)
    assert not np.array_equal(ours, theirs)


# Folders that do not load


def told(path: Path, **options) -> str:
    """The error for a folder, which is the same from the model and from the reference."""
    said = []
    loaders = (lambda: load_hf_model(path, device="cpu", **options), lambda: reference.load(path, **options))
    for load in loaders:
        with pytest.raises(PaliGemmaError) as caught:
            load()
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert "\n" not in said[0]
    return said[0]


def only(directory: Path, *files: str, config: bool = True) -> None:
    """Replace the weights by these files."""
    (directory / SINGLE).unlink()
    if not config:
        (directory / "config.json").unlink()
    for file in files:
        (directory / file).parent.mkdir(parents=True, exist_ok=True)
        (directory / file).write_bytes(b"x" * 8)


def pointer(file: Path) -> None:
    file.write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 4950000000\n")


def rename(directory: Path, change: Callable[[str], str], **more: torch.Tensor) -> None:
    tensors = {change(name): value for name, value in load_file(directory / SINGLE).items()}
    save_file(tensors | {name.replace("__", "."): value for name, value in more.items()}, directory / SINGLE)


def link(file: Path) -> None:
    file.unlink()
    file.symlink_to("../../blobs/0123abcd")


def unmerged(directory: Path) -> None:
    """The tensors of a PeftModel's inner model, in which the adapter is not merged."""
    import peft
    from transformers import PaliGemmaForConditionalGeneration

    model = PaliGemmaForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    tensors = {name: x.clone() for name, x in model.state_dict().items() if name != "lm_head.weight"}
    save_file(tensors, directory / SINGLE)


def part_beside_an_index(directory: Path) -> None:
    shutil.copy(directory / SINGLE, directory / SHARD)
    weight_map = dict.fromkeys(load_file(directory / SINGLE), SHARD)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    edit(directory, lambda t: [t.pop(name) for name in list(t)[:50]])


PROJECTION, WEIGHT = f"{LAYER}.mlp.up_proj", f"{LAYER}.mlp.up_proj.weight"
PATCH = "vision_tower.vision_model.embeddings.patch_embedding.weight"
BYTES = torch.zeros(8, 1, dtype=torch.uint8)
SHARD = "model-00001-of-00001.safetensors"
KERAS = '{"module": "keras_hub", "class_name": "PaliGemmaBackbone"}'
TOLD: dict[str, tuple[Callable[[Path], object], str]] = {
    "inv_freq of another theta": (
        lambda d: put(d, {FREQUENCY: FREQUENCIES * 1.001}),
        "rotary_emb.inv_freq' does not hold the frequencies of config.json's rope_theta, 10000",
    ),
    "inv_freq of another size": (
        lambda d: put(d, {FREQUENCY: FREQUENCIES[:6].clone()}), "does not hold the frequencies"
    ),
    "inv_freq of NaN": (
        lambda d: put(d, {FREQUENCY: FREQUENCIES * torch.nan}), "does not hold the frequencies"
    ),
    "inv_freq elsewhere": (
        lambda d: put(d, {f"{LAYER}.mlp.rotary_emb.inv_freq": FREQUENCIES}), "1 unexpected"
    ),
    "position_ids out of order": (
        lambda d: put(d, {POSITION: POSITIONS.flip(1)}),
        "position_ids' is not 0 to 15; other positions of the patches are not implemented",
    ),
    "no head": (
        lambda d: configure(d, tie_word_embeddings=False),
        "lacks lm_head.weight: config.json says that the output head is not tied",
    ),
    "a head alone that is not tied": (
        lambda d: (LOADED["the head alone"](d), configure(d, tie_word_embeddings=False)),
        f"1 missing ({EMBEDDING})",
    ),
    "a head of another vocabulary": (
        lambda d: put(d, {HEAD: other_head()[:1600].clone()}),
        "the output head 'language_model.lm_head.weight' is F32 with shape (1600",
    ),
    "bitsandbytes": (
        lambda d: (put(d, {WEIGHT: BYTES, f"{WEIGHT}.absmax": torch.zeros(2)}),
                   configure(d, quantization_config=LEFT_BEHIND[0])),
        "quantised weights (bitsandbytes): use the float checkpoint that they were made from",
    ),
    "bytes beside a quantization_config": (
        lambda d: (edit(d, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.int8)})),
                   configure(d, quantization_config=LEFT_BEHIND[1])),
        f"tensor '{WEIGHT}' is I8; only F64, F32, F16, BF16 are supported",
    ),
    "a quantization_config that changes float weights": (
        lambda d: configure(d, quantization_config={"quant_method": "fp8"}),
        "quantised checkpoints are not supported",
    ),
    "GPTQ": (
        lambda d: rename(d, lambda n: n.replace(WEIGHT, f"{PROJECTION}.qweight")),
        "quantised weights (GPTQ or AWQ)",
    ),
    "MLX quantised": (
        lambda d: put(d, {f"{PROJECTION}.{name}": torch.zeros(2, 2) for name in ("scales", "biases")}),
        "quantised weights (MLX)",
    ),
    "MLX": (
        lambda d: edit(d, lambda t: t.update({PATCH: t[PATCH].permute(0, 2, 3, 1).contiguous()})),
        "(72, 3, 14, 14): this is MLX's order of axes",
    ),
    "float8": (
        lambda d: (put(d, {f"{WEIGHT}_scale": torch.ones(1)}),
                   edit(d, lambda t: t.update({WEIGHT: t[WEIGHT].to(torch.float8_e4m3fn)}))),
        "quantised weights (float8, compressed-tensors or the like)",
    ),
    "not merged": (
        unmerged,
        "a model with an adapter that is not merged into it: "
        "call merge_and_unload() of peft and save the result",
    ),
    "torch.compile": (
        lambda d: rename(d, lambda n: f"_orig_mod.{n}"),
        "a model saved from inside torch.compile or a parallel wrapper",
    ),
    "ColPali's tensors": (
        lambda d: rename(d, lambda n: n, custom_text_proj__weight=torch.zeros(4, 88)),
        "but ColPali, which computes embeddings of pages",
    ),
    "pi0's tensors": (
        lambda d: rename(d, lambda n: f"paligemma_with_expert.paligemma.{n}"), "a pi0, a robot's policy"
    ),
    "ColPali": (
        lambda d: configure(d, model_type="colpali"),
        "its config.json has model_type 'colpali': it holds ColPali",
    ),
    "pi0": (
        lambda d: (d / "config.json").write_text('{"type": "pi0"}'),
        "its config.json has type 'pi0': it holds a pi0",
    ),
    "SigLIP": (lambda d: configure(d, model_type="siglip"), "it holds SigLIP"),
    "Gemma 3": (lambda d: configure(d, model_type="gemma3"), "it holds Gemma 3"),
    "two image tokens": (
        lambda d: configure(d, image_token_id=1601),
        "image_token_index is 1600 and image_token_id is 1601, two names of one thing",
    ),
    "pi0-FAST": (
        lambda d: (d / "config.json").write_text('{"type": "pi0_fast"}'),
        "its config.json has type 'pi0_fast': it holds a pi0-FAST",
    ),
    "Keras Hub": (
        lambda d: (only(d, "model.weights.h5"), (d / "config.json").write_text(KERAS)),
        "it holds a PaliGemma of Keras Hub: use the checkpoint for transformers",
    ),
    "a tensor in two shards": (lambda d: twice(d, 1.0), "model-00002-of-00002.safetensors both hold tensor"),
    "an enormous config.json": (
        lambda d: os.truncate(d / "config.json", 1 << 42),
        "config.json has 4398.0 GB, and such a file has less than 0.3 GB: download it again",
    ),
    "a pipe": (
        lambda d: ((d / "config.json").unlink(), os.mkfifo(d / "config.json")),
        "config.json is a pipe or a device, not JSON",
    ),
    "another model": (lambda d: configure(d, model_type="llava"), "model_type is 'llava', not 'paligemma'"),
    "a part beside an index": (
        part_beside_an_index,
        "model.safetensors lacks 50 of the model's tensors",
    ),
    "shards without an index, one missing": (
        lambda d: (whole_shards(d), (d / "model-00001-of-00002.safetensors").unlink()),
        "only 1 of its 2 shards: download it again",
    ),
    "the state of a training": (
        lambda d: only(d, "optimizer.bin", "scheduler.bin", "training_args.bin"),
        "it holds the state of a training (optimizer.bin) and no weights",
    ),
    "a pickle beside the state of a training": (
        lambda d: only(d, "optimizer.bin", "pytorch_model.bin", "training_args.bin"),
        "it holds pytorch_model.bin, a pickle, which is never opened",
    ),
    "a state in parts": (
        lambda d: only(d, "rng_state_0.pth", "random_states_0.pkl"),
        "it holds the state of a training (random_states_0.pkl) and no weights",
    ),
    "OpenVINO": (
        lambda d: only(d, "openvino_model.bin", "openvino_model.xml"),
        "it holds openvino_model.bin, a model for OpenVINO",
    ),
    "GGML": (
        lambda d: only(d, "ggml-model-f16.bin", config=False),
        "it holds ggml-model-f16.bin, a GGML file of llama.cpp",
    ),
    "ONNX": (
        lambda d: only(d, "onnx/decoder.onnx"), "it holds onnx/decoder.onnx, a file of another framework"
    ),
    "a variant": (
        lambda d: only(d, "model.fp16.safetensors"),
        "it holds model.fp16.safetensors, weights whose name has a variant: if",
    ),
    "a variant in shards": (
        lambda d: only(d, "model.fp16-00001-of-00002.safetensors"), "weights whose names have a variant"
    ),
    "an interrupted download": (
        lambda d: only(d, ".cache/huggingface/download/abc.incomplete"),
        "its download was interrupted: run the same hf download again",
    ),
    "a link that leads to itself": (
        lambda d: (only(d, "pytorch_model.bin"), (d / "a").symlink_to(d / "a")),
        "it holds pytorch_model.bin, a pickle",
    ),
    "distributed shards": (
        lambda d: only(d, "optimizer.bin", "global_step5/zero_pp_rank_0_model_states.pt"),
        "it holds the shards of a distributed training (global_step5/zero",
    ),
    "GGUF": (
        lambda d: only(d, "x-Q4_K.gguf", config=False),
        "it holds x-Q4_K.gguf, a GGUF file of llama.cpp, which is not supported",
    ),
    "npz": (lambda d: only(d, "pt_224.npz", config=False), "model/pt_224.npz"),
    "a pickle": (lambda d: only(d, "model.pt", config=False), "it holds model.pt, a pickle"),
    "consolidated.safetensors": (
        lambda d: only(d, "consolidated.safetensors"),
        "it holds consolidated.safetensors, whose tensors have another",
    ),
    "an adapter": (
        lambda d: ((d / "adapter_config.json").write_text('{"base_model_name_or_path": "google/x"}'),
                   only(d, "adapter_model.safetensors", "training_args.bin", config=False)),
        "holds an adapter and no model: "
        "give the model that it was trained on as well: --model google/x --adapter ",
    ),
    "an adapter beside the base's config": (
        lambda d: ((d / "adapter_config.json").write_text("{}"), only(d, "adapter_model.safetensors")),
        "holds an adapter and no model: give the model",
    ),
    "an adapter that names its own folder": (
        lambda d: ((d / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": f"{d}/"})),
                   only(d, "adapter_model.safetensors", config=False)),
        "that it was trained on as well: --model BASE --adapter ",
    ),
    "a model and an adapter": (
        lambda d: (d / "adapter_config.json").write_text("{}"), "holds a model and an adapter: give --model"
    ),
    "a link to nothing": (
        lambda d: link(d / SINGLE),
        "model.safetensors is a link to ../../blobs/0123abcd, which does not exist: download it again",
    ),
    "config.json a link to nothing": (
        lambda d: link(d / "config.json"),
        "config.json is a link to ../../blobs/0123abcd, which does not exist",
    ),
    "config.json a pointer": (
        lambda d: pointer(d / "config.json"),
        "config.json is not JSON: it is git's pointer to the file: run 'git lfs pull'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOLD)
def test_it_is_told_what_it_is(copy, kind):
    make, message = TOLD[kind]
    make(copy)
    said = told(copy)
    assert message in said
    assert str(copy) in said or SINGLE in said or "config.json" in said


def test_a_shard_that_is_a_link_to_nothing(sharded, tmp_path):
    directory = Path(shutil.copytree(sharded, tmp_path / "model"))
    shard = "model-00002-of-00003.safetensors"
    link(directory / shard)
    assert f"{shard} is a link to ../../blobs/0123abcd, which does not exist" in told(directory)


FILES = [SINGLE, "config.json", "tokenizer.model", "adapter_model.safetensors", "x.gguf", "model.pt"]


@pytest.mark.parametrize("file", FILES)
def test_a_file_in_place_of_its_folder(copy, file):
    (copy / file).touch()
    said = told(copy / file)
    assert f"{copy / file} is " in said
    if file in ("x.gguf", "model.pt"):
        assert "give its folder" not in said
    else:
        option = "--adapter " if file.startswith("adapter") else ""
        assert said.endswith(f"give its folder, {option}{copy}")


@pytest.mark.parametrize(
    "below",
    [
        ["snapshots/0123abcd"], ["models--google--paligemma/snapshots/0123abcd"],
        ["hub/models--google--paligemma/snapshots/0123abcd"], ["model"],
        ["run/checkpoint-500"], ["checkpoint-500", "checkpoint-1000"],
    ],
    ids=str,
)  # fmt: skip
def test_the_folder_above(base, tmp_path, below):
    above = tmp_path / "above"
    for folder in below:
        shutil.copytree(base, above / folder)
    others = " (or one of 1 others beside it)" if len(below) > 1 else ""
    says = f"{above} has no config.json: it is not the directory of a checkpoint"
    assert told(above) == f"{says}: give {above / below[-1]}{others}"


def test_what_is_far_below_or_hidden_is_not_meant(base, tmp_path):
    for folder in ("a/b/c", ".git/model", ".hidden"):
        shutil.copytree(base, tmp_path / folder)
    (tmp_path / "a" / "model.gguf").touch()
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text('{"model_type": "llava"}')
    assert told(tmp_path) == f"{tmp_path} has no config.json: it is not the directory of a checkpoint"


def test_many_files_below(copy):
    (copy / "data").mkdir()
    for i in range(4100):
        (copy / "data" / f"{i}.jpg").touch()
    (copy / "adapter_config.json").write_text("{}")
    assert "holds a model and an adapter" in told(copy)
    only(copy, "pytorch_model.bin")
    (copy / "adapter_config.json").unlink()
    assert "it holds pytorch_model.bin, a pickle" in told(copy)


def test_a_name_that_is_not_utf_8(base, tmp_path):
    directory = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    shutil.copytree(base, directory)
    for backend in ("torch", "triton"):
        model, _ = load_hf_model(directory, device="cpu", dtype="float32", backend=backend)
        other, _ = load_hf_model(base, device="cpu", dtype="float32", backend=backend)
        pairs = zip(model.parameters(), other.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)
    assert reference.load(directory).config == model.config


@pytest.mark.parametrize("what", ["the folder", "the folder above", "an adapter's", "the tokenizer's"])
def test_folders_that_may_not_be_entered(base, what):
    with tempfile.TemporaryDirectory() as place:  # no other user may enter pytest's own directory
        os.chmod(place, 0o755)
        model, closed = Path(place) / "above" / "model", Path(place) / "above" / "closed"
        for folder in (model, closed):
            shutil.copytree(base, folder)
        for file in model.iterdir():
            os.chmod(file, 0o644)
        os.chmod(closed.parent, 0o000 if what == "the folder above" else 0o755)
        os.chmod(closed, 0o000)
        user = os.geteuid()
        load: dict[str, Callable[[], object]] = {
            "an adapter's": lambda: load_hf_model(model, device="cpu", adapter=closed),
            "the tokenizer's": lambda: load_hf_model(model, device="cpu", tokenizer=closed),
        }
        try:
            if user == 0:  # root may enter every folder
                os.seteuid(65534)
            if what == "an adapter's":
                with pytest.raises(PaliGemmaError, match="may not be entered"):
                    reference.load(model, adapter=closed)
            if what in load:
                with pytest.raises(PaliGemmaError) as caught:
                    load[what]()
                said = str(caught.value)
            else:
                said = told(closed)
            assert said == f"{closed} may not be entered (permission denied): change its permissions"
        finally:
            os.seteuid(user)
            os.chmod(closed.parent, 0o755)
            os.chmod(closed, 0o755)


def test_the_folder_above_an_adapter(tmp_path):
    for name in ("default", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_config.json").write_text("{}")
    others = "(or one of 1 others beside it)"
    says = f"but has the folder of an adapter in it: give {tmp_path / 'other'} {others}"
    assert told(tmp_path).endswith(says)


def test_a_link_to_nothing_in_place_of_a_folder(tmp_path):
    link, target = tmp_path / "model", tmp_path / "nowhere"
    link.symlink_to(target)
    assert told(link) == f"{link} is a link to {target}, which does not exist: download it again"


def test_a_pointer_in_place_of_an_npz_file(tmp_path):
    file = tmp_path / "pt_224.npz"
    pointer(file)
    says = "is not a whole .npz file: it is git's pointer to the file: run 'git lfs pull'"
    assert told(file).startswith(f"{file} {says}")


@pytest.mark.parametrize("file", [SINGLE, "config.json"])
def test_files_that_may_not_be_read(base, file):
    with tempfile.TemporaryDirectory() as place:  # no other user may enter pytest's own directory
        os.chmod(place, 0o755)
        directory = Path(shutil.copytree(base, Path(place) / "model"))
        os.chmod(directory, 0o755)
        for path in directory.iterdir():
            os.chmod(path, 0o000 if path.name == file else 0o644)
        user = os.geteuid()
        try:
            if user == 0:  # root may read every file
                os.seteuid(65534)
            denied = "may not be read (permission denied): change its permissions"
            assert told(directory) == f"{directory / file} {denied}"
        finally:
            os.seteuid(user)
