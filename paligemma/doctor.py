"""Prints what a bug report needs: versions, devices, instruction sets, backends, threads, memory, and whether
this machine computes correctly.

    python -m paligemma.doctor

The self-test runs the demo model with each backend of this machine and compares it with the NumPy reference,
by the rule of paligemma.compare. It also compares matrix products in bfloat16, int8 and int4, of the
published models' width, with float64. The exit code is 0 if all tests pass, 1 if one fails."""

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from importlib import metadata, util
from typing import Any

from . import __version__, command, demo

PACKAGES = (
    "torch", "triton", "numpy", "numba", "transformers", "pillow", "sentencepiece", "safetensors",
    "huggingface_hub", "tqdm",
)  # fmt: skip
# How the CPU flags begin that decide which kernels a library chooses.
FLAGS = ("avx2", "avx512", "avx_vnni", "amx", "asimd", "bf16", "i8mm", "sve")
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT",
    "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS",
    "NUMBA_THREADING_LAYER", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "PALIGEMMA_GRAPHS", "PALIGEMMA_PDL",
)  # fmt: skip
PICTURE, PROMPT = "shapes.png", "detect red circle"  # one of the demo's samples
ROWS = (1, 20)  # rows of the tested products: one token, and a prompt
WIDTH, OUT = 2048, 1024  # columns and rows of their matrix; 2048 is the width of the published Gemma


def main(argv: list[str] | None = None) -> int:
    return command.exit_code(lambda: run(parse_args(argv)))


def run(args: argparse.Namespace) -> int:
    report: dict[str, Any] = {}
    for name, look in SECTIONS.items():
        report[name] = attempt(look)
        if not args.json:
            command.say(f"{name:11} {text(report[name])}\n")
    report["self_test"] = []
    for name, test in self_tests():
        found = attempt(test, passed=False)
        report["self_test"].append({"name": name, **found})
        if not args.json:
            result = "passed" if found["passed"] else "FAILED"
            details = text({key: value for key, value in found.items() if key != "passed"})
            command.say(f"{'self-test':11} {name}: {result}, {details}\n")
    report["passed"] = all(found["passed"] for found in report["self_test"])
    if args.json:
        command.say_json(report)
    return 0 if report["passed"] else 1


