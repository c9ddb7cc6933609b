"""Tokens that a fine-tune added to the vocabulary: reads the files that list them, and finds them in a text.

Versions of transformers have written them to four different files. The files, their order and the flags of
the tokens follow transformers 5.24 (tokenization_utils_base.py `_from_pretrained`,
tokenization_utils_tokenizers.py `__init__`). The search in a text follows the tokenizers library
(tokenizers/src/tokenizer/added_vocabulary.rs)."""

import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import PaliGemmaError
from ..files import read_json

CONFIG, ADDED, SPECIAL_MAP = FILES = ("tokenizer_config.json", "added_tokens.json", "special_tokens_map.json")
NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class AddedToken:
    """A token that is searched for in the text before the text is split into pieces."""

    content: str
    special: bool = False  # stands for no text: a decoded answer leaves it out
    lstrip: bool = False  # includes the white space before it
    rstrip: bool = False  # includes the white space after it
    normalized: bool = True  # is searched for in a second pass, in which spaces are "▁"
    single_word: bool = False  # is not recognised inside a word


@dataclass(frozen=True)
class Entry:
    """An added token as a file lists it."""

    token: AddedToken
    file: str
    id: int | None = None  # None: the file gives no id, and the token gets the next free one


def lists_all(directory: Path) -> bool:
    """Whether tokenizer_config.json lists the added tokens, as transformers 4 writes them; no other file is
    then needed."""
    return os.path.lexists(directory / CONFIG) and "added_tokens_decoder" in read_json(directory / CONFIG)


def read_entries(directory: Path | None, tokenizer_json: dict | None = None) -> list[Entry]:
    """The added tokens of a directory in the order of their ids; those without an id come last.

    directory: None for a tokenizer.model without other files. tokenizer_json: the parsed tokenizer.json, if
    there is one. Raises PaliGemmaError for a damaged file."""
    paths = [] if directory is None else [directory / name for name in FILES]
    objects = {path.name: read_json(path) for path in paths if os.path.lexists(path)}
    config = objects.get(CONFIG, {})
    mask = AddedToken("<mask>", special=True, normalized=False)  # GemmaTokenizer's default
    named: dict[str, AddedToken] = {"mask_token": mask}
    for key, value in config.items():
        if (key in NAMED or key.endswith("_token")) and isinstance(value, (str, dict)):
            named[key] = _token(value, f"{CONFIG}: {key}", special=True)
        elif key == "mask_token" and value is None:
            del named["mask_token"]
    extras, where = config.get("extra_special_tokens"), f"{CONFIG}: extra_special_tokens"
    extras = extras or config.get("additional_special_tokens") or []
    if isinstance(extras, dict):
        named |= {key: _token(value, where, special=True) for key, value in extras.items()}
        extras = []
    extras = _tokens(extras, where)

    listed: dict[int, Entry] = {}
    if "added_tokens_decoder" in config:
        where = f"{CONFIG}: added_tokens_decoder"
        for text, value in _object(config["added_tokens_decoder"], where).items():
            id_ = _id(int(text) if text.isascii() and text.isdigit() and len(text) < 10 else text, where)
            token = _token(_object(value, f"{where} {text}"), f"{where} {text}")
            listed[id_] = Entry(token, CONFIG, id_)
    else:
        for key, value in objects.get(SPECIAL_MAP, {}).items():
            if isinstance(value, (str, dict)):
                named[key] = _token(value, f"{SPECIAL_MAP}: {key}", special=True)
                continue
            additional = key == "additional_special_tokens" and tokenizer_json is not None and not extras
            if value is not None and (key == "extra_special_tokens" or additional):
                extras += _tokens(value, f"{SPECIAL_MAP}: {key}", special=True)
        special = {token.content for token in (*named.values(), *extras)}
        for content, id_ in objects.get(ADDED, {}).items():
            token = AddedToken(content, special=content in special, normalized=content not in special)
            listed[_id(id_, f"{ADDED}: {content!r}")] = Entry(_checked(token, ADDED), ADDED, id_)
        where = "tokenizer.json: added_tokens"
        for value in _list((tokenizer_json or {}).get("added_tokens", []), where):
            token = _token(_object(value, where), where)
            id_ = _id(value.get("id"), f"{where}: {token.content!r}")
            listed[id_] = Entry(token, "tokenizer.json", id_)
    special = {token.content for token in named.values()}
    entries = []
    for _, entry in sorted(listed.items()):
        token = replace(entry.token, special=entry.token.special or entry.token.content in special)
        entries.append(Entry(token, entry.file, entry.id))
    return entries + [Entry(token, CONFIG) for token in (*named.values(), *extras)]


def number(
    entries: Iterable[Entry], vocabulary: Callable[[str], int | None], size: int, image_id: int
) -> dict[int, AddedToken]:
    """The added tokens by id, numbered as in transformers: a token that is in the vocabulary of `size` pieces
    keeps its id, the others get the next ids without a gap. Raises PaliGemmaError if a file gives another id.

    GemmaTokenizer's default token `<mask>` is added only if the vocabulary has it. The id of `<image>` is
    that of config.json, image_id."""
    tokens: dict[int, AddedToken] = {}
    known = set()
    free = size
    for entry in entries:
        token = entry.token
        if not token.content or token.content in known:
            continue
        id_ = vocabulary(token.content)
        if id_ is None and token.content == "<image>":
            id_ = image_id
        elif id_ is None:
            if entry.id is None and token.content == "<mask>":
                continue
            free += free == image_id
            id_, free = free, free + 1
        if entry.id not in (None, id_):
            if token.content == "<image>":
                ids = f"<image> is {entry.id}, config.json's {image_id}"
                raise PaliGemmaError(f"{entry.file}: {ids}: they are not of one checkpoint")
            right = (
                f"the next free id, which transformers gives it, is {id_}: number added tokens without a gap"
            )
            if id_ < size:
                right = f"the vocabulary has it as {id_}: correct the id"
            shown = f"the added token {_short(token.content)} is {entry.id}"
            raise PaliGemmaError(f"{entry.file}: {shown}, but {right}")
        known.add(token.content)
        tokens[id_] = token
    return tokens


