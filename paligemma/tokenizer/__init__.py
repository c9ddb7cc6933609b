"""Encodes text to token ids, and decodes them."""

import os
import re
from pathlib import Path
from typing import Any

from ..command import tell
from ..config import PaliGemmaConfig
from ..errors import PaliGemmaError
from ..files import check_entered
from . import added_tokens
from .added_tokens import AddedToken, Entry
from .json_model import user_defined_pieces
from .vocabulary import JSON, MODEL, Vocabulary, read
from .vocabulary import needs_json as needs_json

FILES = (MODEL, *added_tokens.FILES)  # of a checkpoint; with tokenizer.json if `needs_json` is true
LOCATION = re.compile(r"<loc\d{4}>|<seg\d{3}>")  # PaliGemmaProcessor adds these with the default flags


class Tokenizer:
    """SentencePiece with PaliGemma's special ids and the tokens that a fine-tune added.

    A prompt is plain text. Names in it become single tokens only if they are added tokens, or user-defined
    pieces of the model, such as `<loc0000>` and `<seg000>`; `<bos>`, `<eos>`, `<pad>`, `<unk>` and `<image>`
    are encoded as text."""

    def __init__(
        self, model: bytes | Vocabulary, config: PaliGemmaConfig, entries: list[Entry] | None = None
    ):
        """model: a serialised SentencePiece model, or a loaded one. entries: the added tokens as files list
        them, see `added_tokens.read_entries`. Raises PaliGemmaError for a tokenizer that cannot be read, or
        does not belong to the checkpoint of config."""
        vocabulary = model if isinstance(model, Vocabulary) else Vocabulary.load(model, MODEL)
        self.pieces, names = vocabulary.pieces, vocabulary.names
        self.bos_token_id, self.pad_token_id = config.bos_token_id, config.pad_token_id
        self.eos_token_ids = config.eos_token_ids
        self.image_token_id, self.vocab_size = config.image_token_index, config.text_config.vocab_size
        if self.pieces.bos_id() != self.bos_token_id:
            ids = f"the tokenizer's <bos> is {self.pieces.bos_id()}, config.json's {self.bos_token_id}"
            raise PaliGemmaError(f"{ids}: they are not of one checkpoint")
        if len(names) > self.vocab_size:
            sizes = f"the tokenizer has {len(names)} pieces, the model {self.vocab_size}"
            raise PaliGemmaError(f"{sizes}: they are not of one checkpoint")

        def id_of(content: str) -> int | None:
            i = self.pieces.piece_to_id(content)
            return i if names[i] == content else None

        entries = added_tokens.read_entries(None) if entries is None else entries
        self.added = added_tokens.number(entries, id_of, len(names), self.image_token_id)
        findable = {i: token for i, token in self.added.items() if not self._is_control(i)}
        self.splitter = None  # not needed if SentencePiece itself finds all added tokens
        if findable.keys() - {id_of("<mask>")}:
            own = {i: AddedToken(names[i], normalized=False) for i in user_defined_pieces(vocabulary.model)}
            flagged = any(t.lstrip or t.rstrip or t.single_word for t in findable.values())
            if flagged or findable.keys() - own.keys():
                tokens = own | findable
                plain = {i: AddedToken(t.content) for i, t in tokens.items() if LOCATION.fullmatch(t.content)}
                self.splitter = added_tokens.Splitter(tokens | plain)

    def _is_control(self, i: int) -> bool:
        """Whether the id is a special one of the model that no text is encoded to."""
        is_piece = 0 <= i < len(self.pieces)
        special = is_piece and (self.pieces.is_control(i) or self.pieces.is_unknown(i))
        return special or i == self.image_token_id

    @classmethod
    def load(cls, model_dir: Path, config: PaliGemmaConfig, file: str | Path | None = None) -> "Tokenizer":
        """The tokenizer of a checkpoint: its tokenizer.model, or else its tokenizer.json converted, with the
        added tokens that files in the same directory list. file: a directory to use instead, or a
        tokenizer file to use without others. Raises PaliGemmaError with the remedy."""
        path = Path(model_dir) if file is None else find(file)
        vocabulary, tokenizer_json = read(path)
        entries = added_tokens.read_entries(path if os.path.isdir(path) else None, tokenizer_json)
        return cls(vocabulary, config, entries)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, without <bos> or <eos>. Raises PaliGemmaError if it is not Unicode text, and
        for an added token that has no embedding."""
        try:
            data = text.encode()
        except (AttributeError, UnicodeEncodeError):  # not a str, or one with half of a surrogate pair
            raise PaliGemmaError(f"{text!r} is not Unicode text: give the prompt as a str") from None
        if not self.splitter:
            return self.pieces.encode(data)
        ids: list[int] = []
        for part in self.splitter.split(text):
            if isinstance(part, str):
                ids += self.pieces.encode(part.encode())
            elif part < self.vocab_size:
                ids.append(part)
            else:
                token = f"the added token {self.added[part].content!r} is {part}"
                limit = f"the model has embeddings for {self.vocab_size} tokens only"
                remedy = "the tokenizer and the model are not of one checkpoint"
                raise PaliGemmaError(f"{token}, and {limit}: {remedy}")
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """<bos>, the prompt, and a newline that is tokenised on its own, as in training."""
        return [self.bos_token_id, *self.encode(prompt), *self.encode("\n")]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of token ids: a list, an array or a tensor of one row, (N,) or (1, N), or a single id.
        With skip_special_tokens, ids that stand for no text (<pad>, <bos>, <eos>, <unk>, <mask>, <image>,
        special added tokens, and ids without a token) are left out; otherwise their names are included.
        Raises PaliGemmaError for values that are not token ids."""
        parts, run = [], []
        for i in one_row(ids):
            token = self.added.get(i)
            if self._is_control(i) or (token is None and not 0 <= i < len(self.pieces)):
                silent, text = True, self.piece(i) or f"<{i}>"
            elif token and (token.special or i >= len(self.pieces)):
                silent, text = token.special, token.content.replace("▁", " ")
            else:
                run.append(i)
                continue
            if not (silent and skip_special_tokens):
                parts += [self.pieces.decode(run), text]
                run = []
        return "".join(parts) + self.pieces.decode(run)

    def piece(self, i: int) -> str:
        """The name of a token; "" for an id that the tokenizer does not have."""
        if i in self.added:
            return self.added[i].content
        if 0 <= i < len(self.pieces):
            return self.pieces.id_to_piece(i)
        return "<image>" if i == self.image_token_id else ""

    def texts(self, ids: list[int]) -> list[str]:
        """The text that each id adds. A character of several tokens is added by the last of them."""
        stream = TextStream(self)
        texts = [stream.push(i) for i in ids]
        return [*texts[:-1], texts[-1] + stream.finish()] if texts else []


