"""What lies in a checkpoint directory: each tensor's canonical name, file, dtype, shape and place. No torch, no NumPy.

Both models read their weights through `tensors`, so that both refuse the same files. It is strict both ways: every tensor
of the files is expected by the model, every parameter of the model is in the files, and errors list the names. Shapes are
checked from the headers, before any weight is read or memory for it taken.
"""

import json
import re
from dataclasses import dataclass, replace
from pathlib import Path

from safetensors import SafetensorError, safe_open

from .config import PaliGemmaConfig, read_json
from .errors import PaliGemmaError

ITEMSIZE = {"F32": 4, "F16": 2, "BF16": 2}  # bytes, by safetensors' names of the dtypes that are read here
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"  # tied to the embedding, so usually not in the file
CHUNK = 1 << 24  # bytes that are compared at a time


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `offset` bytes into `file`, row-major, little-endian."""

    file: Path
    name: str  # as the file has it
    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    offset: int
    lies: tuple[int, ...] | None = None  # the shape that it has in the file, where that is another one
    axes: tuple[int, ...] | None = None  # the order of those axes that makes it `shape`, some of them taken together
    update: "Update | None" = None  # what is to be added

    @property
    def nbytes(self) -> int:
        size = ITEMSIZE[self.dtype]
        for n in self.shape:
            size *= n
        return size


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
    if model.suffix == ".npz" and not model.is_dir():
        from . import jax_checkpoint

        config, stored = jax_checkpoint.load(model)
    else:
        config = PaliGemmaConfig.load(model)
        stored = tensors(model, config)
    if adapter is not None:
        from . import adapters

        stored = adapters.applied(Path(adapter), stored)
    if full_attention:
        config = replace(config, text_config=replace(config.text_config, sliding_window=None))
    return config, stored


def tensors(model_dir: str | Path, config: PaliGemmaConfig) -> dict[str, StoredTensor]:
    """The model's parameters by canonical name, each found once with the shape that the config asks for.

    The embedding may have `vocab_size` rows, or leave out or add the 64 rows of `<image>` and padding behind the
    tokenizer's own (both are in circulation). A stored output head must equal the embedding, to which it is tied.
    Raises PaliGemmaError with the names of what is missing, unexpected, doubled or misshapen."""
    found: dict[str, StoredTensor] = {}
    for tensor in _stored(Path(model_dir)):
        name = canonical_name(tensor.name)
        if name in found:
            raise PaliGemmaError(f"{tensor.file.name}: tensor {tensor.name!r} is the same parameter as {found[name].name!r} in {found[name].file.name}")
        found[name] = tensor

    layers = max(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    if layers > len(found):  # before a list of what they would hold is made
        raise PaliGemmaError(f"{model_dir} holds {len(found)} tensors in all; config.json asks for {layers} layers")
    expected = expected_shapes(config)
    head = found.pop(HEAD, None)
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        parts = [f"{len(names)} {what} ({listed(names)})" for what, names in (("missing", missing), ("unexpected", unexpected)) if names]
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of this PaliGemma: {', '.join(parts)}")
    for name, shape in expected.items():
        stored = found[name].shape
        if name == EMBEDDING and stored[1:] == shape[1:] and {stored[0], shape[0]} == vocabularies(config):
            continue
        if stored != shape:
            raise PaliGemmaError(f"{found[name].file.name}: tensor {found[name].name!r} has shape {stored}; config.json asks for {shape}")
    if head is not None and not _same_bytes(head, found[EMBEDDING]):
        raise PaliGemmaError(f"{head.file.name}: {head.name!r} differs from the embedding; an output head that is not tied to it is not implemented")
    return {name: found[name] for name in expected}


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
    """Every tensor of the directory's safetensors files, which hold what their index says."""
    single, index_path = model_dir / "model.safetensors", model_dir / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index_path.exists():
        pickled = sorted(p.name for p in model_dir.glob("*.bin"))
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        raise PaliGemmaError(f"{model_dir} has no model.safetensors and no model.safetensors.index.json{hint}")
    index = read_json(index_path)
    files = [model_dir / name for name in weight_file_names(index)]
    for file in files:
        if not file.exists():
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
    """Every tensor of one safetensors file. Raises PaliGemmaError for a file that is not whole, or a dtype that is not read."""
    try:
        with safe_open(file, framework="numpy"):  # validates the header: sizes, order, no gap, no overlap, whole file
            pass
    except (SafetensorError, OSError) as error:
        remedy = "it is git's pointer to the weights: run 'git lfs pull'" if _is_pointer(file) else "download it again"
        raise PaliGemmaError(f"{file} is not a whole safetensors file ({error}): {remedy}") from None
    with open(file, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        header = json.loads(f.read(length))
    header.pop("__metadata__", None)
    for name, entry in header.items():
        if entry["dtype"] not in ITEMSIZE:
            raise PaliGemmaError(f"{file.name}: tensor {name!r} is {entry['dtype']}; only F32, F16 and BF16 are read")
    return [StoredTensor(file, name, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]) for name, entry in header.items()]


def _is_pointer(file: Path) -> bool:
    return file.is_file() and file.stat().st_size < 1000 and file.read_bytes().startswith(b"version https://git-lfs")


def _same_bytes(a: StoredTensor, b: StoredTensor) -> bool:
    if (a.dtype, a.shape) != (b.dtype, b.shape):
        return False
    with open(a.file, "rb") as fa, open(b.file, "rb") as fb:
        fa.seek(a.offset)
        fb.seek(b.offset)
        left = a.nbytes
        while left:
            size = min(left, CHUNK)
            if fa.read(size) != fb.read(size):
                return False
            left -= size
    return True


def listed(names: list[str], most: int = 4) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
