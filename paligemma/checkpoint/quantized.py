"""Quantised weights: which tensors a model has of them, and where a directory that `python -m
paligemma.quantize` wrote stores them. No torch, no NumPy.

Its files are called paligemma-int8-00001-of-00002.safetensors and so on. The names of published weights would
let transformers read the directory: it skips a quantization_config that it does not know, and takes codes for
weights. A matrix is the two tensors NAME.weight and NAME.weight_scale; the output head is always there."""

import math
import re
from collections.abc import Mapping
from pathlib import Path

from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from ..quantization import FORMATS, WORDS, Saved
from .safetensors_file import read_header
from .stored import (
    CODESIZE,
    EMBEDDING,
    HEAD,
    ITEMSIZE,
    SCALE,
    StoredTensor,
    differ_by_extra_rows,
    differences,
    expected_shapes,
    listed,
)

FILE = re.compile(r"paligemma-(\w+)-(\d{5})-of-(\d{5})\.safetensors")
AGAIN = "copy the directory again, or make it again with python -m paligemma.quantize"
Shape = tuple[int, ...]
Form = tuple[str, Shape]  # of a tensor: its dtype in safetensors' words, and its shape


def file_name(format: str, number: int | str, count: int | str) -> str:
    """The name of one of the files; with `?????` for the numbers, the pattern of all names."""
    return f"paligemma-{format}-{number:0>5}-of-{count:0>5}.safetensors"


def nbytes(form: Form) -> int:
    return (ITEMSIZE | CODESIZE)[form[0]] * math.prod(form[1])


def forms(shapes: Mapping[str, Shape], dtype: str, format: str | None) -> dict[str, Form]:
    """The tensors of a model that computes in `dtype`, by name.

    shapes: of its parameters before they are quantised. format: of the language model's matrices; None: they
    are in `dtype` too. A quantised output head is a tensor of its own even if it is tied to the embedding.
    Raises PaliGemmaError for a matrix whose rows are not whole groups."""
    found: dict[str, Form] = {}
    head = {HEAD: shapes[EMBEDDING]} if format and HEAD not in shapes else {}
    for name, shape in (*shapes.items(), *head.items()):
        kind = format_of(name, shape, format)
        if kind is None:
            found[name] = WORDS[dtype], shape
            continue
        (rows, columns), how = shape, FORMATS[kind]
        if how.group and columns % how.group:
            groups = f"{kind} needs columns in multiples of {how.group}; use int8"
            raise PaliGemmaError(f"{name} has shape {shape}: {groups}")
        found[name] = how.codes, (rows, columns * how.bits // (8 * CODESIZE[how.codes]))
        scales = (rows, columns // how.group) if how.group else (rows,)
        found[name + SCALE] = Saved(kind, dtype).scale(kind), scales
    return found


def format_of(name: str, shape: Shape, format: str | None) -> str | None:
    """The format in which a parameter is quantised, if the matrices are in `format`; None: it is not."""
    if format is None or name == HEAD:
        return format and FORMATS[format].head
    return format if name.startswith("language_model.model.layers.") and len(shape) == 2 else None


def tensors(model_dir: Path, config: PaliGemmaConfig) -> dict[str, StoredTensor]:
    """The model's tensors by name, as `forms` lists them, each found once. Raises PaliGemmaError with the
    names of tensors and files that are missing, unexpected, stored twice, of another dtype or of another
    shape."""
    saved = config.saved
    assert saved is not None
    found: dict[str, StoredTensor] = {}
    for file in _files(model_dir, saved.format):
        for tensor in read_header(file, AGAIN):
            if tensor.name in found:
                both = f"{found[tensor.name].file} and {file.name} both hold tensor {tensor.name!r}"
                raise PaliGemmaError(f"{both}: {AGAIN}")
            found[tensor.name] = tensor
    layers = max(config.vision_config.num_hidden_layers, config.text_config.num_hidden_layers)
    if layers > len(found):  # before the parameters of that many layers are listed
        total = f"{len(found)} tensors in all"
        raise PaliGemmaError(f"{model_dir} holds {total}; config.json asks for {layers} layers")
    shapes = expected_shapes(config)
    if EMBEDDING in found and differ_by_extra_rows(found[EMBEDDING].shape, shapes[EMBEDDING], config):
        shapes[EMBEDDING] = found[EMBEDDING].shape
    expected = forms(shapes, saved.dtype, saved.format)
    missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
    if missing or unexpected:
        names = differences(missing, unexpected)
        raise PaliGemmaError(
            f"{model_dir} does not hold the tensors of this PaliGemma in {saved.format}: {names}: {AGAIN}"
        )
    for name, (dtype, shape) in expected.items():
        tensor = found[name]
        if (tensor.dtype, tensor.shape) != (dtype, shape):
            wrong = f"{tensor.file.name}: tensor {name!r} is {tensor.dtype} with shape {tensor.shape}"
            asked = f"config.json ({saved.format} for {saved.dtype}) asks for {dtype} with shape {shape}"
            raise PaliGemmaError(f"{wrong}; {asked}: {AGAIN}")
    return {name: found[name] for name in expected}


def _files(model_dir: Path, format: str) -> list[Path]:
    """The files of a directory's quantised weights, in order. Raises PaliGemmaError if one is missing, and if
    there are other weights beside them."""
    others = sorted(
        file.name for file in model_dir.glob("*.safetensors") if not file.name.startswith("paligemma-")
    )
    if others:
        raise PaliGemmaError(
            f"{model_dir} holds {listed(others)} beside weights in {format}: remove one of them"
        )
    named = sorted(file.name for file in model_dir.glob("paligemma-*.safetensors"))
    matches = [match for name in named if (match := FILE.fullmatch(name))]
    counts = {int(match[3]) for match in matches if match[1] == format}
    wanted = [file_name(format, i + 1, count) for count in counts for i in range(count)]
    if len(counts) == 1 and wanted == [match[0] for match in matches]:
        return [model_dir / name for name in wanted]
    held = f"it holds {listed(named)}" if named else "it holds no such file"
    if missing := [name for name in wanted or [file_name(format, 1, 1)] if name not in named]:
        raise PaliGemmaError(f"{model_dir} lacks {missing[0]}; {held}: {AGAIN}")
    raise PaliGemmaError(f"{model_dir} holds files of several checkpoints; {held}: {AGAIN}")
