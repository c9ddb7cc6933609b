"""The table of resources: kernels are compiled for chips that this machine does not have, and those that
break a limit are found."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

from benchmarks.resources import Row, Weights

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
ENVIRONMENT["TRITON_DEFAULT_FP_FUSION"] = "1"
SOUND = Row("rms_norm", "E 2048", "bfloat16", 90, 32, 16, 0, 5, 0, 0)


def run(*arguments: str, path: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    environment = ENVIRONMENT | {"PYTHONPATH": str(path)} | variables
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prints_a_table():
    options = ["--chip", "80", "90", "--dtype", "bfloat16", "--kernel", "rms_norm", "rope", "--jobs", "1"]
    done = run("-m", "benchmarks.resources", *options)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    columns = "kernel variant dtype chip regs shared spills 128-bit narrow TMA KB/SM instr waves"
    assert lines[0].split() == columns.split()

    def count(kernel: str, variant: str, chip: str) -> int:
        return sum(line.startswith(kernel) and variant in line and chip in line for line in lines)

    for chip in ("sm_80", "sm_90"):
        assert count("rms_norm", "E 2304", chip) == 1
        assert count("rope", "H 8 K 1 D 256", chip) == 2  # one token, and many
    assert lines[-1].startswith("no spills")
    assert done.stderr == ""


class Plant(NamedTuple):
    """A mistake in a copy of the kernels, and the faults that must be found."""

    kernel: str
    variant: str  # a part of the variant: the first case that has it is compiled
    file: str
    right: str  # the text that `wrong` replaces; "": `wrong` is added at the end of the file
    wrong: str
    found: tuple[str, ...] = ()
    chip: int = 90


SHORT, LONG = ("project_add", "2048 to 2048 rows 1 adds"), ("project_add", "16384 to")
INT8, SUM = ("norm_geglu", "rows 1 int8"), ("norm_geglu", "sum")
INT4, OPAQUE = ("norm_qkv_rope", "2304 to 4096 rows 1 sum int4"), "return constant + (R >> 8)"
INT4_DOT, OUTPUTS = ("norm_geglu", "rows 1 int4"), "outputs, first = (64, 512"
PREFILL = ("prefill_attention", "D 256")
WAIT = "    wait_for_dependencies(PDL)\n"
BARRIER = """    if not PDL:
        tl.debug_barrier()  # as a wait does, it keeps ptxas from moving loads of weights after arithmetic
"""
SCALE = "    scale = scales(w_ptr, scale_ptr, place, given, block, BLOCK_N)\n"
BRANCH = """    branch_scale = 1.0
    if branch_ptr is not None:
        branch_scale = inverse_of_parts(squares_ptr, R, eps, K, PARTS, NORM_R, BLOCK_PARTS)
"""
SECOND = """    if SECOND:
        w2, s2 = tile(w_ptr, scale_ptr, place, given, block, FIRST, K, BLOCK_N, SECOND, ALL_WANTED, GROUPS)
"""
ARITHMETIC = """        if SECOND:
            z, weighted2 ="""
STAGES = "tl.range(2 * FIRST, K, FIRST, num_stages=STAGES)"
LOOP = f"""        for first in {STAGES}:
            w, s = tile(w_ptr, scale_ptr, place, given, block, first, K, BLOCK_N, FIRST, ALL_WANTED, GROUPS)
            z, _ = features(x_ptr, None, None, None, None, 1.0, R, first, K, BLOCK_R, FIRST)
            sums += terms(w, s, z, R, dtype)
"""
ARGUMENTS = "K, BLOCK_N, FIRST, ALL_WANTED, GROUPS"
NEXT = f"""        w, s = tile(w_ptr, scale_ptr, place, given, block, 2 * FIRST, {ARGUMENTS})
        for first in range(2 * FIRST, K, FIRST):
            following, s = tile(w_ptr, scale_ptr, place, given, block, first + FIRST, {ARGUMENTS})
            z, _ = features(x_ptr, None, None, None, None, 1.0, R, first, K, BLOCK_R, FIRST)
            sums += terms(w, s, z, R, dtype)
            w = following
