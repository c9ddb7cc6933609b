"""Parsing tokens to objects: as the published code does, which is reimplemented here, and for any stream."""

import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from checkpoints import batch, config_dict, torch_inputs
from command_line import ROOT, environment
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from supervision import Detections

from paligemma import PaliGemmaError, demo, load_hf_model, reference
from paligemma.answers.parsing import Answer, Object, parse
from paligemma.config import PaliGemmaConfig
from paligemma.processor import Processor
from paligemma.tokenizer import Tokenizer

SIZES = [(64, 64), (300, 200), (200, 301), (1, 1), (4000, 3000), (17, 1023)]  # width, height
BOX = "<loc0100><loc0200><loc0700><loc0900>"
SEG = "".join(f"<seg{i:03}>" for i in range(16))
ONE_ROW = "it must be one row of numbers: give the rows one by one"


@pytest.fixture(scope="module")
def tokenizer(tokenizer_model) -> Tokenizer:
    return Tokenizer(tokenizer_model, PaliGemmaConfig.from_dict(config_dict()))


def read(tokenizer: Tokenizer, text: str, size=(300, 200), **options) -> Answer:
    return parse(tokenizer, tokenizer.encode(text), size, **options)


def said(answer: Answer) -> list[tuple]:
    """Label and box of its objects."""
    return [(o.label, o.box) for o in answer.objects]


def full_masks(codes: np.ndarray) -> np.ndarray:
    """A mask decoder whose masks fill their boxes."""
    return np.ones((len(codes), 64, 64))


# The parts of an answer


def test_several_objects_with_a_mask_and_text_between_them(tokenizer):
    answer = read(tokenizer, f"look: {BOX}{SEG} red cat ; <loc0000><loc0000><loc1023><loc1023> dog; a tree")
    assert [type(part).__name__ for part in answer.parts] == ["Text", "Object", "Object", "Text"]
    assert said(answer) == [("red cat", (59, 20, 264, 137)), ("dog", (0, 0, 300, 200))]
    assert [o.codes for o in answer.objects] == [tuple(range(16)), ()]
    objects = [f"{BOX}{SEG} red cat ; ", "<loc0000><loc0000><loc1023><loc1023> dog; "]
    assert [part.text for part in answer.parts] == ["look: ", *objects, "a tree"]
    assert answer.faults == []


@pytest.mark.parametrize("size", SIZES[1:3])
@pytest.mark.parametrize("text", [BOX, f"{BOX} ", f"{BOX}{SEG}", f" {BOX} ; "])
def test_without_a_label(tokenizer, text, size):
    answer = read(tokenizer, text, size)
    assert [o.label for o in answer.objects] == [""]
    assert answer.faults == []


def test_one_after_the_other_without_a_semicolon(tokenizer):
    assert [o.label for o in read(tokenizer, f"{BOX} cat {BOX}{SEG} dog").objects] == ["cat", "dog"]
    assert [o.label for o in read(tokenizer, f"{BOX}{BOX}{BOX} cat").objects] == ["", "", "cat"]
    assert [bool(o.codes) for o in read(tokenizer, f"{BOX}{SEG}{BOX}{SEG}").objects] == [True, True]


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("<loc0100><loc0200><loc0700> cat", "3 <loc> tokens where a box has 4"),
        ("<loc0100>", "1 <loc> token where a box has 4"),
        (f"{BOX}<loc0100> cat", "5 <loc> tokens where a box has 4"),
        (f"{BOX}{SEG[:-8]} cat", "15 <seg> tokens where a mask has 16"),
        (f"{BOX}{SEG}<seg000> cat", "17 <seg> tokens where a mask has 16"),
        (f"{SEG} cat", "16 <seg> tokens without a box"),
        ("<loc0700><loc0200><loc0100><loc0900> cat", "the second corner is not below and right of the first"),
        ("<loc0100><loc0900><loc0700><loc0200> cat", "the second corner is not below and right of the first"),
        ("<loc0100><loc0200><loc0100><loc0900> cat", "the second corner is not below and right of the first"),
        ("<loc0100><loc0200><loc0101><loc0900> cat", "the box is less than a pixel of 300 x 200"),
    ],
)
def test_what_is_malformed_stays_text_and_is_reported(tokenizer, text, fault):
    answer = read(tokenizer, f"{BOX} dog ; {text} ; {BOX} star")
    assert [o.label for o in answer.objects] == ["dog", "star"]
    assert [(part.text, part.fault) for part in answer.faults] == [(f"{text} ; ", fault)]


