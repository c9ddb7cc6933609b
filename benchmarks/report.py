"""Turns the numbers of a measurement into the targets, the time of a token by kernel, and tables. Imports no
module that reads the environment."""

from typing import Any

DECODE = "decode, bfloat16, batch 1, context 300"
TARGETS = (  # what, the format of the figure, "at least" or "at most", the limit
    (f"{DECODE}: part of the copy bandwidth", "{:.0%}", "at least", 0.9),
    (f"{DECODE}: times as fast as transformers eager", "{:.2f}", "at least", 10.0),
    (f"{DECODE}: times as fast as the best compiled peer", "{:.2f}", "at least", 1.5),
    ("first token, 224 px, batch 1: ms", "{:.2f}", "at most", 5.0),
    ("decode, 8 bits, batch 1, context 300: part of the bfloat16 time", "{:.2f}", "at most", 0.65),
)
TIMES = ("us", "floor_us", "read_floor_us")
LAUNCHES = 92  # for a token of PaliGemma 3B: five a layer, the head, and the kernel between two tokens


def summary(results: dict[str, Any]) -> dict[str, Any]:
    found = {name: stage["tasks"] for name, stage in results["stages"].items()}
    return {
        "targets": targets(found),
        "token": {
            kind: token(found.get("kernels", []), kind) for kind in ("bfloat16", "int8", "fp8", "int4")
        },
    }


