"""Times generations by this engine and by others on the same weights: the first token, later tokens, and the
parts of a step.

All contenders are timed in the same way, from the caller's side: generations of 1, SHORT and LONG tokens,
until the last token is on the host and the device is idle. The time of the first token is that of a
generation of 1 token. The time of a later token is the difference between the LONG and the SHORT generation,
divided by the difference of their lengths: when a token is handed out does not matter, and the cost of
starting a generation cancels.
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
from paligemma.checkpoint.quantize import quantized_rows
from paligemma.checkpoint.stored import EMBEDDING, HEAD, canonical_name, expected_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.decode_state import bucket
from paligemma.kv_cache import KVCache
from paligemma.layers import QUANTIZED
from paligemma.model import PaliGemma
from paligemma.options import Sampling
from paligemma.packing import pack
from paligemma.padding import UnpaddedBatch

QUANTIZATIONS = (None, *QUANTIZED)
CONTEXTS = {224: 300, 448: 1100, 896: 4200}  # pixels a side -> cached positions in the middle of a generation
SHORT, LONG = 8, 72  # tokens of a generation; of a dry run's
DRY_SHORT, DRY_LONG = 1, 2
PG1, PG2 = "paligemma-3b", "paligemma2-3b"
GRID = [
    (224, 1),
    (448, 1),
    (896, 1),
    (224, 4),
    (224, 16),
    (448, 4),
    (448, 16),
    (896, 4),
    (896, 16),
]  # pixels, batch: the most telling first
DRY_GRID = [(14, 1), (28, 2)]
OWN = ("triton", "torch")  # this engine's backends
TEMPERATURE, TOP_P = 0.8, 0.9  # the command line's
CHECKED = 16  # the first tokens, which are looked at before anything is timed
TIE = {
    None: 0.25,
    "int8": 0.75,
    "fp8": 0.75,
}  # how far below the best a token's logit may be, in standard deviations of the logits. A wrong
# model's choices are 3 to 5 below; those that bfloat16 confuses, less than 0.1


class Cell(NamedTuple):
    """One generation to time: the model, the inputs and the contender."""

    size: int  # pixels a side
    batch: int
    contender: str = "triton"
    quantize: str | None = None
    model: str = PG1
    sampled: bool = False  # by TEMPERATURE and TOP_P, in a step alone; everything else is greedy

    @property
    def name(self) -> str:
        options = [option for option in (self.quantize, "sampled" if self.sampled else None) if option]
        return ", ".join(
            [
                *(["PaliGemma 2"] if self.model == PG2 else []),
                f"{self.size} px",
                f"batch {self.batch}",
                self.contender,
                *options,
            ]
        )


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
    """The cells of other engines: those of the targets first, then others as time allows. One takes about a
    minute to compile."""
    first, *later = DRY_GRID[:1] if dry else [(224, 1), (896, 1), (448, 1), (224, 16)]
    found = [
        Cell(*first, name)
        for name in (
            "transformers eager",
            "compiled",
            "transformers static",
            "transformers sdpa",
            "compiled, products",
        )
    ]
    found += [Cell(*first, "compiled", q) for q in QUANTIZATIONS[1:]]
    return found + [
        Cell(*place, name)
        for place in later
        for name in ("transformers sdpa", "compiled, products", "transformers static", "compiled")
    ]


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
    """Random weights, generated on the device, for the largest image; smaller images use a part of its
    position embedding."""
    config = PaliGemmaConfig.from_dict(
        config_for(model, max(size for size, _ in (DRY_GRID if dry else GRID)), dry)
    )
    device, found = timing.device_of(dry), {}
    generator = torch.Generator(device).manual_seed(0)
    with torch.device(device):
        for name, shape in expected_shapes(config).items():
            found[name] = random_checkpoint.random_weight(name, shape, generator, model == PG2).to(
                torch.bfloat16
            )
    return found


def weights_for(model: str, size: int, dry: bool) -> dict[str, Tensor]:
    patches = PaliGemmaConfig.from_dict(config_for(model, size, dry)).vision_config.num_patches
    return {
        name: x[:patches] if "position_embedding" in name else x for name, x in weights(model, dry).items()
    }


@lru_cache(maxsize=1)
def models_of(model: str, size: int, dry: bool) -> dict[Any, Any]:
    """The dict that keeps the models of this shape. The models of the previous shape are dropped, with their
    caches and graphs, because all of them do not fit into 80 GB."""
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
        for name in [
            name.removesuffix("_scale") for name, _ in network.named_parameters() if name.endswith("_scale")
        ]:
            state[name], state[f"{name}_scale"] = quantized_rows(
                state[EMBEDDING if name == HEAD else name], QUANTIZED[quantize], dtype
            )
    network.load_state_dict(state, strict=True, assign=True)
    for group in network.packable():
        pack(group)
    return network.eval()


def theirs(size: int, attention: str, dry: bool) -> Any:
    """transformers' model, which shares the memory of our weights."""
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
        assert value.shape == parameter.shape, (
            f"{name}: {tuple(parameter.shape)} there, {tuple(value.shape)} here"
        )
        parameter.data = value
    network.generation_config.eos_token_id = None
    kept[attention] = network.eval()
    return kept[attention]


