"""Writes a checkpoint with the shape and the format of a published model and random weights, for measurements
without the real weights.

    python -m benchmarks.random_checkpoint DIR [--model paligemma2-3b] [--resolution 224]
        [--dtype bfloat16] [--layers 2] [--outliers]

Without --tokenizer it writes a stand-in, which has PaliGemma's ids and encodes text character by character.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from tqdm import tqdm

from paligemma.checkpoint.stored import expected_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.tokenizer.json_model import REPLACE_SPACES, sentencepiece_model

# config.json of google/paligemma-3b-pt-224 without torch_dtype; the fields that it omits have their defaults.
CONFIG_224 = {
    "architectures": ["PaliGemmaForConditionalGeneration"],
    "model_type": "paligemma",
    "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0,
    "image_token_index": 257152, "ignore_index": -100,
    "hidden_size": 2048, "projection_dim": 2048, "vocab_size": 257216,
    "text_config": {
        "model_type": "gemma", "hidden_size": 2048, "intermediate_size": 16384, "num_attention_heads": 8,
        "num_hidden_layers": 18, "num_image_tokens": 256, "num_key_value_heads": 1, "vocab_size": 257216,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "num_image_tokens": 256, "patch_size": 14,
        "projection_dim": 2048, "projector_hidden_act": "gelu_fast", "vision_use_head": False,
    },
}  # fmt: skip


MODELS = {  # text_config of each model
    "paligemma-3b": CONFIG_224["text_config"],
    "paligemma2-3b": {
        "model_type": "gemma2", "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_key_value_heads": 4,
    },
    "paligemma2-10b": {
        "model_type": "gemma2", "hidden_size": 3584, "intermediate_size": 14336, "num_attention_heads": 16,
        "num_hidden_layers": 42, "num_key_value_heads": 8,
    },
    "paligemma2-28b": {
        "model_type": "gemma2", "hidden_size": 4608, "intermediate_size": 36864, "num_attention_heads": 32,
        "num_hidden_layers": 46, "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144,
    },
}  # fmt: skip


def config_for(resolution: int, dtype: str, model: str = "paligemma-3b", layers: int | None = None) -> dict:
    """config.json of a published model. layers: the number of layers of both towers (None: all)."""
    config = json.loads(json.dumps({**CONFIG_224, "torch_dtype": dtype}))
    config["text_config"] = {**MODELS[model], "vocab_size": 257216}
    config["projection_dim"] = config["vision_config"]["projection_dim"] = MODELS[model]["hidden_size"]
    if layers is not None:
        config["text_config"]["num_hidden_layers"] = config["vision_config"]["num_hidden_layers"] = layers
    if resolution != 224:
        config["vision_config"]["image_size"] = resolution
    for section in ("text_config", "vision_config"):
        config[section]["num_image_tokens"] = (resolution // 14) ** 2
    return config


def write(
    directory: Path, config: dict, dtype: torch.dtype, tokenizer: bytes, shards: int = 3, seed: int = 0,
    outliers: bool = False,
) -> None:  # fmt: skip
    """Write the files of a checkpoint. The weights are scaled by the fan-in, and the branches are large, so
    that every token depends on the tokens before it. outliers: the matrices of the decoder have some."""
    directory.mkdir(parents=True, exist_ok=True)
    shapes = expected_shapes(PaliGemmaConfig.from_dict(config))
    size = sum(map(math.prod, shapes.values()))
    generator = torch.Generator().manual_seed(seed)
    gemma_2 = config["text_config"]["model_type"] == "gemma2"
    weight_map, part, written, index = {}, {}, 0, 1
    label = f"writing {directory}"
    with tqdm(total=size, unit="param", unit_scale=True, desc=label, disable=None) as bar:
        for i, (name, shape) in enumerate(shapes.items()):
            weight = random_weight(name, shape, generator, gemma_2)
            if outliers and name.startswith("language_model.model.layers") and len(shape) == 2:
                weight = with_outliers(weight, generator)
            part[name] = weight.to(dtype)
            bar.update(math.prod(shape))
            written += math.prod(shape)
            if written * shards >= size * index or i == len(shapes) - 1:
                file = f"model-{index:05}-of-{shards:05}.safetensors"
                save_file(part, directory / file, metadata={"format": "pt"})
                weight_map.update(dict.fromkeys(part, file))
                part, index = {}, index + 1
    index_file = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index_file))
    write_side_files(directory, config, tokenizer)


def write_side_files(directory: Path, config: dict, tokenizer: bytes) -> None:
    """The files of a published checkpoint other than its weights."""
    vision = config["vision_config"]
    size = vision.get("image_size", 224)
    preprocessor = {
        "do_convert_rgb": None, "do_normalize": True, "do_rescale": True, "do_resize": True,
        "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "SiglipImageProcessor", "processor_class": "PaliGemmaProcessor",
        "image_seq_length": (size // vision["patch_size"]) ** 2,
        "resample": 3, "rescale_factor": 1 / 255, "size": {"height": size, "width": size},
    }  # fmt: skip
    generation = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    (directory / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    (directory / "tokenizer.model").write_bytes(tokenizer)


GAINS = {"q_proj": 2.0, "k_proj": 2.0, "o_proj": 2.2, "down_proj": 6.0, "position_embedding": 10.0}


def random_weight(
    name: str, shape: tuple[int, ...], generator: torch.Generator, gemma_2: bool = False
) -> torch.Tensor:
    leaf = name.split(".")[-2]
    value = torch.randn(shape, generator=generator)
    if gemma_2 and leaf in ("post_attention_layernorm", "post_feedforward_layernorm"):
        # The weight of its norm determines the size of a branch in Gemma 2.
        return value * 0.5 + (6 if leaf == "post_feedforward_layernorm" else 1)
    if len(shape) == 1:  # a bias or a norm; the weights of norms are centred on 1 in SigLIP, on 0 in Gemma
        siglip_norm = leaf in ("layer_norm1", "layer_norm2", "post_layernorm")
        return value * 0.1 + (1 if siglip_norm and name.endswith("weight") else 0)
    value *= GAINS.get(leaf, 1.0) / math.sqrt(math.prod(shape[1:]))
    if leaf == "embed_tokens":
        value[CONFIG_224["image_token_index"] :] *= 0.01  # `<image>` and unused rows
    return value


def with_outliers(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """The weight, in which one number in 256, chosen at random, is 10 times as large. Its root mean square
    stays."""
    chosen = torch.rand(weight.shape, generator=generator) < 1 / 256
    return torch.where(chosen, 10 * weight, weight) / (1 + 99 / 256) ** 0.5


def stand_in_tokenizer() -> bytes:
    """A tokenizer.model with PaliGemma's 257,152 ids: control pieces, newline, bytes, characters, unused
    pieces, <loc> and <seg>."""

    def unused(start: int, stop: int) -> list[str]:
        return [f"<unused{i}>" for i in range(start, stop)]

    characters = [chr(c) for c in range(33, 127)] + ["▁"]
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *unused(0, 104), "\n", *unused(104, 212)]
    pieces += [f"<0x{i:02X}>" for i in range(256)] + characters
    pieces += unused(212, 212 + 256000 - len(pieces))
    pieces += [f"<loc{i:04}>" for i in range(1024)] + [f"<seg{i:03}>" for i in range(128)]
    ids = {piece: i for i, piece in enumerate(pieces)}
    model = {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": ids, "merges": []}
    special = [piece for piece in pieces if piece == "\n" or piece.startswith(("<loc", "<seg"))]
    added = [{"id": ids[piece], "content": piece} for piece in special]
    return sentencepiece_model({"model": model, "normalizer": REPLACE_SPACES, "added_tokens": added})


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_checkpoint",
        description="Write a PaliGemma of true shape with random weights.",
    )
    parser.add_argument("directory", type=Path)
    model = "the model whose shape it has (default: %(default)s)"
    parser.add_argument("--model", default="paligemma-3b", choices=MODELS, help=model)
    parser.add_argument("--layers", type=int, metavar="N", help="layers of both towers (default: all)")
    parser.add_argument("--resolution", type=int, default=224, choices=(224, 448, 896))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--tokenizer", type=Path, help="PaliGemma's tokenizer.model (default: a stand-in)")
    outliers = "one number in 256 of a matrix of the decoder is 10 times as large"
    parser.add_argument("--outliers", action="store_true", help=outliers)
    args = parser.parse_args()
    tokenizer = args.tokenizer.read_bytes() if args.tokenizer else stand_in_tokenizer()
    config = config_for(args.resolution, args.dtype, args.model, args.layers)
    write(args.directory, config, getattr(torch, args.dtype), tokenizer, outliers=args.outliers)


if __name__ == "__main__":
    main()
