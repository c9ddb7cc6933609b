"""The configuration of a checkpoint: frozen dataclasses, read from its config.json. No torch, no NumPy.

Published files are sparse: an absent field has the default of the class that wrote the file, Hugging Face's
GemmaConfig, SiglipVisionConfig or PaliGemmaConfig. The sections take precedence over stale copies of their
fields at the top level (PaliGemma 2 has `hidden_size: 2048` there, whatever its width). Errors name the
field."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import PaliGemmaError
from .fields import Fields, shown
from .files import read_json

IMAGE_SETTINGS = (
    "processor_config.json",
    "preprocessor_config.json",
)  # the files; transformers 5 writes the first one, and reads it first
SPECIAL = (
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)  # null says as little as silence does: text_config's, or Gemma's
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three names of one formula


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP's vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels a side
    patch_size: int  # pixels a side
    num_channels: int
    layer_norm_eps: float

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


@dataclass(frozen=True)
class TextConfig:
    """Gemma's decoder."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int  # tokens, the image's included
    query_pre_attn_scalar: float  # scores are divided by its square root
    # Gemma 2
    post_norms: bool = False  # the outputs of attention and MLP are normalised before they are added
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = (
        None  # tokens that a token attends to in some layers, itself included; the prefix attends to all of the prefix
    )
    layer_types: tuple[str, ...] | None = (
        None  # "sliding_attention" or "full_attention"; None: the first slides, and every other one
    )

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None if it has none."""
        slides = (
            layer % 2 == 0 if self.layer_types is None else self.layer_types[layer] == "sliding_attention"
        )
        return self.sliding_window if slides else None

    @property
    def windows(self) -> set[int | None]:
        """The distinct windows of the layers, including None if a layer has none."""
        return {self.window(layer) for layer in range(self.num_hidden_layers)}

    def check_positions(self, count: int) -> None:
        """Raise PaliGemmaError if a sequence of `count` tokens exceeds the model's positions."""
        if count > self.max_position_embeddings:
            raise PaliGemmaError(
                f"input and new tokens take {count} positions; this model has {self.max_position_embeddings}: shorten the prompt or lower max_new_tokens"
            )