def inputs_for(cell: Cell, dry: bool, image: bool = True) -> dict[str, Tensor]:
    """The inputs on the CPU, as a processor returns them. The prompt's length is such that the generation has
    the cell's context half way between SHORT and LONG tokens. Without an image, the prompt has as many tokens
    as both together."""
    config = PaliGemmaConfig.from_dict(config_for(cell.model, cell.size, dry))
    token, P = config.image_token_index, config.vision_config.num_patches
    generator = torch.Generator().manual_seed(1)
    pixels = torch.rand(cell.batch, 3, cell.size, cell.size, generator=generator) * 2 - 1
    text = 4 if dry else CONTEXTS[cell.size] - P - (SHORT + LONG) // 2
    ids = torch.randint(3, token, (cell.batch, P + text), generator=generator)
    if image:
        ids[:, :P] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | (
        {"pixel_values": pixels} if image else {}
    )


def filled(
    network: PaliGemma, inputs: dict[str, Tensor], types: Tensor | None = None
) -> tuple[UnpaddedBatch, Tensor, KVCache]:
    """The prefill of the inputs: the rows, their hidden states (B, T, E), and the cache of keys and
    values."""
    pixels = inputs["pixel_values"]
    rows = network.unpad(inputs["input_ids"], pixels, None, types)[0].to(network.device)
    B, T = rows.input_ids.shape
    cache = KVCache(network.config.text_config, B, T, network.dtype, network.device)
    return rows, network.hidden(rows, pixels, cache), cache


# Whether they compute the same


def compare_logits(size: int, dry: bool) -> dict[str, Any]:
    """Compare the logits of the last position, ours and those of transformers, with our torch model's in
    float32: relative RMS errors, and the tokens chosen."""
    inputs = inputs_for(Cell(size, 1 if dry else 2), dry)
    truth = last_logits(build(PG1, size, "torch", None, dry, torch.float32), inputs)

    def logits_of(contender: str) -> dict[str, Any]:
        if contender in OWN:
            logits = last_logits(ours(PG1, size, contender, None, dry), inputs)
        else:
            network = theirs(size, contender.split()[1], dry)
            given = inputs | {"token_type_ids": torch.zeros_like(inputs["input_ids"])}
            logits = (
                network(**{name: x.to(network.device) for name, x in given.items()}, logits_to_keep=1)
                .logits[:, -1]
                .float()
            )
        return {"rms": distance(logits, truth), "tokens": logits.argmax(-1).tolist()}

    rows = {
        name: timing.attempt(name in OWN, partial(logits_of, name))
        for name in (*OWN, "transformers sdpa", "transformers eager")
    }
    allowed = 2 * rows["torch"]["rms"]  # as in paligemma.compare
    found = {
        "size": size,
        "tokens_in_float32": truth.argmax(-1).tolist(),
        "logits": rows,
        "rms_allowed": allowed,
    }
    if not rows["triton"]["rms"] <= allowed:
        found["failed"] = (
            f"relative RMS error of the logits {rows['triton']['rms']:.1e}, of the torch backend's {rows['torch']['rms']:.1e}"
        )
    return found


def last_logits(network: PaliGemma, inputs: dict[str, Tensor]) -> Tensor:  # -> (B, V)
    return network.logits(filled(network, inputs)[1][:, -1])


