"""Triton's interpreter, made right for bfloat16.

The interpreter keeps bfloat16 as its 16 bits and computes with the bits. Here a cast from or to bfloat16 goes through float32
and rounds to nearest even, tl.dot widens its operands, and any other arithmetic on bfloat16 is an error: kernels load, go to
float32, compute, and round at the store.
"""

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from paligemma.reference.params import round_bfloat16


def install() -> None:
    """Once for a process, before its first kernel runs."""
    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def cast_impl(self, source, target):
        if is_bfloat16(source) and target.scalar != tl.bfloat16:
            source = widened(source)
        if target.scalar != tl.bfloat16 or is_bfloat16(source):
            return source if source.dtype.scalar == target.scalar else cast(self, source, target)
        single = source if source.dtype.scalar == tl.float32 else cast(self, source, tl.float32)
        bits = np.ascontiguousarray(round_bfloat16(single.data), np.float32).view(np.uint32) >> 16
        return TensorHandle(bits.astype(np.uint16), tl.bfloat16)

    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_dot = lambda self, a, b, *rest: dot(self, widened(a), widened(b), *rest)
    for name in ("binary_op", "ternary_op", "unary_op", "create_fabs"):
        refuse_bfloat16(name)


def refuse_bfloat16(name: str) -> None:
    original = getattr(InterpreterBuilder, name)

    def checked(self, *operands):
        if any(is_bfloat16(operand) for operand in operands):
            raise TypeError(f"{name} on bfloat16: go to float32 first")
        return original(self, *operands)

    setattr(InterpreterBuilder, name, checked)


def is_bfloat16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def widened(handle: TensorHandle) -> TensorHandle:
    if not is_bfloat16(handle):
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << np.uint32(16)).view(np.float32), tl.float32)
