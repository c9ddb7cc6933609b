"""What lies in a checkpoint directory: each tensor's canonical name, file, dtype, shape and place. No torch, no NumPy.

Both models read their weights through `tensors`, so that both refuse the same files. It is strict both ways: every tensor
of the files is expected by the model, every parameter of the model is in the files, and errors list the names. Shapes are
checked from the headers, before any weight is read or memory for it taken.
"""

import json
import math
import re
import struct
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from . import folders
from .command import tell
from .config import PaliGemmaConfig
from .errors import PaliGemmaError

ITEMSIZE = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes, by safetensors' names of the dtypes that are read here
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # usually tied to the embedding, and then not in the file
CHUNK = 1 << 24  # bytes that are compared at a time
# Buffers that older versions of transformers stored. They follow from config.json, and transformers ignores them.
FREQUENCIES = re.compile(r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
POSITIONS = re.compile(r"vision_tower\.vision_model\.embeddings\.position_ids")


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` bytes into `file`, row-major, little-endian."""

    file: Path
    name: str  # as the file has it
    dtype: str  # as safetensors has it; of a parameter, a key of ITEMSIZE
    shape: tuple[int, ...]
    offset: int
    lies: tuple[int, ...] | None = None  # the shape that it has in the file, where that is another one
    axes: tuple[int, ...] | None = None  # the order of those axes that makes it `shape`, some of them taken together
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


def load(model: str | Path, *, adapter: str | Path | None = None, full_attention: bool = False) -> tuple[PaliGemmaConfig, dict[str, StoredTensor]]:
    """What a checkpoint is, a directory or an .npz file of Google's, and its parameters by canonical name, those that the adapter in a
    directory changes with that. full_attention: without sliding windows, whatever the checkpoint says."""
    model = Path(model)
    if not (model.exists() or model.is_symlink()):
        raise PaliGemmaError(f"{model} is neither a directory nor an .npz file")
    folders.check_model(model, alone=adapter is None)
    if model.suffix == ".npz" and not model.is_dir():
        from . import jax_checkpoint

        config, stored = jax_checkpoint.load(model)
    else:
        config = PaliGemmaConfig.load(model)
        stored = tensors(model, config)
        if config.quantization:
            tell(f"{model}: config.json has a quantization_config ({config.quantization}), but the weights are float and are used so")
    if adapter is not None:
        from . import adapters

        stored = adapters.applied(Path(adapter), stored)
    if full_attention:
        config = replace(config, text_config=replace(config.text_config, sliding_window=None))
    return config, stored


def tensors(model_dir: str | Path, config: PaliGemmaConfig) -> dict[str, StoredTensor]:
    """The model's parameters by canonical name, each found once with the shape that the config asks for.

    The embedding may have `vocab_size` rows, or leave out or add the 64 rows of `<image>` and padding behind the
    tokenizer's own (both are in circulation). An output head that differs from the embedding is a parameter of its own, HEAD; one with
    the same values is left out. Where they are tied and the embedding is missing, the head is the embedding: safetensors stores one of the two.
    Raises PaliGemmaError with the names of what is missing, unexpected, doubled or misshapen."""
    found: dict[str, StoredTensor] = {}
    everything = _stored(Path(model_dir))
    for tensor in everything:
        name = canonical_name(tensor.name)
        if _is_buffer(name, tensor, config):
            continue
        if name in found:
            raise PaliGemmaError(f"{tensor.file.name}: tensor {tensor.name!r} is the same parameter as {found[name].name!r} in {found[name].file.name}")
        found[name] = tensor

    layers = max(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    if layers > len(found):  # before a list of what they would hold is made
        raise PaliGemmaError(f"{model_dir} holds {len(found)} tensors in all; config.json asks for {layers} layers")
    expected = expected_shapes(config)
    head = found.pop(HEAD, None)
    if head is not None and EMBEDDING not in found and config.tied:
        found[EMBEDDING], head = head, None
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    unread = next((tensor for name, tensor in found.items() if name in expected and tensor.dtype not in ITEMSIZE), None)
    if (missing or unexpected or unread) and (what := folders.foreign([tensor.name for tensor in everything])):
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of a PaliGemma, but {what}")
    if missing and (Path(model_dir) / folders.INDEX).exists() and everything[0].file.name == folders.SINGLE:
        whole = f"{folders.SINGLE} lacks {len(missing)} of the model's tensors ({listed(missing)}), and {folders.INDEX} is beside it"
        raise PaliGemmaError(f"{model_dir}: {whole}: if the shards that this names are there, delete {folders.SINGLE}, which is read first")
    if missing or unexpected:
        parts = [f"{len(names)} {what} ({listed(names)})" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of this PaliGemma: {', '.join(parts)}")
    if unread:
        raise PaliGemmaError(f"{unread.file.name}: tensor {unread.name!r} is {unread.dtype}; only {', '.join(ITEMSIZE)} are read")
    for name, shape in expected.items():
        stored = found[name].shape
        if name == EMBEDDING and stored[1:] == shape[1:] and {stored[0], shape[0]} == vocabularies(config):
            continue
        if stored != shape:
            says = f"{found[name].file.name}: tensor {found[name].name!r} has shape {stored}; config.json asks for {shape}"
            if len(shape) == 4 and stored == (shape[0], *shape[2:], shape[1]):
                says += ": this is MLX's order of axes: use the checkpoint that it was made from"
            raise PaliGemmaError(says)
    parameters = {name: found[name] for name in expected}
    if head is None and not config.tied:
        raise PaliGemmaError(f"{model_dir} lacks lm_head.weight: config.json says that the output head is not tied to the embedding (tie_word_embeddings)")
    if head is None:
        return parameters
    if head.dtype not in ITEMSIZE or head.shape != found[EMBEDDING].shape:
        has = f"is {head.dtype} with shape {head.shape}"
        raise PaliGemmaError(f"{head.file.name}: the output head {head.name!r} {has}; the embedding has {found[EMBEDDING].shape} in {found[EMBEDDING].dtype}")
    return parameters if same_values(head, found[EMBEDDING]) else {**parameters, HEAD: head}


def _is_buffer(name: str, tensor: StoredTensor, config: PaliGemmaConfig) -> bool:
    """Whether a tensor is one of the buffers that follow from config.json. Raises PaliGemmaError where it contradicts that."""
    text, patches = config.text_config, config.vision_config.num_patches
    if FREQUENCIES.fullmatch(name):
        half = text.head_dim // 2
        precision = {"F64": 1e-5, "F32": 1e-5, "F16": 2**-9, "BF16": 2**-7}.get(tensor.dtype, 0)
        tiny = 2**-24 if tensor.dtype == "F16" else 0  # the distance of its smallest numbers
        values = _numbers(tensor) if tensor.shape == (half,) else []
        if len(values) != half or not all(abs(x - text.rope_theta ** (-i / half)) <= precision * abs(x) + tiny for i, x in enumerate(values)):
            says = f"the frequencies of rope_theta {text.rope_theta:g}"
            raise PaliGemmaError(f"{tensor.file.name}: {tensor.name!r} does not hold {says}, which config.json has: they are not of one checkpoint")
        return True
    if POSITIONS.fullmatch(name):
        if tensor.shape not in ((1, patches), (patches,)) or _numbers(tensor) != list(range(patches)):
            raise PaliGemmaError(f"{tensor.file.name}: {tensor.name!r} is not 0 to {patches - 1}; other positions of the patches are not implemented")
        return True
    return False


def _numbers(tensor: StoredTensor) -> list[float]:
    """The values of a small tensor; none of a dtype that buffers do not have."""
    formats = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H", "I64": "q", "I32": "i"}
    if tensor.dtype not in formats:
        return []
    count = math.prod(tensor.shape)
    layout = f"<{count}{formats[tensor.dtype]}"
    with open(tensor.file, "rb") as f:
        f.seek(tensor.offset)
        values = struct.unpack(layout, f.read(struct.calcsize(layout)))
    if tensor.dtype == "BF16":  # the upper half of a float32
        values = struct.unpack(f"<{count}f", b"".join(struct.pack("<HH", 0, value) for value in values))
    return list(values)


def canonical_name(name: str) -> str:
    """The name on the Hub of a parameter, from any of the five ways in which transformers has written it."""
    name = name.removeprefix("model.")
    if name == "lm_head.weight":
        return HEAD
    for tower, inner in (("vision_tower.", "vision_model."), ("language_model.", "model.")):
        rest = name.removeprefix(tower)
        if rest != name and name != HEAD:
            return tower + inner + rest.removeprefix(inner)
    return name


def expected_shapes(config: PaliGemmaConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter of the model by canonical name, in the order of the data flow; linear maps are (out, in)."""
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
    """The two numbers of embedding rows in circulation: the tokenizer's own, and these with 64 more."""
    return {config.image_token_index, config.image_token_index + 64}


def _stored(model_dir: Path) -> list[StoredTensor]:
    """Every tensor of the directory's safetensors files, which hold what their index says; without an index, of shards that are all there
    by their names."""
    single, index_path = model_dir / folders.SINGLE, model_dir / folders.INDEX
    if single.exists() or single.is_symlink():
        return read_header(single)
    if not (index_path.exists() or index_path.is_symlink()):
        names, count = folders.shards(file.name for file in model_dir.glob("*.safetensors"))
        if not count or len(names) != count:
            raise folders.without_weights(model_dir)
        return [tensor for name in names for tensor in read_header(model_dir / name)]
    index = folders.read_json(index_path)
    files = [model_dir / name for name in weight_file_names(index)]
    for file in files:
        if not file.exists() and not file.is_symlink():
            raise PaliGemmaError(f"{model_dir} lacks the shard {file.name} that its index names: download it again")
    stored = [tensor for file in files for tensor in read_header(file)]
    for name, file in sorted(index["weight_map"].items() - {(tensor.name, tensor.file.name) for tensor in stored}):
        raise PaliGemmaError(f"{file} does not hold tensor {name!r}, which {index_path.name} says it does")
    return stored


def weight_file_names(index: dict) -> list[str]:
    """The shards that a model.safetensors.index.json names. Raises PaliGemmaError for a name that is not a plain file name."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise PaliGemmaError("model.safetensors.index.json has no weight_map")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name, re.ASCII):
            raise PaliGemmaError(f"model.safetensors.index.json names the file {name!r}, which is not a plain name that ends in .safetensors")
    return names


def read_header(file: Path) -> list[StoredTensor]:
    """Every tensor of one safetensors file, whatever its dtype. Raises PaliGemmaError for a file that is not whole or may not be read."""
    try:
        with safe_open(file, framework="numpy"):  # validates the header: sizes, order, no gap, no overlap, whole file
            pass
    except (SafetensorError, OSError) as error:
        raise folders.unreadable(file, error, "a whole safetensors file") from None
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    return [StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]) for name, entry in header.items()]


def same_values(a: StoredTensor, b: StoredTensor) -> bool:
    """Whether two tensors of safetensors files hold the same numbers, in whatever dtypes."""
    if a.shape != b.shape:
        return False
    count, step = a.nbytes // ITEMSIZE[a.dtype], max(1, CHUNK // 8)
    with open(a.file, "rb") as fa, open(b.file, "rb") as fb:
        fa.seek(a.offset)
        fb.seek(b.offset)
        for start in range(0, count, step):
            size = min(step, count - start)
            left, right = fa.read(size * ITEMSIZE[a.dtype]), fb.read(size * ITEMSIZE[b.dtype])
            if left != right if a.dtype == b.dtype else not _equal(left, a.dtype, right, b.dtype):
                return False
    return True


def _equal(left: bytes, left_dtype: str, right: bytes, right_dtype: str) -> bool:
    import numpy as np

    def wide(data: bytes, dtype: str) -> np.ndarray:
        if dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        return np.frombuffer(data, {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype]).astype(np.float64)

    return np.array_equal(wide(left, left_dtype), wide(right, right_dtype))


def listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
