"""Checks numbers from JSON files and arguments: each has a range, and an error names a value outside it."""

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from .errors import PaliGemmaError

LARGEST = 2**31 - 1  # the largest whole number in a file: sizes and token ids are far below it


def shown(value: Any, most: int = 80) -> str:
    """A value as one line of an error message, of at most `most` characters."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python does not print a whole number of more than 4300 digits
        text = f"a number of {value.bit_length()} bits"
    return text if len(text) <= most else f"{text[: most - 3]}..."


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def real(value: Any) -> float:
    """The value as a float; NaN if it is not a number or exceeds a float's range."""
    try:
        return float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:
        return math.nan


@dataclass(frozen=True)
class Fields:
    """One section of a JSON file. Every number that is used is read through this class: it has a range, and
    an error names the file and the field."""

    file: str
    section: str  # "" or a name with a dot at its end
    values: dict

    def within(self, name: str) -> "Fields":
        """A section inside this one."""
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, value, "an object")
        return Fields(self.file, f"{self.section}{name}.", value)

    def integer(self, name: str, default: int, least: int = 1, most: int = LARGEST) -> int:
        value = self.values.get(name, default)
        if type(value) is not int or not least <= value <= most:
            raise self.wrong(name, value, f"a whole number from {least} to {most}")
        return value

    def number(self, name: str, default: float, least: float = 1e-30, most: float = 1e30) -> float:
        """A number. In the default range, float32 and bfloat16 can hold the number and its reciprocal."""
        value = self.values.get(name, default)
        if not _in_range(value, least, most):
            raise self.wrong(name, value, f"a number from {least:g} to {most:g}")
        return float(value)

    def numbers(self, name: str, default: list[float], least: float, most: float) -> list[float]:
        """A list of as many numbers as the default has."""
        values = self.values.get(name, default)
        is_list = isinstance(values, list) and len(values) == len(default)
        if not is_list or not all(_in_range(value, least, most) for value in values):
            raise self.wrong(name, values, f"{len(default)} numbers from {least:g} to {most:g}")
        return [float(value) for value in values]

    def wrong(self, name: str, value: Any, wanted: str) -> PaliGemmaError:
        """The error for a field whose value is not what is wanted."""
        return PaliGemmaError(f"{self.file}: {self.section}{name} is {shown(value)}; it must be {wanted}")

    def is_null(self, name: str) -> bool:
        """Whether the field is null; an absent field is not."""
        return name in self.values and self.values[name] is None

    def refuse(self, name: str, *implemented) -> None:
        """Raise PaliGemmaError unless the field is absent, null or one of the implemented values."""
        value = self.values.get(name)
        if value is not None and value not in implemented:
            only = f"which is not implemented (only {', '.join(map(repr, implemented)) or 'null'})"
            raise PaliGemmaError(f"{self.file}: {self.section}{name} is {shown(value)}, {only}")


def _in_range(value: Any, least: float, most: float) -> bool:
    """Whether a number is in the range. NaN is in no range; an int of any size is compared exactly."""
    return type(value) in (int, float) and least <= value <= most
