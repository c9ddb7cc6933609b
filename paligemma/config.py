"""The configuration of a checkpoint: frozen dataclasses, read from its config.json. No torch, no NumPy.

Published files are sparse: an absent field has the default of the class that wrote the file, Hugging Face's
GemmaConfig, SiglipVisionConfig or PaliGemmaConfig. The sections take precedence over stale copies of their
fields at the top level (there, PaliGemma 2 has `hidden_size: 2048` for any width). Errors name the field."""

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from .errors import PaliGemmaError
from .fields import Fields, shown
from .files import read_json
from .quantization import Saved
from .quantization import read as read_quantization

# Files with the image settings; transformers 5 writes the first one, and reads it first.
IMAGE_SETTINGS = ("processor_config.json", "preprocessor_config.json")
# If these are null or absent, the values of text_config count, or else Gemma's.
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
TANH_GELU = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")  # three names of one formula
# Sizes of the decoder, and their defaults in the classes that wrote text_config.
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
)  # fmt: skip
GEMMA, GEMMA_2 = (3072, 24576, 28, 16, 16), (2304, 9216, 26, 8, 4)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP's vision transformer."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    image_size: int  # pixels per side
    patch_size: int  # pixels per side
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
    max_position_embeddings: int  # tokens, including those of the image
    query_pre_attn_scalar: float  # scores are divided by its square root
    # Gemma 2
    post_norms: bool = False  # whether the outputs of attention and MLP are normalised before they are added
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    # Tokens, itself included, that a token attends to in sliding layers; the prefix attends to all of itself.
    sliding_window: int | None = None
    # "sliding_attention" or "full_attention" for each layer; None: layers 0, 2, 4 and so on slide.
    layer_types: tuple[str, ...] | None = None

    def window(self, layer: int) -> int | None:
        """The sliding window of a layer; None if it has none."""
        kinds = self.layer_types
        slides = layer % 2 == 0 if kinds is None else kinds[layer] == "sliding_attention"
        return self.sliding_window if slides else None

    @property
    def windows(self) -> set[int | None]:
        """The distinct windows of the layers, including None if a layer has none."""
        return {self.window(layer) for layer in range(self.num_hidden_layers)}

    def check_positions(self, count: int) -> None:
        """Raise PaliGemmaError if a sequence of `count` tokens exceeds the model's positions."""
        most = self.max_position_embeddings
        if count > most:
            both = f"input and new tokens take {count} positions; this model has {most}"
            raise PaliGemmaError(f"{both}: shorten the prompt, give fewer images or lower max_new_tokens")


@dataclass(frozen=True)
class PaliGemmaConfig:
    """The configuration of the complete model, PaliGemma 1 or 2."""

    vision_config: VisionConfig
    text_config: TextConfig
    image_token_index: int
    bos_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    torch_dtype: str  # the dtype of the stored weights, according to config.json
    tied: bool = True  # whether the output head is the embedding, according to config.json
    # The method of a quantization_config that float weights may have; what it says of quantised weights.
    quantization: str | Saved | None = None

    @property
    def saved(self) -> Saved | None:
        """What config.json says of weights that `python -m paligemma.quantize` wrote; None for others."""
        return self.quantization if isinstance(self.quantization, Saved) else None

    @classmethod
    def load(cls, model_dir: str | Path, config: dict | None = None) -> "PaliGemmaConfig":
        """Read config.json, unless `config` holds its contents, and generation_config.json, if there is one.

        Raises PaliGemmaError if config.json is missing or does not describe a supported PaliGemma."""
        config = read_json(Path(model_dir) / "config.json") if config is None else config
        generation_path = Path(model_dir) / "generation_config.json"
        generation = read_json(generation_path) if os.path.lexists(generation_path) else {}
        return cls.from_dict(config, generation)

    @classmethod
    def from_dict(cls, config: dict, generation: dict | None = None) -> "PaliGemmaConfig":
        """The configuration from the parsed JSON objects of config.json and generation_config.json."""
        top = Fields("config.json", "", config)
        if config.get("model_type") != "paligemma":
            kind = shown(config.get("model_type"))
            raise PaliGemmaError(f"config.json: model_type is {kind}, not 'paligemma': this is another model")
        vision, text = top.within("vision_config"), top.within("text_config")
        ids = {name: text.values[name] for name in SPECIAL if text.values.get(name) is not None}
        ids |= {name: config[name] for name in SPECIAL if config.get(name) is not None}
        eos_file, eos = "config.json", ids.get("eos_token_id", 1)
        if generation and generation.get("eos_token_id") is not None:
            eos_file, eos = "generation_config.json", generation["eos_token_id"]
        tied = config.get("tie_word_embeddings", True)
        if type(tied) is not bool:
            raise top.wrong("tie_word_embeddings", tied, "true or false")
        index, other_index = config.get("image_token_index"), config.get("image_token_id")
        if type(index) is int and type(other_index) is int and index != other_index:
            names = f"image_token_index is {index} and image_token_id is {other_index}"
            raise PaliGemmaError(f"config.json: {names}, two names of one thing: delete the wrong one")
        vision_config, text_config = _vision(vision), _text(text)
        patches, positions = vision_config.num_patches, text_config.max_position_embeddings
        if patches > positions:
            image = f"vision_config.image_size is {vision_config.image_size}, which gives {patches} patches"
            text_model = f"the text model has {positions} positions (max_position_embeddings)"
            raise PaliGemmaError(f"config.json: {image}; {text_model}")
        dtype = config.get("torch_dtype") or config.get("dtype") or text.values.get("torch_dtype")
        quantization = read_quantization(config.get("quantization_config"))
        if isinstance(quantization, Saved) and dtype != quantization.dtype:
            raise top.wrong("torch_dtype", dtype, f"{quantization.dtype!r}, as quantization_config.dtype is")
        index_name = "image_token_index" if "image_token_index" in config else "image_token_id"
        special = replace(top, values=ids)
        return cls(
            vision_config=vision_config,
            text_config=text_config,
            image_token_index=top.integer(index_name, 256000),
            bos_token_id=special.integer("bos_token_id", 2),
            pad_token_id=special.integer("pad_token_id", 0, least=0),
            eos_token_ids=_end_tokens(eos_file, eos, text_config.vocab_size),
            torch_dtype=str(dtype or "float32"),
            tied=tied,
            quantization=quantization,
        )


