"""The forms of checkpoints that are in use load to exactly the same model, and take no more memory than it
needs."""

import copy
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from checkpoints import (
    IMAGE_TOKEN,
    STORED,
    TINY,
    TORCH,
    WHOLE_GROUPS,
    config_dict,
    random_weights,
    write_checkpoint,
    write_zeros,
)
from conftest import photo
from safetensors.torch import save_file

from paligemma import PaliGemmaError, load_hf_model, reference
from paligemma.checkpoint import reading
from paligemma.checkpoint.safetensors_file import read_header
from paligemma.checkpoint.stored import EMBEDDING, expected_shapes
from paligemma.config import PaliGemmaConfig
from paligemma.packing import is_packed, packed

CPU = torch.device("cpu")


def probe(vocabulary: int = IMAGE_TOKEN) -> dict[str, torch.Tensor]:
    """Inputs for TINY: 16 patches, 7 tokens."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(4, vocabulary, (1, 7), generator=generator)
    ids = torch.cat([torch.full((1, 16), IMAGE_TOKEN), text], dim=1)
    return {"input_ids": ids, "pixel_values": torch.rand(1, 3, 56, 56, generator=generator)}


def arrays() -> dict[str, np.ndarray]:
    """`probe` for the reference."""
    return {name: x.numpy() for name, x in probe().items()}


@pytest.fixture(scope="module")
def expected(tiny) -> torch.Tensor:
    """The logits of `probe`, from the reference."""
    return torch.from_numpy(reference.load(tiny).forward(**arrays()))


# Each pair of values of two parameters occurs at least once, except for the pair of layout and dtype.
@pytest.mark.parametrize(
    ("layout", "shards", "dtype", "lm_head"),
    [
        ("hub", 1, "float32", False),
        ("hub", 3, "bfloat16", True),
        ("flat vision", 3, "float16", False),
        ("flat vision", 1, "bfloat16", True),
        ("model prefix", 1, "float16", True),
        ("model prefix", 3, "float32", False),
        ("state dict 4.52", 3, "float32", True),
        ("state dict 4.52", 1, "bfloat16", False),
        ("state dict 5.8", 1, "float32", True),
        ("state dict 5.8", 3, "float16", False),
    ],
)
def test_layouts_shards_dtypes_and_heads(tmp_path, tokenizer_model, expected, layout, shards, dtype, lm_head):
    options = {"layout": layout, "shards": shards, "dtype": dtype, "lm_head": lm_head}
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, **options)
    for into in TORCH:
        model, _ = load_hf_model(directory, device="cpu", dtype=into)
        state = model.state_dict()
        for name, value in random_weights(TINY).items():
            assert torch.equal(state.pop(name), value.to(TORCH[dtype]).to(TORCH[into])), name
        assert not state
    logits = load_hf_model(directory, device="cpu", dtype="float32")[0](**probe())
    # The logits have an RMS of 1. Rounding the weights to bfloat16 and float16 changed them by 1.6e-2 and
    # 2.3e-3 (RMS), float32 arithmetic by 1.2e-6.
    tolerance = {"float32": 5e-6, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    assert (logits - expected).square().mean().sqrt() < tolerance
    again = torch.from_numpy(reference.load(directory, dtype="float32").forward(**arrays()))
    # 10 times the measured difference of two float32 results.
    torch.testing.assert_close(logits, again, rtol=0, atol=1e-4)


@pytest.mark.parametrize("rows", [1600, 1664])
@pytest.mark.parametrize("stated", [1600, 1664])
def test_vocabularies_with_and_without_the_64_extra_rows(tmp_path, tokenizer_model, expected, rows, stated):
    stored = random_weights(TINY)
    stored[EMBEDDING] = stored[EMBEDDING][:rows].clone()
    config = config_dict(text={"vocab_size": stated})
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config, weights=stored)
    logits = load_hf_model(directory, device="cpu", dtype="float32")[0](**probe())
    assert logits.shape == (1, 23, rows)
    torch.testing.assert_close(logits.double(), expected[..., :rows], rtol=0, atol=1e-4)  # as above
    assert reference.load(directory).forward(**arrays()).shape == (1, 23, rows)


# Checkpoints that transformers writes


@pytest.fixture(scope="module")
def theirs(tiny) -> tuple:
    """A model and a processor of transformers."""
    import transformers

    tokenizer = transformers.GemmaTokenizer.from_pretrained(tiny)
    image_processor = transformers.SiglipImageProcessorPil.from_pretrained(tiny)
    processor = transformers.PaliGemmaProcessor(image_processor, tokenizer)
    peer = transformers.PaliGemmaForConditionalGeneration.from_pretrained(tiny, dtype=torch.float32)
    # Its tokenizer adds <mask> if that is missing, and <image> after it.
    peer.config.image_token_index = processor.image_token_id
    return peer, processor


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # in its processor
@pytest.mark.parametrize("form", ["original names", "new names", "shards", "state dict", "bfloat16"])
def test_directories_that_transformers_wrote(tmp_path, theirs, form):
    peer, processor = theirs
    processor.save_pretrained(tmp_path)
    if form == "bfloat16":
        copy.deepcopy(peer).to(torch.bfloat16).save_pretrained(tmp_path)
        peer = type(peer).from_pretrained(tmp_path, dtype=torch.float32)
    else:
        size = "200KB" if form == "shards" else "5GB"
        peer.save_pretrained(tmp_path, save_original_format=form != "new names", max_shard_size=size)
    if form == "state dict":
        tensors = {name: value.clone() for name, value in peer.state_dict().items()}
        save_file(tensors, tmp_path / "model.safetensors")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"processor_config.json", "tokenizer.json"} <= names
    assert not {"tokenizer.model", "preprocessor_config.json"} & names
    assert ("model.safetensors.index.json" in names) == (form == "shards")

    model, ours = load_hf_model(tmp_path, device="cpu", dtype="float32")
    image = photo(90, 60)
    inputs = ours(text=["detect cat"], images=[image])
    expected = processor(text="<image>detect cat", images=image, return_tensors="pt")
    for name in inputs:
        assert torch.equal(inputs[name], expected[name]), name
    with torch.no_grad():
        logits = peer(**expected).logits
    # Two float32 results of RMS 1 differed by 2e-5.
    torch.testing.assert_close(model(**inputs), logits, rtol=0, atol=1e-4)


def test_a_model_that_transformers_made_from_a_config(tmp_path, tiny):
    import transformers

    config = transformers.PaliGemmaConfig(
        text_config=transformers.GemmaConfig(**TINY["text_config"]),
        vision_config=transformers.SiglipVisionConfig(**TINY["vision_config"]),
        image_token_index=IMAGE_TOKEN,
        projection_dim=88,
    )
    peer = transformers.PaliGemmaForConditionalGeneration(config).eval()
    peer.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes((tiny / "tokenizer.model").read_bytes())
    with torch.no_grad():
        logits = peer(**probe(), token_type_ids=torch.zeros(1, 23, dtype=torch.int64)).logits
    model, _ = load_hf_model(tmp_path, device="cpu", dtype="float32")
    # Its initial weights give logits of RMS 0.2.
    torch.testing.assert_close(model(**probe()), logits, rtol=0, atol=1e-5)


# Conversion


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bits of the values; those of every NaN are equal."""
    integers = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.nan_to_num(nan=12345.0, posinf=float("inf"), neginf=float("-inf")).view(integers)


