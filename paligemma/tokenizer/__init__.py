"""From text to token ids and back."""

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

FILES = (MODEL, *added_tokens.FILES)  # of a checkpoint; and tokenizer.json where `needs_json` says so
LOCATION = re.compile(
    r"<loc\d{4}>|<seg\d{3}>"
)  # which PaliGemmaProcessor adds to every tokenizer, with the flags of a plain token


class Tokenizer:
    """SentencePiece with PaliGemma's ids around it, and the tokens that a fine-tune added.

    A prompt is plain text: of what it spells, only pieces that the model itself defines, such as `<loc0000>`
    and `<seg000>`, and added tokens become special; `<bos>`, `<eos>`, `<pad>`, `<unk>` and `<image>` do
    not."""

    def __init__(
        self, model: bytes | Vocabulary, config: PaliGemmaConfig, entries: list[Entry] | None = None
    ):
        """model: a serialised SentencePiece model, or a loaded one. entries: the added tokens as files list
        them, see `added_tokens.read_entries`. Raises PaliGemmaError for a tokenizer that cannot be read, or
        that is of another checkpoint than config."""
        vocabulary = model if isinstance(model, Vocabulary) else Vocabulary.load(model, MODEL)
        self.pieces, names = vocabulary.pieces, vocabulary.names
        self.bos_token_id, self.pad_token_id, self.eos_token_ids = (
            config.bos_token_id,
            config.pad_token_id,
            config.eos_token_ids,
        )
        self.image_token_id, self.vocab_size = config.image_token_index, config.text_config.vocab_size
        if self.pieces.bos_id() != self.bos_token_id:
            raise PaliGemmaError(
                f"the tokenizer's <bos> is {self.pieces.bos_id()}, config.json's {self.bos_token_id}: they are not of one checkpoint"
            )
        if len(names) > self.vocab_size:
            raise PaliGemmaError(
                f"the tokenizer has {len(names)} pieces, the model {self.vocab_size}: they are not of one checkpoint"
            )

        def id_of(content: str) -> int | None:
            i = self.pieces.piece_to_id(content)
            return i if names[i] == content else None

        self.added = added_tokens.number(
            added_tokens.read_entries(None) if entries is None else entries,
            id_of,
            len(names),
            self.image_token_id,
        )
        findable = {i: token for i, token in self.added.items() if not self._is_control(i)}
        self.splitter = None  # where SentencePiece finds them all by itself
        if findable.keys() - {id_of("<mask>")}:
            own = {i: AddedToken(names[i], normalized=False) for i in user_defined_pieces(vocabulary.model)}
            if not all(
                i in own and not (token.lstrip or token.rstrip or token.single_word)
                for i, token in findable.items()
            ):
                both = (own | findable).items()
                self.splitter = added_tokens.Splitter(
                    {
                        i: AddedToken(token.content) if LOCATION.fullmatch(token.content) else token
                        for i, token in both
                    }
                )

    def _is_control(self, i: int) -> bool:
        """Whether the id is one of the model's own that a prompt cannot spell."""
        return i == self.image_token_id or (
            0 <= i < len(self.pieces) and (self.pieces.is_control(i) or self.pieces.is_unknown(i))
        )

    @classmethod
    def load(cls, model_dir: Path, config: PaliGemmaConfig, file: str | Path | None = None) -> "Tokenizer":
        """From a checkpoint's tokenizer.model, or rebuilt from its tokenizer.json where it has only that,
        with the tokens that the files beside it add. `file`: another such directory, or one such file on its
        own. Raises PaliGemmaError with the remedy."""
        path = Path(model_dir) if file is None else find(file)
        vocabulary, tokenizer_json = read(path)
        entries = added_tokens.read_entries(path if os.path.isdir(path) else None, tokenizer_json)
        return cls(vocabulary, config, entries)

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, nothing added. Raises PaliGemmaError for what is not text, and for an added
        token that has no embedding."""
        try:
            data = text.encode()
        except (AttributeError, UnicodeEncodeError):  # no str, or half of a surrogate pair in it
            raise PaliGemmaError(f"{text!r} is no Unicode text: give the prompt as a str") from None
        if not self.splitter:
            return self.pieces.encode(data)
        ids: list[int] = []
        for part in self.splitter.split(text):
            if isinstance(part, str):
                ids += self.pieces.encode(part.encode())
            elif part < self.vocab_size:
                ids.append(part)
            else:
                token = f"the added token {self.added[part].content!r} is {part}, and the model has embeddings for {self.vocab_size} tokens only"
                raise PaliGemmaError(f"{token}: the tokenizer and the model are not of one checkpoint")
        return ids

    def encode_prompt(self, prompt: str) -> list[int]:
        """<bos>, the prompt, and a newline that is tokenised on its own, as in training."""
        return [self.bos_token_id, *self.encode(prompt), *self.encode("\n")]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of token ids: a list, an array or a tensor of one row, (N,) or (1, N), or a single id.
        With skip_special_tokens, ids that stand for no text (<pad>, <bos>, <eos>, <unk>, <mask>, <image>,
        special added tokens and unused rows) are left out; otherwise they are spelled. Raises PaliGemmaError
        for what is not token ids."""
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
        return (
            self.pieces.id_to_piece(i)
            if 0 <= i < len(self.pieces)
            else "<image>"
            if i == self.image_token_id
            else ""
        )

    def texts(self, ids: list[int]) -> list[str]:
        """What each id adds to the text: the last byte of a character adds all of it."""
        stream = TextStream(self)
        texts = [stream.push(i) for i in ids]
        return [*texts[:-1], texts[-1] + stream.finish()] if texts else []