class TextStream:
    """Decodes tokens one by one: `push` returns the new text. A character whose bytes are in several tokens
    is held back until it is complete."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.shown, self.held = tokenizer, "", []

    @property
    def text(self) -> str:
        """The text so far, including an incomplete character."""
        return self.shown + self.tokenizer.decode(self.held)

    def push(self, token: int) -> str:
        self.held.append(token)
        return "" if self.tokenizer.decode(self.held).endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """Return the text that is held back, complete or not."""
        new = self.tokenizer.decode(self.held)
        self.shown, self.held = self.shown + new, []
        return new


def find(path: str | Path) -> Path:
    """The file or directory that a user gives as the tokenizer, with `~` expanded. Raises PaliGemmaError if
    it does not exist."""
    found = Path(os.path.expanduser(path))
    check_entered(found)
    if str(path) == "" or not os.path.exists(found):
        remedy = f"give a {MODEL}, a {JSON}, or a directory that has one"
        raise PaliGemmaError(f"the tokenizer {path} does not exist: {remedy}")
    return found


def of_adapter(directory: Path) -> Path | None:
    """The directory of an adapter if it contains a tokenizer, else None. Trainers save the tokenizer beside
    the adapter, in particular if they added tokens."""
    if any(os.path.lexists(directory / name) for name in (MODEL, JSON)):
        return directory
    if found := [name for name in added_tokens.FILES if os.path.lexists(directory / name)]:
        tell(f"{directory} has {found[0]} and neither {MODEL} nor {JSON}: the model's tokenizer is used")
    return None


def one_row(ids) -> list[int]:
    """Token ids as a list. ids: a list, tuple, iterator, array or tensor, (N,) or (1, N), or a single id.
    Raises PaliGemmaError for several rows, and for a value that is not a whole number."""
    row = _numbers(ids)
    if isinstance(row, list) and len(row) == 1 and isinstance(row[0], list):
        row = row[0]
    elif isinstance(row, list) and any(isinstance(i, list) for i in row):
        remedy = "give one row at a time, as in [tokenizer.decode(row) for row in ids]"
        raise PaliGemmaError(f"the token ids are {len(row)} rows: {remedy}")
    row = row if isinstance(row, list) else [row]
    for i in row:
        if type(i) is not int:
            value = " ".join(repr(i).split())[:60]
            raise PaliGemmaError(f"the token ids contain {value}; they must be whole numbers")
    return row


def _numbers(ids: Any) -> Any:
    """The ids as an int, a list of ints, or nested lists, in the same shape. A value that is not a number is
    returned unchanged."""
    if hasattr(ids, "tolist"):
        return ids.tolist()  # one copy from the device, not one for each token
    if isinstance(ids, (str, bytes, dict, bool)):
        return ids
    if hasattr(ids, "__iter__"):
        return [i if type(i) is int else _numbers(i) for i in ids]
    return ids.__index__() if hasattr(ids, "__index__") else ids