"""
LARGE = "size, large = weight.itemsize, N >= 8192"
LATE = "FMA instructions before the last load of weights"
STRAY = "loads of weights to registers after the wait"
PLAIN = "later tiles do not come by cp.async"
LARGE_TILE = "Tile.of = lambda *args: Tile(128, 128, 16, 3, True, 0)"
SPILLING_TILE = "Tile.of = lambda *args: Tile(128, 64, 64, 2, False, 0)"
SHORT_TILE = "Tile.of = lambda *args: Tile(1, 4, 256, 256, 4)"
NARROW_TILE = "Tile.of = lambda *args: Tile(1, 1, 512, 512, 4)"
PLANTS = {
    "a tile that does not fit": Plant(*PREFILL, "prefill_attention", "", LARGE_TILE, ("shared memory",)),
    "a tile with too few registers": Plant(*PREFILL, "prefill_attention", "", SPILLING_TILE, ("spills",)),
    "loads of two bytes": Plant(
        "rms_norm", "", "rms_norm", "", "blocks_of = lambda size: (1, 128)", ("narrow loads",)
    ),
    "short tiles before the wait": Plant(*SHORT, "gemv_tile", "", SHORT_TILE, ("KB an SM before the wait",)),
    "weights by eight bytes": Plant(*SHORT, "gemv_tile", "", NARROW_TILE, ("narrow loads of weights",)),
    "as it is": Plant(*SUM, "gemv", WAIT, WAIT),
    "no wait": Plant(*SUM, "gemv", WAIT, "", ("accesses before the wait",)),
    "a branch read before the wait": Plant(
        *SUM, "gemv", WAIT + BARRIER + SCALE + BRANCH, BRANCH + WAIT + SCALE, ("accesses before the wait",)
    ),
    "the second tile after the wait": Plant(*SUM, "gemv", SECOND + WAIT, WAIT + SECOND, (STRAY,)),
    "the second tile after the arithmetic of the first": Plant(
        *SUM, "gemv", ARITHMETIC, indent(SECOND, "    ") + ARITHMETIC, (STRAY, LATE)
    ),
    "as it is, without a wait": Plant(*SHORT, "gemv", BARRIER, BARRIER, chip=80),
    "neither a wait nor a barrier": Plant(*SHORT, "gemv", BARRIER, "", (LATE,), chip=80),
    "a long product as it is": Plant(*LONG, "gemv", STAGES, STAGES),
    "later tiles that are not ahead": Plant(
        *LONG, "gemv", STAGES, "tl.range(2 * FIRST, K, FIRST, num_stages=1)", (LATE, STRAY, PLAIN)
    ),
    "the next tile in registers": Plant(*LONG, "gemv", LOOP, NEXT, (LATE, STRAY, PLAIN)),
    "4-bit weights as they are": Plant(*INT4, "gemv_int4", OPAQUE, OPAQUE),
    "two instructions to mask bits and to set others": Plant(
        *INT4, "gemv_int4", OPAQUE, "return constant", ("instructions a weight",)
    ),
    "few outputs of 4-bit weights": Plant(
        *INT4_DOT, "gemv_tile", OUTPUTS, "outputs, first = (16, 512", ("instructions a weight",)
    ),
    "8-bit weights as they are": Plant(*INT8, "gemv_tile", LARGE, LARGE),
    "8-bit weights by FMA": Plant(
        *INT8, "gemv_tile", LARGE, "size, large = weight.itemsize, False", ("instructions a weight",)
    ),
}
COMPILE = """
import importlib, json, sys
from benchmarks import cases, resources
production = cases.production
for i, (kernel, variant, chip) in enumerate(json.loads(sys.argv[1])):
    module = importlib.import_module(f"planted_{i}.{kernel}")
    files = [m for name, m in sys.modules.items() if name.startswith("benchmarks.cases.")]
    (user,) = [m for m in files if callable(getattr(m, kernel, None))]
    setattr(user, kernel, getattr(module, kernel))
    of_kernel = [case for case in production() if case.kernel == kernel and "softcap" not in case.variant]
    case = next(case for case in of_kernel if variant in case.variant)
    cases.production = lambda: [case]
    (row,) = resources.compile_all(chip, "bfloat16", [kernel])
    print(json.dumps(row.faults))