def attempt(look: Callable[[], dict], **otherwise: Any) -> dict:
    """The result of look(), or `otherwise` with the error, so that a fault leaves the rest of the report."""
    try:
        return look()
    except Exception as error:  # any error of any library: this command reports it
        return {**otherwise, "fault": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def text(value: Any) -> str:
    """A part of the report as one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{spoken(name)} {text(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value is None else str(value)


def spoken(name: str) -> str:
    """A key of the report in words: read_gb_per_s is "read GB/s". Names of variables are kept."""
    words = name.replace("gb_per_s", "GB/s").replace("_gb", " GB").replace("_", " ")
    return words if name.islower() else name


# The sections of the report


def versions() -> dict:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    found = {"paligemma": __version__, "python": platform.python_version(), "system": platform.platform()}
    return found | {name: version(name) for name in PACKAGES}


def cpu() -> dict:
    import torch

    from .machine import cpu_flags, cpu_name

    flags = [flag for flag in cpu_flags() if flag.startswith(FLAGS)]
    capability = torch.backends.cpu.get_cpu_capability()
    return {"name": cpu_name(), "cores": os.cpu_count(), "flags": flags, "torch_uses": capability}


def gpu() -> dict:
    import torch

    if not torch.cuda.is_available():
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:  # AssertionError: this torch was built without CUDA
            return {"devices": [], "built_for_cuda": torch.version.cuda, "why": str(error).splitlines()[0]}
    devices = []
    for n in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(n)
        capability = f"{properties.major}.{properties.minor}"
        memory = {"memory_gb": properties.total_memory / 1e9, "free_gb": torch.cuda.mem_get_info(n)[0] / 1e9}
        devices.append({"name": properties.name, "capability": capability, **memory})
    return {"devices": devices, "built_for_cuda": torch.version.cuda}


def backends() -> dict:
    """The backend that "auto" chooses on each device, and why."""
    import torch

    from . import backend, cpu_linear

    fault = cpu_linear.numba_fault()
    chosen = backend.choose_backend("auto", torch.device("cpu"))
    if chosen == "numba" and not fault:
        why = "numba works; models that are too small for it use torch"
    elif util.find_spec("numba") and fault:
        chosen, why = "torch", f"numba does not work: {fault}"
    else:
        chosen, why = "torch", "numba is not installed" if fault else "numba is the default under Linux only"
    found = {"cpu": chosen, "because": why}
    if torch.cuda.is_available():
        found["cuda"] = backend.choose_backend("auto", torch.device("cuda"))
    return found


def threads() -> dict:
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []
    return {"torch": torch.get_num_threads(), "usable_cores": usable, "load_average": load}


def memory() -> dict:
    from .machine import free_memory, read_bandwidth

    return {"free_gb": free_memory() / 1e9, "read_gb_per_s": read_bandwidth("cpu")}


def environment() -> dict:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


SECTIONS = {
    "versions": versions, "cpu": cpu, "gpu": gpu, "backend": backends, "threads": threads, "memory": memory,
    "environment": environment,
}  # fmt: skip


# The self-test


def self_tests() -> Iterator[tuple[str, Callable[[], dict]]]:
    """The tests for this machine, each with its name."""
    engines = [("torch", "cpu")]
    with suppress(Exception):  # the first test raises it again, and the report shows it
        import torch

        from . import cpu_linear

        engines += [] if cpu_linear.numba_fault() else [("numba", "cpu")]
        if torch.cuda.is_available():
            engines.append(("torch", "cuda"))
            if torch.cuda.get_device_capability() >= (8, 0):
                engines.append(("triton", "cuda"))
    truth: dict[str, Any] = {}
    for backend, device in engines:
        yield f"demo, {backend} on {device}", partial(demo_test, backend, device, truth)
    for backend, device in engines:
        if device == "cpu":
            yield f"products, {backend} on {device}", partial(products_test, backend)


def demo_test(backend: str, device: str, truth: dict[str, Any]) -> dict:
    """Compare the demo's float32 logits and greedy answer with the reference's, which `truth` caches."""
    import torch

    from . import load_hf_model, reference
    from .compare import compare
    from .processor import Processor

    if not truth:
        processor = Processor.load(demo.CHECKPOINT)
        inputs = processor.arrays(PROMPT, demo.SAMPLES / PICTURE)
        exact, single = reference.load(demo.CHECKPOINT), reference.load(demo.CHECKPOINT, dtype="float32")
        answer = processor.tokenizer.decode(list(exact.stream(**inputs, max_new_tokens=20)))
        truth |= {"logits": exact.forward(**inputs), "yardstick": single.forward(**inputs)}
        truth |= {"answer": answer, "inputs": inputs}
    model, processor = load_hf_model(demo.CHECKPOINT, device=device, dtype="float32", backend=backend)
    inputs: dict[str, Any] = {name: torch.from_numpy(array) for name, array in truth["inputs"].items()}
    with torch.no_grad():
        logits = model(**inputs).cpu().numpy()
    line = compare("logits", logits, truth["logits"], truth["yardstick"], "float32")
    answer = processor.tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    same = answer == truth["answer"]
    found = {"passed": not line.exceeds and same, "error": line.rms, "allowed": line.rms_allowed}
    found |= {"maximum": line.max, "maximum_allowed": line.max_allowed, "answer": answer}
    return found if same else {**found, "of_the_reference": truth["answer"]}


def products_test(backend: str) -> dict:
    """Compare products of bfloat16 rows with bfloat16, int8 and int4 weights, computed by the kernels
    that `ops` chooses on this CPU, with float64. Returns the worst of them."""
    import numpy as np
    import torch

    from . import int4, ops
    from .checkpoint.quantize import quantized_rows
    from .compare import compare
    from .reference.params import to_dtype

    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((OUT, WIDTH))).to(torch.bfloat16)
    eight, four = quantized_rows(weight, torch.int8, torch.bfloat16), int4.quantized_groups(weight)
    exact = {"bfloat16": weight.double(), "int8": eight[0].double() * eight[1].double()[:, None]}
    exact["int4"] = int4.dequantized(*four).double()
    lines = []
    for rows in ROWS:
        x = torch.from_numpy(np.random.default_rng(rows).standard_normal((1, rows, WIDTH))).to(torch.bfloat16)
        with ops.use(backend), torch.no_grad():
            products = {"bfloat16": ops.linear(x, weight), "int8": ops.quantized_linear(x, *eight)}
            products["int4"] = ops.quantized_linear(x, *four)
        for name, product in products.items():
            truth = (x.double() @ exact[name].T).numpy()
            nearest = to_dtype(truth, "bfloat16")
            lines.append(compare(f"{name}, {rows} rows", product.float().numpy(), truth, nearest, "bfloat16"))
    worst = max(lines, key=lambda line: (line.exceeds, line.rms))
    found = {"passed": not worst.exceeds, "worst": worst.name}
    return {**found, "error": worst.rms, "allowed": worst.rms_allowed}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    about = "Print what a bug report needs, and test whether this machine computes correctly."
    parser = command.Parser(prog="python -m paligemma.doctor", description=about)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.process(main)
