"""Describes a parameter as a checkpoint stores it, and lists the parameters of a model. No torch, no
NumPy."""

import math
from dataclasses import dataclass
from pathlib import Path

from ..config import PaliGemmaConfig

ITEMSIZE = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
}  # bytes, by safetensors' names of the dtypes that are read here
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # usually tied to the embedding, and then not in the file


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor: it starts `offset` bytes into `file`, and is row-major and little-endian."""

    file: Path
    name: str  # as the file has it
    dtype: str  # as safetensors has it; of a parameter, a key of ITEMSIZE
    shape: tuple[int, ...]
    offset: int
    file_shape: tuple[int, ...] | None = None  # its shape in the file, if that differs
    permutation: tuple[int, ...] | None = (
        None  # the order of those axes that makes it `shape`, some of them taken together
    )
    update: "Update | None" = None  # what is to be added
    adapter: bool = False  # whether it is an adapter's

    @property
    def nbytes(self) -> int:
        return ITEMSIZE[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True)
class Update:
    """What an adapter adds to a matrix (out, in): scale * up @ down."""

    down: StoredTensor  # (r, in)
    up: StoredTensor  # (out, r)
    scale: float


def canonical_name(name: str) -> str:
    """The Hub's name of a parameter, from any of the five names that versions of transformers have
    written."""
    name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return HEAD
    for tower, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        rest = name.removeprefix(tower)
        if rest != name and name != HEAD:
            return tower + inner + rest.removeprefix(inner)
    return name


def expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of the model's parameters by canonical name, in order of data flow; linear maps are (out,
    in)."""
    v, t = config.vision_config, config.text_config
    W, M, E = v.hidden_size, v.intermediate_size, t.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *shape: int) -> None:  # a weight with a bias for each row
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    vision = "vision_tower.vision_model"
    affine(f"{vision}.embeddings.patch_embedding", W, v.num_channels, v.patch_size, v.patch_size)
    shapes[f"{vision}.embeddings.position_embedding.weight"] = (v.num_patches, W)
    for i in range(v.num_hidden_layers):
        layer = f"{vision}.encoder.layers.{i}"
        affine(f"{layer}.layer_norm1", W)
        for projection in ("q_proj", "k_proj", "v_proj", "out_proj"):
            affine(f"{layer}.self_attn.{projection}", W, W)
        affine(f"{layer}.layer_norm2", W)
        affine(f"{layer}.mlp.fc1", M, W)
        affine(f"{layer}.mlp.fc2", W, M)
    affine(f"{vision}.post_layernorm", W)
    affine("multi_modal_projector.linear", E, W)

    H, K, D, M = t.num_attention_heads, t.num_key_value_heads, t.head_dim, t.intermediate_size
    shapes[EMBEDDING] = (t.vocab_size, E)
    for i in range(t.num_hidden_layers):
        layer = f"language_model.model.layers.{i}"
        shapes[f"{layer}.input_layernorm.weight"] = (E,)
        shapes[f"{layer}.self_attn.q_proj.weight"] = (H * D, E)
        shapes[f"{layer}.self_attn.k_proj.weight"] = (K * D, E)
        shapes[f"{layer}.self_attn.v_proj.weight"] = (K * D, E)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (E, H * D)
        norms = ("post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
        shapes |= {f"{layer}.{norm}.weight": (E,) for norm in (norms if t.post_norms else norms[:1])}
        shapes[f"{layer}.mlp.gate_proj.weight"] = (M, E)
        shapes[f"{layer}.mlp.up_proj.weight"] = (M, E)
        shapes[f"{layer}.mlp.down_proj.weight"] = (E, M)
    shapes["language_model.model.norm.weight"] = (E,)
    return shapes


def vocabularies(config: PaliGemmaConfig) -> set[int]:
    """The two numbers of embedding rows that published checkpoints have: without and with 64 extra rows."""
    return {config.image_token_index, config.image_token_index + 64}


def listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
