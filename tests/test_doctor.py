"""The doctor's report: complete whatever is broken, and failed if something computes incorrectly."""

import json

import pytest
import torch

from paligemma import cpu_linear, doctor, loading, machine, ops

SECTIONS = {"versions", "cpu", "gpu", "backend", "threads", "memory", "environment", "self_test", "passed"}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    torch.set_num_threads(1)  # Numba's kernel in an earlier test sets another number
    monkeypatch.setattr(machine, "read_bandwidth", lambda device: 12.0)  # test_machine.py tests the real one


def report(capsys, *args: str) -> tuple[int, dict]:
    code = doctor.main(["--json", *args])
    return code, json.loads(capsys.readouterr().out)


def test_a_machine_that_works(capsys, monkeypatch):
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    threads = torch.get_num_threads()
    code, found = report(capsys)
    assert (code, set(found), found["passed"]) == (0, SECTIONS, True)
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["cpu"]["torch_uses"] == torch.backends.cpu.get_cpu_capability()
    assert found["threads"]["torch"] == threads
    assert found["environment"]["ATEN_CPU_CAPABILITY"] == "avx2"
    assert found["memory"]["read_gb_per_s"] == 12.0
    engines = ["torch on cpu"] + ["numba on cpu"] * (cpu_linear.numba_fault() is None)
    assert [test["name"] for test in found["self_test"]] == [
        f"{what}, {engine}" for what in ("demo", "products") for engine in engines
    ]
    for test in found["self_test"]:
        assert 0 < test["error"] <= test["allowed"]
    answers = {test["answer"] for test in found["self_test"] if "answer" in test}
    assert answers == {"<loc0128><loc0252><loc0342><loc0463> red circle"}  # the reference's


def test_the_same_for_a_reader(capsys):
    assert doctor.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    first_words = [line.split()[0] for line in lines[:7]]
    assert first_words == ["versions", "cpu", "gpu", "backend", "threads", "memory", "environment"]
    for line in lines[7:]:
        assert line.startswith("self-test ")
        assert ": passed, " in line
    assert any("read GB/s 12" in line for line in lines)


def without_one(x, weight, eps):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def last_column_lost(x, weight, scale, original=ops.quantized_linear):
    lost = slice(None) if weight.dtype == torch.int32 else slice(-1)
    return original(x[..., lost].contiguous(), weight[:, lost].contiguous(), scale)


def a_word_lost(x, weight, scale, original=ops.quantized_linear):
    lost = torch.arange(weight.shape[1]) == 8
    return original(x, weight.masked_fill(lost, 0) if weight.dtype == torch.int32 else weight, scale)


@pytest.mark.parametrize(
    ("operation", "wrong", "test"),
    [
        ("rms_norm", without_one, "demo, torch on cpu"),
        ("quantized_linear", last_column_lost, "products, torch on cpu"),
        ("quantized_linear", a_word_lost, "products, torch on cpu"),
    ],
)
def test_a_mistake_is_found(capsys, monkeypatch, operation, wrong, test):
    monkeypatch.setattr(ops, operation, wrong)
    code, found = report(capsys)
    assert (code, found["passed"]) == (1, False)
    assert test in [line["name"] for line in found["self_test"] if not line["passed"]]


def broken(*_, **__):
    raise ImportError("of two\nlines")


@pytest.mark.parametrize(
    ("where", "name", "part"),
    [
        (cpu_linear, "numba_fault", "backend"),
        (machine, "cpu_flags", "cpu"),
        (machine, "free_memory", "memory"),
        (torch.cuda, "is_available", "gpu"),
    ],
)
def test_a_faulty_part_is_a_line_of_the_report(capsys, monkeypatch, where, name, part):
    monkeypatch.setattr(where, name, broken)
    monkeypatch.setattr(doctor, "demo_test", lambda *_: {"passed": True})
    monkeypatch.setattr(doctor, "products_test", lambda *_: {"passed": True})
    code, found = report(capsys)
    assert (code, set(found)) == (0, SECTIONS)
    assert found[part] == {"fault": "ImportError: of two lines"}
    assert found["self_test"][0]["name"] == "demo, torch on cpu"
    assert not any("fault" in found[name] for name in ("versions", "threads", "environment"))


def test_numba_that_does_not_work(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "demo_test", lambda *_: {"passed": True})
    monkeypatch.setattr(cpu_linear, "numba_fault", lambda: "ImportError: Numba needs another NumPy")
    code, found = report(capsys)
    assert (code, found["backend"]["cpu"]) == (0, "torch")
    assert not any("numba" in test["name"] for test in found["self_test"])


def test_a_model_that_cannot_be_loaded(capsys, monkeypatch):
    monkeypatch.setattr(loading, "load_hf_model", broken)
    code, found = report(capsys)
    assert code == 1
    assert found["self_test"][0]["fault"] == "ImportError: of two lines"
