"""Times this engine on a CPU beside the other engines that are installed, in alternating runs.

    python -m benchmarks.random_checkpoint checkpoints/random-3b
    python -m benchmarks.peers --model checkpoints/random-3b

Each contender loads in a process of its own and stays loaded while there is room for the others; between its
turns it is stopped. A round gives every contender one turn, so that a drift of the machine affects all of
them. Engines that have only the decoder get as many random ids as the image and the prompt have positions.
The command writes benchmarks/results/peers-cpu-DATE.json after each turn, so that a run that is interrupted
keeps what it measured, and prints a table at the end."""

import json
import re
import shutil
import statistics
import sys
import tempfile
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from paligemma import command
from paligemma.command import tell
from paligemma.errors import PaliGemmaError

from .contenders import CONTENDERS, ENGINE, ROWS

RESULTS = Path(__file__).parent.parent / "results"
KEYS = ("decode_ms", "rows_ms", "first_token_s", "prefill_s", "load_s", "peak_gb", "of_reading")


def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    return command.exit_code(lambda: measure(args))


def parser() -> command.Parser:
    p = command.Parser(
        "python -m benchmarks.peers", description="Measure this engine beside others on a CPU."
    )
    names = [contender.name for contender in CONTENDERS]
    python = "the Python that has an engine, if it is not in this environment: openvino=/path/bin/python"
    files = "keep the files that OpenVINO and llama.cpp load here (default: a temporary directory)"
    rounds, tokens = "turns of each (default: %(default)s)", "tokens a run (default: %(default)s)"
    deadline = "seconds until a contender that does not answer is killed (default: %(default)s)"
    p.add_argument("--model", required=True, type=Path, help="checkpoint directory")
    p.add_argument("--image", type=Path, help="an image file (default: noise and edges)")
    p.add_argument("--prompt", default="caption en")
    only = f"measure only these, in this order: {', '.join(names)}; or an engine's name for all of its kinds"
    p.add_argument("--only", nargs="+", metavar="NAME", help=only)
    p.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help=python)
    number = command.at_least
    p.add_argument("--rounds", type=number(1), default=3, metavar="N", help=rounds)
    p.add_argument("--tokens", type=number(2), default=20, metavar="N", help=tokens)
    p.add_argument("--files", type=Path, metavar="DIR", help=files)
    p.add_argument("--deadline", type=number(1), default=900, metavar="S", help=deadline)
    p.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="directory of the JSON file")
    return p


def chosen(only: list[str] | None) -> list:
    found = []
    for name in only or list(ENGINE):
        some = [c for c in CONTENDERS if name in (c.name, c.engine)]
        if not some:
            raise PaliGemmaError(f"--only {name!r}: it is not a contender; --help lists them")
        found += [c for c in some if c not in found]
    return found


def pythons(given: list[str]) -> dict[str, str]:
    found = dict.fromkeys(ENGINE, sys.executable)
    for text in given:
        engine, _, path = text.partition("=")
        if engine not in ENGINE or not path:
            raise PaliGemmaError(f"--python {text!r} is not ENGINE=PATH; the engines are {', '.join(ENGINE)}")
        if not shutil.which(path):
            raise PaliGemmaError(f"--python {text!r}: {path} is not a program that can be run")
        found[engine] = path
    return found


def measure(args) -> int:
    contenders, python = chosen(args.only), pythons(args.python)
    if not args.results.is_dir():
        raise PaliGemmaError(f"--results {args.results} is not a directory")
    path = args.results / f"peers-cpu-{date.today().isoformat()}.json"
    with tempfile.TemporaryDirectory() as scratch:
        from .turns import Race

        race = Race(args, contenders, python, Path(scratch))

        def write(complete: bool) -> dict[str, Any]:
            results = {"complete": complete} | summary(race, args)
            with command.replacing(path) as file:
                file.write(json.dumps(results, indent=1).encode() + b"\n")
            return results

        try:
            race.run(after_turn=lambda: write(complete=False))
        finally:
            race.workers.end()
        results = write(complete=True)
    command.say(table(results))
    tell(f"wrote {path}")
    return 0


