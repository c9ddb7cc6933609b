"""What a checkpoint needs of the machine, and what the machine does at this moment."""

import math
import os
import time
from typing import NamedTuple

import torch

from paligemma.checkpoint.stored import EMBEDDING, expected_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.cpu_instructions import multiplies
from paligemma.machine import read_bandwidth


class Work(NamedTuple):
    """The work of one token, of a first token with an image, and of a prefill of as many positions."""

    weights: int  # weights of the decoder, each of which a token reads once
    first_flops: float
    prefill_flops: float


def work_of(config: PaliGemmaConfig, positions: int) -> Work:
    """The products of matrices alone; the head's are for the last position only."""
    v, t = config.vision_config, config.text_config
    shapes = expected_shapes(config)
    language = {name: math.prod(x) for name, x in shapes.items() if name.startswith("language_model.")}
    matrices = {name: math.prod(x) for name, x in shapes.items() if len(x) > 1 and "embed" not in name}
    decoder = sum(size for name, size in matrices.items() if name in language)
    vision = sum(size for name, size in matrices.items() if name not in language)
    prefill = 2.0 * positions * decoder + 2 * language[EMBEDDING]
    prefill += 4 * t.num_hidden_layers * positions**2 * t.num_attention_heads * t.head_dim
    image = 2.0 * v.num_patches * (vision + v.hidden_size * v.num_channels * v.patch_size**2)
    image += 4 * v.num_hidden_layers * v.num_patches**2 * v.hidden_size
    return Work(sum(language.values()), prefill + image, prefill)


class Machine(NamedTuple):
    """The machine before a turn."""

    read_gb_s: float | None  # None if there is too little memory to measure it
    tflop_s: float  # of float32 products, or of bfloat16 where the CPU multiplies it and is faster
    load: float  # the load average of the last minute


def machine_now(size: int = 1 << 30, side: int = 2048) -> Machine:
    """Without instructions for bfloat16, torch may take half a minute for a bfloat16 product of this size."""
    rates = []
    dtypes = (torch.bfloat16, torch.float32) if multiplies(torch.bfloat16) else (torch.float32,)
    for dtype in dtypes:
        a, b = (torch.ones(side, side, dtype=dtype) for _ in range(2))
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            torch.mm(a, b)
            seconds.append(time.perf_counter() - start)
        rates.append(2 * side**3 / min(seconds) / 1e12)
    return Machine(read_bandwidth("cpu", size), max(rates), os.getloadavg()[0])
