"""What each stage of the measurement does, as tasks that stand alone: a name, and a function that returns what it found.

A task may say {"failed": why}; one that raises has failed as well. `dry` runs on a CPU, in Triton's interpreter, with tiny shapes.
"""

import math
import os
import platform
import statistics
import time
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks import cases, random_checkpoint, timing
from benchmarks.cases import Case
from benchmarks.timing import distance, tensors
from benchmarks.whole_model import device_name
from paligemma.checkpoint import EMBEDDING, HEAD, canonical_name, expected_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.layers import pack
from paligemma.model import PaliGemma, Rows

Task = tuple[str, Callable[[], dict[str, Any]]]
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def tasks(stage: str, dry: bool) -> list[Task]:
    return list(STAGES[stage](dry))


def device_of(dry: bool) -> str:
    return "cpu" if dry else "cuda"


def chosen(dry: bool) -> tuple[list[Case], list[Case]]:
    """Odd and production cases that this GPU has instructions for; for the dry run the first odd one of each kernel, and none."""
    odd = cases.odd()
    if dry:
        return list({case.kernel: case for case in reversed(odd)}.values())[::-1], []
    major, minor = torch.cuda.get_device_capability()
    odd, production = ([case for case in part if case.chip <= 10 * major + minor] for part in (odd, cases.production()))
    return odd, production


