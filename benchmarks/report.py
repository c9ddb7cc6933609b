"""Turns a measurement's numbers into the targets, a token's time by kernel, and tables. Imports nothing that
reads the environment."""

from typing import Any

TARGETS = (  # what, the figure's format, at least or at most
    ("decode, bfloat16, batch 1, context 300: part of the copy bandwidth", "{:.0%}", "at least", 0.9),
    (
        "decode, bfloat16, batch 1, context 300: times as fast as transformers eager",
        "{:.2f}",
        "at least",
        10.0,
    ),
    (
        "decode, bfloat16, batch 1, context 300: times as fast as the best compiled peer",
        "{:.2f}",
        "at least",
        1.5,
    ),
    ("first token, 224 px, batch 1: ms", "{:.2f}", "at most", 5.0),
    ("decode, 8 bits, batch 1, context 300: part of the bfloat16 time", "{:.2f}", "at most", 0.65),
)
TIMES = ("us", "floor_us", "read_floor_us")
LAUNCHES = 92  # of a token of PaliGemma 3B: five a layer, the head, and what is between two tokens


def summary(results: dict[str, Any]) -> dict[str, Any]:
    found = {name: stage["tasks"] for name, stage in results["stages"].items()}
    return {
        "targets": targets(found),
        "token": {kind: token(found.get("kernels", []), kind) for kind in ("bfloat16", "int8", "fp8")},
    }


def targets(found: dict[str, list[dict]]) -> list[dict[str, Any]]:
    """Each target, with its figure if it was measured."""
    rows = [row for stage in ("model", "peers") for row in found.get(stage, []) if "decode_ms" in row]
    rows = [row for row in rows if (row["model"], row["size"], row["batch"]) == ("paligemma-3b", 224, 1)]
    ours = next((row for row in rows if row["contender"] == "triton" and not row["quantize"]), {})
    peers = [row for row in rows if "decode_ms_over_ours" in row and not row["quantize"]]
    eager = [row["decode_ms_over_ours"] for row in peers if row["contender"] == "transformers eager"]
    compiled = [
        row["decode_ms_over_ours"]
        for row in peers
        if row["contender"].startswith(("compiled", "transformers static"))
    ]
    eight_bits = [
        row["decode_ms"] / ours["decode_ms"]
        for row in rows
        if ours and row["contender"] == "triton" and row["quantize"]
    ]
    figures = (
        ours.get("decode_fraction"),
        min(eager, default=None),
        min(compiled, default=None),
        ours.get("first_token_ms"),
        min(eight_bits, default=None),
    )
    return [
        {
            "what": what,
            "figure": figure,
            "wanted": f"{bound} {form.format(limit)}",
            "met": None if figure is None else reaches(figure, bound, limit),
        }
        for (what, form, bound, limit), figure in zip(TARGETS, figures, strict=True)
    ]


def reaches(figure: float, bound: str, limit: float) -> bool:
    return figure >= limit if bound == "at least" else figure <= limit


def token(kernels: list[dict], kind: str) -> dict[str, Any]:
    """For batch 1 and context 300: the microseconds of all launches of each kernel in a token, and the time
    that copying or reading their bytes takes."""
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
            print(
                "copies {copy_gb_s:.0f} GB/s, reads {read_gb_s:.0f} GB/s, multiplies {matmul_tflop_s:.3g} TFLOP/s; a kernel takes {launch_us:.1f} us".format(
                    **row
                )
            )
    print_kernels(found.get("kernels", []))
    print_crossover(found.get("crossover", []))
    print_generations([*found.get("model", []), *found.get("peers", [])])
    print_step(found)
    for kind, whole in results["summary"]["token"].items():
        if whole["kernels"]:
            print(
                f"\n{f'a token, {kind}, batch 1, context 300':62} {'launches':>8} {'us':>8} {'floor':>8} {'over':>8} {'% copy':>7} {'% read':>7}"
            )
            for part in [
                *whole["kernels"],
                {
                    "kernel": "together" if whole["all"] else "together (some are missing)",
                    "launches": 0,
                    **whole,
                },
            ]:
                us, floor, read = (part[name] for name in TIMES)
                print(
                    f"{part['kernel'][:62]:62} {part['launches'] or '':>8} {us:8.1f} {floor:8.1f} {us - floor:8.1f} {floor / us:7.0%} {read / us:7.0%}"
                )
    print()
    for target, (_, form, _, _) in zip(results["summary"]["targets"], TARGETS, strict=True):
        said = (
            "not measured"
            if target["met"] is None
            else f"{form.format(target['figure'])}, {'met' if target['met'] else 'not met'}"
        )
        print(f"target: {target['what']}, {target['wanted']}: {said}")
    print_failures(found)
    for name, stage in results["stages"].items():
        print(f"{name}: {stage['line']}")