@pytest.mark.parametrize("into", TORCH)
@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("chunk", [8, 24, 1 << 26])  # bytes of one float64, of some values, of all values
def test_conversion_is_torchs(tmp_path, monkeypatch, stored, into, chunk):
    monkeypatch.setattr(reading, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    tensors, file = {}, tmp_path / "model.safetensors"
    for i, shape in enumerate([(1,), (7,), (3, 5), (1, 13, 1, 1), (1021,)]):
        # Random bits: among the values are NaN, infinity and denormal numbers.
        random_bits = rng.integers(0, 256, (*shape, STORED[stored].itemsize), dtype=np.uint8)
        tensors[str(i)] = torch.from_numpy(random_bits).view(STORED[stored]).squeeze(-1)
    # Halfway between neighbouring bfloat16 and float16 values.
    one = 0x3F800000
    halfway = torch.arange(one - 0x28000, one + 0x28000, 0x800, dtype=torch.int32).view(torch.float32)
    largest = torch.tensor([65519.9, 65520.0, 3.4e38])
    tensors["halfway"] = torch.cat([halfway, -halfway, halfway * 2.0**-20, largest]).to(STORED[stored])
    save_file(tensors, file)

    read = reading.read({t.name: t for t in read_header(file)}, CPU, TORCH[into])
    for name, value in tensors.items():
        assert (read[name].dtype, read[name].shape) == (TORCH[into], value.shape)
        assert torch.equal(bits(read[name]), bits(value.to(TORCH[into]))), name


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1000)}, file)
    (tensor,) = read_header(file)
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(PaliGemmaError, match=r"model\.safetensors ended while it was read"):
        reading.read({"a": tensor}, CPU, torch.bfloat16)


