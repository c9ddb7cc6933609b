"""Reads parameters from their files directly into their final place, one at a time."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from ..command import STDERR
from ..errors import PaliGemmaError
from . import quantize
from .stored import CODESIZE, EMBEDDING, HEAD, ITEMSIZE, SCALE, StoredTensor

# NumPy has neither bfloat16 nor e4m3: integers have the same sizes.
NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.int16}
NUMPY |= {"I32": np.int32, "I8": np.int8, "F8_E4M3": np.int8}
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED |= {"I32": torch.int32, "I8": torch.int8, "F8_E4M3": torch.float8_e4m3fn}  # quantised weights
# The linear layers whose weights one product reads, and the groups of parameters that are packed for it.
TOGETHER = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
PACKED = [[f"{name}.{kind}" for name in names] for names in TOGETHER for kind in ("weight", "bias")]
CHUNK = 1 << 26  # bytes of a file that are read at a time if they are converted or moved to a GPU
CODES = 1 << 22  # bytes of e4m3 codes that are checked at a time; new memory for each part would take longer


def read(
    stored: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantized: Mapping[str, torch.dtype] | None = None,
    pack: bool = False,
) -> dict[str, Tensor]:
    """The tensors on `device` in `dtype`; those of saved quantised weights as they are. A progress bar is
    shown on stderr if it is a terminal.

    On a CPU, a tensor that needs no conversion stays mapped in its file; any other is read through a small
    buffer, so that only the final tensor takes memory.
    quantized: the stored dtype of each parameter to quantise, as in quantize.quantized; its scales get its
    name plus "_scale".
    pack: store q, k and v of a layer in one allocation, and gate and up in another. The torch backend on a
    CPU does not use it: packed weights do not stay mapped, and its product is not faster with them."""
    quantized = quantized or {}
    places = packed_places(stored, device, dtype, quantized) if pack else {}
    return dict(read_each(stored, device, dtype, quantized, places))


def read_each(
    stored: Mapping[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantized: Mapping[str, torch.dtype],
    places: Mapping[str, Tensor],
    label: str = "loading weights",
) -> Iterator[tuple[str, Tensor]]:
    """What `read` returns, one tensor after another, so that a caller need not keep them. places: memory for
    some of them, by name. label: of the progress bar."""
    files: dict[Path, Any] = {}
    total = sum(tensor.nbytes for tensor in stored.values())
    style: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None, "delay": 1, "leave": False}
    with tqdm(total=total, desc=label, file=STDERR, **style) as bar:
        for name, tensor in stored.items():
            if name in quantized:
                wide = tensor.update is not None or tensor.dtype == "F64"
                given = torch.float32 if wide else STORED[tensor.dtype]
                made = quantize.quantized(_read(tensor, None, device, given), quantized[name], dtype)
                for key, value in zip((name, name + SCALE), made, strict=True):
                    yield key, places[key].copy_(value) if key in places else value
            else:
                value = _read(tensor, files, device, kept_dtype(tensor, dtype), places.get(name))
                yield name, value
                if name == EMBEDDING and head_is_copied(stored, quantized):
                    if stays_mapped(tensor, device, dtype):
                        value = _read(tensor, None, device, dtype)
                    made = quantize.quantized(value, quantized[HEAD], dtype)
                    yield from zip((HEAD, HEAD + SCALE), made, strict=True)
                del value
            bar.update(tensor.nbytes)


def kept_dtype(tensor: StoredTensor, dtype: torch.dtype) -> torch.dtype:
    """The dtype of a parameter that is not to be quantised, in a model that computes in `dtype`."""
    return STORED[tensor.dtype] if tensor.is_quantized else dtype


def packed_places(
    stored: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantized: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """For each parameter that is packed, and for its scale, its part of the allocation that it shares."""
    places = {}
    layers = sorted({name.split(".self_attn.")[0] for name in stored if ".self_attn." in name})
    for group in ([f"{layer}.{member}" for member in members] for layer in layers for members in PACKED):
        if group[0] not in stored:  # SigLIP's MLP has no gate, and Gemma's layers have no biases
            continue
        rows, features = [stored[name].shape[0] for name in group], stored[group[0]].shape[1:]
        needed: dict[str, tuple[tuple[int, ...], torch.dtype]]
        needed = {"": ((sum(rows), *features), kept_dtype(stored[group[0]], dtype))}
        if group[0] in quantized:
            needed[""], needed[SCALE] = quantize.shapes(sum(rows), features[0], quantized[group[0]], dtype)
        elif scale := stored.get(group[0] + SCALE):
            needed[SCALE] = (sum(rows), *scale.shape[1:]), kept_dtype(scale, dtype)
        for suffix, (shape, kind) in needed.items():
            parts = torch.empty(shape, dtype=kind, device=device).split(rows)
            places.update(zip([name + suffix for name in group], parts, strict=True))
    return places


def stays_mapped(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the parameter needs no conversion, so that it is mapped from its file and takes no memory."""
    same = STORED[tensor.dtype] == kept_dtype(tensor, dtype)
    return device.type == "cpu" and same and tensor.permutation is None and tensor.update is None