def summary(race, args) -> dict[str, Any]:
    from benchmarks.whole_model import commit, device_name, versions

    rows: dict[str, dict[str, Any]] = {}
    for name, turns in race.turns.items():
        values = {key: [turn[key] for turn in turns if turn.get(key) is not None] for key in KEYS}
        rows[name] = {key: statistics.median(x) if x else None for key, x in values.items()}
        rows[name] |= {
            key: without_directories(x) if isinstance(x, str) else x
            for key, x in race.said.get(name, {}).items()
        }
    reads = [turn["machine"]["read_gb_s"] for turns in race.turns.values() for turn in turns]
    reads = [x for x in reads if x]
    rates = [turn["machine"]["tflop_s"] for turns in race.turns.values() for turn in turns]
    read = statistics.median(reads) if reads else None
    rate = statistics.median(rates) if rates else None
    named = [without_directories(x) for x in sys.argv[1:]]
    shown = " ".join(["python -m benchmarks.peers", *named])
    return {
        "command": shown,
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": commit(),
        "device": device_name("cpu"), "versions": versions() | {"engines": race.versions},
        "rounds": args.rounds, "tokens": args.tokens, "rows": ROWS, "positions": race.positions,
        "read_gb_per_s": read, "tflop_per_s": rate,
        "floors": {
            "decode_ms": read and race.work.weights * 2 / read / 1e6,
            "first_token_s": rate and race.work.first_flops / rate / 1e12,
            "prefill_s": rate and race.work.prefill_flops / rate / 1e12,
        },
        "ended_to_make_room": sorted(race.workers.evicted),
        "median": rows, "runs": race.turns,
    }  # fmt: skip


def without_directories(text: str) -> str:
    """A text without the directories of this machine."""
    return re.sub(r"(?<![\w.])/[^\s='\"]*/", "", text)


COLUMNS = (  # title, key, format
    ("ms/token", "decode_ms", "{:.1f}"), ("of reading", "of_reading", "{:.0%}"),
    (f"{ROWS} rows ms", "rows_ms", "{:.0f}"), ("first token s", "first_token_s", "{:.2f}"),
    ("prefill s", "prefill_s", "{:.2f}"), ("load s", "load_s", "{:.1f}"), ("peak GB", "peak_gb", "{:.1f}"),
)  # fmt: skip


def table(results: dict[str, Any]) -> str:
    width = max(len(name) for name in results["median"]) + 2
    lines = [f"{results['device']}, {results['rounds']} rounds, medians"]
    lines.append(f"{'':{width}}" + "".join(f"{title:>15}" for title, _, _ in COLUMNS))
    for name, row in results["median"].items():
        cells = [form.format(row[key]) if row.get(key) is not None else "-" for _, key, form in COLUMNS]
        measured = any(row.get(key) is not None for key in KEYS)
        line = "".join(f"{cell:>15}" for cell in cells) if measured else ""
        said = row.get("error") or row.get("missing") or row.get("note")
        lines.append(f"{name:{width}}{line}{'  ' + said if said else ''}")
    floors, read = results["floors"], results["read_gb_per_s"]
    if read:
        least = f"a bf16 token takes at least {floors['decode_ms']:.0f} ms"
        lines.append(f"The machine reads {read:.1f} GB/s: {least}.")
    if rate := results["tflop_per_s"]:
        least = f"a first token takes at least {floors['first_token_s']:.2f} s"
        lines.append(f"It multiplies at {rate:.2f} TFLOP/s: {least}, a prefill {floors['prefill_s']:.2f} s.")
    if results["ended_to_make_room"]:
        lines.append(f"Loaded again for lack of memory: {', '.join(results['ended_to_make_room'])}.")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    command.process(main)
