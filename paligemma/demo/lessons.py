"""What the training sees: step by step, pictures with what is on each patch of them, and prompts with their
answers.

Everything in a step follows from the seed and the step's number, so that a run can be resumed anywhere."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..processor import Processor
from . import scenes, texts
from .architecture import LOCS, PATCH, SIZE

SIDE = SIZE // PATCH  # patches
NOTHING = -1  # no target here
QUESTION_WEIGHT = 2.0  # of an answer's tokens: they are few
DETECTIONS = {2: 1, 3: 2}  # for each scene, by stage
SQUEEZED = {2: 0.4, 3: 0.6}  # share of the scenes that are not square, by stage, where lessons are hard
JITTER = 6.0  # bins by which a coordinate that was answered is wrong, in the input of what follows it


class Patches(NamedTuple):
    """The shape whose box covers the middle of each patch."""

    kind: Tensor  # (N, P) index into KINDS, or the index after the last for none
    colour: Tensor  # (N, P)
    box: Tensor  # (N, P, 4) y0, x0, y1, x1 in 0..1


class AnswerBatch(NamedTuple):
    """Prompts of one kind with their answers. Each follows the tokens of a picture. W is the length of the
    longest answer."""

    scene: Tensor  # (B,) which picture
    input_ids: Tensor  # (B, T) text without the image's tokens, padded on the right
    prefix: Tensor  # (B,) tokens of the prompt
    where: Tensor  # (B, W) the position that answers, among the text
    target: Tensor  # (B, W) what it is to answer; NOTHING at padding
    coordinate: Tensor  # (B, W) of a <loc>, in bins; NaN elsewhere
    weight: Tensor  # (B, W)


class Step(NamedTuple):
    pixel_values: Tensor  # (N, 3, S, S)
    patches: Patches
    rows: list[AnswerBatch]


class Lessons(Dataset):
    """Steps by number. Those of the vision stage have no rows; those of the second from `harder` on, and all
    of the third, are about what is most often got wrong: two names of which one is absent, stars, squeezed
    pictures."""

    def __init__(self, processor: Processor, seed: int, stage: int, batch: int, harder: int):
        self.processor, self.seed, self.stage, self.batch, self.harder = processor, seed, stage, batch, harder
        self.first_loc = processor.tokenizer.pieces.piece_to_id("<loc0000>")

    def __getitem__(self, step: int) -> Step:
        rng = np.random.default_rng([self.seed, self.stage, step])
        hard = self.stage == 3 or (self.stage == 2 and step >= self.harder)
        drawn = [
            scenes.random_scene(rng, squeezed=SQUEEZED[self.stage] if hard else 0.25, varied=hard)
            for _ in range(self.batch)
        ]
        pixels = torch.from_numpy(np.stack([self.processor.pixels(scene.picture) for scene in drawn]))
        return Step(
            pixels,
            patches([scene.shapes for scene in drawn]),
            self._rows(rng, drawn, hard) if self.stage > 1 else [],
        )

    def _rows(self, rng: np.random.Generator, drawn: list[scenes.Scene], hard: bool) -> list[AnswerBatch]:
        """Some prompts for each scene: captions, questions and detections. A batch for each sort wastes
        little on padding."""
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
                detections.append(
                    self._row(rng, i, f"detect {' ; '.join(queries)}", texts.detect(queries, scene.shapes))
                )
        return [_collate(rows) for rows in (captions, questions, detections) if rows]

    def _row(
        self,
        rng: np.random.Generator,
        scene: int,
        prompt: str,
        answer: str | list[tuple[str, scenes.Box]],
        weight: float = 1.0,
    ) -> dict:
        tokenizer = self.processor.tokenizer
        text = answer if isinstance(answer, str) else texts.boxes_text(answer)
        before = tokenizer.encode_prompt(prompt)
        target = np.array([*tokenizer.encode(text), tokenizer.eos_token_ids[0]])
        is_loc = (target >= self.first_loc) & (target < self.first_loc + LOCS)
        coordinate = np.full(len(target), np.nan)
        if not isinstance(answer, str):
            coordinate[is_loc] = [v * LOCS for _, box in answer for v in box]
        seen = target.copy()
        seen[is_loc] = self.first_loc + np.clip(
            target[is_loc] - self.first_loc + rng.normal(0, JITTER, is_loc.sum()).round().astype(int),
            0,
            LOCS - 1,
        )
        where = np.arange(len(before) - 1, len(before) + len(target) - 1)
        return {
            "scene": scene, "input_ids": np.concatenate([before, seen[:-1]]), "prefix": len(before), "where": where,
            "target": target, "coordinate": coordinate, "weight": np.full(len(target), weight),
        }  # fmt: skip


def _collate(rows: list[dict]) -> AnswerBatch:
    padding = {"input_ids": 0, "where": 0, "target": NOTHING, "coordinate": np.nan, "weight": 0.0}
    columns = {name: torch.tensor([row[name] for row in rows]) for name in ("scene", "prefix")}
    for name, pad in padding.items():
        length = max(len(row[name]) for row in rows)
        columns[name] = torch.from_numpy(
            np.stack([np.pad(row[name], (0, length - len(row[name])), constant_values=pad) for row in rows])
        )
    return AnswerBatch(
        **{name: column.float() if column.is_floating_point() else column for name, column in columns.items()}
    )


def patches(drawn: list[tuple[scenes.Shape, ...]]) -> Patches:
    middle = (np.arange(SIDE) + 0.5) / SIDE
    kind = np.full((len(drawn), SIDE, SIDE), len(scenes.KINDS))
    colour = np.full((len(drawn), SIDE, SIDE), len(scenes.COLOURS))
    box = np.zeros((len(drawn), SIDE, SIDE, 4), np.float32)
    for i, shapes in enumerate(drawn):
        for shape in shapes:
            y0, x0, y1, x1 = shape.box
            place = np.ix_((middle >= y0) & (middle < y1), (middle >= x0) & (middle < x1))
            kind[i][place], colour[i][place] = (
                scenes.KINDS.index(shape.kind),
                scenes.COLOURS.index(shape.colour),
            )
            box[i][place] = shape.box
    return Patches(
        *(torch.from_numpy(x.reshape(len(drawn), SIDE * SIDE, *x.shape[3:])) for x in (kind, colour, box))
    )
