"""From a checkpoint to a running model: parameters read straight into their final place, one at a time."""

import importlib.util
import math
import os
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, cpu_linear, hub
from .checkpoint import ITEMSIZE, StoredTensor
from .command import STDERR
from .errors import PaliGemmaError
from .layers import QUANTIZED
from .model import PaliGemma
from .processor import Processor
from .tokenizer import find

NUMPY = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": np.int16}  # of the same size; NumPy has no bfloat16
STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")  # whose weights one product reads
PACKED = [[f"{name}.{kind}" for name in names] for names in (QKV, ("mlp.gate_proj", "mlp.up_proj")) for kind in ("weight", "bias")]
CHUNK = 1 << 26  # bytes of a file that are in memory at a time while they are converted or moved


def load_hf_model(
    model: str | Path | None = None,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    backend: str = "auto",
    tokenizer: str | Path | None = None,
    adapter: str | Path | None = None,
    quantize: str | None = None,
    full_attention: bool = False,
) -> tuple[PaliGemma, Processor]:
    """The model and the processor of a checkpoint.

    model: a hub id, a local directory, an .npz file of Google's, or "demo" for the small model of this package; None for the one that the
    adapter names. device: "cuda", "cpu", or "auto" for the first of these that is there. dtype: float32, float16, bfloat16 or "auto", which is
    bfloat16, and float32 for the demo model.
    backend: "torch"; "triton" for the kernels (on a GPU, or in Triton's interpreter); "numba" for the one that decodes on a CPU, where that
    package is installed. "auto" is triton on a GPU from compute capability 8.0, numba on a CPU that has it, else torch.
    tokenizer: tokenizer.model, tokenizer.json or their directory, if not beside the weights. adapter: a LoRA adapter, hub id or directory, to be
    merged.
    quantize: "int8" or "fp8" (e4m3; a GPU needs compute capability 8.9) for the language model's matrices, which then take half the memory,
    beside the table of embeddings.
    full_attention: PaliGemma 2 without its sliding windows, as it was trained. revision, token, cache_dir, local_files_only: for the hub, as in
    huggingface_hub.
    Raises PaliGemmaError for a checkpoint, a device or a dtype that cannot be used."""
    device, dtype = _device(device), _dtype(dtype, model)
    asked, backend = backend, _backend(backend, device, dtype)
    if quantize is not None and quantize not in QUANTIZED:
        raise PaliGemmaError(f"quantize is {quantize!r}; it must be {' or '.join(QUANTIZED)}, or nothing")
    if quantize == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        raise PaliGemmaError(f"fp8 needs a GPU of compute capability 8.9 or later, which {torch.cuda.get_device_name(device)} is not: use int8")
    from_hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    tokenizer = tokenizer and find(tokenizer)  # what is wrong with the small files is said before the large ones are fetched
    adapter = hub.resolve_adapter(adapter, **from_hub) if adapter else None
    if model is None:
        model, revision = hub.base_model(adapter, revision)
    elif adapter:
        hub.check_base(model, adapter)
    source = hub.resolve(model, dtype=str(dtype).removeprefix("torch."), revision=revision, **from_hub)
    config, stored = checkpoint.load(source, adapter=adapter, full_attention=full_attention)
    processor = Processor.load(source, config, tokenizer)
    if backend == "numba" and asked == "auto" and (max(math.prod(x.shape) for x in stored.values()) < cpu_linear.LARGE or cpu_linear.numba_fault()):
        backend = "torch"  # there is nothing for it to do, or it does not work here
    vocabulary = stored[checkpoint.EMBEDDING].shape[0]
    with torch.device("meta"):
        text = replace(config.text_config, vocab_size=vocabulary)
        network = PaliGemma(replace(config, text_config=text), backend, quantize, head=checkpoint.HEAD in stored)
    parameters = dict(network.named_parameters())
    quantized = {name: parameters[name].dtype for name in parameters if f"{name}_scale" in parameters}
    check_memory(stored, quantized, device, dtype)
    pack = backend == "triton" or device.type != "cpu"
    network.load_state_dict(read(stored, device, dtype, quantized, pack), strict=True, assign=True)
    return network.eval(), processor