def test_what_only_spells_a_box_is_text(tokenizer):
    ids = [i for character in f"{BOX} cat" for i in tokenizer.encode(character)]
    answer = parse(tokenizer, ids, (300, 200))
    assert (answer.text, answer.objects, answer.faults) == (f"{BOX} cat", [], [])


def test_an_answer_ends_with_its_end_token(tokenizer):
    ids = [*tokenizer.encode(f"{BOX} cat"), 1, 0, 0, *tokenizer.encode(f" ; {BOX} dog")]
    answer = parse(tokenizer, ids, (300, 200), [-1.0] * len(ids))
    assert ([o.label for o in answer.objects], answer.text) == (["cat"], f"{BOX} cat")


@pytest.mark.parametrize("make", [list, np.array, torch.tensor], ids=["list", "array", "tensor"])
def test_ids_and_log_probs_of_any_kind(tokenizer, make):
    ids = tokenizer.encode(f"{BOX} cat")
    values = [-0.5] * len(ids)
    for row, log_probs in ((ids, values), ([ids], [values])):  # (N,), and (1, N) as generate returns it
        answer = parse(tokenizer, make(row), (300, 200), make(log_probs))
        assert said(answer) == [("cat", (59, 20, 264, 137))]
        assert answer.objects[0].score == pytest.approx(np.exp(-0.5 * (0.25 + len(ids) - 4)))


def test_lists_of_tensors(tokenizer):
    ids = tokenizer.encode(f"{BOX} cat")
    steps = [torch.tensor([-0.5]) for _ in ids]  # as log_probs receives them, for one row
    (one,) = parse(tokenizer, [torch.tensor(i) for i in ids], (300, 200), steps).objects
    (other,) = parse(tokenizer, ids, (300, 200), [-0.5] * len(ids)).objects
    assert one.score == other.score
    for empty in ([], torch.zeros(1, 0, dtype=torch.int64)):
        assert parse(tokenizer, empty, (300, 200)).text == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bins": 1000}, "bins is 1000; it must be 1024, or 1023"),
        ({"image_size": (0, 10)}, r"image_size is \(0, 10\); it must be the width and the height"),
        ({"image_size": (10, 10, 3)}, r"image_size is \(10, 10, 3\)"),
        ({"image_size": (10, 10.5)}, r"image_size is \(10, 10.5\)"),
        ({"image_size": 10}, "image_size is 10; it must be the width and the height"),
        ({"image_size": ("10", "10")}, r"image_size is \('10', '10'\)"),
        ({"image_size": None}, "image_size is None"),
        ({"image_size": Image.new("RGB", (9, 9))}, "image_size is <PIL"),
        ({"log_probs": [-1.0]}, "1 log_probs for 2 ids"),
        (
            {"log_probs": [[-1.0, -1.0], [0.0, 0.0]]},
            rf"log_probs is \[\[-1.0, -1.0\], \[0.0, 0.0\]\]; {ONE_ROW}",
        ),
        ({"log_probs": 3}, "log_probs is 3; it must be one row of numbers"),
        ({"ids": torch.zeros(2, 3, dtype=torch.int64)}, "the token ids are 2 rows: give one row at a time"),
        ({"ids": np.zeros((1, 1, 3), int)}, "the token ids contain"),
        ({"ids": [1.5]}, "the token ids contain 1.5; they must be whole numbers"),
        ({"ids": "<loc0001>"}, "the token ids contain '<loc0001>'; they must be whole numbers"),
        ({"ids": None}, "the token ids contain None"),
    ],
)
def test_arguments_that_are_invalid(tokenizer, change, message):
    with pytest.raises(PaliGemmaError, match=message):
        parse(**({"tokenizer": tokenizer, "ids": [5, 6], "image_size": (10, 10)} | change))


# The published code, reimplemented: a regular expression over the text, as on the hub, and the evaluator's
# arithmetic


