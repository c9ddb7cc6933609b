"""Loads a model and its processor from the name of a checkpoint."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from . import checkpoint, cpu_linear, int4
from .backend import choose_backend, choose_device, choose_dtype
from .checkpoint import hub
from .checkpoint.quantize import shapes
from .checkpoint.reading import head_is_copied, read, stays_mapped
from .checkpoint.stored import EMBEDDING, HEAD, StoredTensor
from .errors import PaliGemmaError
from .layers import QUANTIZED
from .machine import free_bytes
from .model import PaliGemma
from .processor import Processor
from .tokenizer import find


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

    model: a hub id, a local directory, one of Google's .npz files, or "demo" for the small model in this
    package; None selects the base model that the adapter names.
    device: "cuda", "cpu", or "auto", which is cuda if a GPU is available.
    dtype: float32, float16, bfloat16, or "auto", which is float32 for the demo model and bfloat16 for any
    other.
    backend: "torch"; "triton" for the Triton kernels (on a GPU, or in Triton's interpreter); "numba" for the
    CPU kernel that decodes, which needs the package numba; or "auto", which is triton on a GPU of compute
    capability 8.0 or later, numba on a CPU if it is installed and the model is large enough, otherwise torch.
    tokenizer: tokenizer.model, tokenizer.json or their directory, if they are not in the directory of the
    weights.
    adapter: the hub id or directory of a LoRA adapter to merge; the tokenizer and image settings in its
    directory replace those of the model.
    quantize: stores the language model's matrices, except the embedding table: "int8" or "fp8" (e4m3; a GPU
    needs compute capability 8.9) in half the memory, "int4" in a quarter, with the output head in int8.
    full_attention: run PaliGemma 2 without its sliding windows, as it was trained.
    revision, token, cache_dir, local_files_only: passed to huggingface_hub.
    Raises PaliGemmaError for a checkpoint, a device or a dtype that cannot be used."""
    device, dtype = choose_device(device), choose_dtype(dtype, model)
    asked, backend = backend, choose_backend(backend, device, dtype)
    if quantize is not None and quantize not in QUANTIZED:
        raise PaliGemmaError(f"quantize is {quantize!r}; it must be int8, fp8 or int4, or nothing")
    if quantize == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        gpu = torch.cuda.get_device_name(device)
        raise PaliGemmaError(
            f"fp8 needs a GPU of compute capability 8.9 or later, which {gpu} is not: use int8"
        )
    from_hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    # The tokenizer first: faults of the small files are reported before the large ones are fetched.
    tokenizer = None if tokenizer is None else find(tokenizer)
    adapter = hub.resolve_adapter(adapter, **from_hub) if adapter is not None else None
    if model is None:
        model, revision = hub.base_model(adapter, revision)
    elif adapter is not None:
        hub.check_base(model, adapter)
    source = hub.resolve(model, dtype=str(dtype).removeprefix("torch."), revision=revision, **from_hub)
    config, stored = checkpoint.load(source, adapter=adapter, full_attention=full_attention)
    processor = Processor.load(source, config, tokenizer, adapter)
    if backend == "numba" and asked == "auto":
        largest = max(math.prod(x.shape) for x in stored.values())
        if largest < cpu_linear.LARGE or cpu_linear.numba_fault():  # it would not be used, or does not work
            backend = "torch"
    vocabulary = stored[EMBEDDING].shape[0]
    with torch.device("meta"):
        text = replace(config.text_config, vocab_size=vocabulary)
        network = PaliGemma(replace(config, text_config=text), backend, quantize, head=HEAD in stored)
    parameters = dict(network.named_parameters())
    quantized = {name: parameters[name].dtype for name in parameters if f"{name}_scale" in parameters}
    check_widths(stored, quantized)
    check_memory(stored, quantized, device, dtype)
    pack = backend == "triton" or device.type != "cpu"
    network.load_state_dict(read(stored, device, dtype, quantized, pack), strict=True, assign=True)
    return network.eval(), processor


def check_widths(stored: dict[str, StoredTensor], quantized: Mapping[str, torch.dtype]) -> None:
    """Raise PaliGemmaError for a matrix whose rows are not whole groups of 4-bit numbers."""
    for name, kind in quantized.items():
        if kind == int4.STORED and stored[name].shape[1] % int4.GROUP:
            shape = f"{name} has shape {stored[name].shape}"
            raise PaliGemmaError(f"{shape}: int4 needs columns in multiples of {int4.GROUP}; use int8")


def check_memory(
    stored: dict[str, StoredTensor],
    quantized: Mapping[str, torch.dtype],
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    """Raise PaliGemmaError if the parameters do not fit in the free memory of `device`. A parameter that
    stays mapped in its file needs no memory."""
    needed = 0
    for name, tensor in stored.items():
        count = math.prod(tensor.shape)
        if name not in quantized and not stays_mapped(tensor, device, dtype):
            needed += count * dtype.itemsize
        kind = quantized.get(HEAD if name == EMBEDDING and head_is_copied(stored, quantized) else name)
        if kind is not None:
            N, K = tensor.shape
            needed += sum(math.prod(shape) * x.itemsize for shape, x in shapes(N, K, kind, dtype))
    free = free_bytes(device)
    if needed > free:
        smaller = ": bfloat16 takes half" if dtype == torch.float32 else ": --quantize int8 takes less"
        sizes = f"{needed / 1e9:.1f} GB for its weights; {device} has {free / 1e9:.1f} GB free"
        raise PaliGemmaError(f"this model needs {sizes}{'' if quantized else smaller}")
