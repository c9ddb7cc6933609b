"""Prepares a model and its input for the command line: the PyTorch model or the reference."""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .machine import read_bandwidth

if TYPE_CHECKING:
    from .model import PaliGemma
    from .processor import Processor

LIMITED = 1 << 28  # bytes of weights from which the bandwidth of memory limits the time of a token


class Engine(NamedTuple):
    """A model that answers one prompt: an iterator that generates the tokens, and the processor that decodes
    them."""

    tokens: Iterator[int]
    log_probs: list  # of the tokens so far, if JSON output is wanted
    processor: "Processor"
    bytes_per_token: int = 0  # of weights that each further token reads, if that limits its time
    vision_seconds: Callable[[], float | None] | None = None  # of the first token's time
    bandwidth: Callable[[], float | None] | None = None  # of this machine's memory, in GB/s
    held_bytes: Callable[[], int] = int  # of the caches and graphs that are kept for later answers


def generation_options(args: argparse.Namespace, log_probs: list) -> dict[str, Any]:
    """The options that `stream` of either model takes from the command line."""
    return {
        "max_new_tokens": args.max_new_tokens, "temperature": args.temperature, "top_p": args.top_p,
        "seed": args.seed, "log_probs": log_probs if args.json else None,
    }  # fmt: skip


def load_model(args: argparse.Namespace) -> "tuple[PaliGemma, Processor]":
    """The PyTorch model of the command line, and its processor."""
    from .loading import load_hf_model

    return load_hf_model(
        args.model, device=args.device, dtype=args.dtype or "auto", revision=args.revision,
        local_files_only=args.local_files_only, backend=args.backend, tokenizer=args.tokenizer,
        adapter=args.adapter, quantize=args.quantize, full_attention=args.full_attention,
    )  # fmt: skip


def torch_engine(args: argparse.Namespace, images: list) -> Engine:
    model, processor = load_model(args)
    log_probs = []
    steps = model.stream(**processor(args.prompt, [images]), **generation_options(args, log_probs))
    read = sum(parameter.nbytes for parameter in model.language_model.parameters())
    if "lm_head" in model.language_model._modules:  # then a token reads the head, and one row of the table
        read -= model.language_model.model.embed_tokens.weight.nbytes
    limited = read >= LIMITED
    bandwidth = partial(read_bandwidth, model.device.type) if limited else None
    tokens, per_token, vision = (int(step[0]) for step in steps), read if limited else 0, vision_watch(model)
    return Engine(tokens, log_probs, processor, per_token, vision, bandwidth, lambda: model.held_bytes)


def vision_watch(model: "PaliGemma") -> Callable[[], float | None]:
    """A function that returns the seconds from the start of the vision tower to the end of the projector, or
    None unless both have run once."""
    import torch

    def mark() -> Any:
        if model.device.type == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    marks = []
    model.vision_tower.vision_model.register_forward_pre_hook(lambda *_: marks.append(mark()))
    model.multi_modal_projector.linear.register_forward_hook(lambda *_: marks.append(mark()))

    def seconds() -> float | None:
        if len(marks) != 2:
            return None
        return marks[1] - marks[0] if model.device.type == "cpu" else marks[0].elapsed_time(marks[1]) / 1e3

    return seconds


def reference_engine(args: argparse.Namespace, images: list) -> Engine:
    from . import reference
    from .checkpoint import hub
    from .processor import Processor
    from .tokenizer import find

    tokenizer = args.tokenizer and find(args.tokenizer)
    if args.adapter:
        hub.check_base(args.model, args.adapter)
    download, dtype = args.dtype or "bfloat16", args.dtype or "float64"
    where = {"revision": args.revision, "local_files_only": args.local_files_only}
    directory = hub.resolve(args.model, dtype=download, **where)
    model = reference.load(directory, dtype, adapter=args.adapter, full_attention=args.full_attention)
    processor = Processor.load(directory, model.config, tokenizer, args.adapter)
    log_probs = []
    tokens = model.stream(**processor.arrays(args.prompt, [images]), **generation_options(args, log_probs))
    return Engine(tokens, log_probs, processor)