def _end_tokens(file: str, eos: Any, vocabulary: int) -> tuple[int, ...]:
    """The ids that end an answer."""
    ids = eos if isinstance(eos, list) else [eos]
    if not ids or not all(type(i) is int and 0 <= i < vocabulary for i in ids):
        wanted = f"a token id or a list of them, from 0 to {vocabulary - 1}"
        raise Fields(file, "", {}).wrong("eos_token_id", eos, wanted)
    return tuple(ids)


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
    W, H = config.hidden_size, config.num_attention_heads
    if W % H:
        raise f.wrong("num_attention_heads", H, f"a divisor of hidden_size, {W}")
    if config.image_size < config.patch_size:
        raise f.wrong("patch_size", config.patch_size, f"at most image_size, {config.image_size}")
    return config


def _text(f: Fields) -> TextConfig:
    f.refuse("model_type", "gemma", "gemma2")
    second = f.values.get("model_type") == "gemma2"
    # Gemma's first files say "gelu" and mean the tanh form; transformers reads it so too.
    f.refuse("hidden_act", "gelu", *TANH_GELU)
    f.refuse("hidden_activation", *TANH_GELU)
    f.refuse("attention_bias", False)
    f.refuse("use_bidirectional_attention", True, False)  # PaliGemma's own mask replaces either
    # rope_scaling is the old name of rope_parameters; transformers 5 prefers it if a file has both.
    scaling = "rope_scaling" if f.values.get("rope_scaling") else "rope_parameters"
    rope = replace(f, values={scaling: f.values.get(scaling) or {}}).within(scaling)  # may have rope_theta
    for name in ("rope_type", "type"):
        rope.refuse(name, "default")
    defaults = zip(SIZES, GEMMA_2 if second else GEMMA, strict=True)
    sizes = {name: f.integer(name, default) for name, default in defaults}
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
    H, K = config.num_attention_heads, config.num_key_value_heads
    if H % K:
        raise f.wrong("num_key_value_heads", K, f"a divisor of num_attention_heads, {H}")
    if config.head_dim % 2:
        raise f.wrong("head_dim", config.head_dim, "even, as rotary embedding rotates pairs")
    return config


def _second(f: Fields, layers: int) -> dict:
    """The fields of TextConfig that only Gemma 2 has."""
    kinds, known = f.values.get("layer_types"), ("sliding_attention", "full_attention")
    is_list = isinstance(kinds, list) and len(kinds) == layers
    if kinds is not None and not (is_list and all(kind in known for kind in kinds)):
        wanted = f"{' or '.join(known)} for each of the {layers} layers"
        raise PaliGemmaError(f"config.json: {f.section}layer_types must name {wanted}")

    def softcap(name: str, default: float) -> float | None:
        return None if f.is_null(name) else f.number(name, default)

    return {
        "post_norms": True,
        "attn_logit_softcapping": softcap("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": softcap("final_logit_softcapping", 30.0),
        "sliding_window": None if f.is_null("sliding_window") else f.integer("sliding_window", 4096),
        "layer_types": None if kinds is None else tuple(kinds),
    }
