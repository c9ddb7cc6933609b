"""Finds the parameters of a model in a checkpoint directory, strictly. No torch, no NumPy.

Both models read their weights through `tensors`, so that both refuse the same files. It is strict in both
directions: the model must expect every tensor in the files, the files must hold every parameter of the model,
and errors list the names. Shapes are checked from the headers, before any weight is read or any memory
allocated."""

import math
import os
import re
import struct
from pathlib import Path

from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from . import folders
from .safetensors_file import same_values, stored_tensors
from .stored import (
    EMBEDDING,
    HEAD,
    ITEMSIZE,
    StoredTensor,
    canonical_name,
    expected_shapes,
    listed,
    vocabularies,
)

# Buffers that older versions of transformers stored. They follow from config.json, and transformers ignores
# them.
FREQUENCIES = re.compile(r"language_model\.model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")
POSITIONS = re.compile(r"vision_tower\.vision_model\.embeddings\.position_ids")


def tensors(model_dir: str | Path, config: PaliGemmaConfig) -> dict[str, StoredTensor]:
    """The model's parameters by canonical name, each found once and with the shape that the config asks for.

    The embedding may have `vocab_size` rows, or that number without or with the 64 rows for `<image>` and
    padding that follow the tokenizer's own (published checkpoints have both). An output head that differs
    from the embedding is the parameter HEAD; one with the same values is left out. If they are tied and the
    embedding is missing, the head is used as the embedding, because safetensors stores only one of the two.
    Raises PaliGemmaError with the names of tensors that are missing, unexpected, duplicated or of the wrong
    shape."""
    found: dict[str, StoredTensor] = {}
    everything = stored_tensors(Path(model_dir))
    for tensor in everything:
        name = canonical_name(tensor.name)
        if _is_buffer(name, tensor, config):
            continue
        if name in found:
            raise PaliGemmaError(
                f"{tensor.file.name}: tensor {tensor.name!r} is the same parameter as {found[name].name!r} in {found[name].file.name}"
            )
        found[name] = tensor

    layers = max(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    if layers > len(found):  # before a list of what they would hold is made
        raise PaliGemmaError(
            f"{model_dir} holds {len(found)} tensors in all; config.json asks for {layers} layers"
        )
    expected = expected_shapes(config)
    head = found.pop(HEAD, None)
    if head is not None and EMBEDDING not in found and config.tied:
        found[EMBEDDING], head = head, None
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    unread = next(
        (tensor for name, tensor in found.items() if name in expected and tensor.dtype not in ITEMSIZE), None
    )
    if (missing or unexpected or unread) and (
        what := folders.foreign([tensor.name for tensor in everything])
    ):
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of a PaliGemma, but {what}")
    if (
        missing
        and os.path.lexists(Path(model_dir) / folders.INDEX)
        and everything[0].file.name == folders.SINGLE
    ):
        whole = f"{folders.SINGLE} lacks {len(missing)} of the model's tensors ({listed(missing)}), and {folders.INDEX} is beside it"
        raise PaliGemmaError(
            f"{model_dir}: {whole}: if the shards that this names are there, delete {folders.SINGLE}, which is read first"
        )
    if missing or unexpected:
        parts = [
            f"{len(names)} {what} ({listed(names)})"
            for what, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of this PaliGemma: {', '.join(parts)}")
    if unread:
        raise PaliGemmaError(
            f"{unread.file.name}: tensor {unread.name!r} is {unread.dtype}; only {', '.join(ITEMSIZE)} are read"
        )
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
        raise PaliGemmaError(
            f"{model_dir} lacks lm_head.weight: config.json says that the output head is not tied to the embedding (tie_word_embeddings)"
        )
    if head is None:
        return parameters
    if head.dtype not in ITEMSIZE or head.shape != found[EMBEDDING].shape:
        has = f"is {head.dtype} with shape {head.shape}"
        raise PaliGemmaError(
            f"{head.file.name}: the output head {head.name!r} {has}; the embedding has {found[EMBEDDING].shape} in {found[EMBEDDING].dtype}"
        )
    return parameters if same_values(head, found[EMBEDDING]) else {**parameters, HEAD: head}


def _is_buffer(name: str, tensor: StoredTensor, config: PaliGemmaConfig) -> bool:
    """Whether a tensor is a buffer that config.json determines. Raises PaliGemmaError if its values
    contradict it."""
    text, patches = config.text_config, config.vision_config.num_patches
    if FREQUENCIES.fullmatch(name):
        half = text.head_dim // 2
        precision = {"F64": 1e-5, "F32": 1e-5, "F16": 2**-9, "BF16": 2**-7}.get(tensor.dtype, 0)
        tiny = 2**-24 if tensor.dtype == "F16" else 0  # the distance of its smallest numbers
        values = _numbers(tensor) if tensor.shape == (half,) else []
        if len(values) != half or not all(
            abs(x - text.rope_theta ** (-i / half)) <= precision * abs(x) + tiny for i, x in enumerate(values)
        ):
            says = f"the frequencies of rope_theta {text.rope_theta:g}"
            raise PaliGemmaError(
                f"{tensor.file.name}: {tensor.name!r} does not hold {says}, which config.json has: they are not of one checkpoint"
            )
        return True
    if POSITIONS.fullmatch(name):
        if tensor.shape not in ((1, patches), (patches,)) or _numbers(tensor) != list(range(patches)):
            raise PaliGemmaError(
                f"{tensor.file.name}: {tensor.name!r} is not 0 to {patches - 1}; other positions of the patches are not implemented"
            )
        return True
    return False


def _numbers(tensor: StoredTensor) -> list[float]:
    """The values of a small tensor; an empty list for a dtype that buffers do not have."""
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