# Memory


@pytest.mark.parametrize("dtype", TORCH)
def test_each_parameter_is_there_once_and_needs_no_gradient(tmp_path, tokenizer_model, dtype):
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, lm_head=True)
    model, _ = load_hf_model(directory, device="cpu", dtype=dtype)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected_shapes(model.config).keys()
    assert not dict(model.named_buffers())
    places = sorted((p.data_ptr(), p.data_ptr() + p.nbytes) for p in parameters.values())
    assert all(end <= start for (_, end), (start, _) in pairwise(places))  # no two overlap
    assert not any(p.requires_grad for p in parameters.values())
    assert not model(**probe()).requires_grad
    assert not model.training


LOAD = """
import json, sys
import torch
from paligemma import cpu_linear, load_hf_model
from paligemma.checkpoint.quantize import quantized
from paligemma.layers import QUANTIZED

def memory(kind):  # bytes; getrusage's maximum would include that of the parent process
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind)) * 1024

warm, mapped, converted, quantize = sys.argv[1:]
load_hf_model(warm, device="cpu", dtype="bfloat16")  # imports and threads
cpu_linear.numba_fault()  # a larger model imports Numba
if quantize:
    for kind in ("int8", quantize):  # of the head, and of the matrices
        quantized(torch.zeros(1024, 1024).bfloat16(), QUANTIZED[kind], torch.bfloat16)
    before = memory("VmRSS")
    model, _ = load_hf_model(mapped, device="cpu", dtype="bfloat16", quantize=quantize)
    result = {"peak": memory("VmHWM") - before, "held": memory("VmRSS") - before}
    made = (p.nbytes for name, p in model.named_parameters() if "scale" in name or not p.is_floating_point())
    result["weights"] = sum(made)
    print(json.dumps(result))
    sys.exit()
before = memory("RssAnon")
model, _ = load_hf_model(mapped, device="cpu", dtype="bfloat16")
result = {"mapped": memory("RssAnon") - before}
del model
before = memory("VmRSS")
model, _ = load_hf_model(converted, device="cpu", dtype="bfloat16")
result["peak"] = memory("VmHWM") - before
result["weights"] = sum(p.nbytes for p in model.parameters())
print(json.dumps(result))
"""


@pytest.fixture
def measured(tmp_path, tiny, tokenizer_model):
    """A function that loads a model in a new process, and returns the bytes that this took."""
    config = config_dict(
        text={"hidden_size": 512, "intermediate_size": 36000, "num_hidden_layers": 2, "vocab_size": 36000}
    )
    for name, dtype in (("converted", "F32"), ("mapped", "BF16")):
        directory = write_checkpoint(tmp_path / name, tokenizer_model)
        (directory / "config.json").write_text(json.dumps(config))
        shapes = expected_shapes(PaliGemmaConfig.from_dict(config)).items()
        write_zeros(directory / "model.safetensors", {tensor: (dtype, shape) for tensor, shape in shapes})
    paths = [str(path) for path in (tiny, tmp_path / "mapped", tmp_path / "converted")]

    def load(quantize: str = "") -> SimpleNamespace:
        command = [sys.executable, "-c", LOAD, *paths, quantize]
        root = Path(__file__).parent.parent
        run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
        return SimpleNamespace(**json.loads(run.stdout))

    return load


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_quantising_takes_the_memory_of_the_result_and_one_matrix(measured, quantize):
    took, matrix = measured(quantize), 2 * 512 * 36000
    assert took.weights > (110e6 if quantize == "int8" else 55e6)
    assert took.weights < took.peak < 1.1 * took.weights + 1.2 * matrix
    assert took.held < 1.1 * took.weights + 10e6, "a matrix that was quantised stays mapped"


def test_loading_takes_the_memory_of_the_weights_and_one_buffer(measured):
    measured = measured()
    assert measured.weights > 220e6  # the file has twice as many bytes; a tensor has 74 MB, more than CHUNK
    assert measured.weights < measured.peak < 1.1 * measured.weights + reading.CHUNK
    assert measured.mapped < 0.1 * measured.weights, "weights that need no conversion stay in their file"


# Options


DEVICES = ["gpu", "mps", "meta", "", "cuda:x", None, 1.5, torch.device("meta")]


