"""The options that the command lines share: which model, which prompt, how to sample."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from .answers import prompts
from .command import Parser, at_least, probability, temperature, utf8
from .errors import PaliGemmaError
from .quantization import FORMATS

MODEL = "google/paligemma-3b-pt-224"  # the default without --model and without --adapter
TEMPERATURE = 0.8  # the default for prompts that are not answered greedily
NOT_EMPTY = ("model", "adapter", "tokenizer", "revision", "masks", "mask_decoder")
Add = Callable[..., argparse.Action]


def prompt_options(add: Add, required: str = "required without --task") -> None:
    # fmt: off
    add("--prompt", type=utf8, help="text prompt, such as 'caption en', 'detect cat ; dog' or "
        f"'answer en what is this?'; {required}")
    add("--task", choices=tuple(prompts.TASKS), help="write the prompt of this task; --prompt is then what "
        "to look for (detect, segment) or the question (vqa)")
    add("--lang", type=utf8, metavar="CODE", help="language of --task caption and vqa (default: en)")


def sampling_options(add: Add) -> None:
    # fmt: off
    add("--max-new-tokens", type=at_least(1), default=100, metavar="N",
        help="largest number of tokens to generate (default: %(default)s)")
    add("--temperature", type=temperature, metavar="X", help="sampling temperature; 0 is greedy (default: "
        "0.8; 0 with --task, and for a prompt that begins with detect, segment or ocr)")
    add("--top-p", type=probability, default=0.9, metavar="P",
        help="sample from the most probable tokens that together have probability P (default: %(default)s)")
    add("--seed", type=at_least(0), metavar="N",
        help="seed for reproducible sampling (default: a new one each time)")
    add("--no-sample", action="store_true", help="greedy decoding, as with --temperature 0")


def model_options(add: Add, backends: Sequence[str]) -> None:
    dtypes = ("float32", "float16", "bfloat16")
    reference = "reference" in backends
    # fmt: off
    add("--model", help="hub id, local directory, one of Google's .npz files, or demo for the small model in "
        f"this package (default: the adapter's base model, or {MODEL})")
    add("--device", default="auto", choices=("auto", "cuda", "cpu"),
        help="where to compute (default: cuda if there is a GPU, else cpu)")
    add("--dtype", choices=dtypes, help="dtype of weights and activations (default: bfloat16; demo: float32"
        + ("; reference: float64)" if reference else ")"))
    add("--backend", default="auto", choices=backends,
        help=("reference: slow NumPy that defines the numbers " if reference else "")
        + "(default: triton, the kernels, on a GPU; numba on a CPU where it is installed, else torch)")
    add("--revision", help="branch, tag or commit on the hub (default: bfloat16 or float16 to match --dtype, "
        "if it exists, else main)")
    add("--tokenizer", metavar="PATH",
        help="tokenizer.model, tokenizer.json or their directory, if they are not beside the weights")
    add("--adapter", metavar="DIR", help="LoRA adapter to merge into the weights, with its tokenizer if it "
        "has one: directory or hub id")
    add("--quantize", choices=tuple(FORMATS), help="store the language model's matrices in 8 bits, which "
        "halves their memory, or in 4 bits, with a scale for each 32 numbers")
    add("--full-attention", action="store_true",
        help="PaliGemma 2 without its sliding windows, as it was trained")
    add("--local-files-only", action="store_true", help="take a hub id from the cache, without a network")


def answer_options(add: Add) -> None:
    # fmt: off
    add("--masks", metavar="DIR",
        help="write each object's mask to a .png of the image's size in this directory")
    add("--mask-decoder", metavar="FILE",
        help="vae-oid.npz, which masks need (default: downloaded on first use)")
    add("--bins", type=int, default=1024, choices=(1024, 1023), help="number of <loc> bins on a side of the "
        "image; 1023 is what Google's evaluator uses (default: %(default)s)")


def refuse_empty(parser: Parser, args: argparse.Namespace, *more: str) -> None:
    """End with wrong usage for an argument whose value is empty. more: others than NOT_EMPTY."""
    for name in (*NOT_EMPTY, *more):
        if getattr(args, name, None) == "":  # from a shell variable that is not set
            parser.error(f"--{name.replace('_', '-')} is empty: give a value, or leave the option out")


def check(parser: Parser, args: argparse.Namespace, *more: str) -> None:
    """End with wrong usage for an option whose value is empty, or for --lang without --task. Writes the
    prompt of --task. more: further options that may not be empty."""
    refuse_empty(parser, args, *more)
    if args.no_sample:
        args.temperature = 0.0
    if args.task:
        try:
            args.prompt = prompts.prompt(args.task, args.prompt, args.lang)
        except PaliGemmaError as error:
            parser.error(f"--task: {error}")
    elif args.lang is not None:
        parser.error("--lang goes with --task; without it, write the language in the prompt ('caption en')")


def is_greedy(task: str | None, prompt: str) -> bool:
    """Whether a prompt is answered greedily if no temperature is given: all of --task are, and the prompts of
    tasks whose most probable answer is wanted."""
    return bool(task) or prompts.is_greedy(prompt)


def temperature_of(task: str | None, prompt: str, given: float | None) -> float:
    """The temperature that is given, or the default for a prompt."""
    if given is not None:
        return given
    return 0.0 if is_greedy(task, prompt) else TEMPERATURE


def model_name(args: argparse.Namespace, adapter: str | None) -> str:
    """The model, and the revision, adapter and quantisation that change its answers, such as
    "google/paligemma-3b-pt-224 (adapter lora, int8)". A directory of quantised weights has its format in the
    name, whether or not --quantize repeats it. Raises PaliGemmaError if its config.json is wrong."""
    from .checkpoint import folders

    # Another --quantize than the directory's stays in the name: no answer is of it, and loading refuses it.
    saved = folders.saved(Path(os.path.expanduser(args.model)))
    quantize = args.quantize or (saved and saved.format)
    revision, added = f"@{args.revision}" if args.revision else "", f"adapter {adapter}" if adapter else ""
    changes = ", ".join(filter(None, (added, quantize)))
    return f"{args.model}{revision}" + (f" ({changes})" if changes else "")


def choose_model(args: argparse.Namespace) -> None:
    """Replace args.adapter by the adapter's directory; set args.model to its base model if none is given."""
    from .checkpoint import hub

    if args.adapter:
        args.adapter = hub.resolve_adapter(args.adapter, local_files_only=args.local_files_only)
        if args.model is None:
            args.model, args.revision = hub.base_model(args.adapter, args.revision)
    args.model = args.model or MODEL