class Splitter:
    """Finds added tokens in a text."""

    def __init__(self, tokens: dict[int, AddedToken]):
        ordered = sorted(tokens.items(), key=lambda item: not item[1].special)
        self.raw = _Search((token.content, id_, token) for id_, token in ordered if not token.normalized)
        normalized = [(id_, token) for id_, token in ordered if token.normalized]
        self.normalized = _Search((token.content.replace(" ", "▁"), id_, token) for id_, token in normalized)

    def split(self, text: str) -> list[str | int]:
        """The text split at the added tokens: their ids, and the strings between them with "▁" for spaces."""
        parts: list[str | int] = []
        for part in self.raw.split(text):
            parts += self.normalized.split(part.replace(" ", "▁")) if isinstance(part, str) else [part]
        return parts


class _Search:
    """Finds strings in a text from left to right; where several begin, it takes the longest."""

    def __init__(self, patterns: Iterable[tuple[str, int, AddedToken]]):
        self.by_first: dict[str, list[tuple[str, int, AddedToken]]] = {}
        for pattern in patterns:
            self.by_first.setdefault(pattern[0][0], []).append(pattern)
        for same in self.by_first.values():
            same.sort(key=lambda pattern: -len(pattern[0]))

    def matches(self, text: str) -> Iterator[tuple[int, int, int, AddedToken]]:
        at = 0
        while at < len(text):
            for pattern, id_, token in self.by_first.get(text[at], ()):
                if text.startswith(pattern, at):
                    yield at, at + len(pattern), id_, token
                    at += len(pattern)
                    break
            else:
                at += 1

    def split(self, text: str) -> list[str | int]:
        parts: list[str | int] = []
        done = 0
        for start, stop, id_, token in self.matches(text):
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[stop : stop + 1])):
                continue
            if token.lstrip:
                while start > done and _is_space(text[start - 1]):
                    start -= 1
            if token.rstrip:
                while stop < len(text) and _is_space(text[stop]):
                    stop += 1
            if done < start:
                parts.append(text[done:start])
            parts.append(id_)
            done = stop  # a token that begins in the white space of the token before it is still recognised
        return [*parts, text[done:]] if done < len(text) else parts


def _is_space(character: str) -> bool:
    """`\\s` of Rust's regex, Unicode's White_Space. Python's isspace accepts four more control characters."""
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"


def _is_word(character: str) -> bool:
    """`\\w` of Rust's regex (UTS 18 C): letters, also enclosed, marks, digits, connectors, joiners."""
    if not character:
        return False
    category, enclosed = unicodedata.category(character), (0x1F130, 0x1F150, 0x1F170)
    letter_like = "\u24b6" <= character <= "\u24e9" or any(0 <= ord(character) - low < 26 for low in enclosed)
    return category[0] in "LM" or category in ("Nd", "Nl", "Pc") or character in "\u200c\u200d" or letter_like


def _object(value: object, where: str) -> dict:
    if not isinstance(value, dict):
        raise PaliGemmaError(f"{where} is {_short(value)}; it must be an object")
    return value


def _list(value: object, where: str) -> list:
    if not isinstance(value, list):
        raise PaliGemmaError(f"{where} is {_short(value)}; it must be a list")
    return value


def _id(value: object, where: str) -> int:
    if type(value) is not int or not 0 <= value < 2**31:
        raise PaliGemmaError(f"{where} has the id {_short(value)}; it must be a token id")
    return value


def _tokens(values: object, where: str, special: bool = False) -> list[AddedToken]:
    """Tokens from strings, which are special, and from objects; `special` overrides the flag of an object."""
    return [_token(value, where, special or not isinstance(value, dict)) for value in _list(values, where)]


def _token(value: object, where: str, special: bool = False) -> AddedToken:
    """A token from its content, or from an object with flags; `special` overrides the flag of the object."""
    if isinstance(value, str):
        return _checked(AddedToken(value, special=special, normalized=not special), where)
    fields = _object(value, where)
    if "content" not in fields:
        raise PaliGemmaError(f"{where} has no 'content'")
    flags = {name: fields.get(name, False) for name in ("special", "lstrip", "rstrip", "single_word")}
    flags["special"] = special or flags["special"]
    normalized = fields.get("normalized", not flags["special"])
    return _checked(AddedToken(fields["content"], normalized=normalized, **flags), where)


def _checked(token: AddedToken, where: str) -> AddedToken:
    for name, value in vars(token).items():
        kind, wanted = (str, "a string") if name == "content" else (bool, "true or false")
        if type(value) is not kind:
            raise PaliGemmaError(f"{where}: {name} is {_short(value)}; it must be {wanted}")
    if any("\ud800" <= character <= "\udfff" for character in token.content):  # half of a surrogate pair
        raise PaliGemmaError(f"{where}: content is {_short(token.content)}; it must be text")
    return token


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