@pytest.mark.parametrize("device", DEVICES, ids=repr)
def test_devices_that_are_not_supported(tiny, device):
    with pytest.raises(PaliGemmaError, match=rf"^device is '{device}'; it must be auto, cuda or cpu$"):
        load_hf_model(tiny, device=device)


@pytest.mark.parametrize("device", ["cuda", "cuda:0", torch.device("cuda")], ids=str)
def test_cuda_without_a_gpu(tiny, monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says = rf"^device is '{device}', and this torch sees no CUDA GPU: use cpu"
    with pytest.raises(PaliGemmaError, match=says):
        load_hf_model(tiny, device=device)


def test_a_gpu_that_does_not_exist(tiny, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(PaliGemmaError, match=r"^device is 'cuda:2'; there are 2, from cuda:0$"):
        load_hf_model(tiny, device="cuda:2")


DTYPES = ["float64", "bf16", "", None, torch.float64, torch.int8, "torch.int8"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_that_are_not_supported(tiny, dtype):
    with pytest.raises(PaliGemmaError, match=r"^dtype is '.*'; it must be auto, float32, float16, bfloat16$"):
        load_hf_model(tiny, device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("dtype", "meant"),
    [
        ("auto", "bfloat16"), ("float16", "float16"), (torch.float32, "float32"),
        ("torch.bfloat16", "bfloat16"),
    ],
)  # fmt: skip
def test_dtypes(tiny, dtype, meant):
    model, _ = load_hf_model(str(tiny), device=CPU, dtype=dtype)
    assert model.dtype == TORCH[meant]


def test_the_interpreter_is_not_trusted_with_bfloat16(tiny):
    with pytest.raises(PaliGemmaError, match="use float32"):
        load_hf_model(tiny, device="cpu", dtype="bfloat16", backend="triton")
    assert load_hf_model(tiny, device="cpu", dtype="float32", backend="triton")[0].backend == "triton"


@pytest.mark.parametrize("backend", ["cuda", "numpy", "reference", "", None])
def test_backends_that_do_not_exist(tiny, backend):
    with pytest.raises(PaliGemmaError, match=rf"^backend is {backend!r}; "):
        load_hf_model(tiny, device="cpu", backend=backend)


@pytest.mark.parametrize("quantize", [None, "int8", "fp8", "int4"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_weights_that_one_product_reads_share_an_allocation(tmp_path, tokenizer_model, stored, quantize):
    """q, k and v are views of one allocation, gate and up of another, under their own names and also after a
    conversion of the model; the torch backend on a CPU leaves them in their file."""
    config = config_dict(**WHOLE_GROUPS)
    directory = write_checkpoint(tmp_path / "model", tokenizer_model, config=config, dtype=stored)
    apart, together = (
        load_hf_model(directory, device="cpu", dtype="float32", quantize=quantize, backend=backend)[0]
        for backend in ("torch", "triton")
    )
    names = apart.state_dict().keys()
    assert names == together.state_dict().keys() == dict(together.named_parameters()).keys()
    for name, value in apart.state_dict().items():
        assert torch.equal(together.state_dict()[name], value), name
    for converted in (False, True):
        model = together.to(torch.float64) if converted else together
        groups, config = list(model.packable()), model.config
        assert (
            len(groups) == 2 * config.text_config.num_hidden_layers + config.vision_config.num_hidden_layers
        )
        for group in groups:
            for name in ("weight", "weight_scale", "bias"):
                parts = [part for linear in group if (part := getattr(linear, name)) is not None]
                if not parts:
                    continue
                whole = packed(*parts)
                assert whole is not None
                assert torch.equal(whole, torch.cat(parts))
                assert whole.untyped_storage().nbytes() == whole.nbytes
    assert quantize or stored != "float32" or not any(is_packed(group) for group in apart.packable())


def test_only_adjacent_parts_are_packed():
    whole = torch.arange(24).view(6, 4)
    first, second, third = whole.split([1, 3, 2])
    assert torch.equal(packed(first, second, third), whole)
    assert torch.equal(packed(second, third), whole[1:])
    columns = (whole[:, :2], whole[:, 2:])
    for parts in ((second, first), (first, third), (first, second.clone()), columns, (first, whole[1:, :2])):
        assert packed(*parts) is None


@pytest.mark.parametrize("name", ["model", "adapter", "tokenizer"])
def test_an_empty_name_is_not_a_directory(tiny, name):
    with pytest.raises(PaliGemmaError, match=f"the {name} (is an empty string|  ?does not exist)"):
        load_hf_model(**{"model": tiny, "device": "cpu"} | {name: ""})
