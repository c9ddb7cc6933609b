"""Draws a result of benchmarks.whole_model as bars.

    python -m benchmarks.plot FILE [--out PICTURE]

The plot of docs/performance.md is that of benchmarks/results/whole_model-cpu-bfloat16-2026-11-22.json."""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS, THEIRS = "#1f6f8b", "#b8b8b8"


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    draw(json.loads(args.result.read_text()), args.out)
    return 0


def draw(result: dict, out: Path) -> None:
    """Draw two charts, of a decode step and of the first token, with a bar for each engine. A line shows the
    shortest possible time of a decode step."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    engines = list(result["median"])
    ours = {"paligemma": "this engine", "paligemma torch": "this engine, torch alone"}
    names = [ours.get(engine, engine) for engine in engines]
    colors = [OURS if engine in ours else THEIRS for engine in engines]
    figure = Figure(figsize=(8, 3), layout="constrained")
    FigureCanvasSVG(figure)
    titles = "ms a token (dotted: what the memory allows)", "s to the first token"
    pair = figure.subplots(1, 2, sharey=True)
    for axes, key, title in zip(pair, ("decode_ms", "first_token_s"), titles, strict=True):
        values = [result["median"][engine][key] for engine in engines]
        bars = axes.barh(names, values, color=colors)
        axes.bar_label(bars, fmt="%.0f" if key == "decode_ms" else "%.1f", padding=3)
        axes.set(xlim=(0, 1.15 * max(values)))
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        if key == "decode_ms":
            axes.axvline(result["decode_floor_ms"], color="black", linewidth=1, linestyle=":")
    pair[0].invert_yaxis()  # inverts both: they share the axis
    figure.suptitle(f"PaliGemma 3B shape, {result['dtype']}, {result['device']}", fontsize=10)
    figure.savefig(out, metadata={"Date": None})


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description="Draw a result of benchmarks.whole_model as bars."
    )
    result = "JSON file of benchmarks.whole_model"
    picture, default = ROOT / "docs/performance.svg", "the picture (default: docs/performance.svg)"
    parser.add_argument("result", type=Path, metavar="FILE", help=result)
    parser.add_argument("--out", type=Path, default=picture, help=default)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
