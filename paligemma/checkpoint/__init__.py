"""Checkpoints: finds their files and the parameters in them. No torch, no NumPy.

Both models call `load`, for a directory of safetensors files (parameters.py, or quantized.py if the weights
are quantised) or an .npz file (npz.py); an adapter's changes (adapters.py) are added. hub.py turns a hub id
into a directory; folders.py says what a directory contains if it is not a checkpoint."""

import os
from dataclasses import replace
from pathlib import Path

from ..command import tell
from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from ..files import check_entered
from . import adapters, folders, npz, quantized
from .parameters import tensors
from .stored import StoredTensor


def load(
    model: str | Path, *, adapter: str | Path | None = None, full_attention: bool = False
) -> tuple[PaliGemmaConfig, dict[str, StoredTensor]]:
    """The configuration of a checkpoint, and its parameters by canonical name.

    model: a directory, or one of Google's .npz files. adapter: the directory of an adapter, whose changes are
    recorded with the parameters that they apply to. full_attention: ignore the checkpoint's sliding windows.
    Raises PaliGemmaError for a checkpoint or an adapter that cannot be used."""
    model = Path(model)
    check_entered(model)
    if not os.path.lexists(model):
        raise PaliGemmaError(f"{model} is neither a directory nor an .npz file")
    config_json = folders.check_model(model, alone=adapter is None)
    if model.suffix == ".npz" and not os.path.isdir(model):
        config, stored = npz.load(model)
        if config.saved:
            other = "but an .npz file has float weights: they are not of one checkpoint"
            raise PaliGemmaError(
                f"config.json beside {model} is that of {config.saved.format} weights, {other}"
            )
    elif (config := PaliGemmaConfig.load(model, config_json)).saved:
        stored = quantized.tensors(model, config)
        if adapter is not None:
            problem = f"{model} holds {config.saved.format} weights, into which no adapter can be merged"
            again = (
                f"python -m paligemma.quantize MODEL DIR --quantize {config.saved.format} --adapter {adapter}"
            )
            raise PaliGemmaError(f"{problem}: merge it into the float model when that is quantised: {again}")
    else:
        stored = tensors(model, config)
        if config.quantization:
            found = f"config.json has a quantization_config ({config.quantization})"
            tell(f"{model}: {found}, but the weights are float and are used as they are")
    if adapter is not None:
        stored = adapters.applied(Path(adapter), stored)
    if full_attention:
        config = replace(config, text_config=replace(config.text_config, sliding_window=None))
    return config, stored
