"""The times that the command line reports for an answer."""

import statistics
from itertools import pairwise

from .engines import Engine


def measured(started: float, loaded: float, times: list[float], engine: Engine) -> dict:
    """The seconds of loading, of the first token and of the vision tower within it. If there are more tokens,
    also the time of each and, if the bandwidth of memory limits it, the rate at which weights are read and
    that of this machine."""
    timings = {"load_s": loaded - started, "first_token_s": times[0] - loaded, "new_tokens": len(times)}
    if engine.vision_seconds and (vision := engine.vision_seconds()) is not None:
        timings["vision_s"] = vision
    if len(times) > 1:
        # The median, because on a GPU the second and third token include compilation and capture.
        seconds = statistics.median(b - a for a, b in pairwise(times))
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
    if timings.get("vision_s", 0) >= 0.005:  # less would be printed as 0.00
        line += f" (vision {timings['vision_s']:.2f} s)"
    line += f", {timings['new_tokens']} token" + "s" * (timings["new_tokens"] != 1)
    if "ms_per_token" in timings:
        line += f", {timings['ms_per_token']:.2f} ms each"
        if "weights_gb_per_s" in timings:
            rate, limit = timings["weights_gb_per_s"], timings.get("machine_gb_per_s")
            line += f" ({rate:.1f} GB/s of weights"
            if limit is not None:
                line += f", {rate / limit:.0%} of the {limit:.1f} that this machine reads"
            line += ")"
    held = timings.get("held_gb", 0)
    return f"{line}, cache and graphs {held:.2f} GB" if held >= 0.005 else line
