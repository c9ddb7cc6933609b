"""What a bug report needs: versions, devices, instruction sets, backends, threads, memory, and whether this
machine computes rightly.

    python -m paligemma.doctor

The self-test holds the demo model, with each backend that this machine has, to the NumPy reference by the
rule of paligemma.compare, and a product of the published models' width in bfloat16 and int8 to float64. Exit
code 0 when all of it passes, 1 when something does not."""

import argparse
import os
import platform
from collections.abc import Callable, Iterator
from importlib import metadata, util
from typing import Any

from . import __version__, command, demo

PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "numba",
    "transformers",
    "pillow",
    "sentencepiece",
    "safetensors",
    "huggingface_hub",
    "tqdm",
)
FLAGS = (
    "avx2",
    "avx512",
    "avx_vnni",
    "amx",
    "asimd",
    "bf16",
    "i8mm",
    "sve",
)  # beginnings of the flags that decide which kernels a library takes
VARIABLES = (
    "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "NUMBA_CPU_NAME", "NUMBA_CPU_FEATURES", "NUMBA_DISABLE_JIT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY",
    "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "NUMBA_THREADING_LAYER", "CUDA_VISIBLE_DEVICES", "TRITON_INTERPRET", "PALIGEMMA_GRAPHS", "PALIGEMMA_PDL",
)  # fmt: skip
PICTURE, PROMPT = "shapes.png", "detect red circle"  # of the demo's samples
ROWS, WIDTH, OUT = (
    (1, 20),
    2048,
    1024,
)  # of the product: a token and a prompt, times a matrix of Gemma's width


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
            details = text({key: value for key, value in found.items() if key != "passed"})
            command.say(f"{'self-test':11} {name}: {'passed' if found['passed'] else 'FAILED'}, {details}\n")
    report["passed"] = all(found["passed"] for found in report["self_test"])
    if args.json:
        command.say_json(report)
    return 0 if report["passed"] else 1


def attempt(look: Callable[[], dict], **otherwise: Any) -> dict:
    """What look() finds, or why it cannot: one faulty part leaves the others."""
    try:
        return look()
    except Exception as error:  # of any library, which is what this command is there to report
        return {**otherwise, "fault": f"{type(error).__name__}: {' '.join(str(error).split())}"}


def text(value: Any) -> str:
    """A part of the report for a reader, in one line."""
    if isinstance(value, dict):
        return ", ".join(f"{spoken(name)} {text(member)}" for name, member in value.items()) or "none"
    if isinstance(value, list):
        return " ".join(map(text, value)) or "none"
    if isinstance(value, float):
        return f"{value:.3g}"
    return "none" if value is None else str(value)


def spoken(name: str) -> str:
    """A name of the report as a reader knows it: read_gb_per_s is "read GB/s"."""
    return (
        name.replace("gb_per_s", "GB/s").replace("_gb", " GB").replace("_", " ") if name.islower() else name
    )


# What is there


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
    return {
        "name": cpu_name(),
        "cores": os.cpu_count(),
        "flags": flags,
        "torch_uses": torch.backends.cpu.get_cpu_capability(),
    }


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
        memory = {"memory_gb": properties.total_memory / 1e9, "free_gb": torch.cuda.mem_get_info(n)[0] / 1e9}
        devices.append(
            {"name": properties.name, "capability": f"{properties.major}.{properties.minor}", **memory}
        )
    return {"devices": devices, "built_for_cuda": torch.version.cuda}


def backends() -> dict:
    """What the backend "auto" is on each device, and why."""
    import torch

    from . import backend, cpu_linear

    fault = cpu_linear.numba_fault()
    chosen = backend.choose_backend("auto", torch.device("cpu"), torch.float32)
    if chosen == "numba" and not fault:
        why = "numba works; models that are too small for it take torch"
    else:
        chosen, why = (
            "torch",
            f"numba does not work: {fault}"
            if util.find_spec("numba") and fault
            else "numba is not installed (the extra cpu)",
        )
    found = {"cpu": chosen, "because": why}
    if torch.cuda.is_available():
        found["cuda"] = backend.choose_backend("auto", torch.device("cuda"), torch.float32)
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
    "versions": versions,
    "cpu": cpu,
    "gpu": gpu,
    "backend": backends,
    "threads": threads,
    "memory": memory,
    "environment": environment,
}


