"""The prompts that the models were trained on, by task:
https://ai.google.dev/gemma/docs/paligemma/prompt-system-instructions"""

from ..errors import PaliGemmaError

TASKS = {  # task -> what its prompt must contain
    "caption": "",
    "detect": "what to look for, such as 'cat' or 'cat ; dog'",
    "segment": "what to look for, such as 'cat' or 'cat ; dog'",
    "ocr": "",
    "vqa": "a question",
}
SPEAKS = ("caption", "vqa")  # the tasks that answer in a language
GREEDY = ("detect", "segment", "ocr")  # the tasks whose most probable answer is wanted, as programs read it


def prompt(task: str, text: str | None = None, lang: str | None = None) -> str:
    """The prompt of a task.

    text: what to detect or segment, names separated by semicolons; or the question. lang: a code such as en
    (the default) or pt-BR. Raises PaliGemmaError for a text or a language that the task does not take, and
    for a missing text that it needs."""
    if task not in TASKS:
        raise PaliGemmaError(f"the task is {task!r}; it must be {', '.join(TASKS)}")
    if TASKS[task] and not (text and text.strip(" ;")):
        raise PaliGemmaError(f"the task {task} needs {TASKS[task]}, as the prompt")
    if not TASKS[task] and text is not None:
        raise PaliGemmaError(f"the task {task} takes no prompt, and {text!r} is given")
    if lang is not None and task not in SPEAKS:
        tasks = " and ".join(SPEAKS)
        raise PaliGemmaError(f"the task {task} has no language, and {lang!r} is given; {tasks} have one")
    if lang is not None and not lang.replace("-", "").isalnum():
        raise PaliGemmaError(f"the language is {lang!r}; it must be a code such as en or pt-BR")
    lang, text = lang or "en", text or ""
    if task == "caption":
        return f"caption {lang}"
    if task == "vqa":
        return f"answer {lang} {text.strip()}"
    if task == "ocr":
        return "ocr"
    return f"{task} {' ; '.join(name for name in map(str.strip, text.split(';')) if name)}"


def is_greedy(prompt: str) -> bool:
    """Whether the first word of a prompt names a task whose most probable answer is wanted."""
    return prompt.split(maxsplit=1)[:1] in [[task] for task in GREEDY]
