"""Checks the arguments of `generate` and fills in their defaults."""

import math
from dataclasses import dataclass, replace
from typing import Any

from .errors import PaliGemmaError
from .fields import is_whole, real, shown


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen from its logits. Raises PaliGemmaError for an invalid value."""

    temperature: float = 0.0  # 0 is greedy decoding
    top_p: float = 1.0  # above 0 and at most 1: the probability of the nucleus
    seed: int | None = None  # repeats the choices; None for other ones each time

    def __post_init__(self):
        if not 0 <= real(self.temperature) < math.inf:
            raise PaliGemmaError(
                f"temperature is {shown(self.temperature)}; it must be 0 (greedy) or a positive number"
            )
        if not 0 < real(self.top_p) <= 1:
            raise PaliGemmaError(f"top_p is {shown(self.top_p)}; it must be above 0 and at most 1")
        if self.seed is not None and not (is_whole(self.seed) and self.seed >= 0):
            raise PaliGemmaError(
                f"seed is {shown(self.seed)}; it must be a whole number of at least 0, or None for a new one each time"
            )

    @classmethod
    def asked(
        cls, do_sample: bool | None, temperature: float | None, top_p: float, seed: int | None
    ) -> "Sampling":
        """What the arguments of `generate` ask for.

        do_sample=False is greedy; do_sample=True samples at `temperature`, or at 1 if it is None. If
        do_sample is None, a temperature or a top_p other than 1 asks for sampling, so that neither is
        ignored."""
        if not (do_sample is None or isinstance(do_sample, bool)):
            raise PaliGemmaError(f"do_sample is {shown(do_sample)}; it must be True, False or None")
        given = cls(1.0 if temperature is None else temperature, top_p, seed)
        if do_sample is None:
            do_sample = temperature is not None or top_p != 1
        return given if do_sample else replace(given, temperature=0.0)


def token_count(max_new_tokens: Any) -> int:
    """max_new_tokens, checked."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise PaliGemmaError(
            f"max_new_tokens is {shown(max_new_tokens)}; it must be a whole number of at least 1"
        )
    return int(max_new_tokens)


def check_log_probs(log_probs: Any) -> None:
    if log_probs is not None and not isinstance(log_probs, list):
        raise PaliGemmaError(
            f"log_probs is {shown(log_probs)}; it must be a list, which receives the logarithms"
        )


def end_tokens(eos_token_id: Any, vocabulary: int) -> tuple[int, ...]:
    """The end tokens that the argument of `generate` names: an id, or a list, an array or a tensor of ids; -1
    matches no token, so that the answer ends at max_new_tokens.
    Raises PaliGemmaError for an id outside the vocabulary."""
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = list(ids) if isinstance(ids, (list, tuple, set, frozenset)) else [ids]
    if not all(is_whole(i) and -1 <= i < vocabulary for i in ids):
        wanted = f"a token id, 0 to {vocabulary - 1}, or a list of them; -1 is an end that never comes"
        raise PaliGemmaError(f"eos_token_id is {shown(eos_token_id)}; it must be {wanted}")
    return tuple(map(int, ids))