def judge(cell: Cell, tokens: Tensor, inputs: dict[str, Tensor], dry: bool) -> dict[str, float]:
    """Compare the first tokens (B, N) with the choices of our torch backend, which reads them in one pass in
    bfloat16: the fraction on which they agree, and how far the worst token's logit is below that of the
    choice, in standard deviations of the logits. More than TIE is an error."""
    network, given = ours(cell.model, cell.size, "torch", None, dry), inputs["input_ids"]
    images = (tokens[:, :CHECKED] == network.config.image_token_index).any(dim=0).tolist()
    tokens = tokens[:, : images.index(True) + 1 if True in images else CHECKED].to(
        given.device
    )  # no input may have another `<image>`
    ids = torch.cat([given, tokens[:, :-1]], dim=1)
    types = (torch.arange(ids.shape[1], device=ids.device) >= given.shape[1]).long().expand_as(ids)
    hidden = filled(network, inputs | {"input_ids": ids}, types)[1]
    logits = network.logits(hidden[:, given.shape[1] - 1 :])
    below = logits.amax(dim=-1) - logits.gather(2, tokens[:, :, None].to(logits.device))[:, :, 0]
    found = {
        "agreement": float((below == 0).float().mean()),
        "worst": float((below / logits.std(dim=-1)).max()),
    }
    if not found["worst"] <= TIE[cell.quantize]:
        raise ArithmeticError(
            "its tokens are not greedy tokens: the worst is {worst:.2f} standard deviations below, {agreement:.0%} agree".format(
                **found
            )
        )
    return found


# How long they take


def generator_of(cell: Cell, inputs: dict[str, Tensor], dry: bool) -> Callable[[int], Tensor]:
    """A function of N that generates N tokens greedily: (B, N)."""
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
    network, cached = (
        theirs(cell.size, "sdpa" if kind == "static" else kind, dry),
        {"cache_implementation": "static"} if kind == "static" else {},
    )
    given = inputs | {
        "token_type_ids": torch.zeros_like(inputs["input_ids"])
    }  # without types transformers 5 is causal

    def generate(new: int) -> Tensor:
        there = {name: x.to(network.device) for name, x in given.items()}
        return network.generate(**there, **cached, do_sample=False, max_new_tokens=new)[
            :, given["input_ids"].shape[1] :
        ]

    return generate