def attempt(own: bool, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What work() returns. Where somebody else's program does not take a shape that is an {"error": why}, and no failure."""
    try:
        return work()
    except Exception as error:
        if own or timing.is_fatal(error):
            raise
        return {"error": timing.one_line(error)}


# Environment


def environment(dry: bool) -> Iterator[Task]:
    yield "environment", partial(describe_environment, dry)


def describe_environment(dry: bool) -> dict[str, Any]:
    found: dict[str, Any] = {"device": device_name(device_of(dry)), "versions": versions(), "cores": os.cpu_count()}
    if not dry:
        p = torch.cuda.get_device_properties(0)
        found |= {
            "capability": f"{p.major}.{p.minor}",
            "multiprocessors": p.multi_processor_count,
            "memory_gb": p.total_memory / 1e9,
            "l2_mb": p.L2_cache_size / 1e6,
        }
    return found


def versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "cuda": str(torch.version.cuda)}
    for name in ("torch", "triton", "transformers", "numpy", "liger-kernel"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


# Ceilings


def ceilings(dry: bool) -> Iterator[Task]:
    yield "ceilings", lambda: dict(timing.ceilings(device_of(dry)))


# Compilation: every kernel once, many processes at a time, so that later stages find it on the disk


def compilation(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    smallest = {(case.kernel, case.variant): case for case in sorted(production, key=lambda case: -case.bytes(1))}
    for dtype in dtypes(dry)[: 1 if dry else None]:
        for case in [*smallest.values(), *odd]:
            yield f"{case.name}, {dtype}", partial(run_once, case, dtype, dry)
    for case in production:
        for name in ("torch.compile", "flex_attention"):
            if name in timed(case, dry):
                yield f"{case.name}, {name}", partial(run_once, case, "bfloat16", dry, name)


def run_once(case: Case, dtype: str, dry: bool, contender: str = "triton") -> dict[str, Any]:
    inputs = case.make(device_of(dry), DTYPES[dtype])
    start = time.perf_counter()

    def work() -> dict[str, Any]:
        timed(case, dry)[contender]()(*inputs)
        synchronize(dry)
        return {"seconds": time.perf_counter() - start}

    return attempt(contender == "triton", work)


def dtypes(dry: bool) -> list[str]:
    return ["bfloat16", "float32"] if dry else list(DTYPES)


def synchronize(dry: bool) -> None:
    if not dry:
        torch.cuda.synchronize()


# Correctness


def correctness(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    for dtype in dtypes(dry):
        for case in [*odd, *production]:
            if dry or case.bytes(8) < torch.cuda.get_device_properties(0).total_memory / 16:
                yield f"{case.name}, {dtype}", partial(check, case, dtype, dry)


GUARD = 4096  # elements of NaN on either side of a buffer
RMS_FACTOR, MAX_FACTOR = 2, 4  # as in paligemma.compare


class Guarded(TorchFunctionMode):
    """While this is open, memory that torch.empty, empty_like or new_empty give out is full of NaN and lies between guards."""

    def __init__(self):
        super().__init__()
        self.buffers: list[Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        return self.place(out) if func in (torch.empty, torch.empty_like, torch.Tensor.new_empty) else out

    def place(self, like: Tensor) -> Tensor:
        """Memory of the shape and strides of `like`, within a new buffer."""
        extent = 1 + sum((n - 1) * stride for n, stride in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
        self.buffers.append(torch.full((extent + 2 * GUARD,), poison(like.dtype), dtype=like.dtype, device=like.device))
        return self.buffers[-1].as_strided(like.shape, like.stride(), GUARD)

    def copy(self, x: Tensor) -> Tensor:
        return self.place(x).copy_(x)

    def intact(self) -> bool:
        """Whether nothing was written beside what was given out."""
        return all(bool(is_poison(end).all()) for buffer in self.buffers for end in (buffer[:GUARD], buffer[-GUARD:]))


def poison(dtype: torch.dtype) -> float | int:
    return math.nan if dtype.is_floating_point else torch.iinfo(dtype).max


def is_poison(x: Tensor) -> Tensor:
    return x.isnan() if x.dtype.is_floating_point else x == torch.iinfo(x.dtype).max


def check(case: Case, dtype: str, dry: bool) -> dict[str, Any]:
    """The launcher's results beside the exact ones, with guards around inputs and outputs; then many replays, bit for bit."""
    torch.manual_seed(zlib.crc32(case.name.encode()))
    device, memory = device_of(dry), Guarded()
    inputs = case.make(device, DTYPES[dtype])
    truth = tensors(case.exact(*(x.clone() for x in inputs)))
    plain = tensors(case.plain(*(x.clone() for x in inputs)))
    given = [memory.copy(x) for x in inputs]
    case.hide(*given)
    before = [x.clone() for x in given]
    with memory:
        results = tensors(case.run(*given))
    synchronize(dry)
    faults = [] if memory.intact() else ["it wrote beside a buffer"]
    changed = [i for i, (x, y) in enumerate(zip(given, before, strict=True)) if not any(x is result for result in results) and differing(x, y)]
    faults += [f"it changed its input {i}" for i in changed]
    found: dict[str, Any] = {"outputs": []}
    for i, (value, exact, yardstick) in enumerate(zip(results, truth, plain, strict=True)):
        if value.shape != exact.shape or value.dtype not in (DTYPES[dtype], torch.float32):
            faults.append(f"output {i} is {tuple(value.shape)} {value.dtype}, not {tuple(exact.shape)} {dtype}")
            continue
        nearest = exact.to(DTYPES[dtype])  # also of logits, which are float32
        floor = 2.0**-23 if dtype == "float32" else 0.0  # a GPU's own exp2 and reciprocal are good to a unit in the last place
        rms, rms_allowed = distance(value, exact), RMS_FACTOR * max(distance(yardstick, exact), distance(nearest, exact), floor)
        most, most_allowed = largest(value, exact), MAX_FACTOR * max(largest(yardstick, exact), largest(nearest, exact))
        found["outputs"].append({"rms": rms, "rms_allowed": rms_allowed, "max": most, "max_allowed": most_allowed})
        if not (rms <= rms_allowed and most <= most_allowed):  # NaN is not
            faults.append(f"output {i}: relative RMS error {rms:.1e} (allowed {rms_allowed:.1e}), largest {most:.1e} (allowed {most_allowed:.1e})")
    if dtype == dtypes(dry)[0]:
        again = replays(case, inputs, dry)
        found |= again
        faults += ["replays differ from one another"] if again["values_that_differed"] else []
    return found | ({"failed": "; ".join(faults)} if faults else {})


def largest(x: Tensor, y: Tensor) -> float:
    return float((x.double() - y).abs().max())


def differing(x: Tensor, y: Tensor) -> int:
    """Values whose bits are not the same."""
    return int((bits(x) != bits(y)).sum())


def bits(x: Tensor) -> Tensor:
    return x.contiguous().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.dtype.itemsize])


def replays(case: Case, inputs: tuple[Tensor, ...], dry: bool, most: int = 1000, seconds: float = 0.5) -> dict[str, Any]:
    """A CUDA graph of the launch, its outputs poisoned before it, replayed 1000 times, or fewer where that takes too long."""
    first = [x.clone() for x in tensors(case.run(*inputs))]
    differed = torch.zeros((), dtype=torch.int64, device=inputs[0].device)

    def work() -> Guarded:
        with Guarded() as memory:
            results = tensors(case.run(*inputs))
        for x, y in zip(results, first, strict=True):
            differed.add_((bits(x) != bits(y)).sum())
        return memory

    if dry:
        work()
        return {"replays": 1, "values_that_differed": int(differed)}
    graph, _memory = timing.captured(work, work)
    differed.zero_()
    done, start = 0, time.perf_counter()
    while done < most and time.perf_counter() - start < seconds:
        for _ in range(50):
            graph.replay()
        done += 50
        torch.cuda.synchronize()
    return {"replays": done, "values_that_differed": int(differed)}


# Kernels


def kernels(dry: bool) -> Iterator[Task]:
    odd, production = chosen(dry)
    for case in production or odd:
        yield case.name, partial(time_kernel, case, dry)


def time_kernel(case: Case, dry: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    row = timing.time_case(case, timed(case, dry), torch.bfloat16, device_of(dry))
    error = row["contenders"]["triton"].get("error")
    return row | ({"failed": error} if error else {})


def timed(case: Case, dry: bool) -> dict[str, Callable[[], Callable]]:
    """Contender -> what makes it. On a CPU, only what needs no compiler and no GPU."""
    peers = {name: make for name, make in case.peers.items() if not dry or name in ("SDPA flash", "SDPA cudnn")}
    return {"triton": lambda: case.run, "torch": lambda: case.plain, **peers}


# The whole model

GRID = [(224, 1), (896, 1), (448, 1), (224, 16), (224, 4), (896, 16), (448, 16), (448, 4), (896, 4)]  # pixels, batch: the most telling first
DRY_GRID = [(14, 1), (28, 2)]
CONTENDERS = ("triton", "transformers sdpa", "torch", "transformers eager")
OWN = ("triton", "torch")  # this engine's backends
PROMPT_TOKENS = 16
NEW_TOKENS = 17


def model(dry: bool) -> Iterator[Task]:
    grid = DRY_GRID if dry else GRID
    for size in dict.fromkeys(size for size, _ in grid):
        yield f"{size} px, logits", partial(compare_logits, size, dry)
    for size, batch in grid:
        for contender in CONTENDERS if batch == 1 or dry else CONTENDERS[:-1]:  # eager is the slowest, and takes the time of the others
            yield f"{size} px, batch {batch}, {contender}", partial(attempt, contender in OWN, partial(time_model, size, batch, contender, dry))


def config_for(size: int, dry: bool) -> dict:
    config = random_checkpoint.config_for(size, "bfloat16")
    if dry:
        config |= {"image_token_index": 290, "vocab_size": 300, "hidden_size": 64, "projection_dim": 64}
        small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1}
        config["text_config"] |= {**small, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}
        config["vision_config"] |= {**small, "projection_dim": 64}
    return config


@lru_cache
def weights(dry: bool) -> dict[str, Tensor]:
    """Random ones, made on the device, for the largest image; smaller ones use a part of its position embedding."""
    config = PaliGemmaConfig.from_dict(config_for(max(size for size, _ in (DRY_GRID if dry else GRID)), dry))
    device, found = device_of(dry), {}
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        for name, shape in expected_shapes(config).items():
            found[name] = random_checkpoint.random_weight(name, shape, generator).to(torch.bfloat16)
    return found


def weights_for(size: int, dry: bool) -> dict[str, Tensor]:
    patches = PaliGemmaConfig.from_dict(config_for(size, dry)).vision_config.num_patches
    return {name: x[:patches] if "position_embedding" in name else x for name, x in weights(dry).items()}


@lru_cache
def ours(size: int, backend: str, dry: bool) -> PaliGemma:
    return build(size, backend, dry, torch.bfloat16)


def build(size: int, backend: str, dry: bool, dtype: torch.dtype) -> PaliGemma:
    with torch.device("meta"):
        network = PaliGemma(PaliGemmaConfig.from_dict(config_for(size, dry)), backend)
    network.load_state_dict({name: x.to(dtype) for name, x in weights_for(size, dry).items()}, strict=True, assign=True)
    for group in network.packed():
        pack(group)
    return network.eval()


@lru_cache
def theirs(size: int, attention: str, dry: bool) -> Any:
    """transformers' model, on the same memory."""
    from transformers import PaliGemmaConfig as TheirConfig
    from transformers import PaliGemmaForConditionalGeneration

    config: Any = TheirConfig.from_dict(config_for(size, dry))
    with torch.device(device_of(dry)):
        network: Any = PaliGemmaForConditionalGeneration._from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    state = weights_for(size, dry)
    state[HEAD] = state[EMBEDDING]
    for name, parameter in network.named_parameters():
        value = state[canonical_name(name)]
        assert value.shape == parameter.shape, f"{name}: {tuple(parameter.shape)} there, {tuple(value.shape)} here"
        parameter.data = value
    network.generation_config.eos_token_id = None
    return network.eval()


def inputs_for(size: int, batch: int, dry: bool) -> dict[str, Tensor]:
    config = PaliGemmaConfig.from_dict(config_for(size, dry))
    image, P = config.image_token_index, config.vision_config.num_patches
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(batch, 3, size, size, generator=generator) * 2 - 1
    text = torch.randint(3, image, (batch, PROMPT_TOKENS), generator=generator)
    ids = torch.cat([torch.full((batch, P), image), text], dim=1)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    return {name: x.to(device_of(dry)) for name, x in inputs.items()}


def compare_logits(size: int, dry: bool) -> dict[str, Any]:
    """The last position's logits of every contender beside our torch model's in float32: relative RMS, and the tokens chosen."""
    inputs = inputs_for(size, 1 if dry else 2, dry)
    truth = last_logits(build(size, "torch", dry, torch.float32), inputs)

    def logits_of(contender: str) -> dict[str, Any]:
        if contender in OWN:
            logits = last_logits(ours(size, contender, dry), inputs)
        else:
            network = theirs(size, contender.split()[1], dry)
            logits = network(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]), logits_to_keep=1).logits[:, -1].float()
        return {"rms": distance(logits, truth), "tokens": logits.argmax(-1).tolist()}

    rows = {contender: attempt(contender in OWN, partial(logits_of, contender)) for contender in CONTENDERS}
    allowed = RMS_FACTOR * rows["torch"]["rms"]
    found = {"size": size, "tokens_in_float32": truth.argmax(-1).tolist(), "logits": rows, "rms_allowed": allowed}
    if not rows["triton"]["rms"] <= allowed:
        found["failed"] = f"relative RMS error of the logits {rows['triton']['rms']:.1e}, of the torch backend's {rows['torch']['rms']:.1e}"
    return found


def last_logits(network: PaliGemma, inputs: dict[str, Tensor]) -> Tensor:  # -> (B, V)
    rows = Rows.pack(inputs["input_ids"], inputs["attention_mask"], None)
    hidden, _ = network.prefill(rows, inputs["pixel_values"], capacity=rows.input_ids.shape[1])
    return network.logits(hidden[:, -1])


def time_model(size: int, batch: int, contender: str, dry: bool, seconds: float = 2.0) -> dict[str, Any]:
    """The first token and the following ones, from the caller's side, launched eagerly; each run is one whole generation."""
    inputs, new = inputs_for(size, batch, dry), 3 if dry else NEW_TOKENS
    if contender in OWN:
        network = ours(size, contender, dry)

        def generate(clock: "Clock") -> None:
            for tokens in network.stream(inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"], max_new_tokens=new, eos_token_id=-1):
                clock.put(tokens.cpu())
    else:
        network = theirs(size, contender.split()[1], dry)
        token_types = torch.zeros_like(inputs["input_ids"])  # without them transformers 5 is causal

        def generate(clock: "Clock") -> None:
            network.generate(**inputs, token_type_ids=token_types, max_new_tokens=new, do_sample=False, streamer=Prompted(clock))

    if not dry:
        torch.cuda.reset_peak_memory_stats()
    first, gaps, tokens, start = [], [], [], time.monotonic()
    for run in range(12):
        if run > 1 and (dry or (run > 2 and time.monotonic() - start > seconds)):
            break
        synchronize(dry)
        clock = Clock()
        generate(clock)
        if run:  # the first warms up
            first.append(clock.times[0] - clock.start)
            gaps += [b - a for a, b in pairwise(clock.times)]
        tokens = [token.tolist() for token in clock.tokens]
    return {
        "size": size, "batch": batch, "contender": contender, "timed": "eager", "runs": len(first),
        "first_token_ms": 1e3 * statistics.median(first), "first_token_ms_range": [1e3 * min(first), 1e3 * max(first)],
        "decode_ms": 1e3 * statistics.median(gaps), "decode_ms_range": [1e3 * x for x in (sorted(gaps)[len(gaps) // 10], sorted(gaps)[-1 - len(gaps) // 10])],
        "peak_gb": 0.0 if dry else torch.cuda.max_memory_allocated() / 1e9, "tokens": tokens,
    } | fractions(size, batch, new, statistics.median(first), statistics.median(gaps), dry)  # fmt: skip


def fractions(size: int, batch: int, new: int, first: float, gap: float, dry: bool) -> dict[str, float]:
    """The parts of this machine's limits: its copy bandwidth for a token's bytes, its matrix rate for the first token's products."""
    config = PaliGemmaConfig.from_dict(config_for(size, dry))
    v, t, limits = config.vision_config, config.text_config, timing.ceilings(device_of(dry))
    state = weights_for(size, dry)
    P = v.num_patches
    T = P + PROMPT_TOKENS
    decoder_bytes = sum(x.nbytes for name, x in state.items() if name.startswith("language_model."))  # the table is the head
    cache_bytes = 2 * batch * (T + new // 2) * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * torch.bfloat16.itemsize
    flops = 2 * batch * t.vocab_size * t.hidden_size
    for name, x in state.items():
        if x.ndim > 1 and name != EMBEDDING and "position_embedding" not in name:
            flops += 2 * batch * x.numel() * (T if name.startswith("language_model.") else P)
    flops += 4 * batch * (v.num_hidden_layers * P * P * v.hidden_size + t.num_hidden_layers * T * T * t.num_attention_heads * t.head_dim)
    return {
        "decode_gb": (decoder_bytes + cache_bytes) / 1e9, "decode_fraction": (decoder_bytes + cache_bytes) / limits["copy_gb_s"] / 1e9 / gap,
        "first_token_tflop": flops / 1e12, "first_token_fraction": flops / limits["matmul_tflop_s"] / 1e12 / first,
    }  # fmt: skip


class Clock:
    """When each token was known."""

    def __init__(self):
        self.tokens: list[Tensor] = []
        self.times: list[float] = []
        self.start = time.perf_counter()

    def put(self, tokens: Tensor) -> None:
        self.tokens.append(tokens)
        self.times.append(time.perf_counter())


class Prompted:
    """transformers' streamer: hands on all but the prompt, which comes first."""

    def __init__(self, clock: Clock):
        self.clock, self.prompted = clock, False

    def put(self, value: Tensor) -> None:
        if self.prompted:
            self.clock.put(value)
        self.prompted = True

    def end(self) -> None:
        pass


STAGES: dict[str, Callable[[bool], Iterator[Task]]] = {
    "environment": environment, "ceilings": ceilings, "compilation": compilation, "correctness": correctness, "kernels": kernels, "model": model,
}  # fmt: skip
