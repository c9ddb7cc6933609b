"""Dry runs of the measuring command: every stage does its work, and a wrong, hanging or crashing kernel is
found."""

import dataclasses
import gc
import json
import math
import os
import subprocess
import sys
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import decoding
import numpy as np
import pytest
import torch
from checkpoints import config_dict
from conftest import ROOT
from rule import given

from benchmarks import (
    box_scores,
    cases,
    compiled,
    generation,
    measure,
    races,
    random_checkpoint,
    report,
    stages,
    timing,
)
from benchmarks.generation import Cell
from benchmarks.peers import __main__ as peers
from benchmarks.peers import limits, processes, turns
from paligemma import checkpoint
from paligemma.reference import layers

PLANTS = """
import dataclasses, os, sys, time
from benchmarks import cases, measure, stages

odd = cases.odd()

def planted(case):
    def no_plus_one(x, weight):
        return case.run(x, weight - 1)

    def beside_its_output(gate, up):
        out = case.run(gate, up)
        if out.storage_offset():  # it is between guards
            out.as_strided((1,), (1,), out.storage_offset() + out.numel()).fill_(1)
        return out

    def unwritten(x, weight, bias):
        return x.new_empty(x.shape)

    def crashes(*inputs):
        os.abort()

    def hangs(*inputs):
        time.sleep(1000)

    def breaks_the_device(*inputs):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    runs = {
        "rms_norm": no_plus_one, "geglu": beside_its_output, "layer_norm": unwritten,
        "add_rms_norm": crashes, "add_layer_norm": hangs, "rope": breaks_the_device,
    }
    return dataclasses.replace(case, run=runs.get(case.kernel, case.run))

others = ("linear", "prefill", "project", "norm", "top")
cases.odd = lambda: [planted(case) for case in odd if case.kernel.split("_")[0] not in others]
stages.dtypes = lambda dry: ["float32"]

def never(dry):
    time.sleep(1000)

def raises(dry):
    raise RuntimeError("no tasks")

stages.STAGES.update(never=never, raises=raises)
Stage = measure.Stage
measure.PLAN = (Stage("never", 4, 1000), Stage("raises", 60, 60), Stage("correctness", 240, 12))
if __name__ == "__main__":
    sys.exit(measure.main(["--dry-run", "--minutes", "5.06666667", "--out", sys.argv[1]]))
"""


def run(directory: Path, *command: str) -> SimpleNamespace:
    """The output of a Python command, and the content of the JSON file that it left in the directory."""
    # without xdist's variables, which make pytest-benchmark refuse to measure
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    options: dict = {"env": environment | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "timeout": 900}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, text=True, check=False, **options)
    files = list(directory.glob("*.json"))
    results = json.loads(files[0].read_text(), parse_constant=pytest.fail) if files else {}
    return SimpleNamespace(code=done.returncode, stdout=done.stdout, stderr=done.stderr, results=results)


def test_dry_run_does_the_work_of_every_stage(tmp_path):
    options = ("--dry-run", "--commit", "1234567", "--out", str(tmp_path))
    done = run(tmp_path, "-m", "benchmarks.measure", *options)
    assert done.code == 0, done.stdout + done.stderr
    results = done.results
    assert results["dry_run"].startswith("on a CPU")
    assert results["device"].endswith(torch.backends.cpu.get_cpu_capability())
    assert results["commit"] == "1234567"
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert list(results["stages"]) == [stage.name for stage in measure.PLAN]
    assert {stage["status"] for stage in results["stages"].values()} == {"ok"}
    found = {name: stage["tasks"] for name, stage in results["stages"].items()}

    kernels = {case.kernel for case in cases.odd()}
    assert len(kernels) == 16
    assert found["ceilings"][0]["copy_gb_s"] > 0
    assert len(found["correctness"]) == len(kernels)
    for task in found["correctness"]:
        assert task.get("values_that_differed", 0) == 0
        whole = task["task"].startswith("top_p")  # integers: their error is 0
        for output in task["outputs"][:1]:
            assert output["rms"] + whole > 0
            assert output["rms"] <= output["rms_allowed"]
    assert sum("replays" in task for task in found["correctness"]) == len(kernels)
    assert {task["kernel"] for task in found["kernels"]} == kernels
    limits = found["ceilings"][0]  # all stages use this one measurement of the limits
    for task in found["kernels"]:
        assert set(task["contenders"]) == {"triton", "torch"}
        for times in task["contenders"].values():
            assert times["us"] > 0
            for name, limit in (("floor_us", "copy_gb_s"), ("read_floor_us", "read_gb_s")):
                compute = task["flops"] / limits["matmul_tflop_s"] / 1e12
                assert times[name] == pytest.approx(1e6 * max(task["bytes"] / limits[limit] / 1e9, compute))
    for task in found["steps"]:
        if "replays" in task:
            assert task["values_that_differed"] == 0
            assert task["step_ms"] > 0
            fraction = 1e3 * task["decode_gb"] / limits["read_gb_s"] / task["step_ms"]
            assert task["decode_read_fraction"] == pytest.approx(fraction)
        elif "parts" in task:
            assert task["parts"][0]["us"] > 0
        else:
            assert task["the_same"] == task["of"] == 2
    assert [task.get("sampled") for task in found["steps"] if "step_ms" in task] == [True, False]
    assert [task["task"] for task in found["steps_without_pdl"]] == [found["steps"][0]["task"]]
    assert "parts" in found["steps"][1]
    quantized = {task["quantize"] for task in found["model"] if "quantize" in task}
    assert quantized == set(generation.QUANTIZATIONS)
    assert {task["contender"] for task in found["peers"]} == {
        "compiled", "compiled, products", "transformers static", "transformers eager", "transformers sdpa"
    }  # fmt: skip
    for task in found["model"] + found["peers"]:
        if "logits" in task:
            assert 0 < task["logits"]["triton"]["rms"] <= task["rms_allowed"]
            assert task["logits"]["transformers eager"]["rms"] <= 2 * task["rms_allowed"]
        else:
            assert "error" not in task
            assert task["first_token_ms"] > 0
            assert task["decode_ms"] != 0  # the difference of two times, which may be negative in a dry run
            assert task["worst"] <= generation.TIE
            assert ("decode_ms_over_ours" in task) == (task["contender"] not in generation.OWN)
    assert sum("vision_ms" in task for task in found["model"]) == 3
    *forms, sums = found["crossover"]
    assert {task["rows"] for task in forms} == {1, 2}
    assert all(set(task["contenders"]) == {"norm, linear", "fused", "a row at a time"} for task in forms)
    forms = {str(form) for form in stages.forms_for(2, 33, 20)}
    assert len(forms) == len(cases.TILES)
    assert set(sums["contenders"]) == set(sums["rms"]) == forms | {stages.REDUCED, stages.ALL_WANTED}
    assert all("us" in times for times in sums["contenders"].values())
    for name, error in sums["rms"].items():
        # A form rounds once; torch on a CPU rounds both the product and its GELU.
        assert error <= (2 * sums["rms_of_rounding"] if name in forms else 0.03), name
    assert "sums in float32" in done.stdout
    assert done.stdout.count("not measured") == len(report.TARGETS) == len(results["summary"]["targets"])
    assert "a dry run" in done.stdout
    assert all(f"{name}: ok" in done.stdout for name in results["stages"])