def published(text: str, size: tuple[int, int], bins: int) -> list[tuple]:
    """Label, box and the bins of each mask. Google's evaluator leaves out boxes without a pixel."""
    width, height = size
    found = []
    for match in re.finditer(r"((?:<loc\d{4}>){4})\s*((?:<seg\d{3}>){16})?\s*([^;<>]+)?", text):
        corners = np.array([int(n) for n in re.findall(r"<loc(\d{4})>", match[1])])
        if not (corners[2] > corners[0] and corners[3] > corners[1]):
            continue
        y0, x0, y1, x1 = corners / bins * np.array([height, width, height, width])
        box = tuple(map(int if bins == 1023 else round, (float(v) for v in (x0, y0, x1, y1))))
        if box[2] > box[0] and box[3] > box[1]:
            codes = [int(n) for n in re.findall(r"<seg(\d{3})>", match[2] or "")]
            found.append(((match[3] or "").strip(), box, codes))
    return found


@pytest.mark.parametrize("bins", [1024, 1023])
@pytest.mark.parametrize("size", SIZES)
def test_objects_are_those_of_the_published_code(tokenizer, size, bins):
    rng = np.random.default_rng(sum(size) + bins)
    masks = rng.normal(size=(128, 64, 64)).cumsum(axis=1).astype(np.float32)  # by the first code

    def decoder(codes: np.ndarray) -> np.ndarray:
        return masks[codes[:, 0]]

    pieces = []
    for label in ["cat", "red circle", "", "the dog"] * 15:
        locs = rng.integers(0, 1024, 4)
        if rng.random() < 0.7:
            locs = np.concatenate([np.sort(locs[::2]), np.sort(locs[1::2])])[[0, 2, 1, 3]]
        segs = rng.integers(0, 128, 16) if rng.random() < 0.5 else []
        tokens = [*(f"<loc{n:04}>" for n in locs), *(f"<seg{n:03}>" for n in segs)]
        pieces.append("".join(tokens) + f" {label}".rstrip())
    text = " ; ".join(pieces)
    answer = read(tokenizer, text, size, bins=bins, mask_decoder=decoder)
    assert answer.text == text
    assert [(o.label, o.box, list(o.codes)) for o in answer.objects] == published(text, size, bins)
    assert len(answer.objects) + len(answer.faults) == 60
    for o in answer.objects if size[0] < 1000 else answer.objects[:5]:
        assert (o.mask is None) == (o.codes == ())
        if o.mask is not None:
            x0, y0, x1, y1 = o.box
            whole = np.zeros(size[::-1], bool)
            soft = Image.fromarray(masks[o.codes[0]]).resize([x1 - x0, y1 - y0], Image.BILINEAR)
            whole[y0:y1, x0:x1] = np.asarray(soft) > 0.0
            assert np.array_equal(o.mask, whole)


