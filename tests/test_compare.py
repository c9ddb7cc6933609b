"""The comparison tool finds the first result that differs, and accepts what only rounds differently."""

import numpy as np
import pytest
import torch

from paligemma import compare, gemma, load_hf_model, torch_ops
from paligemma.compare import main


@pytest.fixture
def command(tiny, image_file):
    return ["--model", str(tiny), "--image", str(image_file), "--prompt", "detect cat"]


def first_difference(out: str) -> str:
    return next(line.split()[0] for line in out.splitlines() if "<-- the first" in line)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_model_keeps_the_rule(command, dtype, capsys):
    assert main([*command, "--dtype", dtype]) == 0
    out, err = capsys.readouterr()
    assert "71 results compared, 0 exceed the rule" in out
    assert "float64" in err, "progress belongs on stderr"


def without_one(x, weight, eps):
    h = x.float()
    return (h * torch.rsqrt(h.square().mean(dim=-1, keepdim=True) + eps) * weight.float()).to(x.dtype)


def erf_gelu(x):
    return torch.nn.functional.gelu(x.float()).to(x.dtype)


def shifted(length, head_dim, theta, device, original=torch_ops.rope_table):
    return original(length + 1, head_dim, theta * 1.001, device)[:, 1:]


def causal(positions, prefix, *rest, original=gemma.visible):
    return original(positions, torch.zeros_like(prefix), *rest)


@pytest.mark.parametrize(
    ("operation", "wrong", "dtype", "first"),
    [
        ("rms_norm", without_one, "bfloat16", "language_model.model.layers.0.input_layernorm"),
        ("gelu_tanh", erf_gelu, "float32", "vision_tower.vision_model.encoder.layers.0.mlp.fc2.input"),
        ("rope_table", shifted, "float32", "language_model.model.layers.0.self_attn.o_proj.input"),
        ("visible", causal, "bfloat16", "language_model.model.layers.0.self_attn.o_proj.input"),
    ],
    ids=["norm without its 1", "erf GELU", "rotary base", "causal prompt"],
)
def test_a_mistake_is_named_where_it_is_made(command, capsys, monkeypatch, operation, wrong, dtype, first):
    monkeypatch.setattr(gemma if operation == "visible" else torch_ops, operation, wrong)
    assert main([*command, "--dtype", dtype]) == 1
    assert first_difference(capsys.readouterr().out) == first


def test_a_dump_can_be_judged_in_the_models_place(command, capsys, tmp_path):
    dump = tmp_path / "dump.npz"
    assert main([*command, "--dump", str(dump)]) == 0
    capsys.readouterr()
    with np.load(dump, allow_pickle=False) as archive:
        arrays = {name: archive[name] for name in archive.files}
    name = "language_model.model.layers.1.mlp.gate_proj"
    arrays = {key: arrays[key] for key in ("logits", name, "multi_modal_projector.linear")}
    arrays["something.else"] = np.zeros(3)
    single = {key: x.view(np.uint32) for key, x in arrays.items() if x.dtype == np.float32}
    half = {key: (x >> 16).astype(np.uint16).view("V2") for key, x in single.items()}
    np.savez(dump, **half)  # as JAX stores bfloat16
    assert main([*command, "--against", str(dump)]) == 0
    assert "3 results compared" in capsys.readouterr().out
    arrays[name][0, 3, 5] += 1
    np.savez(dump, **arrays)
    assert main([*command, "--against", str(dump)]) == 1
    assert first_difference(capsys.readouterr().out) == name


NPY_HEADER = b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (1,), }"


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"other": np.zeros(3)}, "no name in common"),
        ({"logits": np.zeros((1, 2, 3))}, "logits has shape (1, 2, 3)"),
        ({"logits": np.array([object()])}, "cannot be read"),
        (None, "cannot be read"),
        (b"", "cannot be read"),
        (b"PK\x03\x04 and no more", "cannot be read"),
        (NPY_HEADER.ljust(128) + bytes(8), "cannot be read"),
    ],
)
def test_a_dump_that_cannot_be_judged_is_one_line(command, capsys, tmp_path, arrays, message):
    dump = tmp_path / "dump.npz"
    if isinstance(arrays, bytes):
        dump.write_bytes(arrays)
    elif arrays is not None:
        np.savez(dump, **arrays)
    assert main([*command, "--against", str(dump)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error


def test_a_dump_that_cannot_be_written_is_said_before_the_work(command, capsys, tmp_path):
    assert main([*command, "--dump", str(tmp_path / "nowhere" / "x.npz")]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_nan_exceeds():
    truth = np.ones((2, 2))
    assert compare.compare("x", np.array([[1, np.nan], [1, 1]]), truth, truth, "float32").exceeds


def test_recording_ends_with_its_block(tiny):
    model, _ = load_hf_model(tiny, dtype="float32")
    record = {}
    with compare.recording(model, record):
        model(torch.tensor([[2, 30, 4]]))
    assert record["logits"].shape == (1, 3, 1664)
    record.clear()
    model(torch.tensor([[2, 30, 4]]))
    assert not record


def test_wrong_usage_and_a_closed_stdin_are_one_line(command, capsys, monkeypatch):
    with pytest.raises(SystemExit, match="2"):
        main([*command, "--dtype", "int8"])
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "'int8'" in err
    monkeypatch.setattr("sys.stdin", None)
    assert main([*command, "--image", "-"]) == 1
    assert capsys.readouterr() == ("", "error: --image - reads the image from stdin, which is closed\n")


def test_a_dump_is_whole_or_not_there(command, tmp_path, monkeypatch, capsys):
    def fails(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", fails)
    assert main([*command, "--dump", str(tmp_path / "x.npz")]) == 1
    assert "No space left" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())