def test_planted_mistakes_are_found_and_cost_nothing_else(tmp_path):
    (tmp_path / "plants.py").write_text(PLANTS)
    done = run(tmp_path, str(tmp_path / "plants.py"), str(tmp_path))
    assert done.code == 1, done.stdout + done.stderr
    assert list(done.results["stages"]) == ["never", "raises", "correctness"]
    never, raises, correctness = done.results["stages"].values()
    assert never["status"] == "failed"
    assert never["line"].endswith("killed at the stage's deadline")
    assert raises["status"] == "failed"
    assert "exit code 1" in raises["line"]
    assert "no tasks" in done.stderr
    said = {task["task"].split()[0]: task.get("failed", "") for task in correctness["tasks"]}
    assert "relative RMS error" in said["rms_norm"]
    assert said["geglu"] == "it wrote beside a buffer"
    assert "relative RMS error nan" in said["layer_norm"]
    assert said["add_rms_norm"] == "died of signal 6"
    assert said["add_layer_norm"] == "killed: it hung for 12 s"
    assert said["rope"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    assert said["decode_attention"] == ""
    assert correctness["line"].startswith("failed, 8 of 8 tasks")
    assert "FAILED correctness: rms_norm" in done.stdout


@pytest.mark.parametrize("open_ended", [True, False])
def test_a_task_that_the_deadline_cuts_off(tmp_path, monkeypatch, open_ended):
    """The stage fails, unless it may have more tasks than there is time for."""

    def run_child(self):
        self.note({"planned": ["long"]})
        self.note({"started": "long"})
        return measure.LATE

    monkeypatch.setattr(measure.Supervisor, "run_child", run_child)
    stage = measure.Stage("late", 1, 1, open_ended=open_ended)
    supervisor = measure.Supervisor(stage, True, 0.0, 0, 1, tmp_path / "records")
    assert supervisor.run() is None
    assert measure.read_records(supervisor.file)[-1]["error" if open_ended else "failed"] == measure.LATE


def test_pytest_benchmark_runs_the_cases(tmp_path):
    one_each = "rms_norm and not add_rms_norm and bfloat16 or rope and float16"
    benchmark = ("-m", "pytest", "benchmarks", "--benchmark-only", "-p", "no:cacheprovider", "-k", one_each)
    done = run(tmp_path, *benchmark, "--benchmark-json", str(tmp_path / "benchmark.json"))
    assert done.code == 0, done.stdout + done.stderr
    rows = done.results["benchmarks"]
    assert {(row["extra_info"]["contender"], row["extra_info"]["dtype"]) for row in rows} == {
        ("triton", "bfloat16"), ("torch", "bfloat16"), ("triton", "float16"), ("torch", "float16")
    }  # fmt: skip
    for row in rows:
        info = row["extra_info"]
        assert info["interpreted"] == (info["contender"] == "triton")
        assert info["us"] == pytest.approx(1e6 * row["stats"]["median"])
        assert info["fraction"] > 0
        assert {"gb_s", "tflop_s", "device", "limits"} <= set(info)


def test_without_a_gpu_it_says_so(tmp_path):
    done = run(tmp_path, "-m", "benchmarks.measure", "--out", str(tmp_path))
    assert done.code == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1
    assert "no CUDA GPU" in done.stderr


def test_every_task_has_a_name_of_its_own(monkeypatch):
    device = SimpleNamespace(total_memory=140e9, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    for name in stages.STAGES:
        tasks = [task for task, _ in stages.tasks(name, dry=False)]
        assert len(set(tasks)) == len(tasks) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_production_cases_fit(dtype):
    for case in [*cases.production(), *cases.odd()]:
        assert sum(x.nbytes for x in case.make("meta", dtype)) < 5e9, case.name
        assert case.bytes(2) > 0
        assert case.name.isascii()


def test_nine_minutes_are_enough_and_what_tells_most_comes_first(monkeypatch):
    assert sum(stage.seconds for stage in measure.PLAN) == 540
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    steps = [name for name, _ in stages.tasks("steps", dry=False)]
    assert steps[:2] == ["224 px, batch 1, triton, replays", "parts of a step"]
    assert [name for name, _ in stages.tasks("steps_without_pdl", dry=False)] == steps[:1]


def test_forms_of_a_linear_layer_have_one_or_two_programs_for_each_sm():
    def splits(rows: int, size_in: int, size_out: int) -> list[tuple[int, int]]:
        return [(form.rows * form.outputs, form.splits) for form in stages.forms_for(rows, size_in, size_out)]

    found = splits(256, 1152, 1152)  # 72, 36 and 18 tiles
    assert found == [(4096, 2), (4096, 4), (8192, 4), (8192, 8), (16384, 8), (16384, 16)]
    found = splits(272, 16384, 2048)  # 160, 80 and 48 tiles
    assert found == [(4096, 1), (8192, 2), (8192, 4), (16384, 4), (16384, 8)]
    assert splits(4096, 4304, 1152) == [(4096, 1), (8192, 1), (16384, 1)]
    assert splits(2, 33, 20) == [(4096, 1), (8192, 1), (16384, 1)], "more splits than blocks of features"
    for sizes, _ in stages.PREFILL.values():
        assert all(form.splits <= -(-sizes[1] // form.features) for form in stages.forms_for(*sizes))


def test_a_form_is_written_down_where_it_is_surely_faster_than_cublas(monkeypatch, capsys):
    def found(**us: tuple[float, float, float]) -> dict[str, Any]:
        keys = ("us_p10", "us", "us_p90")
        times = {name.replace("_", ", sums in "): dict(zip(keys, x, strict=True)) for name, x in us.items()}

        def time_case(case, contenders, *rest):
            return {"contenders": {name: times.get(name, slow) for name in contenders}}

        monkeypatch.setattr(timing, "time_case", time_case)
        return stages.time_linear("SigLIP out_proj, 5 rows", 5, 96, 40, True, bias=True)

    slow = {"us_p10": 90.0, "us": 91.0, "us_p90": 92.0}
    first = str(stages.forms_for(5, 96, 40)[0])
    cublas = {"cuBLAS_bfloat16": (10, 10.5, 11), "cuBLAS_float32": (9, 9.5, 10)}
    row = {"task": "x", **found(**cublas, **{first: (7, 8, 8.9)})}
    assert row["line"] == "(4, 40, 96): {0: Form(64, 64, 64, 4, 4, 1)},  # SigLIP out_proj, 5 rows"
    report.print_crossover([row])
    assert f"    {row['line']}\n" in capsys.readouterr().out
    assert found(**cublas, **{first: (7, 8, 9.1)})["line"] is None
    assert found(**cublas)["line"] is None


@torch.no_grad()
def test_a_decode_has_the_cache_and_the_counters_of_a_model():
    """The size of the cache determines the splits, and counters that each call allocates would cost one more
    launch."""
    decodes = [case for case in cases.production() if case.kernel == "decode_attention"]
    for case in decodes:
        q, k, v, *_, counters = case.make("meta", torch.bfloat16)
        assert k.shape == v.shape
        assert k.shape[1] in (512, 1280, 4608)
        assert (counters.shape, counters.dtype) == ((len(q) * k.shape[2],), torch.int32)
    case = cases.decode_case("", [40, 3], None, (2, 1, 16))
    assert "failed" not in stages.check(case, "bfloat16", True)  # nobody sees positions after the limits

    def leaves_counters(*inputs):
        result = case.run(*inputs)
        inputs[-1].add_(1)
        return result

    found = stages.check(dataclasses.replace(case, run=leaves_counters), "bfloat16", True)
    assert "it changed its input 4" in found["failed"]


def test_a_graph_lasts_long_enough_that_its_ends_do_not_count(monkeypatch):
    """In this test a call takes 20 us, and the gap between two graphs 5 us."""
    captures: list[list] = []

    def captured(work, warm_up):
        captures.append([])
        return SimpleNamespace(replay=lambda: None), work()

    def elapsed_time(other):
        return (5 + 20 * len(captures[-1])) / 1e3

    event = SimpleNamespace(record=lambda: None, synchronize=lambda: None, elapsed_time=elapsed_time)
    monkeypatch.setattr(timing, "captured", captured)
    monkeypatch.setattr(torch.cuda, "Event", lambda **options: event)
    measure = timing.graph_timer(lambda x: captures[-1].append(x), [(n,) for n in range(3)])
    assert captures[0] == [0, 1, 2]
    assert captures[-1] == [0, 1, 2] * 8
    assert measure() == pytest.approx(20e-6, rel=0.02)
    monkeypatch.setattr(event, "elapsed_time", lambda other: 0.7)
    measure = timing.graph_timer(lambda x: captures[-1].append(x), [(n,) for n in range(3)])
    assert measure() == pytest.approx(0.7e-3 / 3)
    assert len(captures) == 3


def test_models_of_one_size_are_freed_when_those_of_the_next_are_built():
    own = generation.OWN
    kept = [weakref.ref(generation.ours(generation.PG1, 14, backend, None, True)) for backend in own]
    kept.append(weakref.ref(generation.theirs(14, "eager", True)))
    assert generation.ours(generation.PG1, 14, "torch", None, True) is kept[1]()
    gc.collect()
    assert all(model() for model in kept)
    generation.ours(generation.PG1, 28, "torch", None, True)
    gc.collect()
    assert [model() for model in kept] == [None] * 3


def numbers(case: cases.Case) -> tuple[tuple[torch.Tensor, ...], list[np.ndarray]]:
    torch.manual_seed(0)
    inputs = case.make("cpu", torch.float32)
    return inputs, [x.double().numpy() if x.is_floating_point() else x.numpy() for x in inputs]


def test_exact_is_the_reference():
    for kernel in ("rms_norm", "add_rms_norm", "layer_norm", "add_layer_norm"):
        case = cases.norm_case(kernel, "", 33, 7)
        inputs, (x, *others) = numbers(case)
        total = x + others.pop(0) if kernel.startswith("add_") else x
        p = given(**dict(zip(("weight", "bias"), others, strict=False)))
        expected = (layers.layer_norm if "layer" in kernel else layers.rms_norm)(total, p, cases.norms.EPS)
        np.testing.assert_allclose(timing.tensors(case.exact(*inputs))[0], expected, rtol=1e-12, atol=1e-13)

    inputs, (gate, up) = numbers(cases.geglu_case("", 3, 33))
    value, expected = cases.geglu.exact_geglu(*inputs), layers.gelu_tanh(gate) * up
    np.testing.assert_allclose(value, expected, rtol=1e-12, atol=1e-13)

    inputs, (q, k, v, _, positions, keys, values) = numbers(cases.rope_case("", 2, 5, (4, 2, 24), capacity=9))
    row = np.arange(2)[:, None]
    keys[row, positions], values[row, positions] = layers.rope(k, positions, 10000.0), v
    exact = (layers.rope(q, positions, 10000.0), keys, values)
    for value, expected in zip(cases.rope.exact_rope(*inputs), exact, strict=True):
        np.testing.assert_allclose(value, expected, atol=1e-6)  # the table of the case is float32

    for quantize in (None, "int8", "fp8"):
        case = cases.gate_up_case("", 2, 33, 20, True, quantize)
        inputs, (x, branch, post, _, norm, weight, *scale) = numbers(case)  # _: the squares of the branch
        total = x + layers.rms_norm(branch, given(weight=post), cases.norms.EPS)
        total = total.astype(np.float32).astype(np.float64)
        whole = weight * scale[0][:, None] if quantize else weight
        normed = layers.rms_norm(total, given(weight=norm), cases.norms.EPS)
        gate, up = np.split(layers.linear(normed, given(weight=whole)), 2, axis=-1)
        for value, expected in zip(case.exact(*inputs), (layers.gelu_tanh(gate) * up, total), strict=True):
            np.testing.assert_allclose(value, expected, rtol=1e-7, atol=1e-7)  # the sum is rounded to float32

    limits, starts = [[1, 4, 5], [9, 9, 9]], [[0, 3, 1], [0, 8, 2]]
    case = cases.prefill_case("", 2, 3, (4, 2, 24), S=9, limits=limits, starts=starts)
    inputs, (q, k, v, limit, start) = numbers(case)
    position = np.arange(9)
    mask = (position < limit[:, :, None]) & (position >= start[:, :, None])
    wanted = layers.attention(q, k, v, given(), mask)
    np.testing.assert_allclose(case.exact(*inputs), wanted, rtol=1e-12, atol=1e-13)
    scores = torch.linspace(-90, 90, 7, dtype=torch.float64)
    np.testing.assert_allclose(cases.attention.capped(scores, 50.0), 50 * np.tanh(scores.numpy() / 50))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_peers_compute_the_same():
    """Those that run on a CPU."""
    windows = [[max(0, t - 9) for t in range(40)]]
    whole = cases.prefill_case("", 2, 9, (4, 2, 32))
    capped = cases.prefill_case("", 1, 40, (4, 2, 32), starts=windows, softcap=5.0, scale=0.2)
    decoding = cases.decode_case("", [40, 40], 40, (4, 2, 32))
    in_part = cases.decode_case("", [40, 40], 64, (2, 2, 32))
    assert set(whole.peers) == set(decoding.peers) == {"SDPA flash", "SDPA cudnn", "SDPA efficient"}
    assert set(capped.peers) == {"flex_attention"}
    flash, math = (cases.attention.sdpa(name, 32**-0.5) for name in ("flash", "math"))
    for case, peer in (
        (whole, flash), (decoding, lambda *inputs: math(*inputs[:-1])),
        (in_part, in_part.peers["SDPA flash"]()), (capped, cases.attention.flex(0.2, 5.0, compile=False)),
    ):  # fmt: skip
        inputs = case.make("cpu", torch.float32)
        case.hide(*inputs)
        assert timing.distance(peer(*inputs), case.exact(*inputs)) < 1e-6
        assert timing.distance(case.plain(*inputs), case.exact(*inputs)) < 1e-6


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A replacement of torch.cuda's graphs and events: a capture computes, a replay does nothing and takes
    1 ms."""

    @contextmanager
    def context(*args, **kwargs):
        yield

    class Pretence:  # a graph, an event, a stream
        def __init__(self, **options):
            pass

        def replay(self):
            replayed.append(1)

        def record(self):
            pass

        wait_stream = synchronize = lambda self, *others: None
        elapsed_time = lambda self, other: 1.0  # noqa: E731

    replayed = []
    sizes = {"multi_processor_count": 1, "total_memory": 1e12, "L2_cache_size": 1 << 20}
    device = SimpleNamespace(major=9, minor=0, **sizes)
    for name, value in {
        "CUDAGraph": Pretence, "Event": Pretence, "Stream": Pretence, "current_stream": Pretence,
        "graph": context, "stream": context, "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None, "max_memory_allocated": lambda: 7e9,
        "get_device_name": lambda: "NVIDIA Pretence", "get_device_properties": lambda index: device,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "device_of", lambda dry: "cpu")
    monkeypatch.setattr(timing, "timer", lambda call, sets, device: timing.graph_timer(call, sets))
    return replayed


@torch.no_grad()
def test_the_code_that_only_a_gpu_runs(pretended_gpu, monkeypatch):
    """Everything is real except the device, the compilers and the sizes."""
    case = cases.rope_case("", 2, 3, (4, 2, 24), capacity=5)
    assert stages.describe_environment(False)["capability"] == "9.0"
    found = stages.check(case, "bfloat16", False)
    assert "failed" not in found
    assert found["replays"] == 1000
    assert len(pretended_gpu) == 3000  # a graph that fills, one that computes, one that compares
    assert found["values_that_differed"] == 0
    assert stages.run_once(case, "bfloat16", False)["seconds"] > 0
    whole = cases.prefill_case("", 1, 5, (4, 2, 32))
    peers = {name: whole.peers[name] for name in ("SDPA flash", "SDPA cudnn")}
    found = stages.time_kernel(dataclasses.replace(whole, peers=peers), False, {})
    assert "failed" not in found
    assert found["contenders"]["triton"]["us"] == pytest.approx(1e3 / found["sets"])
    assert found["contenders"]["SDPA flash"]["gb_s"] > 0
    assert "error" in found["contenders"]["SDPA cudnn"]

    config_for = generation.config_for
    monkeypatch.setattr(generation, "config_for", lambda model, size, dry: config_for(model, size, True))
    monkeypatch.setattr(generation, "GRID", [(14, 1), (28, 1), (28, 2)])
    monkeypatch.setattr(generation, "CONTEXTS", {14: 45, 28: 50})
    monkeypatch.setattr(generation, "LONG", 20)
    monkeypatch.setattr(compiled, "compiled", lambda decoder: decoder)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    names = dict(stages.tasks("model", False))
    assert "failed" not in names["14 px, logits"]()
    found = names["14 px, batch 1, torch"]()
    assert "error" not in found
    assert found["rounds"] >= 3
    assert found["working_gb"] == 0
    assert {"vision_ms", "language_ms"} <= set(found)
    assert found["context"] == 45
    assert np.shape(found["tokens"]) == (1, generation.CHECKED)

    def ours(cell: Cell, contender: str) -> Cell:  # the cell of this engine that is timed beside a peer
        return Cell(cell.size, cell.batch, "torch")

    monkeypatch.setattr(generation.Cell, "_replace", ours)
    for contender in ("compiled", "transformers static"):
        work = partial(generation.time_model, Cell(14, 1, contender), False, seconds=0.1)
        found = timing.attempt(False, work)
        assert "error" not in found
        assert found["decode_ms_over_ours"] != 0  # a difference of two times, which may be negative here
        assert ("first_token_ms_over_ours" in found) == (not contender.startswith("compiled"))
    found = stages.check_step(Cell(14, 1, "torch"), False)
    assert found["replays"] == 1000 // stages.AT_ONCE + 200 // stages.AT_ONCE
    assert found["step_ms"] > 0
    assert "failed" not in generation.check_graphs(Cell(14, 1, "torch"), False)


@torch.no_grad()
def greedy(cell: Cell, new: int = 12) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    inputs = generation.inputs_for(cell, True)
    return generation.generator_of(cell, inputs, True)(new), inputs


@torch.no_grad()
@pytest.mark.parametrize("sdpa", [True, False], ids=["sdpa", "products"])
@pytest.mark.parametrize("K", [1, 2], ids=["one key head", "two key heads"])
def test_the_compiled_peer_is_the_model(monkeypatch, sdpa, K):
    """In float32, for a batch, step by step. The compiled graph, which must have no break, gives the same
    tokens."""
    config_for = generation.config_for

    def wider(*names):
        config = config_for(*names)
        config["text_config"] |= {"num_attention_heads": 4, "num_key_value_heads": K, "num_hidden_layers": 2}
        return config

    monkeypatch.setattr(generation, "config_for", wider)
    generation.weights.cache_clear()
    network = generation.build(generation.PG1, 28, "torch", None, True, torch.float32)
    generation.weights.cache_clear()
    inputs = generation.inputs_for(Cell(28, 2), True)
    state = network.new_state(2, inputs["input_ids"].shape[1] + 5)
    first = decoding.prefill(network, state, inputs["input_ids"], inputs["pixel_values"])
    decoding.append(network, state, first)
    decoder = compiled.Decoder(network, 2, 64, sdpa)
    decoder.fill(state.cache)
    step = torch.compile(decoder, fullgraph=True, dynamic=False, backend="aot_eager")
    tokens, position = state.buffers.output_ids[0][:, None], state.cache.length[:1] + 0
    for n in range(1, 5):
        logits = decoder.logits(tokens, position)
        expected = decoding.logits_of_next(network, state)
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
        decoding.append(network, state, expected)
        tokens = step(tokens, position)  # writes the same keys and values once more
        assert torch.equal(tokens[:, 0], state.buffers.output_ids[n])
        position += 1


def test_another_computation_is_refused(monkeypatch):
    """A peer is not timed if it does not see its last token, sees it late or takes the least likely one."""
    cell, logits = Cell(28, 2, "compiled"), compiled.Decoder.logits
    good, inputs = greedy(cell)
    assert generation.judge(cell, good, inputs, True)["worst"] < 0.1
    images = torch.full_like(good, 290)  # an `<image>` is judged too, as the last token
    with pytest.raises(ArithmeticError, match="not greedy tokens"), torch.no_grad():
        generation.judge(cell, images, inputs, True)
    plants = {
        "late": lambda self, tokens, position: logits(self, tokens, position + 7),
        "deaf": lambda self, tokens, position: logits(self, torch.zeros_like(tokens), position),
        "least": lambda self, tokens, position: -logits(self, tokens, position),
    }
    for name, plant in plants.items():
        monkeypatch.setattr(compiled.Decoder, "logits", plant)
        with torch.no_grad():
            found = timing.attempt(False, lambda: generation.time_model(cell, True))
        assert "not greedy tokens" in found.get("error", ""), name
        assert "decode_ms" not in found


@torch.no_grad()
def test_graphs_that_differ_are_found(monkeypatch):
    """Plants replays that continue with a wrong token, and steps that give another result each time."""
    cell = Cell(28, 2, "torch")
    network: Any = generation.ours(cell.model, cell.size, cell.contender, None, True)
    generate = network.generate

    def planted(**inputs):
        tokens = generate(**inputs)
        return tokens.roll(1, dims=0) + 1 if network.graphs else tokens

    monkeypatch.setattr(network, "generate", planted, raising=False)
    found = generation.check_graphs(cell, True)
    assert found["the_same"] < found["of"]
    assert "not greedy tokens" in found["failed"]
    assert network.graphs

    def drifting(cell, dry):
        state = torch.zeros(3)
        return lambda: state.add_(1).clone(), lambda: None

    monkeypatch.setattr(generation, "step_of", drifting)
    found = stages.check_step(cell, True)
    assert found["values_that_differed"] == 6  # in memory full of NaN, and in reused memory
    assert found["failed"] == races.FAULT
    assert network.graphs


@torch.no_grad()
@pytest.mark.parametrize(
    ("kernel", "output", "plant"),
    [
        ("norm_head", 1, lambda results: results[1].sub_(1)),  # the index after the largest logit's
        ("next_token", 2, lambda results: results[2][-1:].add_(1)),  # a window that begins too late
    ],
)
def test_a_wrong_whole_number_is_found(kernel, output, plant):
    case = next(case for case in cases.odd() if case.kernel == kernel)

    def run(*inputs):
        results = case.run(*inputs)
        plant(results)
        return results

    assert "failed" not in stages.check(case, "bfloat16", True)
    found = stages.check(dataclasses.replace(case, run=run), "bfloat16", True)
    assert f"output {output}: " in found["failed"]
    inputs = case.make("cpu", torch.bfloat16)
    expected = case.seen(*case.plain(*(x.clone() for x in inputs)))
    with pytest.raises(ArithmeticError, match="differs from plain torch"):
        timing.checked(case, run, inputs, expected)


def test_targets_are_those_of_the_right_rows():
    def row(contender="triton", quantize=None, size=224, batch=1, model=generation.PG1, **figures):
        place = {"size": size, "batch": batch, "model": model, "task": ""}
        return {"contender": contender, "quantize": quantize, **place, "decode_ms": 1.0, **figures}

    def peer(contender, over, **options):
        return row(contender, decode_ms_over_ours=over, **options)

    assert [target["met"] for target in report.targets({"model": [row(quantize="int8")]})] == [None] * 5
    others = [
        row(size=896, decode_fraction=0.1, first_token_ms=60),
        row(batch=4, decode_fraction=0.1),
        row(model=generation.PG2, decode_fraction=0.1),
    ]
    ours = [
        row(decode_fraction=0.91, first_token_ms=5.5, decode_ms=2.0),
        row(quantize="int8", decode_ms=1.6),
        row(quantize="fp8", decode_ms=1.2),
    ]
    peers = [
        peer("transformers eager", 20.0), peer("compiled", 1.9), peer("compiled, products", 1.4),
        peer("transformers static", 2.5), peer("compiled", 1.1, quantize="int8"),
        peer("transformers sdpa", 9), peer("compiled", 1.1, size=896),
        {"task": "another", "error": "out of memory"},
    ]  # fmt: skip
    found = report.targets({"model": others + ours, "peers": peers})
    assert [target["figure"] for target in found] == [0.91, 20.0, 1.4, 5.5, 0.6]
    assert [target["met"] for target in found] == [True, True, False, False, True]
    found = report.targets({"model": ours[:1]})
    assert [target["met"] for target in found] == [True, None, None, False, None]


@pytest.mark.parametrize(("text", "without"), [
    ("/home/me/checkpoints/random-3b", "random-3b"), ("vllm=/opt/vllm/bin/python", "vllm=python"),
    ("OSError: no library /opt/x/lib/torchaudio.so", "OSError: no library torchaudio.so"),
    ("not installed in '/opt/x/python'", "not installed in 'python'"), ("1/2", "1/2"), ("a/b", "a/b"),
])  # fmt: skip
def test_results_name_no_directories(text, without):
    assert peers.without_directories(text) == without


def test_a_token_is_the_sum_of_its_kernels(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))

    def time_kernel(case, dry, launches):
        floor = 1e6 * case.bytes(2) / 4e12
        times = {"us": 2 * floor, "us_p10": 1, "us_p90": 1, "floor_us": floor, "read_floor_us": 0.9 * floor}
        times |= {"fraction": 0.5, "read_fraction": 0.45}
        return {"launches": launches, "contenders": {"triton": times}}

    monkeypatch.setattr(stages, "time_kernel", time_kernel)
    rows = [{"task": name, **task()} for name, task in stages.tasks("kernels", False)]
    wholes = {kind: report.token(rows, kind) for kind in ("bfloat16", "int8", "fp8", "int4")}
    kinds = (("bfloat16", 5.02e9), ("int8", 2.52e9), ("fp8", 2.52e9), ("int4", 1.65e9))
    for kind, bytes_per_token in kinds:
        assert wholes[kind]["all"]
        assert {part["launches"] for part in wholes[kind]["kernels"]} == {1, 18}
        assert wholes[kind]["floor_us"] * 4e6 == pytest.approx(bytes_per_token, rel=0.01)
        assert wholes[kind]["us"] == pytest.approx(2 * wholes[kind]["floor_us"])
        assert wholes[kind]["read_floor_us"] == pytest.approx(0.9 * wholes[kind]["floor_us"])
    assert not report.token(rows[1:], "bfloat16")["all"]
    results: dict = {"device": "", "commit": "", "versions": {}}
    results["stages"] = {"kernels": {"tasks": rows, "line": ""}}
    report.print_table(results | {"summary": report.summary(results)})
    said = capsys.readouterr().out
    assert said.count("together") == 4
    assert said.count("     50%     45%\n") == 4 * (7 + 1)  # seven kernels, and their sum


def test_a_failed_capture_ends_the_process_and_nothing_else(pretended_gpu, monkeypatch):
    monkeypatch.setattr(timing, "failed_captures", [])

    error = RuntimeError("CUDA error: operation not permitted when stream is capturing")

    def fails():
        raise error

    with pytest.raises(RuntimeError):
        timing.captured(fails, lambda: None)
    assert len(timing.failed_captures) == 1
    assert not timing.is_fatal(error)
    assert timing.is_fatal(RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"))


def test_writing_a_checkpoint_draws_no_bar_into_a_file(tmp_path, capsys):
    random_checkpoint.write(tmp_path / "model", config_dict(), torch.float32, b"")
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()
    assert capsys.readouterr().err == ""


CONTENDERS = """
import sys
from pathlib import Path
from benchmarks.peers import __main__ as peers, contenders, processes

HERE = {"needs": (), "packages": (), "install": "pip install planted"}
contenders.ENGINE.update(
    crashes=contenders.Engine("crashes", **HERE), hangs=contenders.Engine("hangs", **HERE),
    raises=contenders.Engine("raises", **HERE),
    missing=contenders.Engine("missing", **{**HERE, "needs": ("no_such_module",)}),
)
PLANTED = ("crashes", "hangs", "raises", "missing")
planted = tuple(contenders.Contender(name, name, "bf16", 16) for name in PLANTED)
peers.CONTENDERS = planted + contenders.CONTENDERS
begin = processes.Worker.__init__

def impatient(self, python, prefix, job, log, deadline, prepare=False):
    begin(self, python, prefix, job, log, deadline, prepare)
    self.deadline = 2 if job.engine == "hangs" else deadline

processes.Worker.__init__ = impatient
if __name__ == "__main__":
    only = [*PLANTED, "paligemma bf16", "paligemma int8", "transformers"]
    options = ["--rounds", "2", "--tokens", "3", "--deadline", "600", "--image", sys.argv[3]]
    sys.exit(peers.main(["--model", sys.argv[1], "--results", sys.argv[2], *options, "--only", *only]))
"""
ENGINES = {
    "crashes": "import os\n\ndef load(job):\n    return lambda request, step: os.abort()\n",
    "raises": "def load(job):\n    raise ValueError('no such weights')\n",
    "hangs": "import time\n\ndef load(job):\n    return lambda request, step: time.sleep(1000)\n",
}


def test_each_turn_of_peers_is_told(monkeypatch):
    race = object.__new__(turns.Race)
    race.contenders, race.weights, race.said = [SimpleNamespace(name=name) for name in "ab"], [], {}
    race.args, told, done = SimpleNamespace(rounds=2), [], []
    monkeypatch.setattr(race, "find", lambda contender: None)
    monkeypatch.setattr(race, "attempt", lambda contender: done.append(contender.name))
    race.run(lambda: told.append(len(done)))
    assert (done, told) == ([*"abab"], [1, 2, 3, 4])


def test_peers_keep_each_turn_of_a_run_that_ends_early(tmp_path, monkeypatch):
    class Interrupted:
        def __init__(self, *_):
            self.turns, self.said, self.versions = {"one": [], "other": []}, {}, {}
            self.workers, self.work, self.positions = processes.Workers(), limits.Work(1, 1, 1), 3

        def run(self, after_turn):
            for milliseconds, contender in ((7.0, "one"), (9.0, "other")):
                machine = {"read_gb_s": 2.0, "tflop_s": 0.5}
                self.turns[contender].append({"decode_ms": milliseconds, "machine": machine})
                after_turn()
            raise KeyboardInterrupt

    monkeypatch.setattr(turns, "Race", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        peers.measure(peers.parser().parse_args(["--model", "m", "--results", str(tmp_path)]))
    (file,) = tmp_path.iterdir()
    found = json.loads(file.read_text())
    assert not found["complete"]
    assert [found["median"][name]["decode_ms"] for name in ("one", "other")] == [7, 9]


def test_peers_take_turns_and_the_faulty_cost_nothing_else(tmp_path, tiny, image_file, monkeypatch):
    for name, code in ENGINES.items():
        (tmp_path / f"{name}.py").write_text(code)
    (tmp_path / "contest.py").write_text(CONTENDERS)
    (tmp_path / "results").mkdir()
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{tmp_path}")
    command = [
        sys.executable,
        str(tmp_path / "contest.py"),
        str(tiny),
        str(tmp_path / "results"),
        str(image_file),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = (tmp_path / "results").iterdir()
    found = json.loads(file.read_text(), parse_constant=pytest.fail)
    median, runs = found["median"], found["runs"]
    assert found["complete"]
    assert median["crashes"]["error"].startswith("died of signal 6")
    assert median["hangs"]["error"] == "killed: no answer for 2 s"
    assert median["raises"]["error"] == "ended with exit code 1: ValueError: no such weights"
    assert median["missing"]["missing"] == "not installed: pip install planted"
    for name in ("paligemma bf16", "paligemma int8", "transformers sdpa bf16"):
        assert len(runs[name]) == 2, name
        assert median[name]["load_s"] > 0  # of the first turn alone: it stays loaded
        assert [("load_s" in turn) for turn in runs[name]] == [True, False]
        for key in ("decode_ms", "rows_ms", "first_token_s", "prefill_s", "peak_gb", "of_reading"):
            assert median[name][key] > 0, (name, key)
        assert runs[name][0]["tokens"] == runs[name][1]["tokens"]
    for part in ("not installed: pip install planted", "died of signal 6", "transformers sdpa bf16"):
        assert part in done.stdout
    assert found["floors"]["decode_ms"] == pytest.approx(
        2 * decoder_weights(tiny) / found["read_gb_per_s"] / 1e6
    )
    assert found["versions"]["engines"]["transformers"]["torch"] == version("torch")
    order = [line for line in done.stderr.splitlines() if line.startswith("round")]
    assert order[-3:] == [f"round 2 of 2: {name}" for name in runs if len(runs[name]) == 2]


def decoder_weights(model: Path) -> int:
    stored = checkpoint.load(model)[1]
    return sum(math.prod(x.shape) for name, x in stored.items() if name.startswith("language_model."))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--only", "nobody"), "--only 'nobody': it is not a contender; --help lists them"),
        (("--python", "openvino"), "--python 'openvino' is not ENGINE=PATH"),
        (("--python", "openvino=missing"), "--python 'openvino=missing': missing is not a program"),
        (("--results", "missing"), "--results missing is not a directory"),
    ],
)
def test_peers_refuse_what_they_do_not_know(options, said, tiny, capsys):
    assert peers.main(["--model", str(tiny), *options]) == 1
    out, error = capsys.readouterr()
    assert out == ""
    assert said in error
    assert len(error.splitlines()) == 1


def test_idle_workers_end_to_make_room(monkeypatch, capsys):
    class Loaded:
        ended = False

        def end(self):
            self.ended = True

    first, second = Loaded(), Loaded()
    workers = processes.Workers()
    workers.loaded |= {"first": first, "second": second}  # pyright: ignore[reportAttributeAccessIssue]
    free = iter((1e9, 9e9, 9e9))
    monkeypatch.setattr(processes, "free_memory", lambda: next(free))
    workers.make_room(5e9)
    assert (first.ended, second.ended) == (True, False)
    assert workers.evicted == {"first"}
    assert list(workers.loaded) == ["second"]
    monkeypatch.setattr(processes, "free_memory", lambda: 1e9)
    with pytest.raises(processes.Failed, match=r"needs about 6\.1 GB of memory, and 1\.0 GB are free"):
        workers.make_room(5e9)
    assert second.ended


def test_scores_of_boxes_are_compared(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["box_scores", "--scenes", "6", "--results", str(tmp_path)])
    box_scores.main()
    (path,) = tmp_path.glob("box_scores-*.json")
    results = json.loads(path.read_text())
    for kind, least in (("scenes", 0.8), ("crowds", 0.05)):
        rows = results[kind]["scores"]
        assert rows["label * box"]["AP"] == rows["(label * box) ** (1/2)"]["AP"] > least  # the same order
        assert rows["none"]["right_median"] == rows["none"]["right_above_0.4"] == 1
        assert (
            rows["label * box ** (1/4)"]["right_above_0.3"]
            > 0.9
            > 0.1
            > rows["label * box"]["right_above_0.3"]
        )
    assert "crowds: " in capsys.readouterr().out
