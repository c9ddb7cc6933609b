"""Saves a model with quantised weights, which then load in the time that reading them takes.

python -m paligemma.quantize google/paligemma-3b-mix-224 paligemma-int8 --quantize int8"""

import argparse
import os
import signal
from pathlib import Path

from . import command
from .command import say, tell
from .errors import PaliGemmaError
from .quantization import FORMATS, WORDS, Saved


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    from . import checkpoint, loading
    from .backend import choose_dtype
    from .checkpoint.saving import check_new, save
    from .processor import Processor, image_settings
    from .tokenizer import of_adapter

    directory, dtype = (
        Path(os.path.expanduser(args.directory)),
        choose_dtype(args.dtype or "auto", args.model),
    )
    check_new(directory)
    source, adapter, tokenizer = loading.locate(
        args.model, args.adapter, args.tokenizer, dtype, args.revision,
        local_files_only=args.local_files_only,
    )  # fmt: skip
    check_new(directory, *filter(None, (source, adapter)))
    config, stored = checkpoint.load(source, adapter=adapter)
    if config.saved:
        remedy = "give the float model that it was made from"
        raise PaliGemmaError(f"{source} holds {config.saved.format} weights already: {remedy}")
    Processor.load(source, config, tokenizer, adapter)  # refuses files that cannot be used
    beside = source if source.is_dir() else source.parent
    tokenizer = tokenizer or (adapter and of_adapter(adapter)) or beside
    saved, images = Saved(args.quantize, str(dtype).removeprefix("torch.")), image_settings(beside, adapter)
    size = save(stored, config, images, tokenizer, saved, directory)
    tell(f"{size / 1e9:.3g} GB of weights, {saved.format} for {saved.dtype}")
    say(f"{args.directory}\n")
    return 0


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = option_parser()
    args = parser.parse_args(argv)
    for name in ("model", "directory", "adapter", "tokenizer", "revision"):
        if getattr(args, name) == "":  # from a shell variable that is not set
            parser.error(f"{name} is empty: give a value, or leave it out")
    return args


def option_parser() -> command.Parser:
    about = "Save a PaliGemma with quantised weights, in a directory that every command takes as --model."
    parser = command.Parser(prog="python -m paligemma.quantize", description=about)
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL", help="hub id, local directory, one of Google's .npz files, or demo")
    add("directory", metavar="DIR", help="new directory for the result, whose path is printed")
    add("--quantize", required=True, choices=tuple(FORMATS),
        help="format of the language model's matrices: 8 bits, or 4 in groups of 32 numbers")
    add("--dtype", choices=tuple(WORDS), help="dtype of the other weights, and the only one in which the "
        "result can be run (default: bfloat16; demo: float32)")
    add("--adapter", metavar="ADAPTER", help="LoRA adapter to merge into the weights before they are "
        "quantised, with its tokenizer if it has one: directory or hub id")
    add("--tokenizer", metavar="PATH",
        help="tokenizer.model, tokenizer.json or their directory, if they are not beside the weights")
    add("--revision", help="branch, tag or commit on the hub (default: bfloat16 or float16 to match --dtype, "
        "if it exists, else main)")
    add("--local-files-only", action="store_true", help="take a hub id from the cache, without a network")
    # fmt: on
    return parser


if __name__ == "__main__":
    for name in ("SIGTERM", "SIGHUP"):  # nothing half written stays, as with Ctrl-C
        number = getattr(signal, name, None)  # Windows has no SIGHUP, and nohup ignores it
        if number and signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, command.interrupted)
    command.process(main)