class TextStream:
    """Text as its tokens arrive: `push` returns what has become certain. A character whose bytes are spread
    over several tokens is held back until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.shown, self.held = tokenizer, "", []

    @property
    def text(self) -> str:
        """All of it so far, a character that is not whole included."""
        return self.shown + self.tokenizer.decode(self.held)

    def push(self, token: int) -> str:
        self.held.append(token)
        return "" if self.tokenizer.decode(self.held).endswith("\ufffd") else self.finish()

    def finish(self) -> str:
        """What was held back."""
        new = self.tokenizer.decode(self.held)
        self.shown, self.held = self.shown + new, []
        return new


def find(path: str | Path) -> Path:
    """The file or directory that a user gives as the tokenizer, `~` expanded. Raises PaliGemmaError where
    there is none."""
    found = Path(os.path.expanduser(path))
    check_entered(found)
    if str(path) == "" or not os.path.exists(found):
        raise PaliGemmaError(
            f"the tokenizer {path} does not exist: give a {MODEL}, a {JSON}, or a directory that has one"
        )
    return found


def of_adapter(directory: Path) -> Path | None:
    """The directory of an adapter where that has a tokenizer, which trainers save beside an adapter, above
    all when they added tokens."""
    if any(os.path.lexists(directory / name) for name in (MODEL, JSON)):
        return directory
    if found := [name for name in added_tokens.FILES if os.path.lexists(directory / name)]:
        tell(f"{directory} has {found[0]} and neither {MODEL} nor {JSON}: the model's tokenizer is used")
    return None


def one_row(ids) -> list[int]:
    """Token ids as a list: from a list, tuple, iterator, array or tensor of (N,) or (1, N), or from a single
    id. Raises PaliGemmaError."""
    row = _numbers(ids)
    if isinstance(row, list) and len(row) == 1 and isinstance(row[0], list):
        row = row[0]
    elif isinstance(row, list) and any(isinstance(i, list) for i in row):
        raise PaliGemmaError(
            f"the token ids are {len(row)} rows: give one row at a time, as in [tokenizer.decode(row) for row in ids]"
        )
    row = row if isinstance(row, list) else [row]
    for i in row:
        if type(i) is not int:
            raise PaliGemmaError(
                f"the token ids contain {' '.join(repr(i).split())[:60]}; they must be whole numbers"
            )
    return row


def _numbers(ids: Any) -> Any:
    """An int, or a list of ints or of such lists, of the same shape. Anything that is not a number is
    returned unchanged."""
    if hasattr(ids, "tolist"):
        return ids.tolist()  # one copy from a device, not one a token
    if isinstance(ids, (str, bytes, dict, bool)):
        return ids
    if hasattr(ids, "__iter__"):
        return [i if type(i) is int else _numbers(i) for i in ids]
    return ids.__index__() if hasattr(ids, "__index__") else ids
