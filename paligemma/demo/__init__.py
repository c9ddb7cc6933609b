"""A small PaliGemma that ships with the package, `--model demo`: it knows drawn shapes and nothing else, and
answers at once.

`scenes` draws its world, `train` made it from nothing, `evaluate` measures how well it knows it."""

from pathlib import Path

NAME = "demo"
CHECKPOINT = Path(__file__).parent / "checkpoint"
SAMPLES = Path(__file__).parent / "samples"
