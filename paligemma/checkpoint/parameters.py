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
from . import folders, lookalikes
from .safetensors_file import same_values, stored_tensors
from .stored import (
    EMBEDDING,
    HEAD,
    ITEMSIZE,
    StoredTensor,
    canonical_name,
    differ_by_extra_rows,
    differences,
    expected_shapes,
    listed,
)

# Buffers that older versions of transformers stored. config.json determines them; transformers ignores them.
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
            same = f"the same parameter as {found[name].name!r} in {found[name].file.name}"
            raise PaliGemmaError(f"{tensor.file.name}: tensor {tensor.name!r} is {same}")
        found[name] = tensor

    layers = max(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    if layers > len(found):  # before the parameters of that many layers are listed
        total = f"{len(found)} tensors in all"
        raise PaliGemmaError(f"{model_dir} holds {total}; config.json asks for {layers} layers")
    expected = expected_shapes(config)
    head = found.pop(HEAD, None)
    if head is not None and EMBEDDING not in found and config.tied:
        found[EMBEDDING], head = head, None
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    unsupported = [x for name, x in found.items() if name in expected and x.dtype not in ITEMSIZE]
    faulty = missing or unexpected or unsupported
    if faulty and (what := lookalikes.foreign([tensor.name for tensor in everything])):
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of a PaliGemma, but {what}")
    single, index = folders.SINGLE, folders.INDEX
    if missing and os.path.lexists(Path(model_dir) / index) and everything[0].file.name == single:
        lacks = f"{single} lacks {len(missing)} of the model's tensors ({listed(missing)})"
        remedy = f"if the shards that {index} names are there, delete {single}, which is read first"
        raise PaliGemmaError(f"{model_dir}: {lacks}: {remedy}")
    if missing or unexpected:
        names = differences(missing, unexpected)
        raise PaliGemmaError(f"{model_dir} does not hold the tensors of this PaliGemma: {names}")
    if unsupported:
        tensor = unsupported[0]
        only = f"{tensor.dtype}; only {', '.join(ITEMSIZE)} are supported"
        raise PaliGemmaError(f"{tensor.file.name}: tensor {tensor.name!r} is {only}")
    for name, shape in expected.items():
        tensor = found[name]
        if name == EMBEDDING and differ_by_extra_rows(tensor.shape, shape, config):
            continue
        if tensor.shape != shape:
            shapes = f"has shape {tensor.shape}; config.json asks for {shape}"
            if len(shape) == 4 and tensor.shape == (shape[0], *shape[2:], shape[1]):
                shapes += ": this is MLX's order of axes: use the checkpoint that it was made from"
            raise PaliGemmaError(f"{tensor.file.name}: tensor {tensor.name!r} {shapes}")
    parameters, embedding = {name: found[name] for name in expected}, found[EMBEDDING]
    if head is None and not config.tied:
        untied = "the output head is not tied to the embedding (tie_word_embeddings)"
        raise PaliGemmaError(f"{model_dir} lacks lm_head.weight: config.json says that {untied}")
    if head is None:
        return parameters
    if head.dtype not in ITEMSIZE or head.shape != embedding.shape:
        differ = f"is {head.dtype} with shape {head.shape}; the embedding is {embedding.dtype} with shape"
        raise PaliGemmaError(f"{head.file.name}: the output head {head.name!r} {differ} {embedding.shape}")
    return parameters if same_values(head, embedding) else {**parameters, HEAD: head}


def _is_buffer(name: str, tensor: StoredTensor, config: PaliGemmaConfig) -> bool:
    """Whether a tensor is a buffer that config.json determines. Raises PaliGemmaError if its values
    contradict it."""
    text, patches = config.text_config, config.vision_config.num_patches
    if FREQUENCIES.fullmatch(name):
        half = text.head_dim // 2
        precision = {"F64": 1e-5, "F32": 1e-5, "F16": 2**-9, "BF16": 2**-7}.get(tensor.dtype, 0)
        tiny = 2**-24 if tensor.dtype == "F16" else 0  # the spacing of float16's smallest numbers
        values = _numbers(tensor) if tensor.shape == (half,) else []
        true = [text.rope_theta ** (-i / half) for i in range(len(values))]
        close = (abs(x - y) <= precision * abs(x) + tiny for x, y in zip(values, true, strict=True))
        if len(values) != half or not all(close):
            other = f"the frequencies of config.json's rope_theta, {text.rope_theta:g}"
            differ = "the two files belong to different checkpoints"
            raise PaliGemmaError(f"{tensor.file.name}: {tensor.name!r} does not hold {other}: {differ}")
        return True
    if POSITIONS.fullmatch(name):
        if tensor.shape not in ((1, patches), (patches,)) or _numbers(tensor) != list(range(patches)):
            other = f"is not 0 to {patches - 1}; other positions of the patches are not implemented"
            raise PaliGemmaError(f"{tensor.file.name}: {tensor.name!r} {other}")
        return True
    return False


def _numbers(tensor: StoredTensor) -> list[float]:
    """The values of a small tensor; an empty list for a dtype that buffers never have."""
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