def head_is_copied(stored: Mapping[str, StoredTensor], quantized: Collection[str]) -> bool:
    """Whether the output head is a quantised copy of the embedding, because the checkpoint has no separate
    head."""
    return HEAD in quantized and HEAD not in stored


def _read(
    tensor: StoredTensor,
    files: dict[Path, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
    place: Tensor | None = None,
) -> Tensor:
    """The tensor, in `place` if one is given. files: those that are open; None if the tensor is only read
    once, so that the part of the file that is mapped for it takes memory no longer than the tensor exists.
    Raises PaliGemmaError for an adapter's tensor that is not finite, so that the fault is not blamed on the
    model, and for a quantised weight that is not: products take its codes for finite ones."""
    value = _read_any(tensor, files, device, dtype, place)
    if tensor.is_quantized and not _is_finite(value):
        damaged = "holds NaN or infinity: the checkpoint is damaged: copy it again, or make it again"
        raise PaliGemmaError(f"{tensor.file}: {tensor.name!r} {damaged}")
    if tensor.adapter and not bool(value.isfinite().all()):
        raise PaliGemmaError(f"{tensor.file}: {tensor.name!r} holds NaN or infinity: the adapter is damaged")
    return value


def _is_finite(value: Tensor) -> bool:
    """Whether all codes or scales are numbers. An e4m3 code of which all bits but the sign are set is NaN;
    that dtype has no infinity."""
    if value.dtype != torch.float8_e4m3fn:
        return not value.is_floating_point() or bool(value.isfinite().all())
    codes = value.view(torch.uint8).flatten()
    memory = torch.empty_like(codes[:CODES])
    parts = ((part, memory[: len(part)]) for part in codes.split(CODES))
    return all(int(torch.bitwise_and(part, 127, out=out).max()) < 127 for part, out in parts)


def _read_any(
    tensor: StoredTensor,
    files: dict[Path, Any] | None,
    device: torch.device,
    dtype: torch.dtype,
    place: Tensor | None,
) -> Tensor:
    mapped, in_npz = stays_mapped(tensor, device, dtype), tensor.file_shape is not None
    if place is not None and (tensor.update is not None or in_npz or mapped):
        return place.copy_(_read(tensor, files, device, dtype))
    if tensor.update is not None:
        update = tensor.update
        down, up = (_read(factor, files, device, torch.float32) for factor in (update.down, update.up))
        weight = _read(replace(tensor, update=None), files, device, torch.float32)
        return weight.addmm(up, down, alpha=update.scale).to(dtype)
    # safe_open does not open a name that is not UTF-8.
    if in_npz or (mapped and (files is None or not _is_utf8(tensor.file))):
        shape = tensor.file_shape or tensor.shape
        raw = np.memmap(tensor.file, NUMPY[tensor.dtype], mode="c", offset=tensor.offset, shape=shape)
        value = torch.from_numpy(raw).view(STORED[tensor.dtype])
        if tensor.permutation is not None:
            value = value.permute(tensor.permutation).to(device, dtype).contiguous()
        return value.reshape(tensor.shape).to(device, dtype)
    if mapped and files is not None:
        if tensor.file not in files:
            files[tensor.file] = safe_open(tensor.file, framework="pt")
        return files[tensor.file].get_tensor(tensor.name)
    out = torch.empty(tensor.shape, dtype=dtype, device=device) if place is None else place
    return _read_converted(tensor, out)


def _is_utf8(file: Path) -> bool:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_converted(tensor: StoredTensor, out: Tensor) -> Tensor:
    """Fill `out` with the tensor, in its dtype, through a buffer of at most CHUNK bytes."""
    flat, done, size = out.view(-1), 0, (ITEMSIZE | CODESIZE)[tensor.dtype]
    buffer = memoryview(bytearray(min(CHUNK, tensor.nbytes)))
    with open(tensor.file, "rb") as f:
        f.seek(tensor.offset)
        while done < len(flat):
            view = buffer[: (len(flat) - done) * size]
            if f.readinto(view) != len(view):
                raise PaliGemmaError(f"{tensor.file} ended while it was read: it was changed or cut off")
            values = torch.frombuffer(view, dtype=STORED[tensor.dtype])
            flat[done : done + len(values)] = values
            done += len(values)
    return out