@pytest.mark.parametrize("size", SIZES[1:3])
def test_boxes_are_exact_to_the_pixel_at_either_convention(tokenizer, size):
    """A box of known pixels, written as in training, is read back to within a pixel."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        x0, y0 = rng.integers(0, size[0] - 40), rng.integers(0, size[1] - 40)
        box = np.array([x0, y0, rng.integers(x0 + 20, size[0] + 1), rng.integers(y0 + 20, size[1] + 1)])
        bins = np.clip(np.round(box / np.array([*size, *size]) * 1023), 0, 1023).astype(int)
        text = "".join(f"<loc{bins[i]:04}>" for i in (1, 0, 3, 2))
        for convention in (1023, 1024):
            (o,) = read(tokenizer, text, size, bins=convention).objects
            assert np.abs(np.array(o.box) - box).max() <= 1


# Any stream of tokens


@pytest.fixture(scope="module")
def alphabet(tokenizer):
    """Streams that resemble answers: boxes, masks, words, bytes, special ids and ids that do not exist."""
    loc, seg = (tokenizer.pieces.piece_to_id(name) for name in ("<loc0000>", "<seg000>"))
    locs, segs = st.integers(loc, loc + 1023), st.integers(seg, seg + 127)
    texts = [" cat", " ;", ";", " ", "\n", "é", "猫", "<", "dog;", "<loc0001", "\t;"]
    words = st.sampled_from(texts).map(tokenizer.encode)
    bytes_ = st.integers(4, 259).map(lambda i: [i])
    anything = st.integers(-3, 1700).filter(lambda i: i != 1).map(lambda i: [i])
    runs = st.one_of(
        st.lists(locs, min_size=4, max_size=4), st.lists(locs, max_size=9),
        st.lists(segs, min_size=16, max_size=16), st.lists(segs, max_size=18),
        words, words, bytes_, anything,
    )  # fmt: skip
    return st.lists(runs, max_size=25).map(lambda runs: [i for run in runs for i in run])


@settings(max_examples=400, deadline=None)
@given(data=st.data(), size=st.sampled_from(SIZES[:4]), bins=st.sampled_from([1023, 1024]))
def test_any_stream_is_read_without_a_loss(tokenizer, alphabet, data, size, bins):
    ids = data.draw(alphabet)
    log_probs = [-n / 1000 for n in range(len(ids))]
    answer = parse(tokenizer, ids, size, log_probs, bins=bins, mask_decoder=full_masks)
    assert answer.text == tokenizer.decode(ids)
    assert "".join(part.text for part in answer.parts) == answer.text
    assert all(part.text for part in answer.parts)
    for o in answer.objects:
        assert 0 <= o.box[0] < o.box[2] <= size[0]
        assert 0 <= o.box[1] < o.box[3] <= size[1]
        assert 0 < o.box_score <= o.box_score**0.25 <= 1
        assert 0 < o.score <= o.label_score <= 1
        assert len(re.findall(r"<loc\d{4}>", o.text)) >= 4  # and more where a label spells one
        assert o.label in o.text
        assert (o.mask is not None) == (len(o.codes) == 16)
    scores = [o.score for o in answer.objects if not o.label]  # each token is less likely than the last
    assert scores == sorted(scores, reverse=True)
    specials = sum(tokenizer.piece(i).startswith(("<loc", "<seg")) for i in ids)
    read_as = sum(4 + len(o.codes) for o in answer.objects)
    assert read_as <= specials
    assert bool(answer.faults) == (read_as < specials)
    answer.detections()


# Scores


def test_the_scores_of_an_object(tokenizer):
    """The score was the product of its two parts until benchmarks/box_scores.py found the fourth root of
    box_score better; the parts are what they were."""
    ids = tokenizer.encode(f"{BOX}{SEG} red cat ; {BOX} ; ")
    text = tokenizer.texts(ids)
    rng = np.random.default_rng(0)
    log_probs = -rng.random(len(ids))
    first, second = parse(tokenizer, ids, (300, 200), log_probs).objects
    semicolon = next(n for n, piece in enumerate(text) if ";" in piece)
    end = max(n for n in range(semicolon) if text[n].strip())
    start = text.index("<loc0100>", semicolon)
    box, label = log_probs[:4].mean(), log_probs[20 : end + 1].sum()
    assert first.box_score == pytest.approx(np.exp(box))
    assert first.label_score == pytest.approx(np.exp(label))
    assert first.score == pytest.approx(np.exp(box / 4 + label))
    assert second.box_score == pytest.approx(np.exp(log_probs[start : start + 4].mean()))
    assert (second.label_score, second.score) == (1, pytest.approx(second.box_score**0.25))
    for o in parse(tokenizer, ids, (300, 200)).objects:
        assert (o.score, o.box_score, o.label_score) == (None, None, None)


def test_a_threshold_keeps_the_right_boxes_of_the_demo():
    """At 0.3, where many people begin."""
    model, processor = load_hf_model("demo", device="cpu")
    picture, log_probs = demo.SAMPLES / "stars.png", []
    ids = model.generate(**processor("detect star", picture), log_probs=log_probs)
    answer = processor.parse(ids[0], Image.open(picture).size, [step[0] for step in log_probs])
    assert len(answer.objects) == 4
    assert all(o.score > 0.4 for o in answer.objects)
    assert all(o.box_score < 0.1 and o.label_score > 0.9 for o in answer.objects)


SAMPLING = {"do_sample": True, "temperature": 3.0, "top_p": 0.7, "seed": 5}


@pytest.mark.parametrize("sampling", [{}, SAMPLING], ids=["greedy", "sampled"])
def test_log_probs_are_those_of_the_reference(tiny, sampling):
    """In a ragged batch whose rows end at different tokens. The truth is the reference's `forward` with the
    answer as a suffix."""
    model, _ = load_hf_model(tiny, dtype="float32", device="cpu")
    true = reference.load(tiny)
    inputs = batch(model.config, [5, 9, 2], [0, 0, 0])
    inputs.pop("token_type_ids")
    told: list[torch.Tensor] = []
    plain = model.generate(**torch_inputs(inputs), max_new_tokens=12, **sampling)
    options = {"max_new_tokens": 12, "eos_token_id": int(plain[0, 4]), **sampling}  # rows end early
    ids = model.generate(**torch_inputs(inputs), log_probs=told, **options).numpy()
    own = torch.stack(told, dim=1).numpy()
    assert own.shape == ids.shape
    reference_told: list[np.ndarray] = []
    assert np.array_equal(true.generate(**inputs, log_probs=reference_told, **options), ids)
    for b, row in enumerate(ids):
        length = next((n + 1 for n, i in enumerate(row) if i == options["eos_token_id"]), len(row))
        prompt = inputs["input_ids"][b][inputs["attention_mask"][b] == 1]
        both, picture = np.concatenate([prompt, row[:length]])[None], inputs["pixel_values"][b : b + 1]
        types = np.array([0] * len(prompt) + [1] * length)
        logits = true.forward(both, picture, token_type_ids=types[None])
        before = logits[0, len(prompt) - 1 : -1]
        wanted = before[np.arange(length), row[:length]] - np.log(np.exp(before).sum(axis=-1))
        # float32 logits of size 10 are about 1e-5 from the truth
        np.testing.assert_allclose(own[b, :length], wanted, atol=2e-4)
        np.testing.assert_allclose(np.array(reference_told)[:, b][:length], wanted, atol=1e-10)
        assert (own[b, length:] == 0).all()
        assert (np.array(reference_told)[length:, b] == 0).all()
    assert len({int((row != 0).sum()) for row in ids}) > 1


def test_asking_for_log_probs_changes_no_token(tiny):
    model, _ = load_hf_model(tiny, dtype="bfloat16", device="cpu")
    inputs = torch_inputs(batch(model.config, [5], [0]))
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "seed": 1}
    assert torch.equal(model.generate(**inputs, **options), model.generate(**inputs, **options, log_probs=[]))


# In Python


def test_arrays_for_supervision(tiny, tokenizer):
    processor = Processor.load(tiny)
    ids = tokenizer.encode(f"{BOX}{SEG} cat ; {BOX} dog ; <loc0000><loc0000><loc0100><loc0100>{SEG} cat")
    answer = processor.parse(ids, (300, 200), [-1.0] * len(ids), mask_decoder=full_masks)
    arrays = answer.detections()
    assert arrays["xyxy"].dtype == np.float32
    assert arrays["xyxy"].tolist() == [[59, 20, 264, 137], [59, 20, 264, 137], [0, 0, 29, 20]]
    assert (arrays["mask"].dtype, arrays["mask"].shape) == (bool, (3, 200, 300))
    assert arrays["mask"].sum(axis=(1, 2)).tolist() == [205 * 117, 0, 29 * 20]
    assert arrays["confidence"].tolist() == pytest.approx([o.score for o in answer.objects])
    assert arrays["class_id"].tolist() == [0, 1, 0]
    assert arrays["data"]["class_name"].tolist() == ["cat", "dog", "cat"]
    detections = Detections(**arrays)
    assert detections.xyxy.tolist() == arrays["xyxy"].tolist()
    assert len(detections[detections.confidence > 0.1]) == 3 > len(detections[detections.class_id == 0])


def test_arrays_of_nothing(tokenizer):
    arrays = read(tokenizer, "a cat").detections()
    assert (arrays["xyxy"].shape, arrays["mask"]) == ((0, 4), None)
    assert len(arrays["class_id"]) == len(arrays["data"]["class_name"]) == 0
    assert read(tokenizer, BOX).detections()["confidence"] is None


def test_objects_compare_by_value(tokenizer):
    (one,) = read(tokenizer, f"{BOX}{SEG} cat", mask_decoder=full_masks).objects
    (other,) = read(tokenizer, f"{BOX}{SEG} cat", mask_decoder=full_masks).objects
    assert isinstance(one, Object)
    assert one == other


def test_importing_it_does_not_import_torch():
    names = [f"answers.{name}" for name in ("parsing", "drawing", "prompts", "mask_weights")]
    modules = ", ".join(f"paligemma.{name}" for name in (*names, "draw", "processor"))
    probe = f"import sys, {modules}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, env=environment(), check=False)
    assert done.returncode == 0
