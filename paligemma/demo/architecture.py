"""The demo model before training: its configuration, its tokenizer, and its initial weights."""

import io
import json
import math
from pathlib import Path

import numpy as np
import sentencepiece
import torch
from safetensors.torch import save
from torch import Tensor

from ..checkpoint.stored import EMBEDDING, expected_shapes
from ..config import PaliGemmaConfig
from . import scenes, texts

LOCS, SEGS = 1024, 128
PIECES = 1728  # the tokenizer: 4 control pieces, newline, <loc>, <seg>, 256 bytes, 315 characters and words
PATCH, SIZE, WIDTH = 14, 112, 128  # pixels, pixels, hidden size

CONFIG = {  # the keys of the published PaliGemma 1
    "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
    "image_token_index": PIECES, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "hidden_size": WIDTH, "projection_dim": WIDTH, "torch_dtype": "bfloat16",
    "text_config": {
        "model_type": "gemma", "hidden_size": WIDTH, "intermediate_size": 256, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32,
        "num_image_tokens": (SIZE // PATCH) ** 2, "vocab_size": PIECES + 64, "max_position_embeddings": 512,
        "torch_dtype": "bfloat16",
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": WIDTH, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_image_tokens": (SIZE // PATCH) ** 2,
        "patch_size": PATCH, "image_size": SIZE, "projection_dim": WIDTH, "projector_hidden_act": "gelu_fast",
        "vision_use_head": False,
    },
}  # fmt: skip
PREPROCESSOR = {
    "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "SiglipImageProcessor",
    "image_seq_length": (SIZE // PATCH) ** 2, "processor_class": "PaliGemmaProcessor", "resample": 3,
    "rescale_factor": 1 / 255, "size": {"height": SIZE, "width": SIZE},
}  # fmt: skip
GENERATION = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}


def config() -> PaliGemmaConfig:
    return PaliGemmaConfig.from_dict(CONFIG, GENERATION)


def write(directory: Path, tokenizer: bytes, weights: dict[str, Tensor]) -> None:
    """Write a checkpoint with the files of the published ones, in bfloat16."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {"config": CONFIG, "generation_config": GENERATION, "preprocessor_config": PREPROCESSOR}
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    (directory / "tokenizer.model").write_bytes(tokenizer)
    rounded = {name: weights[name].detach().to(torch.bfloat16) for name in expected_shapes(config())}
    tensors = {name: value.contiguous() for name, value in rounded.items()}
    data = save(tensors, metadata={"format": "pt"})  # a file of save_file may be read by its owner only
    (directory / "model.safetensors").write_bytes(data)


def tokenizer_model() -> bytes:
    """A SentencePiece model of the demo's language, with PaliGemma's conventions. Other text is encoded as
    characters and bytes."""
    model = io.BytesIO()
    locs, segs = [f"<loc{i:04}>" for i in range(LOCS)], [f"<seg{i:03}>" for i in range(SEGS)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(_sentences()), model_writer=model, model_type="bpe", vocab_size=PIECES,
        hard_vocab_limit=True, byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=False,
        remove_extra_whitespaces=False, split_by_unicode_script=False, minloglevel=2, num_threads=1,
        pad_id=0, eos_id=1, bos_id=2, unk_id=3, pad_piece="<pad>", bos_piece="<bos>", eos_piece="<eos>",
        unk_piece="<unk>", user_defined_symbols=["\n", *locs, *segs],
    )  # fmt: skip
    return model.getvalue()


def _sentences() -> list[str]:
    """Prompts and answers about random scenes. Each word of the language occurs often enough to become one
    piece."""
    rng = np.random.default_rng(0)

    def shape() -> scenes.Shape:
        colour, kind = str(rng.choice(scenes.COLOURS)), str(rng.choice(scenes.KINDS))
        return scenes.Shape(colour, kind, (y := rng.random(), x := rng.random(), y, x))

    sentences = ["".join(map(chr, range(33, 127)))] * 20
    for _ in range(3000):
        shapes = tuple(shape() for _ in range(rng.integers(5)))
        question, answer = texts.random_question(rng, shapes)
        query = " ; ".join(texts.random_query(rng, shapes))
        sentences += ["caption en", texts.caption(shapes), f"answer en {question}", answer]
        sentences += [f"detect {query}", f" {query}"]
    return sentences


def initial_weights(generator: torch.Generator, locs: range) -> dict[str, Tensor]:
    """Canonical name -> float32. locs: the ids of the `<loc>` tokens.

    Three parameters start from structure instead of noise, which makes a short training possible: the patch
    embedding computes low frequencies of brightness and colour, the position embedding is sines, and the
    embeddings of the `<loc>` tokens are sines of their coordinate."""
    weights = {}
    for name, shape in expected_shapes(config()).items():
        leaf = name.split(".")[-2]
        if len(shape) == 1:  # biases and norms: SigLIP's multiply by w, Gemma's by 1 + w
            siglip_norm = leaf in ("layer_norm1", "layer_norm2", "post_layernorm")
            weights[name] = torch.full(shape, 1.0 if siglip_norm and name.endswith("weight") else 0.0)
        else:
            weights[name] = torch.randn(shape, generator=generator) / math.sqrt(math.prod(shape[1:]))
            if leaf in ("out_proj", "fc2", "o_proj", "down_proj"):
                weights[name] *= 0.5
    vision = "vision_tower.vision_model.embeddings"
    weights[f"{vision}.patch_embedding.weight"] = _frequencies(generator)
    weights[f"{vision}.position_embedding.weight"] = 0.3 * _positions()
    weights[EMBEDDING][locs.start : locs.stop] = _coordinates(LOCS)
    return weights


def _frequencies(generator: torch.Generator) -> Tensor:  # -> (W, 3, 14, 14)
    """8 x 8 cosines of the brightness and 5 x 5 of each of two colour differences, 114 in all, multiplied by
    a random rotation."""
    n = torch.arange(PATCH)
    cosine = torch.cos(math.pi * (n + 0.5) * n[:, None] / PATCH)  # (frequency, pixel)
    cosine /= cosine.norm(dim=1, keepdim=True)
    channels = torch.tensor([[1.0, 1, 1], [1, -1, 0], [1, 1, -2]])
    channels /= channels.norm(dim=1, keepdim=True)
    waves = [
        torch.einsum("c,iy,jx->ijcyx", channels[c], cosine[:k], cosine[:k]).flatten(0, 1)
        for c, k in ((0, 8), (1, 5), (2, 5))
    ]
    basis = torch.cat(waves)
    rotation = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=generator)).Q[:, : len(basis)]
    return 0.5 * torch.einsum("wf,fcyx->wcyx", rotation, basis)


def _positions() -> Tensor:  # -> (P, W)
    """Sines and cosines of a patch's row and column."""
    side = SIZE // PATCH
    frequency = math.pi / side * torch.logspace(-0.3, 0.9, WIDTH // 4)
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)  # (side, W/2)
    return torch.cat([waves.repeat_interleave(side, dim=0), waves.repeat(side, 1)], dim=1)


def _coordinates(count: int) -> Tensor:  # -> (count, E), rows of length 1
    """Sines and cosines of a coordinate in 0..1, with 0.5 to 24 periods."""
    periods = torch.logspace(math.log10(0.5), math.log10(24), WIDTH // 2)
    angle = 2 * math.pi * (torch.arange(count)[:, None] + 0.5) / count * periods
    return torch.cat([angle.sin(), angle.cos()], dim=1) / math.sqrt(WIDTH / 2)