# Whether it computes rightly


def self_tests() -> Iterator[tuple[str, Callable[[], dict]]]:
    """The names of the tests for this machine, and the tests."""
    engines = [("torch", "cpu")]
    try:
        import torch

        from . import cpu_linear

        engines += [] if cpu_linear.numba_fault() else [("numba", "cpu")]
        if torch.cuda.is_available():
            engines += [("torch", "cuda")] + [("triton", "cuda")] * (
                torch.cuda.get_device_capability() >= (8, 0)
            )
    except Exception:  # the first test says what it is
        pass
    truth: dict[str, Any] = {}
    for backend, device in engines:
        yield (
            f"demo, {backend} on {device}",
            lambda backend=backend, device=device: demo_test(backend, device, truth),
        )
    for backend, device in engines:
        if device == "cpu":
            yield f"products, {backend} on {device}", lambda backend=backend: products_test(backend)


def demo_test(backend: str, device: str, truth: dict[str, Any]) -> dict:
    """The demo's float32 logits and greedy answer beside the reference's, which are kept in `truth`."""
    import torch

    from . import load_hf_model, reference
    from .compare import compare
    from .processor import Processor

    if not truth:
        processor = Processor.load(demo.CHECKPOINT)
        inputs = processor.arrays(PROMPT, demo.SAMPLES / PICTURE)
        exact, single = reference.load(demo.CHECKPOINT), reference.load(demo.CHECKPOINT, dtype="float32")
        answer = processor.tokenizer.decode(list(exact.stream(**inputs, max_new_tokens=20)))
        truth |= {
            "logits": exact.forward(**inputs),
            "yardstick": single.forward(**inputs),
            "answer": answer,
            "inputs": inputs,
        }
    model, processor = load_hf_model(demo.CHECKPOINT, device=device, dtype="float32", backend=backend)
    inputs: dict[str, Any] = {name: torch.from_numpy(array) for name, array in truth["inputs"].items()}
    with torch.no_grad():
        logits = model(**inputs).cpu().numpy()
    line = compare("logits", logits, truth["logits"], truth["yardstick"], "float32")
    answer = processor.tokenizer.decode(model.generate(**inputs, max_new_tokens=20)[0])
    found = {
        "passed": not line.exceeds and answer == truth["answer"],
        "error": line.rms,
        "allowed": line.rms_allowed,
    }
    found |= {"maximum": line.max, "maximum_allowed": line.max_allowed, "answer": answer}
    return found if answer == truth["answer"] else {**found, "of_the_reference": truth["answer"]}


def products_test(backend: str) -> dict:
    """Products of bfloat16 rows with bfloat16 and int8 weights beside float64: as the operations choose them
    for this CPU."""
    import numpy as np
    import torch

    from . import ops
    from .checkpoint.quantize import quantized_rows
    from .compare import Line, compare
    from .reference.params import to_dtype

    weight = torch.from_numpy(np.random.default_rng(0).standard_normal((OUT, WIDTH))).to(torch.bfloat16)
    values, scale = quantized_rows(weight, torch.int8, torch.bfloat16)
    worst: Line | None = None
    for rows in ROWS:
        x = torch.from_numpy(np.random.default_rng(rows).standard_normal((1, rows, WIDTH))).to(torch.bfloat16)
        with ops.use(backend), torch.no_grad():
            made = {"bfloat16": ops.linear(x, weight), "int8": ops.quantized_linear(x, values, scale)}
        for name, exact in (
            ("bfloat16", weight.double()),
            ("int8", values.double() * scale.double()[:, None]),
        ):
            truth = (x.double() @ exact.T).numpy()
            line = compare(
                f"{name}, {rows} rows",
                made[name].float().numpy(),
                truth,
                to_dtype(truth, "bfloat16"),
                "bfloat16",
            )
            if worst is None or line.exceeds or (not worst.exceeds and line.rms > worst.rms):
                worst = line
    assert worst is not None
    return {
        "passed": not worst.exceeds,
        "worst": worst.name,
        "error": worst.rms,
        "allowed": worst.rms_allowed,
    }


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = command.Parser(
        prog="python -m paligemma.doctor",
        description="Print what a bug report needs, and test whether this machine computes rightly.",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


if __name__ == "__main__":
    command.process(main)
