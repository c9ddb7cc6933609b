"""Scores texts beside the right answers: exact match, VQAv2's accuracy, ANLS.

The truth is a file with a line of JSON for each id: {"id", "answers": [...]} and perhaps "metric", which is
one of METRICS."""

from pathlib import Path
from typing import Any, NamedTuple

from ..errors import PaliGemmaError
from . import vqa
from .rows import Problems, Row, id_of, json_lines, wrong

METRICS = ("exact", "vqa", "anls")


class Truth(NamedTuple):
    metric: str
    answers: list[str]


def read_truth(path: str | Path, problems: Problems) -> dict[str, Truth]:
    """The right answers by id. Raises PaliGemmaError for a file that is not as described above."""
    truth: dict[str, Truth] = {}
    for where, line in json_lines(path, problems):
        name = id_of(line, where)
        if name in truth:
            raise PaliGemmaError(f"{where}: id {name!r} occurs again: leave one answer for each id")
        truth[name] = _truth(line, where)
    if not truth:
        raise PaliGemmaError(f'{path} has no answers: give lines of {{"id", "answers"}}')
    return truth


def _truth(line: dict, where: str) -> Truth:
    metric, answers = line.get("metric", "exact"), line.get("answers", line.get("answer"))
    if metric not in METRICS:
        raise wrong(where, "metric", metric, f"one of {', '.join(METRICS)}")
    listed: list[Any] = answers if isinstance(answers, list) else [answers]
    texts: list[Any] = [one.get("answer") if isinstance(one, dict) else one for one in listed]
    if not texts or not all(isinstance(one, str) for one in texts):
        raise wrong(where, "answers", answers, "a list of texts")
    if metric == "vqa" and len(texts) < vqa.LEAST:
        wanted = f"the answers of at least {vqa.LEAST} people (VQAv2 has 10); for fewer use exact"
        raise wrong(where, "answers", answers, wanted)
    return Truth(metric, texts)


def score(rows: dict[str, Row], truth: dict[str, Truth], problems: Problems) -> dict[str, dict]:
    """For each metric that the truth names, the number of ids and their mean score from 0 to 1. An id without
    an answer scores 0."""
    if not rows.keys() & truth.keys():
        ids = f"{next(iter(rows))!r}, and the first of the truth is {next(iter(truth))!r}"
        raise PaliGemmaError(f"no id of the rows is in the truth: the first id of the rows is {ids}")
    scores: dict[str, list[float]] = {}
    for name, right in truth.items():
        row = rows.get(name)
        if row is None:
            problems.add("ids of the truth without a row, which count as wrong", name)
        value = SCORE[right.metric](row.text, right.answers) if row and row.error is None else 0.0
        scores.setdefault(right.metric, []).append(value)
    for name in rows:
        if name not in truth:
            problems.add("rows without a truth, which are left out", name)
    return {
        metric: {"count": len(scores[metric]), "mean": sum(scores[metric]) / len(scores[metric])}
        for metric in METRICS
        if metric in scores
    }


def exact(text: str, answers: list[str]) -> float:
    """1 if the text is one of the answers; white space at the ends does not count."""
    return float(text.strip() in [answer.strip() for answer in answers])


def anls(text: str, answers: list[str]) -> float:
    """The largest normalised Levenshtein similarity to an answer, and 0 below 0.5, as the server of DocVQA's
    challenge computes it: capital letters and the amount of white space do not count."""
    try:
        from anls_star import anls_score
    except ImportError:
        raise PaliGemmaError("metric anls needs anls-star: pip install anls-star") from None
    similarity: Any = anls_score(tuple(answers), text)
    return similarity


SCORE = {"exact": exact, "vqa": vqa.accuracy, "anls": anls}
