"""The formats of quantised weights, and what config.json says of a checkpoint that holds them. No torch, no
NumPy."""

import json
from dataclasses import dataclass
from typing import Any

from .errors import PaliGemmaError
from .fields import Fields, shown

METHOD, VERSION = "paligemma", 1  # of a quantization_config that this package writes
# Methods of a quantization_config that a merge leaves behind in config.json although the weights are float;
# such weights are used as they are. Weights quantised by these methods have other names or dtypes, and are
# refused when they are found.
LEFT_BEHIND = ("bitsandbytes", "gptq", "awq")
WORDS = {
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
}  # safetensors' words for the dtypes of a model


@dataclass(frozen=True)
class Format:
    """How a matrix is quantised."""

    codes: str  # safetensors' word for the dtype of the stored numbers
    bits: int  # of a code
    group: int | None  # codes of a row that share a scale; None: all of the row
    head: str  # the format of the output head beside such matrices


FORMATS = {
    "int8": Format("I8", 8, None, "int8"),
    "fp8": Format("F8_E4M3", 8, None, "fp8"),
    "int4": Format("I32", 4, 32, "int8"),  # eight codes in an int32: see int4.py
}


@dataclass(frozen=True)
class Saved:
    """A checkpoint that holds quantised weights. It is for one dtype, because codes, scales and the other
    weights depend on the dtype in which a model computes."""

    format: str  # a key of FORMATS
    dtype: str  # a key of WORDS

    def scale(self, format: str) -> str:
        """Safetensors' word for the dtype of the scales of a format. The CPU's bfloat16 product of int8
        weights takes bfloat16 scales; 4-bit weights always have them."""
        return "BF16" if format == "int4" or self.dtype == "bfloat16" else "F32"

    def config(self) -> dict[str, Any]:
        """The quantization_config of its config.json."""
        kind = FORMATS[self.format]
        dtypes = {word: name for name, word in WORDS.items()}
        return {
            "quant_method": METHOD, "version": VERSION, "format": self.format, "bits": kind.bits,
            "group_size": kind.group, "head": kind.head, "dtype": self.dtype,
            "scale_dtype": dtypes[self.scale(self.format)], "head_scale_dtype": dtypes[self.scale(kind.head)],
        }  # fmt: skip


def read(value: object) -> str | Saved | None:
    """What a quantization_config says: that the weights are quantised and saved by this package, or the name
    of a method that is left behind beside float weights; None if there is none. Raises PaliGemmaError for any
    other."""
    if not value:
        return None
    fields = value if isinstance(value, dict) else {}
    method = fields.get("quant_method")
    if method == METHOD:
        return _saved(Fields("config.json", "quantization_config.", fields))
    if method is None and (fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        method = "bitsandbytes"  # whose first versions did not write a quant_method
    if method not in LEFT_BEHIND:
        refused = "quantised checkpoints are not supported, except those of python -m paligemma.quantize"
        remedy = "use the float checkpoint that it was made from"
        raise PaliGemmaError(f"config.json: quantization_config: {refused}: {remedy}")
    return method


def _saved(fields: Fields) -> Saved:
    """Raises PaliGemmaError for every value other than those that this package writes."""
    version, values = fields.values.get("version"), fields.values
    if version != VERSION:
        known = f"this paligemma reads version {VERSION}: update it, or make the checkpoint again"
        raise PaliGemmaError(f"config.json: quantization_config.version is {shown(version)}; {known}")
    for name, known in (("format", FORMATS), ("dtype", WORDS)):
        if not isinstance(values.get(name), str) or values[name] not in known:
            raise fields.wrong(name, values.get(name), f"one of {', '.join(known)}")
    saved = Saved(values["format"], values["dtype"])
    written = saved.config()
    for name, wanted in written.items():
        if name not in values:
            raise PaliGemmaError(
                f"config.json: quantization_config.{name} is missing: make the checkpoint again"
            )
        if type(values[name]) is not type(wanted) or values[name] != wanted:
            raise fields.wrong(
                name, values.get(name), f"{json.dumps(wanted)} for {saved.format} in {saved.dtype}"
            )
    if unknown := sorted(values.keys() - written.keys()):
        raise PaliGemmaError(f"config.json: quantization_config has the unknown field {shown(unknown[0])}")
    return saved