def print_kernels(rows: list[dict]) -> None:
    rows = [row for row in rows if "contenders" in row]
    if rows:
        print(f"\n{'kernel':62} {'us':>8} {'spread':>7} {'% limit':>7} {'% read':>7}   others, us")
    for row in rows:
        times = {name: value for name, value in row["contenders"].items() if "us" in value}
        own = times.pop("triton", None)
        figures = f"{'failed':>32}"
        if own:
            figures = f"{own['us']:8.1f} {(own['us_p90'] - own['us_p10']) / own['us']:7.0%} {own['fraction']:7.0%} {own['read_fraction']:7.0%}"
        print(
            f"{row['task'][:62]:62} {figures}   "
            + ", ".join(f"{name} {value['us']:.1f}" for name, value in times.items())
        )


def print_crossover(rows: list[dict]) -> None:
    sums = [row for row in rows if "rms" in row]
    for row in sums:
        times = {name: form["us"] for name, form in row["contenders"].items() if "us" in form}
        said = "; ".join(
            f"{name} {us:.1f} us, error {row['rms'][name] / row['rms_of_rounding']:.3f}"
            for name, us in sorted(times.items(), key=lambda x: x[1])
        )
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
        times = [
            f"{row['contenders'][name]['us']:{width}.1f}"
            if "us" in row["contenders"].get(name, {})
            else f"{'':{width}}"
            for name, width in columns
        ]
        print(f"{row['task'][:62]:62} " + " ".join(times))


def print_generations(rows: list[dict]) -> None:
    rows = [row for row in rows if "decode_ms" in row or "error" in row]
    if rows:
        columns = f"{'ms/token':>9} {'p10-p90':>15} {'% copy':>7} {'% read':>7} {'over ours':>9} {'first token ms':>15} {'% limit':>8} {'over ours':>9}"
        print(f"\n{'whole generations':45} {'context':>7} {columns} {'agree':>6}")
    for row in rows:
        if "error" in row:
            print(f"{row['task']:45} not measured: {row['error'][:150]}")
            continue
        over, over_first = (
            f"{row[name]:9.2f}" if name in row else f"{'':9}"
            for name in ("decode_ms_over_ours", "first_token_ms_over_ours")
        )
        first = (
            f"{row['first_token_ms']:15.2f} {row['first_token_fraction']:8.0%}"
            if "first_token_ms" in row
            else f"{'':24}"
        )
        part = (
            f"   vision {row['vision_ms']:.2f}, as much text {row['language_ms']:.2f} ms"
            if "vision_ms" in row
            else ""
        )
        print(
            f"{row['task']:45} {row['context']:7} {row['decode_ms']:9.3f} {row['decode_ms_p10']:7.3f}-{row['decode_ms_p90']:<7.3f}"
            f" {row['decode_fraction']:7.0%} {row['decode_read_fraction']:7.0%} {over} {first} {over_first} {row['agreement']:6.0%}{part}"
        )


def print_step(found: dict[str, list[dict]]) -> None:
    without = {row["task"]: row for row in found.get("steps_without_pdl", [])}
    rows = [row for row in found.get("steps", []) if "step_ms" in row]
    if rows:
        print(
            f"\n{'graph of one step, ms':62} {'with PDL':>9} {'% copy':>7} {'% read':>7} {'without':>9} {'replays':>8}"
        )
    for row in rows:
        other = without.get(row["task"], {}).get("step_ms")
        fractions = f"{row['decode_fraction']:7.0%} {row['decode_read_fraction']:7.0%}"
        print(
            f"{row['task'][:62]:62} {row['step_ms']:9.3f} {fractions} {f'{other:9.3f}' if other else '':>9} {row['replays']:8}"
        )
    for row in found.get("steps", []):
        if "the_same" in row:
            print(
                f"{row['task'][:62]:62} {row['the_same']} of {row['of']} tokens the same, holds {row['held_gb']:.2f} GB"
            )
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
