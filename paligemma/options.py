"""The arguments of `generate`: checked, and what they leave out."""

import math
from typing import Any

from .errors import PaliGemmaError
from .fields import is_whole, real, shown


def check_sampling(max_new_tokens: int, temperature: float, top_p: float, seed: int | None = None, log_probs: list | None = None) -> None:
    """Raise PaliGemmaError for an argument of `stream` that has no meaning."""
    if not is_whole(max_new_tokens) or max_new_tokens < 1:
        raise PaliGemmaError(f"max_new_tokens is {shown(max_new_tokens)}; it must be a whole number of at least 1")
    _check_temperature(temperature)
    if not 0 < real(top_p) <= 1:
        raise PaliGemmaError(f"top_p is {shown(top_p)}; it must be above 0 and at most 1")
    if seed is not None and not (is_whole(seed) and seed >= 0):
        raise PaliGemmaError(f"seed is {shown(seed)}; it must be a whole number of at least 0, or None for a new one each time")
    if log_probs is not None and not isinstance(log_probs, list):
        raise PaliGemmaError(f"log_probs is {shown(log_probs)}; it must be a list, which receives the logarithms")


def sampling_temperature(do_sample: bool | None, temperature: float | None, top_p: float) -> float:
    """The temperature that the arguments of `generate` ask for; 0 is greedy decoding.

    do_sample=False is greedy, and do_sample=True samples at `temperature`, or at 1 where there is none. Where do_sample is None, a temperature
    or a top_p that is not 1 asks for sampling, so that neither is ignored. Raises PaliGemmaError for a value without a meaning."""
    if not (do_sample is None or isinstance(do_sample, bool)):
        raise PaliGemmaError(f"do_sample is {shown(do_sample)}; it must be True, False or None")
    if temperature is not None:
        _check_temperature(temperature)
    if do_sample is None:
        do_sample = temperature is not None or top_p != 1
    if not do_sample:
        return 0.0
    return 1.0 if temperature is None else float(temperature)


def end_tokens(eos_token_id: Any, vocabulary: int) -> tuple[int, ...]:
    """The end tokens that the argument of `generate` names: an id, or a list, an array or a tensor of ids; -1 is an end that never comes.
    Raises PaliGemmaError for what is not a token of the vocabulary."""
    ids = eos_token_id.tolist() if hasattr(eos_token_id, "tolist") else eos_token_id
    ids = list(ids) if isinstance(ids, (list, tuple, set, frozenset)) else [ids]
    if not all(is_whole(i) and -1 <= i < vocabulary for i in ids):
        wanted = f"a token id, 0 to {vocabulary - 1}, or a list of them; -1 is an end that never comes"
        raise PaliGemmaError(f"eos_token_id is {shown(eos_token_id)}; it must be {wanted}")
    return tuple(map(int, ids))


def _check_temperature(temperature: float) -> None:
    if not 0 <= real(temperature) < math.inf:
        raise PaliGemmaError(f"temperature is {shown(temperature)}; it must be 0 (greedy) or a positive number")
