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
    seed: int | None = None  # the same seed gives the same tokens; None: a new seed each time

    def __post_init__(self):
        if not 0 <= real(self.temperature) < math.inf:
            raise _wrong("temperature", self.temperature, "0 (greedy) or a positive number")
        if not 0 < real(self.top_p) <= 1:
            raise _wrong("top_p", self.top_p, "above 0 and at most 1")
        if self.seed is not None and not (is_whole(self.seed) and self.seed >= 0):
            wanted = "a whole number of at least 0, or None for a new one each time"
            raise _wrong("seed", self.seed, wanted)

    @classmethod
    def asked(
        cls, do_sample: bool | None, temperature: float | None, top_p: float, seed: int | None
    ) -> "Sampling":
        """What the arguments of `generate` ask for.

        do_sample=False is greedy; do_sample=True samples at `temperature`, or at 1 if that is None. If
        do_sample is None, a given temperature or a top_p other than 1 turns sampling on, so that neither
        argument is ignored."""
        if not (do_sample is None or isinstance(do_sample, bool)):
            raise _wrong("do_sample", do_sample, "True, False or None")
        given = cls(1.0 if temperature is None else temperature, top_p, seed)
        if do_sample is None:
            do_sample = temperature is not None or top_p != 1
        return given if do_sample else replace(given, temperature=0.0)


def token_count(max_new_tokens: Any) -> int:
    """max_new_tokens as an int. Raises PaliGemmaError if it is not a whole number of at least 1."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise _wrong("max_new_tokens", max_new_tokens, "a whole number of at least 1")
    return int(max_new_tokens)


def check_log_probs(log_probs: Any) -> None:
    if log_probs is not None and not isinstance(log_probs, list):
        raise _wrong("log_probs", log_probs, "a list, which receives the logarithms")


def end_tokens(eos_token_id: Any, vocabulary: int) -> tuple[int, ...]:
    """The ids of the end tokens that eos_token_id names: an id, or a list, an array or a tensor of ids. The
    id -1 matches no token, so that the answer ends at max_new_tokens only. Raises PaliGemmaError for an id
    outside the vocabulary."""
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = list(ids) if isinstance(ids, (list, tuple, set, frozenset)) else [ids]
    if not all(is_whole(i) and -1 <= i < vocabulary for i in ids):
        wanted = f"a token id from 0 to {vocabulary - 1}, or a list of them; -1 matches no token"
        raise _wrong("eos_token_id", eos_token_id, wanted)
    return tuple(map(int, ids))


def _wrong(name: str, value: Any, wanted: str) -> PaliGemmaError:
    return PaliGemmaError(f"{name} is {shown(value)}; it must be {wanted}")
