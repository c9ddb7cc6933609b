"""--task and --lang: the published prompts, greedy by default."""

import json

import pytest
from command_line import run
from test_generate import line

from paligemma import PaliGemmaError
from paligemma.answers.prompts import is_greedy, prompt


@pytest.mark.parametrize(
    ("arguments", "made"),
    [
        (("caption",), "caption en"),
        (("caption", None, "pt-BR"), "caption pt-BR"),
        (("ocr",), "ocr"),
        (("detect", "cat"), "detect cat"),
        (("detect", "cat;red dog ;  a bus ;"), "detect cat ; red dog ; a bus"),
        (("segment", " cat ; dog "), "segment cat ; dog"),
        (("vqa", "what is this; a cat?"), "answer en what is this; a cat?"),
        (("vqa", " was ist das? ", "de"), "answer de was ist das?"),
    ],
)
def test_the_published_prompts(arguments, made):
    assert prompt(*arguments) == made


WRONG = [
    (("find", "cat"), "the task is 'find'; it must be caption, detect"),
    (("detect",), "the task detect needs what to look for"),
    (("segment", " ; "), "the task segment needs what to look for"),
    (("vqa", ""), "the task vqa needs a question"),
    (("caption", "a cat"), "the task caption takes no prompt, and 'a cat' is given"),
    (("ocr", ""), "the task ocr takes no prompt"),
    (("detect", "cat", "en"), "the task detect has no language, and 'en' is given; caption and vqa have one"),
    (("caption", None, "e n"), "the language is 'e n'"),
    (("caption", None, ""), "the language is ''"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_what_makes_no_prompt(arguments, message):
    with pytest.raises(PaliGemmaError, match=message):
        prompt(*arguments)


def said(*args) -> dict:
    return json.loads(run(*args, "--json").text)


def test_a_task_is_answered_greedily(tiny, image_file):
    args = line(tiny, image_file, prompt="cat ; dog")
    greedy = said(*line(tiny, image_file, prompt="detect cat ; dog"), "--no-sample")
    task = said(*args, "--task", "detect")
    assert (task["prompt"], task["tokens"]) == ("detect cat ; dog", greedy["tokens"])
    sampling = ("--temperature", 3, "--seed", 1)
    warm = said(*args, "--task", "detect", *sampling)
    same = said(*line(tiny, image_file, prompt="detect cat ; dog"), *sampling)
    assert warm["tokens"] == same["tokens"] != task["tokens"]


@pytest.mark.parametrize("text", ["detect cat", "segment a ; b", "ocr", "  ocr\n"])
def test_prompts_that_are_greedy(text):
    assert is_greedy(text)


@pytest.mark.parametrize("text", ["detective", "answer en detect", ""])
def test_prompts_that_are_not_greedy(text):
    assert not is_greedy(text)


def test_a_task_without_a_prompt(tiny, image_file):
    args = ["--model", tiny, "--image", image_file, "--max-new-tokens", 1]
    assert said(*args, "--task", "caption", "--lang", "de")["prompt"] == "caption de"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--task", "detect"], "--task: the task detect needs what to look for, such as 'cat' or"),
        (["--task", "detect"], "'cat ; dog', as the prompt"),
        (["--task", "caption", "--prompt", "x"], "--task: the task caption takes no prompt"),
        (["--task", "count"], "--task: invalid choice: 'count'"),
        (["--lang", "de", "--prompt", "x"], "--lang goes with --task"),
        (["--task", "ocr", "--lang", "de"], "the task ocr has no language"),
        (["--bins", "1000", "--prompt", "x"], "--bins: invalid choice: 1000"),
    ],
)
def test_wrong_usage(tiny, image_file, args, message):
    done = run("--model", tiny, "--image", image_file, *args)
    assert (done.code, done.out) == (2, b"")
    assert message in done.err.splitlines()[-1]
