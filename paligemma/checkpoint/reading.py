"""Reads parameters from their files directly into their final place, one at a time."""

from collections.abc import Collection, Mapping
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
from .quantize import quantized_rows, scale_dtype
from .stored import EMBEDDING, HEAD, ITEMSIZE, StoredTensor

NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.int16,
}  # of the same size; NumPy has no bfloat16
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # whose weights one product reads
PACKED = [
    [f"{name}.{kind}" for name in names]
    for names in (QKV, ("mlp.gate_proj", "mlp.up_proj"))
    for kind in ("weight", "bias")
]
CHUNK = 1 << 26  # bytes of a file that are in memory at a time while they are converted or moved


def read(
    stored: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantized: Mapping[str, torch.dtype] | None = None,
    pack: bool = False,
) -> dict[str, Tensor]:
    """The tensors on `device` in `dtype`. A progress bar is shown on stderr if it is a terminal.

    On a CPU, a tensor that needs no conversion stays mapped in its file; any other is read through a small
    buffer, so that only the final tensor takes memory.
    quantized: the 8-bit dtype of each parameter to quantise; its scales (one per row) get its name plus
    "_scale".
    pack: store q, k and v of a layer in one allocation, and gate and up in another. The torch backend on a
    CPU does not use it, because packed weights do not stay mapped and its product is not faster with them."""
    parameters, files, quantized = {}, {}, quantized or {}
    places = packed_places(stored, device, dtype, quantized) if pack else {}
    total = sum(tensor.nbytes for tensor in stored.values())
    with tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        desc="loading weights",
        disable=None,
        delay=1,
        leave=False,
        file=STDERR,
    ) as bar:
        for name, tensor in stored.items():
            if name in quantized:
                made = quantized_rows(_read(tensor, files, device, torch.float32), quantized[name], dtype)
                for key, value in zip((name, f"{name}_scale"), made, strict=True):
                    parameters[key] = places[key].copy_(value) if key in places else value
            else:
                parameters[name] = _read(tensor, files, device, dtype, places.get(name))
            if name == EMBEDDING and head_is_copied(stored, quantized):
                made = quantized_rows(parameters[name], quantized[HEAD], dtype)
                parameters[HEAD], parameters[f"{HEAD}_scale"] = made
            bar.update(tensor.nbytes)
    return parameters


def packed_places(
    stored: dict[str, StoredTensor],
    device: torch.device,
    dtype: torch.dtype,
    quantized: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """The part of a shared allocation for each weight that is packed, and for its scale."""
    places = {}
    layers = sorted({name.split(".self_attn.")[0] for name in stored if ".self_attn." in name})
    for group in ([f"{layer}.{member}" for member in members] for layer in layers for members in PACKED):
        if group[0] not in stored:  # SigLIP's MLP is another, and Gemma's layers have no biases
            continue
        rows, features = [stored[name].shape[0] for name in group], stored[group[0]].shape[1:]
        together = torch.empty(sum(rows), *features, dtype=quantized.get(group[0], dtype), device=device)
        places.update(zip(group, together.split(rows), strict=True))
        if group[0] in quantized:
            scales = torch.empty(sum(rows), dtype=scale_dtype(dtype), device=device)
            places.update(zip([f"{name}_scale" for name in group], scales.split(rows), strict=True))
    return places


def stays_mapped(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> bool:
    return (
        device.type == "cpu"
        and STORED[tensor.dtype] == dtype
        and tensor.permutation is None
        and tensor.update is None
    )


def head_is_copied(stored: Mapping[str, StoredTensor], quantized: Collection[str]) -> bool:
    """Whether the output head is an 8-bit copy of the embedding, because the checkpoint has no separate
    head."""
    return HEAD in quantized and HEAD not in stored


def _read(
    tensor: StoredTensor,
    files: dict[Path, Any],
    device: torch.device,
    dtype: torch.dtype,
    place: Tensor | None = None,
) -> Tensor:
    """The tensor, in `place` if one is given. Raises PaliGemmaError for an adapter's tensor that is not
    finite, so that the fault is not blamed on the model."""
    value = _read_any(tensor, files, device, dtype, place)
    if tensor.adapter and not bool(value.isfinite().all()):
        raise PaliGemmaError(f"{tensor.file}: {tensor.name!r} holds NaN or infinity: the adapter is damaged")
    return value


def _read_any(
    tensor: StoredTensor,
    files: dict[Path, Any],
    device: torch.device,
    dtype: torch.dtype,
    place: Tensor | None,
) -> Tensor:
    if place is not None and (
        tensor.update is not None or tensor.file_shape is not None or stays_mapped(tensor, device, dtype)
    ):
        return place.copy_(_read(tensor, files, device, dtype))
    if tensor.update is not None:
        down, up = (
            _read(factor, files, device, torch.float32) for factor in (tensor.update.down, tensor.update.up)
        )
        together = _read(replace(tensor, update=None), files, device, torch.float32)
        return together.addmm(up, down, alpha=tensor.update.scale).to(dtype)
    if tensor.file_shape is not None or (
        stays_mapped(tensor, device, dtype) and not _is_utf8(tensor.file)
    ):  # of an .npz file; torch does not map the other
        raw = np.memmap(
            tensor.file,
            NUMPY[tensor.dtype],
            mode="c",
            offset=tensor.offset,
            shape=tensor.file_shape or tensor.shape,
        )
        value = torch.from_numpy(raw).view(STORED[tensor.dtype])
        if tensor.permutation is not None:
            value = value.permute(tensor.permutation).to(device, dtype).contiguous()
        return value.reshape(tensor.shape).to(device, dtype)
    if stays_mapped(tensor, device, dtype):
        if tensor.file not in files:
            files[tensor.file] = safe_open(tensor.file, framework="pt")
        return files[tensor.file].get_tensor(tensor.name)
    return _read_converted(
        tensor, torch.empty(tensor.shape, dtype=dtype, device=device) if place is None else place
    )


def _is_utf8(file: Path) -> bool:
    try:
        str(file).encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_converted(tensor: StoredTensor, out: Tensor) -> Tensor:
    flat, done = out.view(-1), 0
    buffer = memoryview(bytearray(min(CHUNK, tensor.nbytes)))
    with open(tensor.file, "rb") as f:
        f.seek(tensor.offset)
        while done < len(flat):
            view = buffer[: (len(flat) - done) * ITEMSIZE[tensor.dtype]]
            if f.readinto(view) != len(view):
                raise PaliGemmaError(f"{tensor.file} ended while it was read: it was changed or cut off")
            values = torch.frombuffer(view, dtype=STORED[tensor.dtype])
            flat[done : done + len(values)] = values
            done += len(values)
    return out
