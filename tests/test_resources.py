"""The ahead-of-time gate: kernels are compiled for chips that are not there, and what breaks a limit is found."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.resources import Row, Weights

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | {"TRITON_DEFAULT_FP_FUSION": "1"}
SOUND = Row("rms_norm", "E 2048", "bfloat16", 90, 32, 16, 0, 5, 0, 0)


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False)


def test_the_command_prints_a_table():
    done = run("-m", "benchmarks.resources", "--chip", "80", "90", "--dtype", "bfloat16", "--kernel", "rms_norm", "rope", "--jobs", "1")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["kernel", "variant", "dtype", "chip", "regs", "shared", "spills", "128-bit", "narrow", "TMA", "KB/SM", "instr", "waves"]
    for chip in ("sm_80", "sm_90"):
        assert sum(line.startswith("rms_norm") and "E 2304" in line and chip in line for line in lines) == 1
        assert sum(line.startswith("rope") and "H 8 K 1 D 256" in line and chip in line for line in lines) == 2  # one token, and many
    assert lines[-1].startswith("no spills")
    assert done.stderr == ""


PLANTED = {  # kernel, what to spoil, what is found
    "a tile that does not fit": ("prefill_attention", "Tile.of = lambda *args: module.Tile(128, 128, 16, 3, True, 0)", "shared memory"),
    "a tile with too few registers": ("prefill_attention", "Tile.of = lambda *args: module.Tile(128, 64, 64, 2, False, 0)", "spills"),
    "loads of two bytes": ("rms_norm", "blocks_of = lambda size: (1, 128)", "narrow"),
    "short tiles before the wait": ("project_add", "Tile.of = lambda *args: module.Tile(1, 4, 256, 256, 4)", "KB an SM before the wait"),
    "weights by eight bytes": ("project_add", "Tile.of = lambda *args: module.Tile(1, 1, 512, 512, 4)", "narrow loads of weights"),
}


@pytest.mark.parametrize(("kernel", "plant", "fault"), PLANTED.values(), ids=PLANTED)
def test_a_planted_mistake_is_found(kernel, plant, fault):
    script = f"""
from benchmarks import cases, resources
from paligemma.kernels import {kernel} as module
module.{plant}
case = next(case for case in cases.production() if case.kernel == {kernel!r} and "softcap" not in case.variant)
cases.production = lambda: [case]
(row,) = resources.compile_all(90, "bfloat16", [{kernel!r}])
print(row.faults)
"""
    done = run("-c", script)
    assert fault in done.stdout, done.stdout + done.stderr


WAIT = "    wait(PDL)\n"
SCALE = "    scale = scales(scale_ptr, place, given, block, BLOCK_N)\n"
BRANCH = """    branch_scale = 1.0
    if branch_ptr is not None:
        branch_scale = inverse_of_parts(squares_ptr, R, eps, K, PARTS, NORM_R, BLOCK_PARTS)
"""
SECOND = """    if SECOND:
        w2 = tile(w_ptr, place, given, block, FIRST, K, BLOCK_N, SECOND, WHOLE)
"""
PRODUCT = "        out = product(w, weighted * before, BLOCK_R, dtype)\n"
STAGES = "tl.range(2 * FIRST, K, FIRST, num_stages=STAGES)"
NORM, LONG = ("norm_geglu", "sum"), ("project_add", "16384 to")
WAITS = {  # the kernel, what is planted where it waits for those before it, and what is found
    "as it is": (NORM, WAIT, WAIT, "[]"),
    "no wait": (NORM, WAIT, "", "accesses before the wait"),
    "a branch read before the wait": (NORM, WAIT + SCALE + BRANCH, BRANCH + WAIT + SCALE, "accesses before the wait"),
    "the second tile after the wait": (NORM, SECOND + WAIT, WAIT + SECOND, "loads of weights to registers after the wait"),
    "a long product as it is": (LONG, STAGES, STAGES, "[]"),
    "later tiles that are not ahead": (LONG, STAGES, "tl.range(2 * FIRST, K, FIRST, num_stages=1)", "FMA instructions before the last load of weights"),
}


@pytest.mark.parametrize(("case", "right", "wrong", "found"), WAITS.values(), ids=WAITS)
def test_what_comes_before_the_wait(tmp_path, case, right, wrong, found):
    """Weights and nothing else: there Triton's own wait does not keep the order for us."""
    shutil.copytree(ROOT / "kernels", tmp_path / "planted")
    source = (tmp_path / "planted" / "gemv.py").read_text()
    assert source.count(right) == 1
    (tmp_path / "planted" / "gemv.py").write_text(source.replace(right, wrong))
    script = f"""
import sys
sys.path.append({str(tmp_path)!r})
from benchmarks import cases, resources
from planted.{case[0]} import {case[0]}
cases.{case[0]}.{case[0]} = {case[0]}
case = next(case for case in cases.production() if case.kernel == {case[0]!r} and {case[1]!r} in case.variant)
cases.production = lambda: [case]
(row,) = resources.compile_all(90, "bfloat16", [{case[0]!r}])
print(row.faults)
"""
    done = run("-c", script)
    assert found in done.stdout, done.stdout + done.stderr


def test_programmatic_dependent_launch_is_for_chips_that_have_it_and_can_be_turned_off():
    script = """
from benchmarks import cases, resources
from paligemma.kernels import common
case = next(case for case in cases.production() if case.kernel == "project_add")
cases.production = lambda: [case]
resources.inspect = lambda kernel: (int(kernel.metadata.launch_pdl), int("griddepcontrol.wait" in kernel.asm["ptx"]), 0, 0, 0, 0)
resources.inspect_product = lambda *args: {}
(row,) = resources.compile_all(%d, "bfloat16", ["project_add"])
print(row.registers, row.shared)
"""
    for chip, setting, expected in ((80, "1", "0 0"), (90, "1", "1 1"), (90, "0", "0 0")):
        environment = ENVIRONMENT | {"PALIGEMMA_PDL": setting}
        done = subprocess.run([sys.executable, "-c", script % chip], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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
    assert not product._replace(weights=Weights(70, 70, 5.1, 2, 8)).faults, "all of the matrix is there before the wait"
    assert not SOUND._replace(narrow=1, kernel="rope").faults
