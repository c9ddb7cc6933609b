"""Prepares a model and its input for the command line: the PyTorch model, or the reference."""

import argparse
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from .machine import read_bandwidth

if TYPE_CHECKING:
    from .model import PaliGemma
    from .processor import Processor

LIMITED = 1 << 28  # bytes of weights from which memory is what limits a token


class Engine(NamedTuple):
    """A model that answers one prompt: its tokens, generated one by one, and the processor that decodes
    them."""

    tokens: Iterator[int]
    log_probs: list  # which grows with them where JSON is asked for
    processor: "Processor"
    bytes_per_token: int = (
        0  # of weights that one more token reads, where reading them is what takes its time
    )
    vision_seconds: Callable[[], float | None] | None = None  # of the first token's time
    bandwidth: Callable[[], float | None] | None = None  # of this machine, in GB/s
    held_bytes: Callable[[], int] = int  # by caches and graphs for a next answer


def torch_engine(args: argparse.Namespace, image) -> Engine:
    from .loading import load_hf_model

    model, processor = load_hf_model(
        args.model, device=args.device, dtype=args.dtype or "auto", revision=args.revision, local_files_only=args.local_files_only,
        backend=args.backend, tokenizer=args.tokenizer, adapter=args.adapter, quantize=args.quantize, full_attention=args.full_attention,
    )  # fmt: skip
    log_probs = []
    steps = model.stream(
        **processor(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=log_probs if args.json else None,
    )
    read = sum(parameter.nbytes for parameter in model.language_model.parameters())
    if (
        "lm_head" in model.language_model._modules
    ):  # the table is there besides the head, and a token reads one row of it
        read -= model.language_model.model.embed_tokens.weight.nbytes
    limited = read >= LIMITED
    bandwidth = partial(read_bandwidth, model.device.type) if limited else None
    tokens = (int(step[0]) for step in steps)
    return Engine(
        tokens,
        log_probs,
        processor,
        read if limited else 0,
        vision_watch(model),
        bandwidth,
        lambda: model.held_bytes,
    )


def vision_watch(model: "PaliGemma") -> Callable[[], float | None]:
    """The seconds from the vision tower's beginning to the projector's end, if both have run."""
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


def reference_engine(args: argparse.Namespace, image) -> Engine:
    from . import reference
    from .checkpoint import hub
    from .processor import Processor
    from .tokenizer import find

    tokenizer = args.tokenizer and find(args.tokenizer)
    if args.adapter:
        hub.check_base(args.model, args.adapter)
    directory = hub.resolve(
        args.model,
        dtype=args.dtype or "bfloat16",
        revision=args.revision,
        local_files_only=args.local_files_only,
    )
    model = reference.load(
        directory, dtype=args.dtype or "float64", adapter=args.adapter, full_attention=args.full_attention
    )
    processor = Processor.load(directory, model.config, tokenizer, args.adapter)
    log_probs = []
    tokens = model.stream(
        **processor.arrays(args.prompt, image),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        log_probs=log_probs if args.json else None,
    )
    return Engine(tokens, log_probs, processor)
