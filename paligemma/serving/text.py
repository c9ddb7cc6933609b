"""The text of an answer, up to the first of the stop texts."""

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..tokenizer import TextStream


class Piece(NamedTuple):
    """The text that a token adds."""

    text: str
    log_prob: float


class StoppedText:
    """Decodes tokens. What could be the beginning of a stop text is held back until it is known."""

    def __init__(self, stream: "TextStream", stops: tuple[str, ...]):
        self.stream, self.stops = stream, stops
        self.held: list[Piece] = []
        self.stopped = False
        self.count = 0  # the tokens of the answer: those before the stop text, or all

    def push(self, tokens: list[int], log_probs: list[float], ended: bool) -> list[Piece]:
        """The pieces that are certain now. ended: no tokens follow; an end token is among them."""
        ends = self.stream.tokenizer.eos_token_ids
        for token, log_prob in zip(tokens, log_probs, strict=True):
            if token in ends:
                self.count += 1
                break
            self.held.append(Piece(self.stream.push(token), log_prob))
            self.count += 1
            if self._cut():
                break
        if ended and not self.stopped and (rest := self.stream.finish()):
            last = self.held.pop() if self.held else Piece("", 0.0)
            self.held.append(Piece(last.text + rest, last.log_prob))
            self._cut()
        keep = 0 if ended or self.stopped else self._possible()
        certain = []
        while self.held and sum(len(piece.text) for piece in self.held) - len(self.held[0].text) >= keep:
            certain.append(self.held.pop(0))
        return certain

    def _cut(self) -> bool:
        """End the text before the stop text that is complete first, if there is one. It is in the held
        text."""
        text = "".join(piece.text for piece in self.held)
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self.stops if stop in text]
        if not found:
            return False
        left, kept = min(found)[1], []
        for piece in self.held:
            if left > 0:
                kept.append(Piece(piece.text[:left], piece.log_prob))
            if left < max(len(piece.text), 1):  # the token is not in the answer, or not all of it
                self.count -= 1
            left -= min(left, len(piece.text))
        self.held, self.stopped = kept, True
        return True

    def _possible(self) -> int:
        """The characters at the end of the text that could begin a stop text."""
        text = "".join(piece.text for piece in self.held)
        most = min(len(text), max(map(len, self.stops), default=0))
        return next((n for n in range(most, 0, -1) if any(s.startswith(text[-n:]) for s in self.stops)), 0)