def targets(found: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Each target, with its figure if it was measured."""
    rows = [row for stage in ("model", "peers") for row in found.get(stage, []) if "decode_ms" in row]
    rows = [row for row in rows if (row["model"], row["size"], row["batch"]) == ("paligemma-3b", 224, 1)]
    ours = next((row for row in rows if row["contender"] == "triton" and not row["quantize"]), {})
    own = [row for row in rows if row["contender"] == "triton"]
    quantized = [row["decode_ms"] for row in own if row["quantize"] in ("int8", "fp8")]

    def least_over_ours(*contenders: str) -> float | None:
        peers = [row for row in rows if "decode_ms_over_ours" in row and not row["quantize"]]
        over = [row["decode_ms_over_ours"] for row in peers if row["contender"].startswith(contenders)]
        return min(over, default=None)

    figures = (
        ours.get("decode_fraction"),
        least_over_ours("transformers eager"),
        least_over_ours("compiled", "transformers static"),
        ours.get("first_token_ms"),
        min(quantized) / ours["decode_ms"] if ours and quantized else None,
    )
    return [target(*wanted, figure) for wanted, figure in zip(TARGETS, figures, strict=True)]


def target(what: str, form: str, bound: str, limit: float, figure: float | None) -> dict[str, Any]:
    met = None if figure is None else reaches(figure, bound, limit)
    return {"what": what, "figure": figure, "wanted": f"{bound} {form.format(limit)}", "met": met}


def reaches(figure: float, bound: str, limit: float) -> bool:
    return figure >= limit if bound == "at least" else figure <= limit


def token(kernels: list[dict], kind: str) -> dict[str, Any]:
    """For batch 1 and context 300: the microseconds that all launches of each kernel take for one token, and
    the time of copying or reading the same number of bytes."""
    rows, parts = [row for row in kernels if kind in row.get("launches", {})], []
    for row in rows:
        own, n = row["contenders"].get("triton", {}), row["launches"][kind]
        if "us" in own:
            parts.append({"kernel": row["task"], "launches": n} | {name: n * own[name] for name in TIMES})
    sums = {name: sum(part[name] for part in parts) for name in TIMES}
    return {"kernels": parts, **sums, "all": sum(part["launches"] for part in parts) == LAUNCHES}


def print_table(results: dict[str, Any]) -> None:
    found = {name: stage["tasks"] for name, stage in results["stages"].items()}
    print(f"{results['device']}, commit {results['commit']}, {results['versions']}")
    for row in found.get("ceilings", []):
        if "copy_gb_s" in row:
            print(f"copies {row['copy_gb_s']:.0f} GB/s, reads {row['read_gb_s']:.0f} GB/s,", end=" ")
            print(f"multiplies {row['matmul_tflop_s']:.3g} TFLOP/s; a kernel takes {row['launch_us']:.1f} us")
    print_kernels(found.get("kernels", []))
    print_crossover(found.get("crossover", []))
    print_generations([*found.get("model", []), *found.get("peers", [])])
    print_step(found)
    for kind, whole in results["summary"]["token"].items():
        print_token(kind, whole)
    print()
    for found_target, (_, form, _, _) in zip(results["summary"]["targets"], TARGETS, strict=True):
        figure, met = found_target["figure"], "met" if found_target["met"] else "not met"
        said = "not measured" if figure is None else f"{form.format(figure)}, {met}"
        print(f"target: {found_target['what']}, {found_target['wanted']}: {said}")
    print_failures(found)
    for name, stage in results["stages"].items():
        print(f"{name}: {stage['line']}")


def print_token(kind: str, whole: dict[str, Any]) -> None:
    if not whole["kernels"]:
        return
    columns = f"{'launches':>8} {'us':>8} {'floor':>8} {'over':>8} {'% copy':>7} {'% read':>7}"
    print(f"\n{f'a token, {kind}, batch 1, context 300':62} {columns}")
    name = "together" if whole["all"] else "together (some are missing)"
    for part in [*whole["kernels"], {"kernel": name, "launches": "", **whole}]:
        us, floor, read = (part[time] for time in TIMES)
        columns = f"{us:8.1f} {floor:8.1f} {us - floor:8.1f} {floor / us:7.0%} {read / us:7.0%}"
        print(f"{part['kernel'][:62]:62} {part['launches']:>8} {columns}")


def print_kernels(rows: list[dict]) -> None:
    rows = [row for row in rows if "contenders" in row]
    if rows:
        print(f"\n{'kernel':62} {'us':>8} {'spread':>7} {'% limit':>7} {'% read':>7}   others, us")
    for row in rows:
        times = {name: value for name, value in row["contenders"].items() if "us" in value}
        own = times.pop("triton", None)
        figures = f"{'failed':>32}"
        if own:
            figures = f"{own['us']:8.1f} {(own['us_p90'] - own['us_p10']) / own['us']:7.0%}"
            figures += f" {own['fraction']:7.0%} {own['read_fraction']:7.0%}"
        others = ", ".join(f"{name} {value['us']:.1f}" for name, value in times.items())
        print(f"{row['task'][:62]:62} {figures}   {others}")


def print_crossover(rows: list[dict]) -> None:
    sums = [row for row in rows if "rms" in row]
    for row in sums:
        times = sorted((form["us"], name) for name, form in row["contenders"].items() if "us" in form)
        errors = {name: rms / row["rms_of_rounding"] for name, rms in row["rms"].items()}
        said = "; ".join(f"{name} {us:.1f} us, error {errors[name]:.3f}" for us, name in times)
        print(f"{row['task'][:40]:40} {said} (of the rounding to bfloat16)")
    lines = [row["line"] for row in sums if row["line"]]
    if lines:
        print("faster than cuBLAS, for FORMS of kernels/linear.py:")
    for line in lines:
        print(f"    {line}")
    rows = [row for row in rows if "contenders" in row and row not in sums]
    if rows:
        print(f"\n{'product, us':62} {'fused':>8} {'a row at a time':>16} {'norm, linear':>13}")
    for row in rows:
        columns = (("fused", 8), ("a row at a time", 16), ("norm, linear", 13))
        times = [cell(row["contenders"].get(name, {}), "us", f"{width}.1f") for name, width in columns]
        print(f"{row['task'][:62]:62} " + " ".join(times))


def cell(row: dict, name: str, form: str) -> str:
    """The number of that name, or as many spaces."""
    return f"{row[name]:{form}}" if name in row else " " * int(form.partition(".")[0])


def print_generations(rows: list[dict]) -> None:
    rows = [row for row in rows if "decode_ms" in row or "error" in row]
    if rows:
        columns = f"{'ms/token':>9} {'p10-p90':>15} {'% copy':>7} {'% read':>7} {'over ours':>9}"
        first = f"{'first token ms':>15} {'% limit':>8} {'over ours':>9}"
        print(f"\n{'whole generations':45} {'context':>7} {columns} {first} {'agree':>6}")
    for row in rows:
        if "error" in row:
            print(f"{row['task']:45} not measured: {row['error'][:150]}")
            continue
        times = f"{row['decode_ms']:9.3f} {row['decode_ms_p10']:7.3f}-{row['decode_ms_p90']:<7.3f}"
        fractions = f"{row['decode_fraction']:7.0%} {row['decode_read_fraction']:7.0%}"
        over = cell(row, "decode_ms_over_ours", "9.2f")
        first = f"{cell(row, 'first_token_ms', '15.2f')} {cell(row, 'first_token_fraction', '8.0%')}"
        first += f" {cell(row, 'first_token_ms_over_ours', '9.2f')} {row['agreement']:6.0%}"
        if "vision_ms" in row:
            first += f"   vision {row['vision_ms']:.2f}, as much text {row['language_ms']:.2f} ms"
        print(f"{row['task']:45} {row['context']:7} {times} {fractions} {over} {first}")


def print_step(found: dict[str, list[dict]]) -> None:
    without = {row["task"]: row for row in found.get("steps_without_pdl", [])}
    rows = [row for row in found.get("steps", []) if "step_ms" in row]
    if rows:
        columns = f"{'with PDL':>9} {'% copy':>7} {'% read':>7} {'without':>9} {'replays':>8}"
        print(f"\n{'graph of one step, ms':62} {columns}")
    for row in rows:
        other = cell(without.get(row["task"], {}), "step_ms", "9.3f")
        fractions = f"{row['decode_fraction']:7.0%} {row['decode_read_fraction']:7.0%}"
        print(f"{row['task'][:62]:62} {row['step_ms']:9.3f} {fractions} {other} {row['replays']:8}")
    for row in found.get("steps", []):
        if "the_same" in row:
            same = f"{row['the_same']} of {row['of']} tokens the same"
            print(f"{row['task'][:62]:62} {same}, holds {row['held_gb']:.2f} GB")
        if "parts" in row:
            print(f"{row['task'][:62]:62} {row['launches']:.0f} launches")
        for part in row.get("parts", [])[:12]:
            print(f"  {part['kernel'][:60]:60} {part['calls']:8.0f} {part['us']:9.1f} us")


def print_failures(found: dict[str, list[dict]]) -> None:
    failures = [(name, row) for name, tasks in found.items() for row in tasks if "failed" in row]
    if failures:
        print()
    for name, row in failures[:20]:
        print(f"FAILED {name}: {row['task']}: {row['failed'][:200]}")
    if len(failures) > 20:
        print(f"and {len(failures) - 20} more failures")
    print()
