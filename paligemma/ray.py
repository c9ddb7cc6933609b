"""Answers prompts about the pictures of a Ray dataset. Needs the extra `ray`.

    ds = ray.data.read_binary_files("photos", include_paths=True)  # columns: bytes, path
    options = {"model": "google/paligemma-3b-mix-224", "task": "caption"}
    answers = ds.map_batches(
        paligemma.ray.Generate, fn_constructor_kwargs=options, num_gpus=1, batch_size=128,
        compute=ray.data.ActorPoolStrategy(size=8),
    )
    answers.write_json("captions")

Importing this module does not import Ray."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import arguments
from .answers import prompts
from .errors import PaliGemmaError
from .fields import shown
from .options import Sampling
from .pipeline import Question, load_pipeline
from .questions import prompt_of

if TYPE_CHECKING:
    import pyarrow as pa

# The first of these columns that a batch has is used.
IDS, IMAGES = ("id", "path"), ("image", "bytes", "path")
OPTIONAL = ("prompt", "task", "lang", "temperature")  # the other columns that are read


class Generate:
    """What `ray.data.Dataset.map_batches` calls; each worker holds a copy of the model.

    The columns that it reads:
    - `id`, or `path`: text or whole numbers.
    - `image`, `bytes` or `path`: pixels as an array, the bytes of a file, or the path of a file; or a list of
      paths, for several images of one prompt.
    - `prompt`, `task` and `lang`, as in the lines of `paligemma.batch`, and `temperature`. All are optional.

    The columns that it returns are the fields of docs/json.md, as Arrow structs and lists, and `error`: why a
    row has no answer, or null. A row with an error has null in all other columns but `id`.

    model: a hub id, a directory or "demo". slots: how many rows are decoded together; None chooses them from
    the free memory. A `batch_size` of several times that keeps them filled. prompt, task, lang: for rows that
    have none of their own. temperature, top_p, seed: as on the command line, with the same defaults. options:
    those of `paligemma.pipeline.load_pipeline`. Raises PaliGemmaError for an option or a model that cannot be
    used, and for a batch without `id` or `image`."""

    def __init__(
        self, model: str | Path | None = None, slots: int | None = None, *, prompt: str | None = None,
        task: str | None = None, lang: str | None = None, temperature: float | None = None,
        top_p: float = 0.9, seed: int | None = None, **options: Any,
    ):  # fmt: skip
        if task is not None:
            prompt = prompts.prompt(task, prompt, lang)
        elif lang is not None:
            raise PaliGemmaError("lang goes with task; without one, write the language in the prompt")
        self.default, self.temperature, self.top_p, self.seed = (prompt, task), temperature, top_p, seed
        Sampling(temperature or 0.0, top_p, seed)  # raises for a value that is wrong
        if model is None and options.get("adapter") is None:
            model = arguments.MODEL
        self.pipeline = load_pipeline(model, slots, **options)

    def __call__(self, batch: "Mapping[str, Any] | pa.Table") -> "pa.Table":
        """The answers to a batch, in its order. The batch is a dictionary of arrays, or an Arrow table."""
        ids, failed, questions = [], [], []
        for row in rows_of(batch):
            ids.append(row["id"])
            try:
                questions.append(self.question(row))
            except PaliGemmaError as error:
                failed.append({"id": row["id"], "error": str(error)})
        records = [*failed, *self.pipeline.answers(questions)]
        order = {id: n for n, id in enumerate(ids)}
        return to_table(sorted(records, key=lambda told: order[told["id"]]), self.pipeline.log_probs)

    def question(self, row: dict[str, Any]) -> Question:
        prompt, task = prompt_of(row, self.default, PaliGemmaError)
        given = row.get("temperature", self.temperature)
        temperature = arguments.temperature_of(task, prompt, given)
        return Question(
            row["id"], _source(row["image"]), prompt, Sampling(temperature, self.top_p, self.seed)
        )


def rows_of(batch: "Mapping[str, Any] | pa.Table") -> Iterator[dict[str, Any]]:
    """The rows of a batch: `id`, `image`, and what the optional columns have."""
    if isinstance(batch, Mapping):
        columns = {str(name): values for name, values in batch.items()}
    elif hasattr(batch, "column_names"):
        columns = {name: batch[name].to_pylist() for name in batch.column_names}  # of arrays, for pixels
    else:
        wanted = "a dictionary of arrays or an Arrow table: give batch_format='numpy' or 'pyarrow'"
        raise PaliGemmaError(f"the batch is a {type(batch).__name__}; it must be {wanted}")
    needed = {}
    for field, names in (("id", IDS), ("image", IMAGES)):
        found = [name for name in names if name in columns]
        if not found:
            problem = (
                f"the rows have the columns {', '.join(columns) or 'none'}, and none of {', '.join(names)}"
            )
            raise PaliGemmaError(f"{problem}: the {field} is read there")
        needed[field] = found[0]
    for n in range(len(columns[needed["id"]])):
        row = {field: _plain(columns[name][n]) for field, name in needed.items()}
        if not isinstance(row["id"], (str, int)) or isinstance(row["id"], bool):
            raise PaliGemmaError(f"an id is {shown(row['id'])}; it must be a text or a whole number")
        for name in OPTIONAL:
            value = _plain(columns[name][n]) if name in columns else None
            if value is not None and value == value:  # NaN is a missing value too
                row[name] = value
        yield row


def _source(image: Any) -> Any:
    """A list or an array of paths as a list, and one path alone; pixels as they are."""
    paths = list(image) if isinstance(image, list) or getattr(image, "ndim", 0) == 1 else []
    if not paths or not all(isinstance(path, str) for path in paths):
        return image
    return paths if len(paths) > 1 else paths[0]


def _plain(value: Any) -> Any:
    """A scalar of NumPy as one of Python."""
    return value.item() if getattr(value, "shape", None) == () else value


def to_table(records: list[dict[str, Any]], log_probs: bool) -> "pa.Table":
    """Records as an Arrow table, whose columns depend on log_probs alone."""
    import pyarrow as pa

    number, text = pa.float64(), pa.string()
    size = pa.struct([("width", pa.int64()), ("height", pa.int64()), ("path", text)])
    scores = [(name, number) for name in ("score", "box_score", "label_score")]
    found = [("label", text), ("box", pa.list_(pa.int64())), *scores, ("mask", text)]
    types = {
        "model": text, "image": size, "images": pa.list_(size), "prompt": text, "text": text,
        "objects": pa.list_(pa.struct(found)),
        "faults": pa.list_(pa.struct([("text", text), ("fault", text)])), "finish_reason": text,
    }  # fmt: skip
    if log_probs:
        types |= {"tokens": pa.list_(pa.int64()), "log_probs": pa.list_(number)}
    columns = {name: pa.array([told.get(name) for told in records], type=types[name]) for name in types}
    ids = [told["id"] for told in records]
    ids = pa.array(ids, type=pa.int64() if ids and isinstance(ids[0], int) else text)
    return pa.table({"id": ids, **columns, "error": pa.array([r.get("error") for r in records], type=text)})


def to_record(row: dict[str, Any]) -> dict[str, Any]:
    """The record of a row of `to_table`: what is null there because it is missing is missing here."""
    if row["error"] is not None:
        return {"id": row["id"], "error": row["error"]}
    missing = "image" if row["image"] is None else "images"
    told = {name: value for name, value in row.items() if name not in ("error", missing)}
    told["objects"] = [_without(o, "mask") for o in told["objects"]]
    if missing == "image":
        return told | {"images": [_without(image, "path") for image in told["images"]]}
    return told | {"image": _without(told["image"], "path")}


def _without(values: dict[str, Any], name: str) -> dict[str, Any]:
    """The values, without the one of this name if it is null."""
    return {key: value for key, value in values.items() if key != name or value is not None}
