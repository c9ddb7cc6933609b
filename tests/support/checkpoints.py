"""Small checkpoints in the published format on disk. Their weights are random, and every token depends on the
context."""

import io
import json
import os
from math import prod
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save_file

from benchmarks.random_checkpoint import write_side_files
from paligemma.checkpoint.stored import EMBEDDING, HEAD, expected_shapes
from paligemma.config import PaliGemmaConfig

PIECES = 1600  # of the tokenizer below: 448, and 1152 <loc> and <seg> pieces
IMAGE_TOKEN = PIECES
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
STORED = {**TORCH, "float64": torch.float64}  # dtypes of files

# Shapes that do not match by chance: no width is a power of two or equals another one. 16 patches.
TINY = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "model_type": "paligemma",
    "hidden_size": 2048,  # a stale copy, as in the published PaliGemma 2
    "image_token_index": IMAGE_TOKEN,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "projection_dim": 88,
    "torch_dtype": "float32",
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 88,
        "intermediate_size": 152,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 24,
        "vocab_size": PIECES + 64,
    },
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 72,
        "intermediate_size": 100,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "patch_size": 14,
        "image_size": 56,
        "projection_dim": 88,
        "vision_use_head": False,
    },
}


# Changes of TINY that make its decoder's matrices whole groups of 4-bit numbers.
WHOLE_GROUPS = {
    "text": {"hidden_size": 96, "intermediate_size": 160}, "vision": {"projection_dim": 96},
    "projection_dim": 96,
}  # fmt: skip

# Changes of TINY's text_config that give a PaliGemma 2, with softcaps low enough to matter.
GEMMA_2 = {
    "model_type": "gemma2",
    "num_key_value_heads": 2,
    "query_pre_attn_scalar": 20,
    "attn_logit_softcapping": 3.0,
    "final_logit_softcapping": 1.5,
    "hidden_activation": "gelu_pytorch_tanh",
}
GEMMA_2_SHAPES = {
    "Gemma 2": {"text": GEMMA_2},
    "Gemma 2, a window": {"text": {**GEMMA_2, "sliding_window": 7}},
    "Gemma 2, layers listed": {
        "text": {
            **GEMMA_2, "num_key_value_heads": 4, "head_dim": 16, "sliding_window": 21,
            "final_logit_softcapping": None,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
        }
    },
}  # fmt: skip


def config_dict(text: dict | None = None, vision: dict | None = None, **top) -> dict:
    """TINY with some values replaced; a value of None removes the key."""
    config = json.loads(json.dumps(TINY))
    for section, values in ((config["text_config"], text), (config["vision_config"], vision), (config, top)):
        section.update(values or {})
        for name in [name for name, value in section.items() if value is None]:
            del section[name]
    return config