def time_model(cell: Cell, dry: bool, seconds: float = 1.5) -> dict[str, Any]:
    """Check the tokens of a cell, then time it. Times of another engine are interleaved with ours. `seconds`
    is for both, without the warm-up."""
    inputs, (short, long) = inputs_for(cell, dry), (DRY_SHORT, DRY_LONG) if dry else (SHORT, LONG)
    contenders = {"": generator_of(cell, inputs, dry)}
    if cell.contender not in OWN:
        torch.compiler.reset()
        contenders["ours_"] = generator_of(cell._replace(contender="torch" if dry else "triton"), inputs, dry)
    before, start = 0.0 if dry else memory_gb(reset=True), time.monotonic()
    found: dict[str, Any] = cell._asdict() | {"context": inputs["input_ids"].shape[1] + (short + long) // 2}
    tokens = contenders[""](long)
    found |= judge(cell, tokens, inputs, dry) | {
        "tokens": tokens[:, :CHECKED].tolist(),
        "warm_up_s": time.monotonic() - start,
    }
    counts = (
        (long, short) if cell.contender.startswith("compiled") else dict.fromkeys((long, short, 1))
    )  # its prefill is ours
    timers = {
        f"{whose}{new}": timer(partial(generate, new), dry)
        for whose, generate in contenders.items()
        for new in counts
    }
    for measure in (
        () if dry else timers.values()
    ):  # some capture graphs the second time: what is measured begins with the third
        measure()
    samples = timing.interleaved(timers, seconds, 1 if dry else 15, least=1 if dry else 3)
    for whose in contenders:
        gaps = [
            (a - b) / (long - short)
            for a, b in zip(samples[f"{whose}{long}"], samples[f"{whose}{short}"], strict=True)
        ]
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
    """Times of the image embedding alone, and of the first token for a text as long as image and prompt
    together."""
    text = inputs_for(cell, dry, image=False)
    network: Any = ours(cell.model, cell.size, cell.contender, None, dry)

    def embed() -> Tensor:
        with network.computing(cell.batch):
            return network.embed_image(inputs["pixel_values"])[:, -1, -1]

    timers = {
        "vision_ms": timer(embed, dry),
        "language_ms": timer(lambda: network.generate(**text, max_new_tokens=1, eos_token_id=-1), dry),
    }
    for measure in () if dry else [*timers.values()] * 2:
        measure()
    return {
        name: 1e3 * statistics.median(samples)
        for name, samples in timing.interleaved(timers, 0.3, 1 if dry else 15).items()
    }


def memory_gb(reset: bool = False) -> float:
    """The peak of allocated memory since the last reset."""
    if reset:
        torch.cuda.reset_peak_memory_stats()
    return torch.cuda.max_memory_allocated() / 1e9


OF_LIMIT = (("decode_fraction", "copy_gb_s"), ("decode_read_fraction", "read_gb_s"))


def fractions(cell: Cell, found: dict[str, Any], dry: bool) -> dict[str, float]:
    """The fractions of this machine's limits that were reached: copy and read bandwidth for a token's bytes,
    the rate of matrix products for the first token."""
    config = PaliGemmaConfig.from_dict(config_for(cell.model, cell.size, dry))
    v, t, limits = config.vision_config, config.text_config, timing.ceilings(timing.device_of(dry))
    P, T, batch = v.num_patches, inputs_for(cell, dry)["input_ids"].shape[1], cell.batch
    flops = 2 * batch * t.vocab_size * t.hidden_size
    for name, x in weights_for(cell.model, cell.size, dry).items():
        if x.ndim > 1 and name != EMBEDDING and "position_embedding" not in name:
            flops += 2 * batch * x.numel() * (T if name.startswith("language_model.") else P)
    flops += (
        4
        * batch
        * (
            v.num_hidden_layers * P * P * v.hidden_size
            + t.num_hidden_layers * T * T * t.num_attention_heads * t.head_dim
        )
    )
    first = found.get("first_token_ms")
    first_of_limit = {"first_token_fraction": flops / limits["matmul_tflop_s"] / 1e9 / first} if first else {}
    return {
        "first_token_tflop": flops / 1e12,
        **decode_fractions(cell, found["context"], found["decode_ms"], dry),
        **first_of_limit,
    }


def decode_fractions(cell: Cell, context: int, ms: float, dry: bool) -> dict[str, float]:
    """The gigabytes that a decode step reads at least, and the fractions of the copy and the read bandwidth
    that it reaches in `ms` milliseconds."""
    t, limits = (
        PaliGemmaConfig.from_dict(config_for(cell.model, cell.size, dry)).text_config,
        timing.ceilings(timing.device_of(dry)),
    )
    parameters = ours(cell.model, cell.size, "triton", cell.quantize, dry).language_model.named_parameters()
    decoder_bytes = sum(
        x.nbytes for name, x in parameters if not (cell.quantize and "embed_tokens" in name)
    )  # where the table is not the head
    cache_bytes = (
        2
        * cell.batch
        * context
        * t.num_hidden_layers
        * t.num_key_value_heads
        * t.head_dim
        * torch.bfloat16.itemsize
    )
    moved = (decoder_bytes + cache_bytes) / 1e9
    return {"decode_gb": moved} | {name: 1e3 * moved / limits[limit] / ms for name, limit in OF_LIMIT}


# One decode step


ROOM = 4 * timing.ROUNDS  # more steps than are ever taken from one beginning


def step_of(cell: Cell, dry: bool) -> tuple[Callable[[], tuple[Tensor, Tensor]], Callable[[], None]]:
    """(step, reset). step() computes the next token and returns the logits and all tokens so far; it advances
    a state, and its launches are those of one token. reset() returns the state to the first token after the
    prompt."""
    network, inputs = ours(cell.model, cell.size, cell.contender, cell.quantize, dry), inputs_for(cell, dry)
    rows = network.unpad(inputs["input_ids"], inputs["pixel_values"])[0].to(network.device)
    T = rows.input_ids.shape[1]
    # As large as for graphs, because attention's splits depend on the size.
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
        state.cache.keys_values[:, :, :, T:].fill_(torch.nan)  # which the steps are to write
        state.cache.used = used

    return step, reset


def check_graphs(cell: Cell, dry: bool) -> dict[str, Any]:
    """Compare the tokens of replayed graphs with those of eager launches: they are equal, or equally good."""
    network: Any = ours(cell.model, cell.size, cell.contender, cell.quantize, dry)
    inputs, new, times = inputs_for(cell, dry), 2 if dry else 64, 1 if dry else 3

    def generate(graphs: bool) -> Tensor:
        network.graphs, tokens = graphs, torch.empty(0)
        try:
            for _ in range(times):  # what the second records, the third replays from its beginning on
                tokens = network.generate(**inputs, max_new_tokens=new, eos_token_id=-1).cpu()
        finally:
            network.graphs = True
        return tokens

    eager, replayed = generate(False), generate(True)
    found: dict[str, Any] = {
        "the_same": int((eager == replayed).sum()),
        "of": eager.numel(),
        "held_gb": network.held_bytes / 1e9,
    }
    try:
        found |= {"eager": judge(cell, eager, inputs, dry), "replayed": judge(cell, replayed, inputs, dry)}
    except ArithmeticError as error:
        found["failed"] = str(error)
    return found


def profile(cell: Cell, dry: bool) -> dict[str, Any]:
    """The kernels of one step and their times, from the profiler, the longest first. The time in which two
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
    return {
        "launches": sum(row["calls"] for row in rows),
        "parts": sorted(rows, key=lambda row: -row["us"])[:25],
    }
