"""From a checkpoint to a running model: parameters read straight into their final place, one at a time."""

import importlib.util
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from . import checkpoint, hub
from .checkpoint import ITEMSIZE, StoredTensor
from .config import PaliGemmaConfig
from .errors import PaliGemmaError
from .model import PaliGemma
from .processor import Processor

STORED = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in STORED.values()}
CHUNK = 1 << 26  # bytes of a file that are in memory at a time while they are converted or moved


def load_hf_model(
    model: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    backend: str = "auto",
) -> tuple[PaliGemma, Processor]:
    """The model and the processor of a checkpoint.

    model: a hub id, a local directory, or "demo" for the small model of this package. device: "cuda", "cpu", or "auto" for the
    first of these that is there. dtype: float32, float16, bfloat16 or "auto", which is bfloat16. backend: "torch", or "triton"
    for the kernels (on a GPU, or in Triton's interpreter); "auto" is triton on a GPU from compute capability 8.0, else torch.
    revision, token, cache_dir, local_files_only: for the hub, as in huggingface_hub.
    Raises PaliGemmaError for a checkpoint, a device or a dtype that cannot be used."""
    device, dtype = _device(device), _dtype(dtype)
    backend = _backend(backend, device, dtype)
    directory = hub.resolve(
        model, dtype=str(dtype).removeprefix("torch."), revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
    )
    config = PaliGemmaConfig.load(directory)
    stored = checkpoint.tensors(directory, config)
    processor = Processor.load(directory, config)
    vocabulary = stored[checkpoint.EMBEDDING].shape[0]
    with torch.device("meta"):
        network = PaliGemma(replace(config, text_config=replace(config.text_config, vocab_size=vocabulary)), backend)
    network.load_state_dict(read(stored, device, dtype), strict=True, assign=True)
    return network.eval(), processor


def read(stored: dict[str, StoredTensor], device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors, each on its device and in its dtype, with a progress bar on stderr where that is a terminal.

    On a CPU and without conversion a tensor stays in its file, mapped; otherwise it passes through a small buffer, so that
    nothing beside the final tensor takes memory."""
    parameters, files = {}, {}
    total = sum(tensor.nbytes for tensor in stored.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=None, delay=1, leave=False) as bar:
        for name, tensor in stored.items():
            if device.type == "cpu" and STORED[tensor.dtype] == dtype:
                if tensor.file not in files:
                    files[tensor.file] = safe_open(tensor.file, framework="pt")
                parameters[name] = files[tensor.file].get_tensor(tensor.name)
            else:
                parameters[name] = _read_converted(tensor, device, dtype)
            bar.update(tensor.nbytes)
    return parameters


def _read_converted(tensor: StoredTensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    out = torch.empty(tensor.shape, dtype=dtype, device=device)
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
    if backend not in ("auto", "torch", "triton"):
        raise PaliGemmaError(f"backend is {backend!r}; it must be auto, torch or triton (the reference is paligemma.reference)")
    if backend == "triton" and device.type != "cuda":
        if os.environ.get("TRITON_INTERPRET") != "1":
            raise PaliGemmaError(f"backend triton needs a CUDA GPU, and device is {device}: use torch, or set TRITON_INTERPRET=1 to interpret the kernels")
        if dtype == torch.bfloat16:
            raise PaliGemmaError("Triton's interpreter computes bfloat16 wrongly: use float32")
    too_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if backend == "triton" and too_old:
        raise PaliGemmaError(f"the kernels need a GPU of compute capability 8.0 or later, which {torch.cuda.get_device_name(device)} is not: use torch")
    if backend == "auto":
        backend = "triton" if device.type == "cuda" and not too_old else "torch"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        raise PaliGemmaError("the kernels need the package triton, which is not installed: install it, or choose the backend torch")
    return backend


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        return torch.bfloat16
    if name not in DTYPES:
        raise PaliGemmaError(f"dtype is {name!r}; it must be auto, {', '.join(DTYPES)}")
    return DTYPES[name]
