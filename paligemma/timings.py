"""What the command line tells of an answer's time."""

import statistics
from itertools import pairwise

from .engines import Engine


def measured(started: float, loaded: float, times: list[float], engine: Engine) -> dict:
    """Seconds to load and to the first token, and of that in the vision tower; then, where there are more
    tokens, what each takes, the weights read for it, and what this machine reads, where that is the limit."""
    timings = {"load_s": loaded - started, "first_token_s": times[0] - loaded, "new_tokens": len(times)}
    if engine.vision_seconds and (vision := engine.vision_seconds()) is not None:
        timings["vision_s"] = vision
    if len(times) > 1:
        seconds = statistics.median(
            b - a for a, b in pairwise(times)
        )  # a GPU's second and third token are compiled and recorded
        timings |= {"ms_per_token": 1e3 * seconds, "tokens_per_s": 1 / seconds}
        if engine.bytes_per_token:
            timings["weights_gb_per_s"] = engine.bytes_per_token / seconds / 1e9
        if engine.bandwidth and (bandwidth := engine.bandwidth()):
            timings["machine_gb_per_s"] = bandwidth
    if engine.held_bytes():
        timings["held_gb"] = engine.held_bytes() / 1e9
    return {name: round(value, 3) for name, value in timings.items()}


def summary(timings: dict) -> str:
    line = f"load {timings['load_s']:.2f} s, first token {timings['first_token_s']:.2f} s"
    if timings.get("vision_s", 0) >= 0.005:  # of a tiny model it would be 0.00
        line += f" (vision {timings['vision_s']:.2f} s)"
    line += f", {timings['new_tokens']} token" + "s" * (timings["new_tokens"] != 1)
    if "ms_per_token" in timings:
        line += f", {timings['ms_per_token']:.2f} ms each"
        if "weights_gb_per_s" in timings:
            line += f" ({timings['weights_gb_per_s']:.1f} GB/s of weights"
            if "machine_gb_per_s" in timings:
                line += f", {timings['weights_gb_per_s'] / timings['machine_gb_per_s']:.0%} of the {timings['machine_gb_per_s']:.1f} that this machine reads"
            line += ")"
    return line + (
        f", cache and graphs {timings['held_gb']:.2f} GB" if timings.get("held_gb", 0) >= 0.005 else ""
    )
