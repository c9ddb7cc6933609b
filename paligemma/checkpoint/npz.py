"""Google's own checkpoints: big_vision's parameters in one .npz file, with the layers stacked. The arrays are
located in the file and stay in it; nothing is unpickled. No torch.

The file contains neither softcaps nor windows nor special tokens. They come from the config.json in its
directory; without one, the published values are used.
"""

import math
import os
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from ..config import PaliGemmaConfig, TextConfig, VisionConfig
from ..errors import PaliGemmaError
from ..files import npy_header, unreadable
from .big_vision import FUSED, TABLE, VISION_ATTENTION, VISION_BLOCK, Axes, tree
from .stored import EMBEDDING, ITEMSIZE, StoredTensor, differ_by_extra_rows, differences, expected_shapes

PREFIX = "params/"
# NumPy has no bfloat16: files declare it as 2 bytes of any type.
DTYPES = {"<f8": "F64", "<f4": "F32", "<f2": "F16", "|V2": "BF16", "<V2": "BF16"}
FIRST_NORM = "llm/layers/pre_attention_norm/scale"


@dataclass(frozen=True)
class Array:
    """The place of one array in the file."""

    dtype: str  # a key of ITEMSIZE
    shape: Axes
    offset: int  # bytes


def load(file: Path) -> tuple[PaliGemmaConfig, dict[str, StoredTensor]]:
    """The model's configuration, and its parameters by canonical name. Raises PaliGemmaError for a file that
    is incomplete, needs unpickling, or is not a PaliGemma; the error names the missing and unexpected
    arrays."""
    arrays = _arrays(file)
    config_file = file.parent / "config.json"
    if os.path.lexists(config_file):
        config, says = PaliGemmaConfig.load(file.parent), "config.json"
    else:
        config, says = _config(file, arrays), "the rest of the file"
    if not config.tied:
        untied = "tie_word_embeddings is False, but the output head of an .npz file is its embedding"
        raise PaliGemmaError(f"{config_file}: {untied}")
    fused, v, t = FUSED in arrays, config.vision_config, config.text_config
    if fused and t.num_attention_heads != t.num_key_value_heads:
        heads = f"{t.num_attention_heads} query heads to {t.num_key_value_heads} key heads"
        raise PaliGemmaError(f"{file}: {PREFIX}{FUSED} has keys for each query head; {says} asks for {heads}")
    counts = {f"{VISION_BLOCK}/LayerNorm_0/scale": v.num_hidden_layers, FIRST_NORM: t.num_hidden_layers}
    for name, count in counts.items():  # before `tree` lists the parameters of that many layers
        if name in arrays and arrays[name].shape[:1] != (count,):
            shape = arrays[name].shape
            raise PaliGemmaError(f"{file}: {PREFIX}{name} has shape {shape}; {says} asks for {count} layers")
    expected = tree(config, fused)
    missing, unexpected = expected.keys() - arrays.keys(), arrays.keys() - expected.keys()
    if missing or unexpected:
        wanted, names = f"the arrays of the PaliGemma that {says} describes", differences(missing, unexpected)
        raise PaliGemmaError(f"{file} does not hold {wanted}: {names}")
    stored: dict[str, StoredTensor] = {}
    for name, (shape, places) in expected.items():
        array = arrays[name]
        extra_rows = name == TABLE and differ_by_extra_rows(array.shape, shape, config)
        if array.shape != shape and not extra_rows:
            raise PaliGemmaError(f"{file}: {PREFIX}{name} has shape {array.shape}; {says} asks for {shape}")
        for canonical, index, permutation in places:
            stored[canonical] = _slice(file, name, array, index, permutation)
    shapes = expected_shapes(config) | {EMBEDDING: arrays[TABLE].shape}
    return config, {name: replace(stored[name], shape=shape) for name, shape in shapes.items()}


def _slice(file: Path, name: str, array: Array, index: Axes, permutation: Axes | None) -> StoredTensor:
    """array[index], with its axes permuted."""
    raw, offset = array.shape[len(index) :], array.offset
    step = ITEMSIZE[array.dtype] * math.prod(raw)
    for i, n in zip(reversed(index), reversed(array.shape[: len(index)]), strict=True):
        offset += i * step
        step *= n
    return StoredTensor(file, PREFIX + name, array.dtype, raw, offset, raw, permutation)


