"""Numbers out of JSON, and arguments: each has a range, and an error names what is out of it."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import PaliGemmaError

LARGEST = 2**31 - 1  # whole number that a file may say: every size and every token id is far below it


def shown(value: Any, most: int = 80) -> str:
    """A value in one line of an error message, cut where it is long."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def real(value: Any) -> float:
    """The number, or NaN for what is not one that a float can be."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


@dataclass(frozen=True)
class Fields:
    """One section of a JSON file. Every number that is used is read through here: it has a range, and an
    error names the file and the field."""

    file: str
    section: str  # "" or with the dot that follows it
    values: dict

    def integer(self, name: str, default: int, least: int = 1, most: int = LARGEST) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float = 1e-30, most: float = 1e30) -> float:
        """A number; the range that is the default holds positive numbers of which float32 and bfloat16 have
        the reciprocal too."""
        value = self.values.get(name, default)
        if not _in_range(value, least, most):
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def numbers(self, name: str, default: list[float], least: float, most: float) -> list[float]:
        """As many as the default has."""
        values = self.values.get(name, default)
        if (
            not isinstance(values, list)
            or len(values) != len(default)
            or not all(_in_range(value, least, most) for value in values)
        ):
            raise self.wrong(name, values, f"{len(default)} numbers from {least:g} to {most:g}")
        return [float(value) for value in values]

    def wrong(self, name: str, value: Any, wanted: str) -> PaliGemmaError:
        return PaliGemmaError(f"{self.file}: {self.section}{name} is {shown(value)}; it must be {wanted}")

    def is_null(self, name: str) -> bool:
        """Whether the file says null, which is not the same as leaving it out."""
        return name in self.values and self.values[name] is None

    def refuse(self, name: str, *implemented) -> None:
        """Anything but an absent value, null, or one of those implemented is an error."""
        value = self.values.get(name)
        if value is not None and value not in implemented:
            only = ", ".join(map(repr, implemented)) or "null"
            raise PaliGemmaError(
                f"{self.file}: {self.section}{name} is {shown(value)}, which is not implemented (only {only})"
            )


def _in_range(value: Any, least: float, most: float) -> bool:
    return (
        type(value) in (int, float) and least <= value <= most
    )  # NaN is in none; an int is compared exactly, whatever its size
