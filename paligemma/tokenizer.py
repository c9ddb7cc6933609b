"""From text to token ids and back."""

from pathlib import Path

import sentencepiece

from .config import PaliGemmaConfig, read_json
from .errors import PaliGemmaError
from .tokenizer_json import sentencepiece_model


class Tokenizer:
    """SentencePiece with PaliGemma's ids around it. A prompt is plain text: of what it spells, only pieces that the model
    itself defines, such as `<loc0000>` and `<seg000>`, become special; `<bos>`, `<eos>` and `<image>` do not."""

    def __init__(self, model: bytes, config: PaliGemmaConfig):
        if not model:
            raise RuntimeError("empty")  # which SentencePiece would take for no model at all
        self.pieces = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.bos_token_id, self.pad_token_id, self.eos_token_ids = config.bos_token_id, config.pad_token_id, config.eos_token_ids
        self.image_token_id = config.image_token_index
        if self.pieces.bos_id() != self.bos_token_id:
            raise PaliGemmaError(f"the tokenizer's <bos> is {self.pieces.bos_id()}, config.json's {self.bos_token_id}: they are not of one checkpoint")
        if len(self.pieces) > config.text_config.vocab_size:
            raise PaliGemmaError(f"the tokenizer has {len(self.pieces)} pieces, the model {config.text_config.vocab_size}: they are not of one checkpoint")

    @classmethod
    def load(cls, model_dir: Path, config: PaliGemmaConfig, file: str | Path | None = None) -> "Tokenizer":
        """From tokenizer.model, or rebuilt from tokenizer.json where a checkpoint has only that; or from another such file."""
        path = Path(file) if file is not None else model_dir / "tokenizer.model"
        if file is None and not path.exists():
            path = model_dir / "tokenizer.json"
        if file is None and not path.exists():
            raise PaliGemmaError(f"{model_dir} has no tokenizer.model and no tokenizer.json: give one with --tokenizer (tokenizer=...)")
        try:
            return cls(sentencepiece_model(read_json(path)) if path.suffix == ".json" else path.read_bytes(), config)
        except (OSError, RuntimeError) as error:
            raise PaliGemmaError(f"{path} is not a tokenizer that SentencePiece reads ({error}): download it again") from None

    def encode(self, text: str) -> list[int]:
        """The ids of plain text, nothing added."""
        try:
            return self.pieces.encode(text.encode())
        except (AttributeError, UnicodeEncodeError):  # no str, or half of a surrogate pair in it
            raise PaliGemmaError(f"{text!r} is no Unicode text: give the prompt as a str") from None

    def encode_prompt(self, prompt: str) -> list[int]:
        """<bos>, the prompt, and a newline that is tokenised on its own, as in training."""
        return [self.bos_token_id, *self.encode(prompt), *self.encode("\n")]

    def decode(self, ids, skip_special_tokens: bool = True) -> str:
        """The text of token ids (a list, an array or a tensor of one row). With skip_special_tokens, ids that stand for no
        text (<pad>, <bos>, <eos>, <unk>, <image> and the unused rows behind it) are left out; otherwise they are spelled."""
        parts, run = [], []
        for i in map(int, ids.tolist() if hasattr(ids, "tolist") else ids):  # one copy from a device, not one a token
            if not 0 <= i < len(self.pieces):
                special = "<image>" if i == self.image_token_id else f"<{i}>"
            elif self.pieces.is_control(i) or self.pieces.is_unknown(i):
                special = self.pieces.id_to_piece(i)
            else:
                run.append(i)
                continue
            if not skip_special_tokens:
                parts += [self.pieces.decode(run), special]
                run = []
        return "".join(parts) + self.pieces.decode(run)

    def piece(self, i: int) -> str:
        """The name of a token; "" for an id that the tokenizer does not have."""
        return self.pieces.id_to_piece(i) if 0 <= i < len(self.pieces) else ""

    def texts(self, ids: list[int]) -> list[str]:
        """What each id adds to the text: the last byte of a character adds all of it."""
        stream = TextStream(self)
        texts = [stream.push(i) for i in ids]
        return [*texts[:-1], texts[-1] + stream.finish()] if texts else []


class TextStream:
    """Text as its tokens arrive: `push` returns what has become certain. A character whose bytes are spread over several
    tokens is held back until it is whole."""

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
