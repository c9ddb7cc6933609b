"""The training data: for each step, pictures with the shape on each of their patches, and prompts with
answers.

A step is a function of the seed, the stage and the step's number, so that a run can resume at any step."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..processor import Processor
from . import scenes, texts
from .architecture import LOCS, PATCH, SIZE

Answer = str | list[tuple[str, scenes.Box]]  # text, or label and box of each detection

SIDE = SIZE // PATCH  # patches in a row of the picture
NOTHING = -1  # in place of a target where there is none
QUESTION_WEIGHT = 2.0  # weight of the tokens that answer a question, which are few
DETECTIONS = {2: 1, 3: 2}  # detections for each scene, by stage
SQUEEZED = {2: 0.4, 3: 0.6}  # share of the scenes of hard lessons that are not square, by stage
JITTER = 6.0  # bins: standard deviation of the error that is added to coordinates in the input


class Patches(NamedTuple):
    """The shape whose box covers the middle of each patch."""

    kind: Tensor  # (N, P) index into KINDS; len(KINDS) for no shape
    colour: Tensor  # (N, P) index into COLOURS; len(COLOURS) for no shape
    box: Tensor  # (N, P, 4) y0, x0, y1, x1 in 0..1


class AnswerBatch(NamedTuple):
    """Prompts of one kind with their answers, each about one picture, whose tokens come before the text. W is
    the number of tokens of the longest answer."""

    scene: Tensor  # (B,) index of the picture
    input_ids: Tensor  # (B, T) text without the image's tokens, padded on the right
    prefix: Tensor  # (B,) number of tokens of the prompt
    where: Tensor  # (B, W) the position in the text that predicts the token
    target: Tensor  # (B, W) the token to predict; NOTHING at padding
    coordinate: Tensor  # (B, W) the exact coordinate of a <loc>, in bins; NaN for other tokens
    weight: Tensor  # (B, W) weight of the token in the loss


class Step(NamedTuple):
    pixel_values: Tensor  # (N, 3, S, S)
    patches: Patches
    rows: list[AnswerBatch]  # empty in stage 1


class Lessons(Dataset):
    """The steps of a stage, by number. The steps of stage 2 from number `harder` on, and all of stage 3, are
    hard: they have more of what the model most often gets wrong, which is two names of which one is absent,
    stars, and squeezed pictures."""

    def __init__(self, processor: Processor, seed: int, stage: int, batch: int, harder: int):
        self.processor, self.seed, self.stage, self.batch, self.harder = processor, seed, stage, batch, harder
        self.first_loc = processor.tokenizer.pieces.piece_to_id("<loc0000>")

    def __getitem__(self, step: int) -> Step:
        rng = np.random.default_rng([self.seed, self.stage, step])
        hard = self.stage == 3 or (self.stage == 2 and step >= self.harder)
        squeezed = SQUEEZED[self.stage] if hard else 0.25
        drawn = [scenes.random_scene(rng, squeezed=squeezed, varied=hard) for _ in range(self.batch)]
        pixels = torch.from_numpy(np.stack([self.processor.pixels(scene.picture) for scene in drawn]))
        rows = self._rows(rng, drawn, hard) if self.stage > 1 else []
        return Step(pixels, patches([scene.shapes for scene in drawn]), rows)

    def _rows(self, rng: np.random.Generator, drawn: list[scenes.Scene], hard: bool) -> list[AnswerBatch]:
        """Some prompts for each scene: captions, questions and detections. They are three batches, because
        answers of one kind have similar lengths and need little padding."""
        captions, questions, detections = [], [], []
        for i, scene in enumerate(drawn):
            asked = [texts.random_question(rng, scene.shapes)]
            if rng.random() < 0.75:
                captions.append(self._row(rng, i, "caption en", texts.caption(scene.shapes)))
            else:
                asked.append(texts.random_question(rng, scene.shapes))
            for question, answer in asked:
                prompt = question if rng.random() < 0.85 else question.removesuffix("?")
                questions.append(self._row(rng, i, f"answer en {prompt}", answer, QUESTION_WEIGHT))
            for _ in range(DETECTIONS[self.stage]):
                queries = texts.random_query(rng, scene.shapes, tricky=hard)
                prompt, answer = f"detect {' ; '.join(queries)}", texts.detect(queries, scene.shapes)
                detections.append(self._row(rng, i, prompt, answer))
        return [_collate(rows) for rows in (captions, questions, detections) if rows]

    def _row(
        self, rng: np.random.Generator, scene: int, prompt: str, answer: Answer, weight: float = 1.0
    ) -> dict:
        """One row of an AnswerBatch. Coordinates in the input have random errors, as they have when the model
        continues its own answer."""
        tokenizer = self.processor.tokenizer
        text = answer if isinstance(answer, str) else texts.boxes_text(answer)
        before = tokenizer.encode_prompt(prompt)
        target = np.array([*tokenizer.encode(text), tokenizer.eos_token_ids[0]])
        is_loc = (target >= self.first_loc) & (target < self.first_loc + LOCS)
        coordinate = np.full(len(target), np.nan)
        if not isinstance(answer, str):
            coordinate[is_loc] = [v * LOCS for _, box in answer for v in box]
        seen = target.copy()
        errors = rng.normal(0, JITTER, is_loc.sum()).round().astype(int)
        seen[is_loc] = self.first_loc + np.clip(target[is_loc] - self.first_loc + errors, 0, LOCS - 1)
        where = np.arange(len(before) - 1, len(before) + len(target) - 1)
        return {
            "scene": scene, "input_ids": np.concatenate([before, seen[:-1]]), "prefix": len(before),
            "where": where, "target": target, "coordinate": coordinate,
            "weight": np.full(len(target), weight),
        }  # fmt: skip


def _collate(rows: list[dict]) -> AnswerBatch:
    padding = {"input_ids": 0, "where": 0, "target": NOTHING, "coordinate": np.nan, "weight": 0.0}
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("scene", "prefix")}
    for name, pad in padding.items():
        values = [row[name] for row in rows]
        length = max(map(len, values))
        padded = [np.pad(value, (0, length - len(value)), constant_values=pad) for value in values]
        column = torch.from_numpy(np.stack(padded))
        columns[name] = column.float() if column.is_floating_point() else column
    return AnswerBatch(**columns)


def patches(drawn: list[tuple[scenes.Shape, ...]]) -> Patches:
    """The kind, the colour and the box on each patch of the pictures, by row."""
    middle = (np.arange(SIDE) + 0.5) / SIDE
    kind = np.full((len(drawn), SIDE, SIDE), len(scenes.KINDS))
    colour = np.full((len(drawn), SIDE, SIDE), len(scenes.COLOURS))
    box = np.zeros((len(drawn), SIDE, SIDE, 4), np.float32)
    for i, shapes in enumerate(drawn):
        for shape in shapes:
            y0, x0, y1, x1 = shape.box
            place = np.ix_((middle >= y0) & (middle < y1), (middle >= x0) & (middle < x1))
            kind[i][place] = scenes.KINDS.index(shape.kind)
            colour[i][place] = scenes.COLOURS.index(shape.colour)
            box[i][place] = shape.box
    flat = (x.reshape(len(drawn), SIDE * SIDE, *x.shape[3:]) for x in (kind, colour, box))
    return Patches(*map(torch.from_numpy, flat))
