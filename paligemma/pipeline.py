"""Answers many prompts about pictures: pictures are read and resized in threads while the model computes, and
each answer becomes a record. The command line `paligemma.batch` runs it."""

import hashlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

import torch

from .answers.parsing import Answer
from .answers.record import details, record
from .decode_state import bucket
from .errors import PaliGemmaError
from .images import ImageSource, open_image
from .kv_cache import position_bytes
from .machine import free_bytes
from .options import Sampling
from .processor import as_list
from .row import GREEDY, Row
from .rows import Rows

if TYPE_CHECKING:
    from .answers.parsing import DecodeMasks
    from .model import PaliGemma
    from .processor import Processor

MOST_ROWS = 16  # slots, if memory allows: the kernels of a decode step compute up to 16 rows at a time
SHARE = 4  # the caches may take a quarter of the free memory
LONGEST_NAME = 150  # bytes of the part of a mask's name that comes from the id


@dataclass(frozen=True)
class Question:
    """One input: a prompt about a picture, or about several in a list."""

    id: str | int
    image: ImageSource | list[Any]
    prompt: str
    sampling: Sampling = GREEDY


class Pipeline:
    """Answers questions with a model, up to `slots` at a time.

    name: the model's name in the records. log_probs: whether the records have tokens and log-probabilities.
    mask_decoder: decodes the masks; save_masks: writes those of an answer, and returns their paths. threads:
    how many read pictures; at most slots + threads pictures are read before they are needed."""

    def __init__(
        self, model: "PaliGemma", processor: "Processor", slots: int, *, name: str, max_new_tokens: int = 100,
        bins: int = 1024, log_probs: bool = False, mask_decoder: "DecodeMasks | None" = None,
        save_masks: Callable[[str | int, Answer], list[Path | None]] | None = None,
        threads: int | None = None,
    ):  # fmt: skip
        self.rows, self.processor, self.name = Rows(model, slots), processor, name
        self.max_new_tokens, self.bins, self.log_probs = max_new_tokens, bins, log_probs
        self.mask_decoder, self.save_masks = mask_decoder, save_masks
        self.threads = threads or min(8, max(2, os.cpu_count() or 2))
        self.waited = 0.0  # seconds in which the model had nothing to compute, because no picture was ready

    def answers(self, questions: Iterable[Question]) -> Iterator[dict[str, Any]]:
        """The records of all questions, in the order in which their answers end: what docs/json.md describes,
        with the `id`. A question that cannot be answered gives {"id", "error"}."""
        source, pending = iter(questions), deque[tuple[Question, Future]]()
        asked: dict[Row, tuple[Question, list[tuple[int, int]]]] = {}
        pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pictures")
        wrong: PaliGemmaError | None = None
        try:
            more = True
            while more or pending or self.rows.busy:
                while more and len(pending) < self.rows.slots + self.threads:
                    try:
                        question = next(source, None)
                    except PaliGemmaError as error:  # the questions before it are answered first
                        question, wrong = None, error
                    more = question is not None
                    if question:
                        pending.append((question, pool.submit(self.prepare, question)))
                while pending and self.rows.free and (pending[0][1].done() or not self.rows.busy):
                    question, future = pending.popleft()
                    start = time.perf_counter()
                    wait([future])
                    self.waited += time.perf_counter() - start
                    try:
                        inputs, sizes = future.result()
                        row = self.rows.submit(question.id, inputs, self.max_new_tokens, question.sampling)
                    except PaliGemmaError as error:
                        yield {"id": question.id, "error": str(error)}
                    else:
                        asked[row] = (question, sizes)
                for row in self.rows.step():
                    if row.finish_reason and row in asked:
                        yield self.record(row, *asked.pop(row))
            if wrong:
                raise wrong
        finally:
            for row in asked:  # the caller wants no more answers
                self.rows.cancel(row)
            pool.shutdown(cancel_futures=True)

    def prepare(self, question: Question) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        """The inputs of the model, and the sizes of the pictures. Called in the threads."""
        images = [open_image(source) for source in as_list(question.image)]
        arrays = self.processor.arrays(question.prompt, [images])
        inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return inputs, [image.size for image in images]

    def record(self, row: Row, question: Question, sizes: list[tuple[int, int]]) -> dict[str, Any]:
        if row.finish_reason == "error":
            return {"id": question.id, "error": row.error}
        options = {"bins": self.bins, "mask_decoder": self.mask_decoder}  # boxes are in the first picture
        answer = self.processor.parse(row.tokens, sizes[0], row.log_probs, **options)
        masks = self.save_masks(question.id, answer) if self.save_masks else ()
        reason = row.finish_reason or ""
        told = {"id": question.id, **record(self.name, question.prompt, answer, reason, masks, sizes)}
        for image, source in zip(told.get("images") or [told["image"]], as_list(question.image), strict=True):
            if isinstance(source, str):
                image["path"] = os.path.abspath(source)
        return told | (details(row.tokens, row.log_probs) if self.log_probs else {})


def choose_slots(model: "PaliGemma", max_new_tokens: int) -> int:
    """How many rows to decode together: MOST_ROWS, or fewer if their caches would take more than a quarter of
    the free memory."""
    row = usual_positions(model, max_new_tokens) * position_bytes(model.config.text_config, model.dtype)
    return max(1, min(MOST_ROWS, free_bytes(model.device) // SHARE // row))


def usual_positions(model: "PaliGemma", max_new_tokens: int) -> int:
    """The positions of a row with one image and a prompt of 64 tokens."""
    return bucket(model.config.vision_config.num_patches + 64 + max_new_tokens)


def load_pipeline(
    model: str | Path | None, slots: int | None = None, *, name: str | None = None, max_new_tokens: int = 100,
    bins: int = 1024, log_probs: bool = False, masks: str | Path | None = None,
    mask_decoder: str | None = None, **options: Any,
) -> Pipeline:  # fmt: skip
    """The pipeline of a checkpoint.

    slots: None chooses them from the free memory. name: the model's name in the records; by default it is
    `model`. masks: the directory to which masks are written, or None. mask_decoder: the file of the mask
    decoder; None downloads it if masks are written. options: those of `load_hf_model`. Raises PaliGemmaError
    as `load_hf_model` does, and if the memory has no room for the caches of so many slots."""
    from .answers.masks import MaskDecoder
    from .loading import load_hf_model

    local = {"local_files_only": options.get("local_files_only", False)}
    decoder = MaskDecoder.load(mask_decoder, **local) if masks or mask_decoder else None
    network, processor = load_hf_model(model, **options)
    named = options.get("adapter") if model is None else model
    pipeline = Pipeline(
        network, processor, slots or choose_slots(network, max_new_tokens), name=name or str(named),
        max_new_tokens=max_new_tokens, bins=bins, log_probs=log_probs, mask_decoder=decoder,
        save_masks=(lambda id, answer: save_masks(Path(masks), id, answer)) if masks else None,
    )  # fmt: skip
    pipeline.rows.check_memory(usual_positions(network, max_new_tokens))
    return pipeline


def save_masks(directory: Path, id: str | int, answer: Answer) -> list[Path | None]:
    """Write the masks of an answer, in files whose names begin with the id. Whatever the id is, the files are
    in the directory. The names of two ids differ, because no quoted id has a "+"."""
    from .answers.drawing import save_mask

    name = quote(str(id), safe=" ", errors="surrogatepass")
    if len(name) > LONGEST_NAME:
        name = f"{name[: LONGEST_NAME - 17]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}"
    return [save_mask(o, directory, n, f"{name}+") for n, o in enumerate(answer.objects)]
