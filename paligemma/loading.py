"""Loads a model and its processor from the name of a checkpoint."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import checkpoint, cpu_linear
from .backend import DTYPES, check_dtype, choose_backend, choose_device, choose_dtype
from .checkpoint import hub
from .checkpoint.quantized import format_of
from .checkpoint.reading import read, stays_mapped
from .checkpoint.stored import EMBEDDING, HEAD, SCALE, StoredTensor
from .command import tell
from .errors import PaliGemmaError
from .machine import free_bytes
from .memory import weight_bytes
from .model import PaliGemma
from .processor import Processor
from .quantization import FORMATS, Saved
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
    other. A checkpoint of quantised weights is for one dtype, which is "auto" for it.
    backend: "torch"; "triton" for the Triton kernels (on a GPU, or in Triton's interpreter); "numba" for the
    CPU kernels, which need the package numba; or "auto", which is triton on a GPU of compute
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
    device, chosen = choose_device(device), choose_dtype(dtype, model)
    asked, backend = backend, choose_backend(backend, device)
    check_format(quantize, device)
    from_hub = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    source, adapter, tokenizer = locate(model, adapter, tokenizer, chosen, revision, **from_hub)
    config, stored = checkpoint.load(source, adapter=adapter, full_attention=full_attention)
    if config.saved:
        quantize, chosen = of_saved(source, config.saved, quantize, None if dtype == "auto" else chosen)
        check_format(quantize, device)
    check_dtype(backend, device, chosen)
    processor = Processor.load(source, config, tokenizer, adapter)
    if backend == "numba" and asked == "auto":
        largest = max(math.prod(x.shape) for x in stored.values())
        if largest < cpu_linear.LARGE or cpu_linear.numba_fault():  # it would not be used, or does not work
            backend = "torch"
    vocabulary = stored[EMBEDDING].shape[0]
    with torch.device("meta"):
        text = replace(config.text_config, vocab_size=vocabulary)
        network = PaliGemma(replace(config, text_config=text), backend, quantize, head=HEAD in stored)
    check_memory(stored, None if config.saved else quantize, device, chosen)
    parameters = {} if config.saved else dict(network.named_parameters())
    quantized = {name: parameters[name].dtype for name in parameters if name + SCALE in parameters}
    pack = backend == "triton" or device.type != "cpu"
    network.load_state_dict(read(stored, device, chosen, quantized, pack), strict=True, assign=True)
    return network.eval(), processor


def locate(
    model: str | Path | None,
    adapter: str | Path | None,
    tokenizer: str | Path | None,
    dtype: torch.dtype,
    revision: str | None,
    **from_hub: Any,
) -> tuple[Path, Path | None, Path | None]:
    """The directory or the .npz file of a model, the directory of the adapter, and the path of the tokenizer;
    the arguments and the errors are those of `load_hf_model`."""
    # The tokenizer first: faults of the small files are reported before the large ones are fetched.
    found = None if tokenizer is None else find(tokenizer)
    lora = hub.resolve_adapter(adapter, **from_hub) if adapter is not None else None
    if model is None:
        model, revision = hub.base_model(lora, revision)
    elif lora is not None:
        hub.check_base(model, lora)
    name = str(dtype).removeprefix("torch.")
    return hub.resolve(model, dtype=name, revision=revision, **from_hub), lora, found


def check_format(quantize: str | None, device: torch.device) -> None:
    """Raise PaliGemmaError for an unknown format of weights, and for one that the device cannot compute
    with."""
    if quantize is not None and quantize not in FORMATS:
        raise PaliGemmaError(f"quantize is {quantize!r}; it must be one of {', '.join(FORMATS)}, or None")
    if quantize == "fp8" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        gpu = torch.cuda.get_device_name(device)
        raise PaliGemmaError(
            f"fp8 needs a GPU of compute capability 8.9 or later, which {gpu} is not: use int8"
        )


def of_saved(
    source: Path, saved: Saved, quantize: str | None, dtype: torch.dtype | None
) -> tuple[str, torch.dtype]:
    """The format and the dtype of a saved checkpoint. Raises PaliGemmaError if another one is asked for."""
    if quantize not in (None, saved.format):
        remedy = f"leave out --quantize, or quantise the float model that it was made from to {quantize}"
        raise PaliGemmaError(f"{source} holds {saved.format} weights, not {quantize}: {remedy}")
    if quantize:
        tell(f"{source} holds {quantize} weights already: --quantize can be left out")
    if dtype not in (None, DTYPES[saved.dtype]):
        other = str(dtype).removeprefix("torch.")
        command = f"python -m paligemma.quantize MODEL DIR --quantize {saved.format} --dtype {other}"
        remedy = f"leave out --dtype, or make another from the float model: {command}"
        raise PaliGemmaError(f"{source} was quantised for {saved.dtype}, not {other}: {remedy}")
    return saved.format, DTYPES[saved.dtype]


def check_memory(
    stored: dict[str, StoredTensor], format: str | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Raise PaliGemmaError if the parameters do not fit in the free memory of `device`. A parameter that
    stays mapped in its file needs no memory. format: in which the matrices are to be quantised."""
    mapped = {name for name, tensor in stored.items() if stays_mapped(tensor, device, dtype)}
    if any(tensor.is_quantized for tensor in stored.values()):
        needed = sum(tensor.nbytes for name, tensor in stored.items() if name not in mapped)
    else:
        shapes = {name: tensor.shape for name, tensor in stored.items()}
        mapped = {name for name in mapped if format_of(name, shapes[name], format) is None}
        needed = weight_bytes(shapes, str(dtype).removeprefix("torch."), format, mapped)
    free = free_bytes(device)
    if needed > free:
        smaller = ": bfloat16 takes half" if dtype == torch.float32 else ": --quantize int4 takes the least"
        sizes = f"{needed / 1e9:.1f} GB for its weights; {device} has {free / 1e9:.1f} GB free"
        quantized = format or any(tensor.is_quantized for tensor in stored.values())
        raise PaliGemmaError(f"this model needs {sizes}{'' if quantized else smaller}")
