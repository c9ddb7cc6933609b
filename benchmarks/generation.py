"""Times generations by this engine and by others on the same weights: the first token, later tokens, and the
parts of a step.

All contenders are timed in the same way, from the caller's side: generations of 1, SHORT and LONG tokens,
until the last token is on the host and the device is idle. The time of the first token is that of a
generation of 1 token. The time of a later token is the difference between the times of the LONG and the SHORT
generation, divided by the difference of their lengths. So it does not matter when an engine returns a token,
and the cost of starting a generation cancels.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import compiled, random_checkpoint, timing
from benchmarks.timing import Task, distance
from paligemma.checkpoint.quantize import quantized
from paligemma.checkpoint.stored import EMBEDDING, HEAD, canonical_name, expected_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.decode_state import bucket
from paligemma.kv_cache import KVCache
from paligemma.layers import EIGHT_BITS, QUANTIZED
from paligemma.model import PaliGemma
from paligemma.options import Sampling
from paligemma.packing import pack
from paligemma.padding import UnpaddedBatch

QUANTIZATIONS = (None, *QUANTIZED)
CONTEXTS = {224: 300, 448: 1100, 896: 4200}  # pixels a side -> cached positions in the middle of a generation
SHORT, LONG = 8, 72  # tokens of a generation
DRY_SHORT, DRY_LONG = 1, 2  # tokens of a generation in a dry run
PG1, PG2 = "paligemma-3b", "paligemma2-3b"
# pixels a side, batch: the most informative first
GRID = [(224, 1), (448, 1), (896, 1), (224, 4), (224, 16), (448, 4), (448, 16), (896, 4), (896, 16)]
DRY_GRID = [(14, 1), (28, 2)]
OWN = ("triton", "torch")  # this engine's backends
TEMPERATURE, TOP_P = 0.8, 0.9  # the defaults of the command line
CHECKED = 16  # number of first tokens that are checked before anything is timed
# How far a token's logit may be below the largest logit, in standard deviations of the logits. The choices of
# a wrong model are 3 to 5 below; choices that differ by bfloat16's rounding are less than 0.1 below.
TIE = 0.25


class Cell(NamedTuple):
    """One generation to time: the model, the inputs and the contender."""

    size: int  # pixels a side
    batch: int
    contender: str = "triton"
    quantize: str | None = None
    model: str = PG1
    sampled: bool = False  # with TEMPERATURE and TOP_P; only a step alone is ever sampled

    @property
    def name(self) -> str:
        model, sampled = "PaliGemma 2" if self.model == PG2 else None, "sampled" if self.sampled else None
        parts = (model, f"{self.size} px", f"batch {self.batch}", self.contender, self.quantize, sampled)
        return ", ".join(part for part in parts if part)


def cells(dry: bool) -> list[Cell]:
    """The cells of this engine, the most important first."""
    (first, *later), second = DRY_GRID if dry else GRID, (14 if dry else 224, 1)
    found = [
        *(Cell(*first, quantize=q) for q in QUANTIZATIONS),
        *(Cell(*place) for place in later[:2]),
        Cell(*second, model=PG2),
    ]
    found += [] if dry else [Cell(*place, quantize=q) for q in QUANTIZATIONS for place in later]
    return list(dict.fromkeys([*found, Cell(*first, contender="torch")]))


def peers(dry: bool) -> list[Cell]:
    """The cells of other engines: those that the targets need first, then others as time allows. A compiled
    one takes about a minute to compile."""
    first, *later = DRY_GRID[:1] if dry else [(224, 1), (896, 1), (448, 1), (224, 16)]
    eager, static, sdpa = "transformers eager", "transformers static", "transformers sdpa"
    found = [Cell(*first, name) for name in (eager, "compiled", static, sdpa, "compiled, products")]
    found += [Cell(*first, "compiled", q) for q in EIGHT_BITS]
    names = (sdpa, "compiled, products", static, "compiled")
    return found + [Cell(*place, name) for place in later for name in names]


def model_tasks(dry: bool) -> Iterator[Task]:
    sizes = dict.fromkeys(size for size, _ in (DRY_GRID if dry else GRID))
    for i, cell in enumerate(cells(dry)):
        if i < len(sizes):
            yield f"{list(sizes)[i]} px, logits", partial(compare_logits, list(sizes)[i], dry)
        yield cell.name, partial(time_model, cell, dry)


def peer_tasks(dry: bool) -> Iterator[Task]:
    for cell in peers(dry):
        yield cell.name, partial(timing.attempt, False, partial(time_model, cell, dry))


# The models


def config_for(model: str, size: int, dry: bool) -> dict:
    config = random_checkpoint.config_for(size, "bfloat16", model)
    if dry:
        config |= {"image_token_index": 290, "vocab_size": 300, "hidden_size": 64, "projection_dim": 64}
        small = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_hidden_layers": 1}
        config["text_config"] |= {**small, "num_key_value_heads": 1, "head_dim": 32, "vocab_size": 300}
        config["vision_config"] |= {**small, "projection_dim": 64}
    return config


@lru_cache
def weights(model: str, dry: bool) -> dict[str, Tensor]:
    """Random weights, generated on the device, for the largest image. Smaller images use a part of its
    position embedding."""
    largest = max(size for size, _ in (DRY_GRID if dry else GRID))
    config = PaliGemmaConfig.from_dict(config_for(model, largest, dry))
    device, found = timing.device_of(dry), {}
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        for name, shape in expected_shapes(config).items():
            weight = random_checkpoint.random_weight(name, shape, generator, model == PG2)
            found[name] = weight.to(torch.bfloat16)
    return found


def weights_for(model: str, size: int, dry: bool) -> dict[str, Tensor]:
    patches = PaliGemmaConfig.from_dict(config_for(model, size, dry)).vision_config.num_patches
    every = weights(model, dry).items()
    return {name: x[:patches] if "position_embedding" in name else x for name, x in every}


@lru_cache(maxsize=1)
def models_of(model: str, size: int, dry: bool) -> dict[Any, Any]:
    """The dict that keeps the models of this shape. The cache drops the models of the previous shape, with
    their KV caches and graphs, because all of them together do not fit into 80 GB."""
    return {}


def ours(model: str, size: int, backend: str, quantize: str | None, dry: bool) -> PaliGemma:
    kept, name = models_of(model, size, dry), (backend, quantize)
    if name not in kept:
        kept[name] = build(model, size, backend, quantize, dry, torch.bfloat16)
    return kept[name]


def build(
    model: str, size: int, backend: str, quantize: str | None, dry: bool, dtype: torch.dtype
) -> PaliGemma:
    with torch.device("meta"):
        network = PaliGemma(PaliGemmaConfig.from_dict(config_for(model, size, dry)), backend, quantize)
    state = {name: x.to(dtype) for name, x in weights_for(model, size, dry).items()}
    if quantize:
        parameters = dict(network.named_parameters())
        for scale in [name for name in parameters if name.endswith("_scale")]:
            name = scale.removesuffix("_scale")
            weight = state[EMBEDDING if name == HEAD else name]
            state[name], state[scale] = quantized(weight, parameters[name].dtype, dtype)
    network.load_state_dict(state, strict=True, assign=True)
    for group in network.packable():
        pack(group)
    return network.eval()


def theirs(size: int, attention: str, dry: bool) -> Any:
    """The model of transformers, which shares the memory of our weights."""
    kept = models_of(PG1, size, dry)
    if attention in kept:
        return kept[attention]
    from transformers import PaliGemmaConfig as TheirConfig
    from transformers import PaliGemmaForConditionalGeneration

    config: Any = TheirConfig.from_dict(config_for(PG1, size, dry))
    with torch.device(timing.device_of(dry)):
        network: Any = PaliGemmaForConditionalGeneration._from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention
        )
    state = weights_for(PG1, size, dry)
    state[HEAD] = state[EMBEDDING]
    for name, parameter in network.named_parameters():
        value = state[canonical_name(name)]
        assert value.shape == parameter.shape, f"{name}: {tuple(value.shape)}, not {tuple(parameter.shape)}"
        parameter.data = value
    network.generation_config.eos_token_id = None
    kept[attention] = network.eval()
    return kept[attention]


def inputs_for(cell: Cell, dry: bool, image: bool = True) -> dict[str, Tensor]:
    """The inputs on the CPU, as a processor returns them. The length of the prompt is chosen so that the
    generation has the cell's context half way between SHORT and LONG tokens. Without an image, the prompt has
    as many tokens as image and prompt together."""
    config = PaliGemmaConfig.from_dict(config_for(cell.model, cell.size, dry))
    token, P = config.image_token_index, config.vision_config.num_patches
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(cell.batch, 3, cell.size, cell.size, generator=generator) * 2 - 1
    text = 4 if dry else CONTEXTS[cell.size] - P - (SHORT + LONG) // 2
    ids = torch.randint(3, token, (cell.batch, P + text), generator=generator)
    if image:
        ids[:, :P] = token
    found = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return found | ({"pixel_values": pixels} if image else {})


def filled(
    network: PaliGemma, inputs: dict[str, Tensor], types: Tensor | None = None
) -> tuple[UnpaddedBatch, Tensor, KVCache]:
    """The prefill of the inputs: the rows, their hidden states (B, T, E), and the KV cache."""
    pixels = inputs["pixel_values"]
    rows = network.unpad(inputs["input_ids"], pixels, None, types)[0].to(network.device)
    B, T = rows.input_ids.shape
    cache = KVCache(network.config.text_config, B, T, network.dtype, network.device)
    return rows, network.hidden(rows, pixels, cache), cache


# Whether they compute the same


def compare_logits(size: int, dry: bool) -> dict[str, Any]:
    """Compare our logits and those of transformers, at the last position, with the logits of our torch model
    in float32: relative RMS errors, and the tokens chosen."""
    inputs = inputs_for(Cell(size, 1 if dry else 2), dry)
    truth = last_logits(build(PG1, size, "torch", None, dry, torch.float32), inputs)

    def logits_of(contender: str) -> dict[str, Any]:
        if contender in OWN:
            logits = last_logits(ours(PG1, size, contender, None, dry), inputs)
        else:
            network = theirs(size, contender.split()[1], dry)
            given = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
            there = {name: x.to(network.device) for name, x in given.items()}
            logits = network(**there, logits_to_keep=1).logits[:, -1].float()
        return {"rms": distance(logits, truth), "tokens": logits.argmax(-1).tolist()}

    contenders = (*OWN, "transformers sdpa", "transformers eager")
    rows = {name: timing.attempt(name in OWN, partial(logits_of, name)) for name in contenders}
    triton, plain = rows["triton"]["rms"], rows["torch"]["rms"]
    allowed = 2 * plain  # as in paligemma.compare
    found: dict[str, Any] = {"size": size, "tokens_in_float32": truth.argmax(-1).tolist()}
    found |= {"logits": rows, "rms_allowed": allowed}
    if not triton <= allowed:
        found["failed"] = f"relative RMS error of the logits: triton {triton:.1e}, torch {plain:.1e}"
    return found


def last_logits(network: PaliGemma, inputs: dict[str, Tensor]) -> Tensor:  # -> (B, V)
    return network.logits(filled(network, inputs)[1][:, -1])


def judge(cell: Cell, tokens: Tensor, inputs: dict[str, Tensor], dry: bool) -> dict[str, float]:
    """Compare the first tokens (B, N) with the choices of our torch backend, which reads them in one pass
    with the same weights: the fraction on which they agree, and how far the logit of the worst token is below
    the largest logit, in standard deviations of the logits. More than TIE raises ArithmeticError."""
    network, given = ours(cell.model, cell.size, "torch", cell.quantize, dry), inputs["input_ids"]
    # up to the first `<image>`, because no input may contain another one
    images = (tokens[:, :CHECKED] == network.config.image_token_index).any(dim=0).tolist()
    tokens = tokens[:, : images.index(True) + 1 if True in images else CHECKED].to(given.device)
    ids = torch.cat([given, tokens[:, :-1]], dim=1)
    types = (torch.arange(ids.shape[1], device=ids.device) >= given.shape[1]).long().expand_as(ids)
    hidden = filled(network, inputs | {"input_ids": ids}, types)[1]
    logits = network.logits(hidden[:, given.shape[1] - 1 :])
    below = logits.amax(dim=-1) - logits.gather(2, tokens[:, :, None].to(logits.device))[:, :, 0]
    agreement, worst = float((below == 0).float().mean()), float((below / logits.std(dim=-1)).max())
    if not worst <= TIE:
        far = f"the worst is {worst:.2f} standard deviations below the best, {agreement:.0%} agree"
        raise ArithmeticError(f"its tokens are not greedy tokens: {far}")
    return {"agreement": agreement, "worst": worst}


# How long they take


def generator_of(cell: Cell, inputs: dict[str, Tensor], dry: bool) -> Callable[[int], Tensor]:
    """A function that generates N tokens greedily: N -> (B, N)."""
    if cell.contender in OWN:
        network: Any = ours(cell.model, cell.size, cell.contender, cell.quantize, dry)
        return lambda new: network.generate(**inputs, max_new_tokens=new, eos_token_id=-1)
    if cell.contender.startswith("compiled"):
        model = ours(cell.model, cell.size, "torch" if dry else "triton", cell.quantize, dry)
        capacity = -(-(inputs["input_ids"].shape[1] + LONG) // 64) * 64
        decoder = compiled.Decoder(model, cell.batch, capacity, sdpa="products" not in cell.contender)
        step = decoder if dry else compiled.compiled(decoder)
        return lambda new: compiled.generate(model, decoder, step, inputs, new)
    kind = cell.contender.split()[1]
    network = theirs(cell.size, "sdpa" if kind == "static" else kind, dry)
    cached = {"cache_implementation": "static"} if kind == "static" else {}
    # without token types, attention in transformers 5 is causal
    given = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}

    def generate(new: int) -> Tensor:
        there = {name: x.to(network.device) for name, x in given.items()}
        ids = network.generate(**there, **cached, do_sample=False, max_new_tokens=new)
        return ids[:, given["input_ids"].shape[1] :]

    return generate


def time_model(cell: Cell, dry: bool, seconds: float = 1.5) -> dict[str, Any]:
    """Check the tokens of a cell, then time it. Another engine and ours are timed in turn. `seconds` limits
    both together, without the warm-up."""
    inputs, (short, long) = inputs_for(cell, dry), (DRY_SHORT, DRY_LONG) if dry else (SHORT, LONG)
    contenders = {"": generator_of(cell, inputs, dry)}
    if cell.contender not in OWN:
        torch.compiler.reset()
        contenders["ours_"] = generator_of(cell._replace(contender="torch" if dry else "triton"), inputs, dry)
    before, start = 0.0 if dry else memory_gb(reset=True), time.monotonic()
    found: dict[str, Any] = cell._asdict() | {"context": inputs["input_ids"].shape[1] + (short + long) // 2}
    tokens = contenders[""](long)
    found |= judge(cell, tokens, inputs, dry)
    found |= {"tokens": tokens[:, :CHECKED].tolist(), "warm_up_s": time.monotonic() - start}
    # A compiled decoder has no first token of its own: its prefill is ours.
    counts = (long, short) if cell.contender.startswith("compiled") else dict.fromkeys((long, short, 1))
    timers = {
        f"{whose}{new}": timer(partial(generate, new), dry)
        for whose, generate in contenders.items()
        for new in counts
    }
    # Some engines capture graphs in the second run, so that the third run is the first to be measured.
    for measure in () if dry else timers.values():
        measure()
    samples = timing.interleaved(timers, seconds, 1 if dry else 15, least=1 if dry else 3)
    for whose in contenders:
        pairs = zip(samples[f"{whose}{long}"], samples[f"{whose}{short}"], strict=True)
        gaps = [(a - b) / (long - short) for a, b in pairs]
        found |= timing.spread(f"{whose}decode_ms", 1e3, gaps) | {"rounds": len(gaps)}
        if 1 in counts:
            found |= timing.spread(f"{whose}first_token_ms", 1e3, samples[f"{whose}1"])
    for time_of in ("decode_ms", "first_token_ms"):
        if f"ours_{time_of}" in found:
            found[f"{time_of}_over_ours"] = found[time_of] / found[f"ours_{time_of}"]
    if cell.contender in OWN and cell.batch == 1 and not cell.quantize:
        found |= parts_of_first_token(cell, inputs, dry)
    return found | fractions(cell, found, dry) | {"working_gb": 0.0 if dry else memory_gb() - before}


def timer(generate: Callable[[], Tensor], dry: bool) -> Callable[[], float]:
    def measure() -> float:
        timing.synchronize(dry)
        start = time.perf_counter()
        generate().cpu()
        timing.synchronize(dry)
        return time.perf_counter() - start

    return measure


def parts_of_first_token(cell: Cell, inputs: dict[str, Tensor], dry: bool) -> dict[str, float]:
    """The times of the image embedding alone, and of the first token for a text as long as image and prompt
    together."""
    text = inputs_for(cell, dry, image=False)
    network: Any = ours(cell.model, cell.size, cell.contender, None, dry)

    def embed() -> Tensor:
        with network.computing(cell.batch):
            return network.embed_image(inputs["pixel_values"])[:, -1, -1]

    def generate() -> Tensor:
        return network.generate(**text, max_new_tokens=1, eos_token_id=-1)

    timers = {"vision_ms": timer(embed, dry), "language_ms": timer(generate, dry)}
    for measure in () if dry else [*timers.values()] * 2:
        measure()
    samples = timing.interleaved(timers, 0.3, 1 if dry else 15)
    return {name: 1e3 * statistics.median(times) for name, times in samples.items()}


def memory_gb(reset: bool = False) -> float:
    """The peak of the allocated GPU memory since the last reset, in GB."""
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


OF_LIMIT = (("decode_fraction", "copy_gb_s"), ("decode_read_fraction", "read_gb_s"))


def fractions(cell: Cell, found: dict[str, Any], dry: bool) -> dict[str, float]:
    """The fractions of this machine's limits that were reached: of copy and read bandwidth by the bytes of a
    later token, and of the rate of matrix products by the first token."""
    config = PaliGemmaConfig.from_dict(config_for(cell.model, cell.size, dry))
    v, t, limits = config.vision_config, config.text_config, timing.ceilings(timing.device_of(dry))
    P, T, batch = v.num_patches, inputs_for(cell, dry)["input_ids"].shape[1], cell.batch
    flops = 2 * batch * t.vocab_size * t.hidden_size
    for name, x in weights_for(cell.model, cell.size, dry).items():
        if x.ndim > 1 and name != EMBEDDING and "position_embedding" not in name:
            flops += 2 * batch * x.numel() * (T if name.startswith("language_model.") else P)
    flops += 4 * batch * v.num_hidden_layers * P * P * v.hidden_size
    flops += 4 * batch * t.num_hidden_layers * T * T * t.num_attention_heads * t.head_dim
    reached = {"first_token_tflop": flops / 1e12}
    reached |= decode_fractions(cell, found["context"], found["decode_ms"], dry)
    if first := found.get("first_token_ms"):
        reached["first_token_fraction"] = flops / limits["matmul_tflop_s"] / 1e9 / first
    return reached


def decode_fractions(cell: Cell, context: int, ms: float, dry: bool) -> dict[str, float]:
    """The gigabytes that a decode step must at least read, and the fractions of the copy and the read
    bandwidth that it reaches in `ms` milliseconds."""
    t = PaliGemmaConfig.from_dict(config_for(cell.model, cell.size, dry)).text_config
    limits = timing.ceilings(timing.device_of(dry))
    parameters = ours(cell.model, cell.size, "triton", cell.quantize, dry).language_model.named_parameters()
    # Quantised, the head is a matrix of its own, and a step reads a few rows of the embedding table.
    weights = sum(x.nbytes for name, x in parameters if not (cell.quantize and "embed_tokens" in name))
    position = 2 * t.num_hidden_layers * t.num_key_value_heads * t.head_dim * torch.bfloat16.itemsize
    moved = (weights + cell.batch * context * position) / 1e9
    return {"decode_gb": moved} | {name: 1e3 * moved / limits[limit] / ms for name, limit in OF_LIMIT}


# One decode step


ROOM = 4 * timing.ROUNDS  # positions for steps; no measurement takes as many steps without a reset


def step_of(cell: Cell, dry: bool) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[], None]]:
    """(step, reset). step() computes the next token, with the launches of one token: it advances a state and
    returns the logits and all tokens so far. reset() returns the state to the first token after the
    prompt."""
    network, inputs = ours(cell.model, cell.size, cell.contender, cell.quantize, dry), inputs_for(cell, dry)
    rows = network.unpad(inputs["input_ids"], inputs["pixel_values"])[0].to(network.device)
    T = rows.input_ids.shape[1]
    # The cache is as large as for graphs, because attention's splits depend on its size.
    state = network.new_state(cell.batch, bucket(T + ROOM), sampled=cell.sampled)
    state.begin(Sampling(TEMPERATURE, TOP_P, seed=0), state.cache.capacity)
    with network.computing(rows.input_ids.numel()):
        network.first_step(state, rows, inputs["pixel_values"])
    kept, used = [(x, x.clone()) for x in state.buffers if x is not None], state.cache.used

    def step() -> tuple[Tensor, Tensor]:
        with network.computing(cell.batch):
            return network.next_step(state), state.buffers.output_ids

    def reset() -> None:
        for x, before in kept:
            x.copy_(before)
        state.cache.keys_values[:, :, :, T:].fill_(torch.nan)  # the positions that the steps write
        state.cache.used = used

    return step, reset


def check_graphs(cell: Cell, dry: bool) -> dict[str, Any]:
    """Compare the tokens of replayed graphs with the tokens of eager launches. They must be equal or equally
    good."""
    network: Any = ours(cell.model, cell.size, cell.contender, cell.quantize, dry)
    inputs, new, times = inputs_for(cell, dry), 2 if dry else 64, 1 if dry else 3

    def generate(graphs: bool) -> Tensor:
        network.graphs, tokens = graphs, torch.empty(0)
        try:
            for _ in range(times):  # the second records the graphs, which the third replays throughout
                tokens = network.generate(**inputs, max_new_tokens=new, eos_token_id=-1).cpu()
        finally:
            network.graphs = True
        return tokens

    eager, replayed = generate(False), generate(True)
    found: dict[str, Any] = {"the_same": int((eager == replayed).sum()), "of": eager.numel()}
    found["held_gb"] = network.held_bytes / 1e9
    try:
        found |= {"eager": judge(cell, eager, inputs, dry), "replayed": judge(cell, replayed, inputs, dry)}
    except ArithmeticError as error:
        found["failed"] = str(error)
    return found


def profile(cell: Cell, dry: bool) -> dict[str, Any]:
    """The kernels of one step and their times, from the profiler, the longest first. Time in which two
    kernels overlap counts twice."""
    (step, reset), steps = step_of(cell, dry), 1 if dry else 5
    replay = step if dry else timing.captured(step, step)[0].replay
    reset()
    kind = torch.profiler.ProfilerActivity.CPU if dry else torch.profiler.ProfilerActivity.CUDA
    with torch.profiler.profile(activities=[kind]) as profiler:
        for _ in range(steps):
            replay()
        timing.synchronize(dry)
    rows = []
    for event in profiler.key_averages():
        total: float = event.self_cpu_time_total if dry else event.self_device_time_total
        rows.append({"kernel": event.key[:100], "calls": event.count / steps, "us": total / steps})
    longest = sorted(rows, key=lambda row: -row["us"])[:25]
    return {"launches": sum(row["calls"] for row in rows), "parts": longest}
