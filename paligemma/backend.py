"""Chooses the device, the dtype and the backend of a model. An error is one line with the remedy."""

import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from . import cpu_linear, cpu_threads, ops
from .checkpoint import hub
from .errors import PaliGemmaError

SMALL = 1 << 24  # parameters; one thread of a CPU reads so many in 2 ms
BRIEF = 1 << 30  # parameters times tokens; one thread computes so many products in 20 ms

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def choose_device(device: str | torch.device) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError):  # torch does not know the device
        chosen = torch.device("meta")
    if chosen.type not in ("cuda", "cpu"):
        raise PaliGemmaError(f"device is {str(device)!r}; it must be auto, cuda or cpu")
    if chosen.type == "cuda" and not torch.cuda.is_available():
        remedy = "use cpu, or install a CUDA build of torch and a driver"
        raise PaliGemmaError(f"device is {str(device)!r}, and this torch sees no CUDA GPU: {remedy}")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise PaliGemmaError(f"device is {str(device)!r}; there are {torch.cuda.device_count()}, from cuda:0")
    return chosen


def choose_backend(backend: str, device: torch.device) -> str:
    if backend not in ("auto", "torch", "numba", "triton"):
        known = "auto, torch, numba or triton (the reference is paligemma.reference)"
        raise PaliGemmaError(f"backend is {backend!r}; it must be {known}")
    if backend == "numba" and device.type != "cpu":
        raise PaliGemmaError(f"backend numba computes on a CPU, and device is {device}: use triton or torch")
    if backend == "numba" and (fault := cpu_linear.numba_fault()):
        remedy = "install numba, or choose the backend torch"
        raise PaliGemmaError(f"backend numba needs the package numba ({fault}): {remedy}")
    if backend == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        remedy = "use torch, or set TRITON_INTERPRET=1 to interpret the kernels"
        raise PaliGemmaError(f"backend triton needs a CUDA GPU, and device is {device}: {remedy}")
    too_old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
    if backend == "triton" and too_old:
        gpu = torch.cuda.get_device_name(device)
        needed = f"a GPU of compute capability 8.0 or later, which {gpu} is not"
        raise PaliGemmaError(f"the kernels need {needed}: use torch")
    if backend == "auto":
        on_cpu = "numba" if sys.platform == "linux" and importlib.util.find_spec("numba") else "torch"
        backend = on_cpu if device.type == "cpu" else "torch" if too_old else "triton"
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        remedy = "install it, or choose the backend torch"
        raise PaliGemmaError(f"the kernels need the package triton, which is not installed: {remedy}")
    return backend


def check_dtype(backend: str, device: torch.device, dtype: torch.dtype) -> None:
    """Raise PaliGemmaError for a dtype that a chosen backend cannot compute in. A saved checkpoint decides
    the dtype, but a backend that is not there is reported before the checkpoint is fetched."""
    if backend == "triton" and device.type != "cuda" and dtype == torch.bfloat16:
        raise PaliGemmaError("Triton's interpreter computes bfloat16 wrongly: use float32")


def choose_dtype(dtype: str | torch.dtype, model: str | Path | None) -> torch.dtype:
    name = str(dtype).removeprefix("torch.")
    if name == "auto":
        # In bfloat16 the demo model is not faster; in float32 it gives the same answers on every CPU.
        return torch.float32 if model is not None and hub.is_demo(model) else torch.bfloat16
    if name not in DTYPES:
        raise PaliGemmaError(f"dtype is {name!r}; it must be auto, {', '.join(DTYPES)}")
    return DTYPES[name]


@contextmanager
def computing(backend: str, device: torch.device, parameters: int, tokens: int) -> Iterator[None]:
    """Inside this block, operations use the backend and the device, in the model's own dtype even under
    torch.autocast. On a CPU, torch uses one thread if the model is small, or if Numba computes the products
    of a single token: its kernel has threads of its own."""
    alone = (parameters < SMALL and parameters * tokens < BRIEF) or (backend == "numba" and tokens == 1)
    # Triton launches kernels on the current device.
    on_device = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    threads = cpu_threads.one_thread() if device.type == "cpu" and alone else nullcontext()
    with ops.use(backend), torch.autocast(device.type, enabled=False), on_device, threads:
        yield
