"""A small PaliGemma that ships with the package, `--model demo`. It knows only drawn shapes, and is fast.

`scenes` draws its pictures, `train` trains it from scratch, `evaluate` measures its accuracy."""

from pathlib import Path

NAME = "demo"
CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLES = Path(__file__).parent / "samples"