"""


def test_planted_mistakes_are_found(tmp_path):
    """All of them are compiled in one process, because its start takes longer than the compilation of a
    kernel."""
    for i, plant in enumerate(PLANTS.values()):
        shutil.copytree(ROOT / "kernels", tmp_path / f"planted_{i}")
        file = tmp_path / f"planted_{i}" / f"{plant.file}.py"
        source = file.read_text()
        assert not plant.right or source.count(plant.right) == 1, plant
        added = f"{source}\n\n{plant.wrong}\n"
        file.write_text(source.replace(plant.right, plant.wrong) if plant.right else added)
    plants = json.dumps([(plant.kernel, plant.variant, plant.chip) for plant in PLANTS.values()])
    done = run("-c", COMPILE, plants, path=tmp_path)
    assert done.returncode == 0, done.stderr
    for (name, plant), line in zip(PLANTS.items(), done.stdout.splitlines(), strict=True):
        faults = json.loads(line)
        assert bool(faults) == bool(plant.found), f"{name}: {faults}"
        for found in plant.found:
            assert any(fault.endswith(found) for fault in faults), f"{name}: {found!r} is not among {faults}"


def test_programmatic_dependent_launch_is_for_chips_that_have_it_and_can_be_turned_off():
    script = """
from benchmarks import cases, resources
from paligemma.kernels import common
case = next(case for case in cases.production() if case.kernel == "project_add")
cases.production = lambda: [case]
def inspect(kernel):
    return int(kernel.metadata.launch_pdl), int("griddepcontrol.wait" in kernel.asm["ptx"]), 0, 0, 0, 0
resources.inspect = inspect
resources.inspect_product = lambda *args: {}
(row,) = resources.compile_all(%d, "bfloat16", ["project_add"])
print(row.registers, row.shared)
"""
    for chip, setting, expected in ((80, "1", "0 0"), (90, "1", "1 1"), (90, "0", "0 0")):
        done = run("-c", script % chip, PALIGEMMA_PDL=setting)
        assert done.stdout.strip() == expected, done.stderr


def test_limits():
    assert not SOUND.faults
    assert SOUND._replace(spills=1).faults == ["1 spills"]
    assert SOUND._replace(shared=166_913, chip=80).faults == ["more than 166912 bytes of shared memory"]
    assert not SOUND._replace(shared=166_913).faults
    assert SOUND._replace(early=2).faults == ["2 accesses before the wait"]
    assert SOUND._replace(slow=3).faults == ["3 narrow loads of weights"]
    assert SOUND._replace(narrow=1).faults == ["1 narrow loads"]
    assert SOUND._replace(late=7).faults == ["7 FMA instructions before the last load of weights"]
    assert SOUND._replace(stray=2).faults == ["2 loads of weights to registers after the wait"]
    assert SOUND._replace(plain=True).faults == ["later tiles do not come by cp.async"]
    product = SOUND._replace(kernel="project_add", variant="2048 to 2048 rows 1 adds")
    assert not product._replace(weights=Weights(48, 500, 8, 2, 16)).faults
    assert product._replace(weights=Weights(47, 500, 8, 2, 16)).faults == ["47 KB an SM before the wait"]
    assert not product._replace(weights=Weights(31, 31, 8, 2, 16)).faults, "all of a small matrix"
    assert product._replace(weights=Weights(48, 500, 5.1, 2, 8)).faults == ["5.1 instructions a weight"]
    assert not product._replace(weights=Weights(70, 70, 5.1, 2, 8)).faults, "all loads precede the wait"
    assert not product._replace(weights=Weights(48, 500, 6, 2, 4)).faults
    assert product._replace(weights=Weights(70, 70, 6.1, 2, 4)).faults == ["6.1 instructions a weight"]
    assert not SOUND._replace(narrow=1, kernel="rope").faults