def check_memory(stored: dict[str, StoredTensor], quantized: Collection[str], device: torch.device, dtype: torch.dtype) -> None:
    """Raise PaliGemmaError where the parameters do not fit what is free; those that stay in their file, mapped, take none of it."""
    needed = 0
    for name, tensor in stored.items():
        count = math.prod(tensor.shape)
        if name not in quantized and not _stays_mapped(tensor, device, dtype):
            needed += count * dtype.itemsize
        if name in quantized or (name == checkpoint.EMBEDDING and _copied(stored, quantized)):
            needed += count + tensor.shape[0] * (2 if dtype == torch.bfloat16 else 4)
    free = free_memory()
    if device.type == "cuda":  # what torch has taken from the driver and does not use is free too
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if needed > free:
        smaller = "" if quantized else ": --quantize int8 takes less" if dtype != torch.float32 else ": bfloat16 takes half"
        raise PaliGemmaError(f"this model needs {needed / 1e9:.1f} GB for its weights; {device} has {free / 1e9:.1f} GB free{smaller}")


def _copied(stored: Mapping[str, StoredTensor], quantized: Collection[str]) -> bool:
    """Whether the output head is made from the embedding: 8-bit, and not a weight of its own."""
    return checkpoint.HEAD in quantized and checkpoint.HEAD not in stored


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, or of the container."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not on Linux: all that there is
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else sys.maxsize
    try:
        group = Path("/sys/fs/cgroup")
        most, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = next(int(line.split()[1]) for line in (group / "memory.stat").read_text().splitlines() if line.startswith("inactive_file "))
        return min(free, most - used + cached)
    except (OSError, ValueError, StopIteration):  # no container, or one without a limit
        return free