@dataclass(frozen=True)
class PaliGemmaConfig:
    """The configuration of the complete model, PaliGemma 1 or 2."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_index: int
    bos_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    torch_dtype: str  # of the stored weights, as config.json has it
    tied: bool = True  # whether config.json says that the output head is the embedding
    quantization: str | None = None  # the method of a quantization_config that goes with float weights

    @classmethod
    def load(cls, model_dir: str | Path, config: dict | None = None) -> "PaliGemmaConfig":
        """Read config.json, unless `config` holds its contents, and generation_config.json, if there is one.

        Raises PaliGemmaError if config.json is missing, does not describe a PaliGemma, or is not
        supported."""
        config = read_json(Path(model_dir) / "config.json") if config is None else config
        generation_path = Path(model_dir) / "generation_config.json"
        generation = read_json(generation_path) if os.path.lexists(generation_path) else {}
        return cls.from_dict(config, generation)

    @classmethod
    def from_dict(cls, config: dict, generation: dict | None = None) -> "PaliGemmaConfig":
        """The configuration from the parsed JSON objects of config.json and generation_config.json."""
        if config.get("model_type") != "paligemma":
            raise PaliGemmaError(
                f"config.json: model_type is {shown(config.get('model_type'))}, not 'paligemma': this is not a PaliGemma checkpoint"
            )
        vision, text = _section(config, "vision_config"), _section(config, "text_config")
        ids = {
            name: value
            for values in (text.values, config)
            for name, value in values.items()
            if name in SPECIAL and value is not None
        }
        eos_file, eos = "config.json", ids.get("eos_token_id", 1)
        if generation and generation.get("eos_token_id") is not None:
            eos_file, eos = "generation_config.json", generation["eos_token_id"]
        top, special = Fields("config.json", "", config), Fields("config.json", "", ids)
        tied = config.get("tie_word_embeddings", True)
        if type(tied) is not bool:
            raise top.wrong("tie_word_embeddings", tied, "true or false")
        image_ids = {
            config[name] for name in ("image_token_id", "image_token_index") if type(config.get(name)) is int
        }
        if len(image_ids) > 1:
            says = f"image_token_index is {config['image_token_index']} and image_token_id is {config['image_token_id']}"
            raise PaliGemmaError(f"config.json: {says}, two names of one thing: delete the wrong one")
        vision_config, text_config = _vision(vision), _text(text)
        if vision_config.num_patches > text_config.max_position_embeddings:
            image = f"vision_config.image_size is {vision_config.image_size}, which makes {vision_config.num_patches} patches"
            raise PaliGemmaError(
                f"config.json: {image}; the text model has {text_config.max_position_embeddings} positions (max_position_embeddings)"
            )
        return cls(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=top.integer(
                "image_token_id" if "image_token_index" not in config else "image_token_index", 256000
            ),
            bos_token_id=special.integer("bos_token_id", 2),
            pad_token_id=special.integer("pad_token_id", 0, least=0),
            eos_token_ids=_end_tokens(eos_file, eos, text_config.vocab_size),
            torch_dtype=str(
                config.get("torch_dtype")
                or config.get("dtype")
                or text.values.get("torch_dtype")
                or "float32"
            ),
            tied=tied,
            quantization=_quantization(config.get("quantization_config")),
        )


def _end_tokens(file: str, eos: Any, vocabulary: int) -> tuple[int, ...]:
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        raise Fields(file, "", {}).wrong(
            "eos_token_id", eos, f"a token id or a list of them, from 0 to {vocabulary - 1}"
        )
    return tuple(ids)


def _section(config: dict, name: str, parent: str = "") -> Fields:
    value = config.get(name)
    if not isinstance(value, dict):
        raise Fields("config.json", parent, config).wrong(name, value, "an object")
    return Fields("config.json", f"{parent}{name}.", value)


def _vision(f: Fields) -> VisionConfig:
    f.refuse("model_type", "siglip_vision_model")
    f.refuse("hidden_act", *TANH_GELU)
    f.refuse("vision_use_head", False)
    config = VisionConfig(
        hidden_size=f.integer("hidden_size", 768),
        intermediate_size=f.integer("intermediate_size", 3072),
        num_hidden_layers=f.integer("num_hidden_layers", 12),
        num_attention_heads=f.integer("num_attention_heads", 12),
        image_size=f.integer("image_size", 224),
        patch_size=f.integer("patch_size", 16),
        num_channels=f.integer("num_channels", 3),
        layer_norm_eps=f.number("layer_norm_eps", 1e-6),
    )
    f.refuse("num_channels", 3)
    if config.hidden_size % config.num_attention_heads:
        heads = f"vision_config.num_attention_heads is {config.num_attention_heads}"
        raise PaliGemmaError(f"config.json: {heads}, which does not divide hidden_size {config.hidden_size}")
    if config.image_size < config.patch_size:
        raise PaliGemmaError(
            f"config.json: vision_config.patch_size is {config.patch_size}, larger than image_size {config.image_size}"
        )
    return config


GEMMA = {
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
}
GEMMA_2 = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
}


# Methods of quantization_config under which float weights are computed with as they are: a merge does not
# remove these. Their quantised weights have other names or dtypes, which are refused where they are found.
LEFT_BEHIND = ("bitsandbytes", "gptq", "awq")


def _quantization(value: object) -> str | None:
    """The method of a quantization_config. Raises PaliGemmaError if it may change the use of float
    weights."""
    if not value:
        return None
    method = value.get("quant_method") if isinstance(value, dict) else None
    if method is None and isinstance(value, dict) and any(value.get(f"load_in_{bits}bit") for bits in (4, 8)):
        method = "bitsandbytes"  # of its first versions, which did not name themselves
    if method not in LEFT_BEHIND:
        raise PaliGemmaError(
            "config.json: quantization_config: quantised checkpoints are not supported; use the float one it was made from"
        )
    return method


def _text(f: Fields) -> TextConfig:
    f.refuse("model_type", "gemma", "gemma2")
    second = f.values.get("model_type") == "gemma2"
    # Gemma's first files say "gelu" and mean the tanh form; Hugging Face reads it so too.
    f.refuse("hidden_act", "gelu", *TANH_GELU)
    f.refuse("hidden_activation", *TANH_GELU)
    f.refuse("attention_bias", False)
    f.refuse("use_bidirectional_attention", True, False)  # PaliGemma's own mask takes the place of either
    scaling = (
        "rope_scaling" if f.values.get("rope_scaling") else "rope_parameters"
    )  # the old name of the same, which transformers 5 prefers
    rope = _section({scaling: f.values.get(scaling) or {}}, scaling, f.section)  # rope_theta may be in here
    for name in ("rope_type", "type"):
        rope.refuse(name, "default")
    sizes = {name: f.integer(name, default) for name, default in (GEMMA_2 if second else GEMMA).items()}
    head_dim = f.integer("head_dim", 256)
    config = TextConfig(
        **sizes,
        head_dim=head_dim,
        vocab_size=f.integer("vocab_size", 256000),
        rms_norm_eps=f.number("rms_norm_eps", 1e-6),
        rope_theta=rope.number("rope_theta", f.number("rope_theta", 10000.0)),
        max_position_embeddings=f.integer("max_position_embeddings", 8192),
        query_pre_attn_scalar=f.number("query_pre_attn_scalar", 256) if second else head_dim,
        **(_second(f, sizes["num_hidden_layers"]) if second else {}),
    )
    if config.num_attention_heads % config.num_key_value_heads:
        heads = f"text_config.num_key_value_heads is {config.num_key_value_heads}"
        raise PaliGemmaError(
            f"config.json: {heads}, which does not divide num_attention_heads {config.num_attention_heads}"
        )
    if config.head_dim % 2:
        raise PaliGemmaError(
            f"config.json: text_config.head_dim is {config.head_dim}; rotary embedding needs an even number"
        )
    return config


def _second(f: Fields, layers: int) -> dict:
    """The fields of TextConfig that only Gemma 2 has."""
    kinds, known = f.values.get("layer_types"), ("sliding_attention", "full_attention")
    if kinds is not None and not (
        isinstance(kinds, list) and len(kinds) == layers and all(kind in known for kind in kinds)
    ):
        raise PaliGemmaError(
            f"config.json: {f.section}layer_types must name {' or '.join(known)} for each of the {layers} layers"
        )
    return {
        "post_norms": True,
        "attn_logit_softcapping": None
        if f.is_null("attn_logit_softcapping")
        else f.number("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": None
        if f.is_null("final_logit_softcapping")
        else f.number("final_logit_softcapping", 30.0),
        "sliding_window": None if f.is_null("sliding_window") else f.integer("sliding_window", 4096),
        "layer_types": None if kinds is None else tuple(kinds),
    }
