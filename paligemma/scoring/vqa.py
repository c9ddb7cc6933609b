"""VQAv2's accuracy of an answer, to the official code: github.com/GT-Vision-Lab/VQA,
PythonEvaluationTools/vqaEvaluation/vqaEval.py, whose peculiarities are part of the published numbers.

People answered each question. An answer is right if at least 3 of them gave it; the accuracy is the mean over
all choices of leaving out one person."""

import re

# The official table maps each of these without one of its apostrophes to the word. Its words with a capital I
# are left out, because they never meet a text, which is in lower case.
APOSTROPHES = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
    somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
    something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
    they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
    who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'd've y'all'll you'd you'd've you'll you're you've"""
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
DIGITS = {"none": "0"} | {word: str(n) for n, word in enumerate(NUMBERS)}
ARTICLES = {"a", "an", "the"}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
COMMA = re.compile(r"\d,\d")
PERIOD = re.compile(r"\.(?!\d)")
LEAST = 4  # answers of people, of which three others remain when one is left out


def _without_an_apostrophe() -> dict[str, str]:
    wrong = {"somebody'd": "somebodyd"}  # this way round in the official table
    for word in APOSTROPHES.split():
        places = (match.start() for match in re.finditer("'", word))
        wrong |= {word[:place] + word[place + 1 :]: word for place in places}
    return wrong


CONTRACTIONS = _without_an_apostrophe()


def accuracy(text: str, answers: list[str]) -> float:
    """The accuracy, from 0 to 1, of an answer to a question that people have answered: 10 in VQAv2, at least
    LEAST. Texts are normalised only if the people disagree, as in the official code."""
    text, answers = _one_line(text), [_one_line(answer) for answer in answers]
    if len(set(answers)) > 1:
        text, answers = normalised(text), [normalised(answer) for answer in answers]
    same = [answer == text for answer in answers]
    return sum(min(1.0, (sum(same) - one) / 3) for one in same) / len(same)


def normalised(text: str) -> str:
    """Without punctuation, articles and capital letters; numbers up to ten in digits; contractions with their
    apostrophes."""
    comma, plain = COMMA.search(text), text
    for mark in PUNCTUATION:
        joined = comma or f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if joined else " ")
    # The official code passes the flag re.UNICODE, which is 32, as the largest number of periods to remove.
    words = [DIGITS.get(word, word) for word in PERIOD.sub("", plain, count=32).lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