def _stays_mapped(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> bool:
    return device.type == "cpu" and STORED[tensor.dtype] == dtype and tensor.axes is None and tensor.update is None


def read(
    stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype, quantized: Mapping[str, torch.dtype] | None = None, pack: bool = False
) -> dict[str, Tensor]:
    """The tensors, each on its device and in its dtype, with a progress bar on stderr where that is a terminal.

    On a CPU and without conversion a tensor stays in its file, mapped; otherwise it passes through a small buffer, so that
    nothing beside the final tensor takes memory. Those of `quantized` become what it says, with a scale for each row beside
    them under the name with "_scale" behind it. With `pack`, q, k and v of a layer, and gate and up, lie in one allocation each: not for the torch
    backend on a CPU, where they would leave their file for a product that is no faster."""
    parameters, files, quantized = {}, {}, quantized or {}
    places = packed_places(stored, device, dtype, quantized) if pack else {}
    total = sum(tensor.nbytes for tensor in stored.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=None, delay=1, leave=False, file=STDERR) as bar:
        for name, tensor in stored.items():
            if name in quantized:
                made = quantized_rows(_read(tensor, files, device, torch.float32), quantized[name], dtype)
                for key, value in zip((name, f"{name}_scale"), made, strict=True):
                    parameters[key] = places[key].copy_(value) if key in places else value
            else:
                parameters[name] = _read(tensor, files, device, dtype, places.get(name))
            if name == checkpoint.EMBEDDING and _copied(stored, quantized):
                made = quantized_rows(parameters[name], quantized[checkpoint.HEAD], dtype)
                parameters[checkpoint.HEAD], parameters[f"{checkpoint.HEAD}_scale"] = made
            bar.update(tensor.nbytes)
    return parameters


def packed_places(stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype, quantized: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """For each of the weights that are packed, and its scale, its part of the allocation."""
    places = {}
    layers = sorted({name.split(".self_attn.")[0] for name in stored if ".self_attn." in name})
    for group in ([f"{layer}.{member}" for member in members] for layer in layers for members in PACKED):
        if group[0] not in stored:  # SigLIP's MLP is another, and Gemma's layers have no biases
            continue
        rows, features = [stored[name].shape[0] for name in group], stored[group[0]].shape[1:]
        whole = torch.empty(sum(rows), *features, dtype=quantized.get(group[0], dtype), device=device)
        places.update(zip(group, whole.split(rows), strict=True))
        if group[0] in quantized:
            scales = torch.empty(sum(rows), dtype=scale_dtype(dtype), device=device)
            places.update(zip([f"{name}_scale" for name in group], scales.split(rows), strict=True))
    return places


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def quantized_rows(weight: Tensor, stored: torch.dtype, dtype: torch.dtype, step: int = 4096) -> tuple[Tensor, Tensor]:  # (out, in) -> (out, in), (out,)
    """The nearest numbers of `stored` (int8: whole ones of -127 to 127; e4m3: of 3 bits behind the point, to 448) times a scale for each row;
    some rows at a time. Scales are float32, and for bfloat16 numbers of that, as the CPU's product for it wants them."""
    kept, largest = scale_dtype(dtype), torch.finfo(stored).max if stored.is_floating_point else torch.iinfo(stored).max
    out, scales = torch.empty_like(weight, dtype=stored), []
    for start in range(0, len(weight), step):
        rows = weight[start : start + step].float()
        scale = (rows.abs().amax(dim=1) / largest).clamp(min=torch.finfo(kept).tiny).to(kept)
        rows = (rows / scale.float()[:, None]).clamp_(-largest, largest)
        out[start : start + step] = rows if stored.is_floating_point else rows.round_()
        scales.append(scale)
    return out, torch.cat(scales)


def _read(tensor: StoredTensor, files: dict[Path, Any], device: torch.device, dtype: torch.dtype, place: Tensor | None = None) -> Tensor:
    """The tensor, in `place` where one is given. Raises PaliGemmaError for one of an adapter's that is damaged: it would be told as the model's."""
    value = _read_any(tensor, files, device, dtype, place)
    if tensor.adapter and not bool(value.isfinite().all()):
        raise PaliGemmaError(f"{tensor.file}: {tensor.name!r} holds NaN or infinity: the adapter is damaged")
    return value


def _read_any(tensor: StoredTensor, files: dict[Path, Any], device: torch.device, dtype: torch.dtype, place: Tensor | None) -> Tensor:
    if place is not None and (tensor.update is not None or tensor.lies is not None or _stays_mapped(tensor, device, dtype)):
        return place.copy_(_read(tensor, files, device, dtype))
    if tensor.update is not None:
        down, up = (_read(factor, files, device, torch.float32) for factor in (tensor.update.down, tensor.update.up))
        whole = _read(replace(tensor, update=None), files, device, torch.float32)
        return whole.addmm(up, down, alpha=tensor.update.scale).to(dtype)
    if tensor.lies is not None:  # of an .npz file
        raw = np.memmap(tensor.file, NUMPY[tensor.dtype], mode="c", offset=tensor.offset, shape=tensor.lies)
        value = torch.from_numpy(raw).view(STORED[tensor.dtype])
        if tensor.axes is not None:
            value = value.permute(tensor.axes).to(device, dtype).contiguous()
        return value.reshape(tensor.shape).to(device, dtype)
    if _stays_mapped(tensor, device, dtype):
        if tensor.file not in files:
            files[tensor.file] = safe_open(tensor.file, framework="pt")
        return files[tensor.file].get_tensor(tensor.name)
    return _read_converted(tensor, torch.empty(tensor.shape, dtype=dtype, device=device) if place is None else place)


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


def _device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):  # no device that torch knows
        chosen = torch.device("meta")
    if chosen.type not in ("cuda", "cpu"):
        raise PaliGemmaError(f"device is {str(device)!r}; it must be auto, cuda or cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise PaliGemmaError(f"device is {str(device)!r}, and this torch sees no CUDA GPU: use cpu, or install a CUDA build of torch and a driver")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise PaliGemmaError(f"device is {str(device)!r}; there are {torch.cuda.device_count()}, from cuda:0")
    return chosen


def _backend(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    if backend not in ("auto", "torch", "numba", "triton"):
        raise PaliGemmaError(f"backend is {backend!r}; it must be auto, torch, numba or triton (the reference is paligemma.reference)")
    if backend == "numba" and device.type != "cpu":
        raise PaliGemmaError(f"backend numba computes on a CPU, and device is {device}: use triton or torch")
    if backend == "numba" and (fault := cpu_linear.numba_fault()):
        raise PaliGemmaError(f"backend numba needs the package numba ({fault}): install paligemma[cpu], or choose the backend torch")
    if backend == "triton" and device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise PaliGemmaError(f"backend triton needs a CUDA GPU, and device is {device}: use torch, or set TRITON_INTERPRET=1 to interpret the kernels")
        if dtype == torch.bfloat16:
            raise PaliGemmaError("Triton's interpreter computes bfloat16 wrongly: use float32")
    too_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if backend == "triton" and too_old:
        raise PaliGemmaError(f"the kernels need a GPU of compute capability 8.0 or later, which {torch.cuda.get_device_name(device)} is not: use torch")
    if backend == "auto":
        on_cpu = "numba" if sys.platform == "linux" and importlib.util.find_spec("numba") else "torch"
        backend = on_cpu if device.type == "cpu" else "torch" if too_old else "triton"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise PaliGemmaError("the kernels need the package triton, which is not installed: install it, or choose the backend torch")
    return backend


def _dtype(dtype: str | torch.dtype, model: str | Path | None) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":  # the demo model gains no time in bfloat16, and in float32 it gives the same answers on every CPU
        return torch.float32 if model is not None and hub.is_demo(model) else torch.bfloat16
    if name not in DTYPES:
        raise PaliGemmaError(f"dtype is {name!r}; it must be auto, {', '.join(DTYPES)}")
    return DTYPES[name]
