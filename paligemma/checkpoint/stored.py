"""A parameter as a checkpoint stores it; the names and shapes of a model's parameters. No torch, no NumPy."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from ..config import PaliGemmaConfig

# Bytes of a value, by safetensors' names of the dtypes that are supported.
ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
CODESIZE = {"I32": 4, "I8": 1, "F8_E4M3": 1}  # the same of quantised weights, which only quantized.py finds
SCALE = "_scale"  # follows the name of a quantised weight in that of its scales
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # not in the file if it is tied to the embedding, which is usual


@dataclass(frozen=True)
class StoredTensor:
    """The place of one tensor, which is row-major and little-endian."""

    file: Path
    name: str  # in the file
    dtype: str  # in safetensors' words; a parameter has a key of ITEMSIZE or CODESIZE
    shape: tuple[int, ...]
    offset: int  # bytes from the beginning of the file
    file_shape: tuple[int, ...] | None = None  # its shape in the file, if that differs from `shape`
    permutation: tuple[int, ...] | None = None  # of file_shape's axes, before the reshape to `shape`
    update: "Update | None" = None  # an adapter's change, to be added to it
    adapter: bool = False  # whether it is in an adapter's file

    @property
    def nbytes(self) -> int:
        return (ITEMSIZE | CODESIZE)[self.dtype] * math.prod(self.shape)

    @property
    def is_quantized(self) -> bool:
        """Whether it holds the codes of a quantised weight, or its scales; both are used as they are
        stored."""
        return self.dtype in CODESIZE or self.name.endswith(SCALE)


@dataclass(frozen=True)
class Update:
    """An adapter's change of a matrix (out, in): scale * up @ down is added to it."""

    down: StoredTensor  # (r, in)
    up: StoredTensor  # (out, r)
    scale: float


def canonical_name(name: str) -> str:
    """The name of a parameter on the Hub, from any of the five forms that transformers has written."""
    name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return HEAD
    for tower, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        rest = name.removeprefix(tower)
        if rest != name and name != HEAD:
            return tower + inner + rest.removeprefix(inner)
    return name


def expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of a model's parameters by canonical name, in order of data flow; matrices are (out, in)."""
    v, t = config.vision_config, config.text_config
    W, M, E = v.hidden_size, v.intermediate_size, t.hidden_size
    shapes: dict[str, tuple[int, ...]] = {}

    def affine(name: str, *shape: int) -> None:  # a weight, and a bias with a value for each row
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


def differ_by_extra_rows(shape: tuple[int, ...], other: tuple[int, ...], config: PaliGemmaConfig) -> bool:
    """Whether of two shapes of an embedding one has the 64 extra rows and the other lacks them."""
    return shape[1:] == other[1:] and {shape[0], other[0]} == vocabularies(config)


def differences(missing: Collection[str], unexpected: Collection[str]) -> str:
    """For an error message: the numbers of missing and unexpected names, and the first names of each."""
    kinds = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    return ", ".join(f"{len(names)} {kind} ({listed(names)})" for kind, names in kinds.items() if names)


def listed(names: list[str], most: int = 4) -> str:
    """The first names, and the number of the others."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
