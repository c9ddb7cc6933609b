"""Google's own checkpoints: big_vision's parameter tree in one .npz file, with the layers stacked. The arrays
are located in the file and stay in it; nothing is unpickled. No torch.

The file contains neither softcaps nor windows nor special tokens: the published values are used, unless its
directory has a config.json.
"""

import math
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..errors import PaliGemmaError
from ..files import npy_header, unreadable
from .stored import EMBEDDING, ITEMSIZE, StoredTensor, expected_shapes, listed, vocabularies

PREFIX = "params/"
DTYPES = {
    "<f8": "F64",
    "<f4": "F32",
    "<f2": "F16",
    "|V2": "BF16",
    "<V2": "BF16",
}  # bfloat16 is not among NumPy's types: 2 bytes of anything
KERNEL, BIAS, SCALE = "/kernel", "/bias", "/scale"
TABLE = "llm/embedder/input_embedding"


@dataclass(frozen=True)
class Array:
    """The place of one array in the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int


def load(file: Path) -> tuple[PaliGemmaConfig, dict[str, StoredTensor]]:
    """The model's configuration, and its parameters by canonical name. Raises PaliGemmaError for a file that
    is incomplete, needs unpickling, or is not a PaliGemma; the error names the missing and unexpected
    arrays."""
    arrays = _arrays(file)
    beside = file.parent / "config.json"
    config = PaliGemmaConfig.load(file.parent) if os.path.lexists(beside) else _config(file, arrays)
    says = "config.json" if os.path.lexists(beside) else "the rest of the file"
    if not config.tied:
        raise PaliGemmaError(
            f"{beside}: tie_word_embeddings is False, but the output head of an .npz file is its embedding"
        )
    fused, v, t = "llm/layers/attn/qkv_einsum/w" in arrays, config.vision_config, config.text_config
    if fused and t.num_attention_heads != t.num_key_value_heads:
        heads = f"{t.num_attention_heads} query heads to {t.num_key_value_heads}"
        raise PaliGemmaError(
            f"{file}: {PREFIX}llm/layers/attn/qkv_einsum/w has keys for each query head; {says} asks for {heads}"
        )
    for name, count in (
        ("img/Transformer/encoderblock/LayerNorm_0/scale", v.num_hidden_layers),
        ("llm/layers/pre_attention_norm/scale", t.num_hidden_layers),
    ):
        if name in arrays and arrays[name].shape[:1] != (
            count,
        ):  # before a list of what they would hold is made
            raise PaliGemmaError(
                f"{file}: {PREFIX}{name} has shape {arrays[name].shape}; {says} asks for {count} layers"
            )
    tree = _tree(config, fused)
    missing, unexpected = sorted(tree.keys() - arrays.keys()), sorted(arrays.keys() - tree.keys())
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({listed(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise PaliGemmaError(
            f"{file} does not hold the arrays of the PaliGemma that {says} describes: {', '.join(parts)}"
        )
    stored: dict[str, StoredTensor] = {}
    for name, (shape, places) in tree.items():
        array = arrays[name]
        if array.shape != shape and not (
            name == TABLE
            and array.shape[1:] == shape[1:]
            and {array.shape[0], shape[0]} == vocabularies(config)
        ):
            raise PaliGemmaError(f"{file}: {PREFIX}{name} has shape {array.shape}; {says} asks for {shape}")
        for canonical, index, permutation in places:
            stored[canonical] = _slice(file, name, array, index, permutation)
    shapes = expected_shapes(config) | {EMBEDDING: arrays[TABLE].shape}
    return config, {name: replace(stored[name], shape=shape) for name, shape in shapes.items()}


def _slice(
    file: Path, name: str, array: Array, index: tuple[int, ...], permutation: tuple[int, ...] | None
) -> StoredTensor:
    """array[index], with its axes permuted."""
    raw, offset = array.shape[len(index) :], array.offset
    step = ITEMSIZE[array.dtype] * math.prod(raw)
    for i, n in zip(reversed(index), reversed(array.shape[: len(index)]), strict=True):
        offset += i * step
        step *= n
    return StoredTensor(file, PREFIX + name, array.dtype, raw, offset, raw, permutation)


def _tree(config: PaliGemmaConfig, fused: bool) -> dict[str, tuple[tuple[int, ...], list]]:
    """The shape of each array, and the parameters in it. fused: whether q, k and v are one array; Google's
    code stores them so if each query head has its own keys."""
    v, t = config.vision_config, config.text_config
    W, M, heads, d, patch, E = (
        v.hidden_size,
        v.intermediate_size,
        v.num_attention_heads,
        v.head_dim,
        v.patch_size,
        t.hidden_size,
    )
    tree: dict[str, tuple[tuple[int, ...], list]] = {}

    def one(
        name: str, shape: tuple[int, ...], canonical: str, permutation: tuple[int, ...] | None = None
    ) -> None:
        tree[name] = shape, [(canonical, (), permutation)]

    def layers(
        name: str,
        shape: tuple[int, ...],
        prefix: str,
        *parts: tuple[str, tuple[int, ...], tuple[int, ...] | None],
    ) -> None:
        """An array of all layers, (L, *shape), each of which contains the parts."""
        count = v.num_hidden_layers if prefix.startswith("vision") else t.num_hidden_layers
        tree[name] = (
            (count, *shape),
            [
                (f"{prefix}.{i}.{part}", (i, *index), permutation)
                for i in range(count)
                for part, index, permutation in parts
            ],
        )

    vision, at = "vision_tower.vision_model", "img/Transformer/encoderblock"
    one(
        "img/embedding" + KERNEL,
        (patch, patch, 3, W),
        f"{vision}.embeddings.patch_embedding.weight",
        (3, 2, 0, 1),
    )
    one("img/embedding" + BIAS, (W,), f"{vision}.embeddings.patch_embedding.bias")
    one("img/pos_embedding", (1, v.num_patches, W), f"{vision}.embeddings.position_embedding.weight")
    for i in range(2):
        for leaf, ours in ((SCALE, "weight"), (BIAS, "bias")):
            layers(
                f"{at}/LayerNorm_{i}{leaf}",
                (W,),
                f"{vision}.encoder.layers",
                (f"layer_norm{i + 1}.{ours}", (), None),
            )
    for name in ("query", "key", "value"):
        ours, attention = f"self_attn.{name[0]}_proj", f"{at}/MultiHeadDotProductAttention_0/{name}"
        layers(
            attention + KERNEL, (W, heads, d), f"{vision}.encoder.layers", (f"{ours}.weight", (), (1, 2, 0))
        )
        layers(attention + BIAS, (heads, d), f"{vision}.encoder.layers", (f"{ours}.bias", (), None))
    attention = f"{at}/MultiHeadDotProductAttention_0/out"
    layers(
        attention + KERNEL,
        (heads, d, W),
        f"{vision}.encoder.layers",
        ("self_attn.out_proj.weight", (), (2, 0, 1)),
    )
    layers(attention + BIAS, (W,), f"{vision}.encoder.layers", ("self_attn.out_proj.bias", (), None))
    for i, (wide, out) in enumerate(((W, M), (M, W))):
        layers(
            f"{at}/MlpBlock_0/Dense_{i}{KERNEL}",
            (wide, out),
            f"{vision}.encoder.layers",
            (f"mlp.fc{i + 1}.weight", (), (1, 0)),
        )
        layers(
            f"{at}/MlpBlock_0/Dense_{i}{BIAS}",
            (out,),
            f"{vision}.encoder.layers",
            (f"mlp.fc{i + 1}.bias", (), None),
        )
    for leaf, ours in ((SCALE, "weight"), (BIAS, "bias")):
        one(f"img/Transformer/encoder_norm{leaf}", (W,), f"{vision}.post_layernorm.{ours}")
    one("img/head" + KERNEL, (W, E), "multi_modal_projector.linear.weight", (1, 0))
    one("img/head" + BIAS, (E,), "multi_modal_projector.linear.bias")

    H, K, D, M = t.num_attention_heads, t.num_key_value_heads, t.head_dim, t.intermediate_size
    model = "language_model.model"
    one(TABLE, (t.vocab_size, E), EMBEDDING)
    projections = [
        (f"self_attn.{name}_proj.weight", (0, 2, 1)) for name in "qkv"
    ]  # (heads, E, D) -> (heads, D, E)
    if fused:
        layers(
            "llm/layers/attn/qkv_einsum/w",
            (3, H, E, D),
            f"{model}.layers",
            *((name, (i,), order) for i, (name, order) in enumerate(projections)),
        )
    else:
        layers(
            "llm/layers/attn/q_einsum/w",
            (H, E, D),
            f"{model}.layers",
            (projections[0][0], (), projections[0][1]),
        )
        layers(
            "llm/layers/attn/kv_einsum/w",
            (2, K, E, D),
            f"{model}.layers",
            *((name, (i,), order) for i, (name, order) in enumerate(projections[1:])),
        )
    layers(
        "llm/layers/attn/attn_vec_einsum/w",
        (H, D, E),
        f"{model}.layers",
        ("self_attn.o_proj.weight", (), (2, 0, 1)),
    )
    gate_up = (("mlp.gate_proj.weight", (0,), (1, 0)), ("mlp.up_proj.weight", (1,), (1, 0)))
    layers("llm/layers/mlp/gating_einsum", (2, E, M), f"{model}.layers", *gate_up)
    layers("llm/layers/mlp/linear", (M, E), f"{model}.layers", ("mlp.down_proj.weight", (), (1, 0)))
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    if t.post_norms:  # Gemma 2 uses this name for another norm
        norms |= {
            "post_attention_norm": "post_attention_layernorm",
            "pre_ffw_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
    for theirs, ours in norms.items():
        layers(f"llm/layers/{theirs}{SCALE}", (E,), f"{model}.layers", (f"{ours}.weight", (), None))
    one("llm/final_norm" + SCALE, (E,), f"{model}.norm.weight")
    return tree


def _config(file: Path, arrays: dict[str, Array]) -> PaliGemmaConfig:
    """A configuration from the shapes of the arrays; other values are those of every published PaliGemma."""

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        found = arrays.get(name)
        if found is None or len(found.shape) != ndim or not all(found.shape):
            have = f"has shape {found.shape}" if found else "is missing"
            raise PaliGemmaError(
                f"{file}: {PREFIX}{name} {have}: this is not a PaliGemma as big_vision saves it"
            )
        return found.shape

    patch, _, channels, W = shape("img/embedding/kernel", 4)
    patches = shape("img/pos_embedding", 3)[1]
    _, _, heads, d = shape("img/Transformer/encoderblock/MultiHeadDotProductAttention_0/query/kernel", 4)
    vision_layers, _, vision_mlp = shape("img/Transformer/encoderblock/MlpBlock_0/Dense_0/kernel", 3)
    side = math.isqrt(patches)
    if side * side != patches or channels != 3 or heads * d != W:
        raise PaliGemmaError(
            f"{file}: {patches} patches of {channels} channels, {heads} heads of {d} for a width of {W}: this is not PaliGemma's SigLIP"
        )
    V, E = shape(TABLE, 2)
    if "llm/layers/attn/qkv_einsum/w" in arrays:
        H = K = shape("llm/layers/attn/qkv_einsum/w", 5)[2]
    else:
        H, K = shape("llm/layers/attn/q_einsum/w", 4)[1], shape("llm/layers/attn/kv_einsum/w", 5)[2]
    D = shape("llm/layers/attn/attn_vec_einsum/w", 4)[2]
    layers, _, _, M = shape("llm/layers/mlp/gating_einsum", 4)
    if H % K or D % 2:
        raise PaliGemmaError(
            f"{file}: {H} query heads of {D} to {K} key heads: this is not PaliGemma's Gemma"
        )
    second = {}
    if "llm/layers/post_attention_norm/scale" in arrays:
        second = {
            "post_norms": True,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window": 4096,
        }
    return PaliGemmaConfig(
        vision_config=VisionConfig(W, vision_mlp, vision_layers, heads, side * patch, patch, channels, layer_norm_eps=1e-6),
        text_config=TextConfig(
            E, M, layers, H, K, D, V, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=8192,
            query_pre_attn_scalar=E / H if second and D == 128 else D,  # Gemma 2 27B, the one with heads of 128, divides by more
            **second,
        ),
        image_token_index=V, bos_token_id=2, pad_token_id=0, eos_token_ids=(1,), torch_dtype="float32",
    )  # fmt: skip


def _arrays(file: Path) -> dict[str, Array]:
    """Every array of an .npz file, by its name without "params/"."""
    try:
        with zipfile.ZipFile(file) as archive, open(file, "rb") as f:
            members, size = archive.infolist(), file.stat().st_size
            arrays: dict[str, Array] = {}
            for member in members:
                name = member.filename.removesuffix(".npy").removeprefix(PREFIX)
                if name in arrays:
                    raise PaliGemmaError(f"{file} holds {member.filename} twice")
                if member.compress_type != zipfile.ZIP_STORED:
                    raise PaliGemmaError(
                        f"{file}: {member.filename} is compressed, so it cannot be read in place: save it again with numpy.savez"
                    )
                arrays[name] = _header(f, file, member, size)
            return arrays
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise unreadable(file, error, "a whole .npz file") from None


def _header(f: BinaryIO, file: Path, member: zipfile.ZipInfo, size: int) -> Array:
    f.seek(member.header_offset)
    local = f.read(30)
    start = (
        member.header_offset
        + 30
        + int.from_bytes(local[26:28], "little")
        + int.from_bytes(local[28:30], "little")
    )
    f.seek(start)
    try:
        if local[:4] != b"PK\x03\x04":
            raise ValueError("no array where the directory says")
        shape, by_column, dtype = npy_header(f)
    except ValueError as error:
        raise PaliGemmaError(
            f"{file}: {member.filename} is not an array that NumPy wrote ({str(error).splitlines()[0]})"
        ) from None
    if dtype.hasobject:
        raise PaliGemmaError(
            f"{file}: {member.filename} holds Python objects, which are pickled and never opened"
        )
    if dtype.str not in DTYPES:
        raise PaliGemmaError(
            f"{file}: {member.filename} is {dtype}; only float64, float32, float16 and bfloat16 are read"
        )
    if by_column and len(shape) > 1:
        raise PaliGemmaError(
            f"{file}: {member.filename} is stored column by column: save it again from numpy.ascontiguousarray"
        )
    if (
        f.tell() + math.prod(shape) * dtype.itemsize != start + member.file_size
        or start + member.file_size > size
    ):
        raise PaliGemmaError(
            f"{file}: {member.filename} has {member.file_size} bytes, which is not what its shape {shape} takes: download it again"
        )
    return Array(DTYPES[dtype.str], tuple(shape), f.tell())