def _config(file: Path, arrays: dict[str, Array]) -> PaliGemmaConfig:
    """A configuration from the shapes of the arrays; other values are those of every published PaliGemma."""

    def shape(name: str, ndim: int) -> Axes:
        found = arrays.get(name)
        if found is None or len(found.shape) != ndim or not all(found.shape):
            problem = f"has shape {found.shape}" if found else "is missing"
            other = "this is not a PaliGemma as big_vision saves it"
            raise PaliGemmaError(f"{file}: {PREFIX}{name} {problem}: {other}")
        return found.shape

    patch, _, channels, W = shape("img/embedding/kernel", 4)
    patches = shape("img/pos_embedding", 3)[1]
    _, _, heads, d = shape(f"{VISION_ATTENTION}/query/kernel", 4)
    vision_layers, _, vision_mlp = shape(f"{VISION_BLOCK}/MlpBlock_0/Dense_0/kernel", 3)
    side = math.isqrt(patches)
    if side * side != patches or channels != 3 or heads * d != W:
        sizes = f"{patches} patches of {channels} channels, {heads} heads of size {d} for a width of {W}"
        raise PaliGemmaError(f"{file}: {sizes}: this is not PaliGemma's SigLIP")
    V, E = shape(TABLE, 2)
    if FUSED in arrays:
        H = K = shape(FUSED, 5)[2]
    else:
        H, K = shape("llm/layers/attn/q_einsum/w", 4)[1], shape("llm/layers/attn/kv_einsum/w", 5)[2]
    D = shape("llm/layers/attn/attn_vec_einsum/w", 4)[2]
    layers, _, _, M = shape("llm/layers/mlp/gating_einsum", 4)
    if H % K or D % 2:
        raise PaliGemmaError(
            f"{file}: {H} query heads of size {D} to {K} key heads: this is not PaliGemma's Gemma"
        )
    second: dict[str, Any] = {}  # the fields that only Gemma 2 has
    if "llm/layers/post_attention_norm/scale" in arrays:
        second = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "sliding_window": 4096}
        second["post_norms"] = True
    # Gemma 2 27B, the only one with heads of size 128, divides scores by the square root of E / H instead.
    scalar = E / H if second and D == 128 else D
    return PaliGemmaConfig(
        VisionConfig(W, vision_mlp, vision_layers, heads, side * patch, patch, channels, layer_norm_eps=1e-6),
        TextConfig(
            E, M, layers, H, K, D, V, rms_norm_eps=1e-6, rope_theta=10000.0, max_position_embeddings=8192,
            query_pre_attn_scalar=scalar, **second,
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
                    again = "so it cannot be read in place: save it again with numpy.savez"
                    raise PaliGemmaError(f"{file}: {member.filename} is compressed, {again}")
                arrays[name] = _header(f, file, member, size)
            return arrays
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise unreadable(file, error, "a whole .npz file") from None


def _header(f: BinaryIO, file: Path, member: zipfile.ZipInfo, size: int) -> Array:
    """The array of one member of the archive, `file`, which has `size` bytes and is open as `f`."""
    f.seek(member.header_offset)
    local = f.read(30)  # zip's local header; a name and an extra field follow, of these lengths
    name_length, extra_length = (int.from_bytes(local[i : i + 2], "little") for i in (26, 28))
    start = member.header_offset + 30 + name_length + extra_length
    says = f"{file}: {member.filename}"
    f.seek(start)
    try:
        if local[:4] != b"PK\x03\x04":
            raise ValueError("the archive's directory gives a wrong place")
        shape, by_column, dtype = npy_header(f)
    except ValueError as error:
        why = str(error).splitlines()[0]
        raise PaliGemmaError(f"{says} is not an array that NumPy wrote ({why})") from None
    if dtype.hasobject:
        raise PaliGemmaError(f"{says} holds Python objects, which are pickled and never opened")
    if dtype.str not in DTYPES:
        raise PaliGemmaError(f"{says} is {dtype}; only float64, float32, float16 and bfloat16 are supported")
    if by_column and len(shape) > 1:
        raise PaliGemmaError(f"{says} is stored column by column: save it again from numpy.ascontiguousarray")
    end = start + member.file_size
    if f.tell() + math.prod(shape) * dtype.itemsize != end or end > size:
        count = f"{member.file_size} bytes, which does not match its shape {shape}"
        raise PaliGemmaError(f"{says} has {count}: download it again")
    return Array(DTYPES[dtype.str], tuple(shape), f.tell())
