"""Saves a checkpoint with quantised weights. Each tensor is the one into which loading with --quantize would
convert the float tensor."""

import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import checkpoint
from ..config import IMAGE_SETTINGS, PaliGemmaConfig
from ..errors import PaliGemmaError
from ..machine import free_memory
from ..quantization import WORDS, Saved
from ..tokenizer import FILES as TOKENIZER
from ..tokenizer.vocabulary import JSON, MODEL
from .quantized import Form, forms, nbytes
from .reading import STORED, read_each, stays_mapped
from .stored import EMBEDDING, HEAD, SCALE, StoredTensor
from .writing import file_bytes, writing

CPU = torch.device("cpu")
SAFETENSORS = {dtype: word for word, dtype in STORED.items()}
SIDE = 1 << 26  # bytes allowed for the small files; tokenizer.json has 34 million


def save(
    stored: dict[str, StoredTensor], config: PaliGemmaConfig, images: dict, tokenizer: Path, saved: Saved,
    directory: Path,
) -> int:  # fmt: skip
    """Write the checkpoint's directory and return the size of its weights in bytes. The directory appears
    when all of it is on the disk; if anything fails before, nothing is left.

    stored: the float parameters, with the changes of an adapter. images: the settings of the image processor.
    tokenizer: the directory of the tokenizer, or its one file. Raises PaliGemmaError if memory or the disk
    has too little space."""
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    wanted, dtype = forms(shapes, saved.dtype, saved.format), STORED[WORDS[saved.dtype]]
    quantized = {name: STORED[wanted[name][0]] for name in wanted if name + SCALE in wanted}
    _check_memory(stored, wanted, dtype)
    size = file_bytes(wanted)
    free = shutil.disk_usage(Path(os.path.realpath(directory)).parent).free
    if size + SIDE > free:
        few = f"its disk has {free / 1e9:.1f} GB free: free some space, or give a directory on another disk"
        raise PaliGemmaError(f"{directory} needs {size / 1e9:.1f} GB, and {few}")
    with _appearing(directory) as partial:
        for source, name in tokenizer_files(tokenizer):
            shutil.copyfile(source, partial / name)
        for name, value in (("config.json", _config(config, saved)), (IMAGE_SETTINGS[1], images)):
            (partial / name).write_text(json.dumps(value, indent=2) + "\n")
        with writing(partial, saved.format, wanted) as writer:
            for name, value in read_each(stored, CPU, dtype, quantized, {}, f"quantising to {saved.format}"):
                value = value.detach().contiguous()
                if name.endswith(SCALE) and not bool(value.isfinite().all()):
                    origin = stored.get(name.removesuffix(SCALE)) or stored[EMBEDDING]
                    damaged = f"tensor {origin.name!r} of {origin.file} holds NaN or infinity"
                    raise PaliGemmaError(f"{damaged}: the checkpoint is damaged: get it again")
                form = SAFETENSORS[value.dtype], tuple(value.shape)
                writer.write(name, form, value.view(torch.uint8).numpy().data)
        checkpoint.load(partial)  # all tensors are there, before it gets its name
    return size


def tokenizer_files(path: Path) -> list[tuple[Path, str]]:
    """The files of a tokenizer, each with its name in a checkpoint. path: its directory, or the one file to
    use."""
    if not path.is_dir():
        return [(path, JSON if path.suffix == ".json" else MODEL)]
    return [(path / name, name) for name in (MODEL, JSON, *TOKENIZER) if (path / name).exists()]


def check_new(directory: Path, *others: Path) -> None:
    """Raise PaliGemmaError, before any work is done, for a directory that cannot be written. others:
    directories that are read."""
    target = Path(os.path.realpath(directory))
    try:
        target.is_dir()
    except OSError as error:
        raise PaliGemmaError(f"{directory} cannot be made ({error.strerror}): give another name") from None
    for other in (Path(os.path.realpath(path)) for path in others):
        if target == other or other in target.parents:
            raise PaliGemmaError(f"{directory} is in {other}, which is read: give a directory outside it")
    if os.path.lexists(target) and not target.is_dir():
        raise PaliGemmaError(f"{directory} is a file: give the name of a new directory")
    if os.path.ismount(target):  # the result, which is made beside it, could not take its place
        raise PaliGemmaError(f"{directory} is where a disk is mounted: give a new directory inside it")
    if target.is_dir() and any(target.iterdir()):
        raise PaliGemmaError(f"{directory} is not empty: give the name of a new directory")
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise PaliGemmaError(f"{directory} cannot be made: the directory above it is missing or read-only")


@contextmanager
def _appearing(directory: Path) -> Iterator[Path]:
    """A directory to fill, beside `directory`, which it becomes at the end of the block. If the block raises,
    it is removed."""
    target = Path(os.path.realpath(directory))
    partial = target.with_name(f".{os.urandom(8).hex()}.part")
    try:
        partial.mkdir()
        yield partial
        for path in partial.iterdir():
            _sync(path)
        _sync(partial)
        if target.is_dir():
            target.rmdir()  # it is empty; Windows does not replace it
        partial.rename(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            more = "free some space, or give a directory on another disk"
            raise PaliGemmaError(f"the disk of {directory} is full, and nothing was kept: {more}") from None
        raise PaliGemmaError(f"{directory} cannot be written ({error.strerror or error})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk. Windows opens no directory."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_memory(stored: dict[str, StoredTensor], wanted: dict[str, Form], dtype: torch.dtype) -> None:
    """Raise PaliGemmaError if the memory has no room for the tensor that takes the most. A tensor that must
    be converted first takes up to two copies in float32 besides."""

    def needed(name: str, tensor: StoredTensor) -> int:
        mapped = name + SCALE not in wanted and stays_mapped(tensor, CPU, dtype)
        made = [name + SCALE] if mapped else [name, name + SCALE]
        made += [HEAD, HEAD + SCALE] if name == EMBEDDING and HEAD not in stored else []
        taken = sum(nbytes(wanted[part]) for part in made if part in wanted)
        direct = stays_mapped(tensor, CPU, STORED[tensor.dtype])
        return taken if direct else taken + 8 * tensor.nbytes // STORED[tensor.dtype].itemsize

    most, free = max(needed(name, tensor) for name, tensor in stored.items()), free_memory()
    if most > free:
        sizes = f"{most / 1e9:.1f} GB of memory; this machine has {free / 1e9:.1f} GB free"
        raise PaliGemmaError(f"quantising this model needs {sizes}: close other programs")


def _config(config: PaliGemmaConfig, saved: Saved) -> dict[str, Any]:
    """A config.json that says all of a configuration. Nothing is taken from the float checkpoint's own, whose
    files may be several or, beside an .npz file, missing."""
    text, vision = asdict(config.text_config), asdict(config.vision_config)
    text["model_type"] = "gemma2" if text.pop("post_norms") else "gemma"
    if text["layer_types"] is None:
        del text["layer_types"]
    vision |= {"model_type": "siglip_vision_model"}
    return {
        "architectures": ["PaliGemmaForConditionalGeneration"], "model_type": "paligemma",
        "image_token_index": config.image_token_index, "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids), "pad_token_id": config.pad_token_id,
        "projection_dim": config.text_config.hidden_size, "tie_word_embeddings": config.tied,
        "torch_dtype": saved.dtype, "quantization_config": saved.config(),
        "text_config": text, "vision_config": vision,
    }  # fmt: skip