def random_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Canonical name -> float32. The outputs of attention and MLP are large, so that greedy decoding does not
    repeat one token."""
    rng = np.random.default_rng(seed)
    weights, second = {}, config["text_config"].get("model_type") == "gemma2"
    for name, shape in expected_shapes(PaliGemmaConfig.from_dict(config)).items():
        leaf = name.split(".")[-2]
        if leaf.startswith("post_") and second and "language" in name:
            # This norm scales the output of Gemma 2's attention or MLP.
            value = (6 if "feedforward" in leaf else 1) + 0.5 * rng.standard_normal(shape)
        elif name.endswith("bias") or "layernorm" in leaf or leaf == "norm":
            value = 0.2 * rng.standard_normal(shape)
        elif "layer_norm" in leaf:
            value = 1 + 0.2 * rng.standard_normal(shape)
        elif leaf == "position_embedding":
            value = 0.5 * rng.standard_normal(shape)
        elif leaf == "embed_tokens":
            value = rng.standard_normal(shape) / np.sqrt(shape[1])
            # `<image>` and unused rows: small noise, as in the published files.
            value[config["image_token_index"] :] *= 0.01
        else:
            gain = {"o_proj": 6.0, "down_proj": 6.0, "linear": 2.0}.get(leaf, 1.5)
            value = gain * rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))
        weights[name] = torch.from_numpy(value.astype(np.float32))
    return weights


# The five forms of tensor names that transformers has written: the prefixes of SigLIP, Gemma and the
# projector, and the name of a stored head.
PROJECTOR, OLD_HEAD, NEW_HEAD = "multi_modal_projector.", "language_model.lm_head.weight", "lm_head.weight"
LAYOUTS = {
    "hub": ("vision_tower.vision_model.", "language_model.model.", PROJECTOR, OLD_HEAD),
    "flat vision": ("vision_tower.", "language_model.model.", PROJECTOR, OLD_HEAD),
    "model prefix": (
        "model.vision_tower.vision_model.", "model.language_model.model.", f"model.{PROJECTOR}", NEW_HEAD,
    ),
    "state dict 4.52": (
        "model.vision_tower.vision_model.", "model.language_model.", f"model.{PROJECTOR}", NEW_HEAD,
    ),
    "state dict 5.8": ("model.vision_tower.", "model.language_model.", f"model.{PROJECTOR}", NEW_HEAD),
}  # fmt: skip


def rename(name: str, layout: str) -> str:
    """Translate a canonical name to another layout."""
    for canonical, other in zip(LAYOUTS["hub"], LAYOUTS[layout], strict=True):
        if name.startswith(canonical):
            return other + name.removeprefix(canonical)
    raise AssertionError(name)


def write_checkpoint(
    directory: Path,
    tokenizer_model: bytes,
    *,
    config: dict | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    layout: str = "hub",
    dtype: str = "float32",
    shards: int = 1,
    lm_head: bool = False,
) -> Path:
    """Write a checkpoint directory as a download of it would be, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    config = config or config_dict(torch_dtype=dtype)
    weights = dict(weights or random_weights(config))
    if lm_head:
        weights[HEAD] = weights[EMBEDDING].clone()
    named = {rename(name, layout): value.to(STORED[dtype]).contiguous() for name, value in weights.items()}
    write_side_files(directory, config, tokenizer_model)
    if shards == 1:
        save_file(named, directory / "model.safetensors", metadata={"format": "pt"})
        return directory
    names = list(named)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i * len(names) // shards : (i + 1) * len(names) // shards]
        save_file({name: named[name] for name in part}, directory / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def batch(
    config, prompt_lengths: list[int], suffix_lengths: list[int], padding: str = "left", seed: int = 0,
    images: list[int] | None = None,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Random images, one for each row unless their numbers are given, followed by random prompts and
    suffixes, padded on one side."""
    images = images or [1] * len(prompt_lengths)
    rng = np.random.default_rng(seed)
    P, size = config.vision_config.num_patches, config.vision_config.image_size
    lengths = [p + s for p, s in zip(prompt_lengths, suffix_lengths, strict=True)]
    texts = [rng.integers(4, 1600, size=length).tolist() for length in lengths]
    rows = [[IMAGE_TOKEN] * P * count + text for count, text in zip(images, texts, strict=True)]
    B, T = len(rows), max(map(len, rows))
    ids, mask, types = np.zeros((B, T), np.int64), np.zeros((B, T), np.int64), np.zeros((B, T), np.int64)
    for b, row in enumerate(rows):
        place = slice(T - len(row), T) if padding == "left" else slice(0, len(row))
        ids[b, place], mask[b, place] = row, 1
        types[b, place] = [0] * (len(row) - suffix_lengths[b]) + [1] * suffix_lengths[b]
    pixels = rng.uniform(-1, 1, (sum(images), 3, size, size)).astype(np.float32)
    return {"input_ids": ids, "pixel_values": pixels, "attention_mask": mask, "token_type_ids": types}


def torch_inputs(inputs: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in inputs.items()}


def write_zeros(file: Path, tensors: dict[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write a sparse safetensors file of zeros, which takes no disk space; tensors: name -> dtype, shape."""
    at, header = 0, {}
    for name, (dtype, shape) in tensors.items():
        end = at + prod(shape) * {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I16": 2}.get(dtype, 1)
        header[name], at = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}, end
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(file, 8 + len(text) + at)


def train_tokenizer(*symbols: str) -> bytes:
    """A SentencePiece model with PaliGemma's conventions (ids of pad, eos, bos, unk; bytes; <loc> and <seg>)
    and 1,600 pieces; `symbols` are user-defined pieces before the others."""
    words = [
        "a", "the", "cat", "dog", "red", "green", "circle", "left", "of", "above", "detect", "caption",
        "answer", "en", "what", "is", "this",
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    characters = "".join(map(chr, range(33, 127)))
    sentences = [" ".join(rng.choice(words, size=8)) for _ in range(400)] + [characters] * 20
    pieces = [*symbols, "\n", "\n\n", "▁▁"]
    pieces += [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="bpe", byte_fallback=True,
        vocab_size=PIECES + len(symbols), hard_vocab_limit=True, user_defined_symbols=pieces, minloglevel=2,
        normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False,
        split_by_unicode_script=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>", unk_piece="<unk>",
    )  # fmt: skip
    return model.getvalue()
