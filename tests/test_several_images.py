"""Several images a prompt: the layout, the numbers of both models, ragged batches, and the command lines."""

import json
import re

import numpy as np
import pytest
import torch
from checkpoints import GEMMA_2, IMAGE_TOKEN, batch, config_dict, torch_inputs, write_checkpoint
from command_line import assert_one_line, run
from conftest import photo
from rule import DTYPES

from paligemma import PaliGemmaError, compare, load_hf_model, reference
from paligemma.compare import Judge
from paligemma.config import PaliGemmaConfig
from paligemma.processor import Processor
from paligemma.tokenizer import Tokenizer

SHAPES = {"PaliGemma": {}, "PaliGemma 2": GEMMA_2, "a window": {**GEMMA_2, "sliding_window": 7}}
BOTH = ["PaliGemma", "PaliGemma 2"]
RAGGED = [2, 0, 1, 3]  # images of the rows


@pytest.fixture(scope="module")
def directory(request, tmp_path_factory, tokenizer_model):
    config = config_dict(text=SHAPES[request.param])
    return write_checkpoint(tmp_path_factory.mktemp("images") / "model", tokenizer_model, config=config)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Three images of different sizes."""
    root = tmp_path_factory.mktemp("files")
    for n, size in enumerate([(90, 60), (40, 50), (30, 30)]):
        photo(*size, seed=n).save(root / f"{n}.png")
    return [root / f"{n}.png" for n in range(3)]


def ragged(config, padding: str = "left") -> dict[str, np.ndarray]:
    return batch(config, [1, 9, 4, 2], [0, 2, 6, 1], padding, images=RAGGED)


def judged(logits: torch.Tensor, directory, inputs: dict, dtype: str) -> int:
    """0 if the logits keep the rule, 1 if not."""
    valid = inputs["attention_mask"].astype(bool)
    yardstick = {"logits": reference.load(directory, dtype=dtype).forward(**inputs)[valid]}
    judge = Judge({"logits": logits.numpy()[valid]}, yardstick, dtype)
    judge["logits"] = reference.load(directory).forward(**inputs)[valid]
    return judge.report()


# The processor.


def test_images_come_one_after_the_other_before_the_text(tiny, files):
    processor = Processor.load(tiny)
    a, b, c = (photo(*size, seed=n) for n, size in enumerate([(90, 60), (40, 50), (30, 30)]))
    arrays = processor.arrays(["a cat", "", "what"], [[a, b], [], files[2]])
    one = processor.arrays("a cat", [a])["input_ids"][0].tolist()
    assert arrays["input_ids"][0].tolist() == [IMAGE_TOKEN] * 16 + one  # one <bos>, after all images
    counts = (arrays["input_ids"] == IMAGE_TOKEN).sum(axis=1)
    assert counts.tolist() == [32, 0, 16]
    expected = np.stack([processor.pixels(image) for image in (a, b, c)])
    np.testing.assert_array_equal(arrays["pixel_values"], expected, strict=True)
    assert not np.array_equal(expected[0], expected[1])
    nested, flat = processor.arrays("a cat", [[a]]), processor.arrays("a cat", a)
    for name, array in flat.items():
        np.testing.assert_array_equal(nested[name], array, strict=True)
    assert processor.arrays("a", [[]])["pixel_values"].shape == (0, 3, 56, 56)
    assert processor(["a"], [(a, b)])["pixel_values"].shape == (2, 3, 56, 56)


class Unopened:
    def read(self, *_):
        raise AssertionError("an image was opened before the lengths were checked")


@pytest.mark.parametrize(("count", "most"), [(6, 5), (5, None), (1000, 5), (0, None)])
def test_images_that_do_not_fit_are_refused_before_they_are_opened(tokenizer_model, count, most):
    config = PaliGemmaConfig.from_dict(config_dict(text={"max_position_embeddings": 5 * 16 + 3}))
    processor = Processor(Tokenizer(tokenizer_model, config), config, {})
    if most is None:
        shape = processor.arrays("a", [[photo(9, 9)] * count])["input_ids"].shape
        assert shape == (1, 16 * count + 3)
        return
    message = (
        f"{count} images of 16 tokens and 3 of text take {16 * count + 3} positions; this model has 83: "
        f"with this text, give at most {most} images"
    )
    with pytest.raises(PaliGemmaError, match=f"^{message}$"):
        processor.arrays("a", [[Unopened()] * count])


def test_a_prompt_without_an_image_that_is_too_long(tokenizer_model):
    config = PaliGemmaConfig.from_dict(config_dict(text={"max_position_embeddings": 20}))
    processor = Processor(Tokenizer(tokenizer_model, config), config, {})
    with pytest.raises(PaliGemmaError, match=r"^the prompt is 22 tokens; this model takes at most 20$"):
        processor.arrays("<loc0000>" * 20, [[]])


@pytest.mark.parametrize(("images", "message"), [
    ([photo(9, 9)] * 2, r"1 prompt and 2 images: there must .* are a list in the list: \[\[a, b\]\]"),
    ([[["a.png"]]], "the image is a list"),
    ([["missing.png", photo(9, 9)]], r"missing\.png: there is no such file"),
])  # fmt: skip
def test_lists_that_are_refused(tiny, images, message):
    with pytest.raises(PaliGemmaError, match=message):
        Processor.load(tiny).arrays("a", images)


# The models.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("directory", SHAPES, indirect=True)
def test_logits_keep_the_rule(directory, dtype, padding):
    model, _ = load_hf_model(directory, dtype=dtype)
    inputs = ragged(model.config, padding)
    assert judged(model(**torch_inputs(inputs)), directory, inputs, dtype) == 0


@pytest.mark.parametrize("mistake", ["order", "place", "rows"])
@pytest.mark.parametrize("directory", BOTH, indirect=True)
def test_planted_mistakes_are_found(directory, mistake, monkeypatch):
    model, _ = load_hf_model(directory, dtype="float32")
    inputs = ragged(model.config)
    right, unpad = torch_inputs(inputs), model.unpad

    def wrong(*args):
        rows, pixels = unpad(*args)
        patch = rows.patch.clone()
        if mistake == "order":  # the two images of the first row change places
            pixels = pixels[[1, 0, *range(2, len(pixels))]]
        elif mistake == "place":  # the second image's patches at the first's place
            patch[0, :16] = patch[0, 16:32]
        else:  # each row reads from the first image on
            patch = torch.where(patch >= 0, patch - patch.max(dim=1, keepdim=True).values + 15, patch)
            patch = torch.where(rows.patch >= 0, patch.clamp(min=0), -1)
        return rows._replace(patch=patch), pixels

    monkeypatch.setattr(model, "unpad", wrong)
    assert judged(model(**right), directory, inputs, "float32") == 1


@pytest.mark.parametrize("directory", SHAPES, indirect=True)
def test_greedy_tokens_are_the_references(directory):
    model, _ = load_hf_model(directory, dtype="float32")
    inputs = ragged(model.config)
    expected = reference.load(directory).generate(**inputs, max_new_tokens=12, eos_token_id=-1)
    tokens = model.generate(**torch_inputs(inputs), max_new_tokens=12, eos_token_id=-1)
    assert len(np.unique(expected)) > 15, "these weights repeat few tokens, so the comparison shows nothing"
    assert (tokens.numpy() == expected).all()
    columns = list(model.stream(**torch_inputs(inputs), max_new_tokens=12, eos_token_id=-1))
    assert torch.equal(torch.stack(columns, dim=1), tokens)


@pytest.mark.parametrize("directory", ["PaliGemma", "a window"], indirect=True)
def test_the_kernels(directory):
    model, _ = load_hf_model(directory, dtype="float32", backend="triton", device="cpu")
    inputs = batch(model.config, [1, 4], [0, 2], images=[2, 1])
    assert judged(model(**torch_inputs(inputs)), directory, inputs, "float32") == 0
    options = {"max_new_tokens": 4, "eos_token_id": -1}
    tokens = model.generate(**torch_inputs(inputs), **options)
    assert (tokens.numpy() == reference.load(directory).generate(**inputs, **options)).all()


def rows_alone(inputs: dict[str, np.ndarray]):
    """The inputs of each row without padding, with its images only."""
    ends = np.cumsum(RAGGED)
    for b, (end, count) in enumerate(zip(ends, RAGGED, strict=True)):
        valid = inputs["attention_mask"][b].astype(bool)
        row = {name: x[b : b + 1, valid] for name, x in inputs.items() if name != "pixel_values"}
        yield b, valid, row | {"pixel_values": inputs["pixel_values"][end - count : end]}


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("directory", BOTH, indirect=True)
def test_a_row_is_what_it_is_alone(directory, padding):
    model, _ = load_hf_model(directory, dtype="float32")
    inputs = ragged(model.config, padding)
    together, tokens = model(**torch_inputs(inputs)), model.generate(**torch_inputs(inputs), max_new_tokens=8)
    for b, valid, alone in rows_alone(inputs):
        logits = model(**torch_inputs(alone))
        # The tolerance is for float32 rounding: the sums are the same over tiles of other sizes.
        torch.testing.assert_close(together[b, valid], logits[0], atol=2e-5, rtol=0)
        row = model.generate(**torch_inputs(alone), max_new_tokens=8)[0]
        assert torch.equal(tokens[b, : len(row)], row)


@pytest.mark.parametrize("directory", BOTH, indirect=True)
def test_images_matter_and_so_does_their_order(directory):
    model, _ = load_hf_model(directory, dtype="float32")
    inputs = torch_inputs(batch(model.config, [6], [0], images=[3]))
    logits = model(**inputs)
    for order in ([1, 0, 2], [0, 2, 1], [0, 0, 2]):
        changed = model(**inputs | {"pixel_values": inputs["pixel_values"][order]})
        assert (changed - logits)[0, -1].abs().max() > 0.01


@pytest.mark.parametrize(("images", "row"), [(1, 32), (3, 32), (2, 31), (0, 32), (2, 48)])
def test_counts_that_do_not_agree(tiny, images, row):
    ids, pixels = [[IMAGE_TOKEN] * row + [2, 4]], np.zeros((images, 3, 56, 56), np.float32)
    message = re.escape(f"hold [{row}] <image> tokens, for {images} images; each image has 16")
    for model in (load_hf_model(tiny)[0], reference.load(tiny)):
        with pytest.raises(PaliGemmaError, match=message):
            model.generate(ids, pixels)


def test_half_an_image_in_each_of_two_rows(tiny):
    ids = [[IMAGE_TOKEN] * 8 + [2, 4]] * 2
    for model in (load_hf_model(tiny)[0], reference.load(tiny)):
        with pytest.raises(PaliGemmaError, match=r"hold \[8, 8\] <image> tokens, for 1 images"):
            model.generate(ids, np.zeros((1, 3, 56, 56), np.float32))


def test_images_and_new_tokens_beyond_the_positions(tiny):
    model, _ = load_hf_model(tiny)
    inputs = torch_inputs(batch(model.config, [4], [0], images=[511]))
    with pytest.raises(
        PaliGemmaError, match=r"take 8199 positions; this model has 8192: .*give fewer images"
    ):
        model.generate(**inputs, max_new_tokens=20)


# transformers, which has an implementation of its own.


@pytest.fixture
def peer(directory):
    from transformers import PaliGemmaForConditionalGeneration

    return PaliGemmaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


@pytest.mark.parametrize("directory", BOTH, indirect=True)
def test_nested_lists_are_transformers(directory, peer):
    """Its processor and its model, on the same nested lists."""
    from test_processor import peer_images
    from transformers import GemmaTokenizer, PaliGemmaProcessor

    model, processor = load_hf_model(directory, dtype="float32")
    theirs = PaliGemmaProcessor(peer_images(56), GemmaTokenizer.from_pretrained(directory))
    images = [photo(40 + 5 * n, 50, seed=n) for n in range(6)]
    nested, prompts = [images[:2], images[2:3], [], images[3:]], ["detect cat", "", "a dog", "what is this"]
    ours = processor(prompts, nested)
    wanted = theirs(text=prompts, images=nested, padding=True, return_tensors="pt")
    # The test's tokenizer has no <mask>, so transformers gives the next id to <image>.
    wanted["input_ids"][wanted["input_ids"] == theirs.image_token_id] = IMAGE_TOKEN
    for name, value in ours.items():
        torch.testing.assert_close(value, wanted[name], atol=0, rtol=0, check_dtype=False)
    valid = ours["attention_mask"].bool()
    names = ("input_ids", "attention_mask", "pixel_values", "token_type_ids")
    with torch.no_grad():
        logits = peer(**{name: wanted[name] for name in names}).logits.float()
    # Float32 rounding of both; two images that change places move the logits by 0.01 and more.
    torch.testing.assert_close(model(**ours)[valid], logits[valid], atol=1e-4, rtol=0)


# The command lines.


def line(model, images, *args) -> list:
    return [
        "--model",
        model,
        "--image",
        *images,
        "--prompt",
        "a cat",
        "--no-sample",
        "--max-new-tokens",
        6,
        *args,
    ]


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_generate_answers_about_all_images(tiny, files, backend):
    processor = Processor.load(tiny)
    inputs = processor.arrays("a cat", [files])
    (ids,) = reference.load(tiny, dtype="float32").generate(**inputs, max_new_tokens=6)
    options = ["--backend", backend, "--dtype", "float32", "--json"]
    done = run(*line(tiny, files, *options))
    assert done.code == 0, done.err
    answer = json.loads(done.text)
    assert answer["tokens"] == ids.tolist()
    assert "image" not in answer
    assert answer["images"] == [{"width": w, "height": h} for w, h in ((90, 60), (40, 50), (30, 30))]
    piped = run(*line(tiny, [files[0], "-"], "--image", files[2], *options), stdin=files[1].read_bytes())
    assert json.loads(piped.text)["tokens"] == ids.tolist()
    alone = json.loads(run(*line(tiny, files[:1], *options)).text)
    assert list(alone)[:3] == ["model", "image", "prompt"]
    assert alone["tokens"] != ids.tolist()


@pytest.mark.parametrize(("args", "message", "code"), [
    (["--draw", "out.png"], "--draw and --masks are for one image, and one prompt is about 3: leave", 2),
    (["--masks", "out"], "--draw and --masks are for one image", 2),
    (["--video", "clip.mp4"], "argument --video: not allowed with argument --image", 2),
    (["--frames", "4"], "--frames goes with --video", 2),
    (["--image", "-", "-"], "--image has - twice, and stdin has one image: give the path of the other", 1),
    (["--image", "missing.png"], "missing.png: there is no such file", 1),
])  # fmt: skip
def test_command_lines_that_are_refused(tiny, files, args, message, code):
    assert_one_line(run(*line(tiny, files, *args)), message, code=code)


def test_too_many_images_for_the_model(tmp_path, tokenizer_model, files):
    config = config_dict(text={"max_position_embeddings": 60})
    directory = write_checkpoint(tmp_path / "short", tokenizer_model, config=config)
    done = run(*line(directory, [*files, files[0]]))
    taken = "4 images of 16 tokens and 4 of text take 68 positions; this model has 60"
    assert_one_line(done, f"{taken}: with this text, give at most 3 images", code=1)
    many = run(*line(directory, ["no such file"] * 33))
    assert_one_line(
        many, "--image has 33 images, and a prompt is about at most 32", "python -m paligemma.batch"
    )


def test_compare_takes_several_images(tiny, files, capsys):
    args = ["--model", tiny, "--image", *files, "--prompt", "a cat", "--dtype", "float32"]
    assert compare.main([str(arg) for arg in args]) == 0
    printed = capsys.readouterr().out
    assert "(3, 16, 72)" in printed  # the vision tower's results for three images
    assert "0 exceed the rule" in printed
