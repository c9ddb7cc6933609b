"""Corrects Triton's interpreter (3.5 to 3.9) for bfloat16, and, before Triton 3.7, for NumPy 2.4.

The interpreter stores bfloat16 as 16-bit integers and computes with these integers. With the corrections, a
cast from or to bfloat16 goes through float32 and rounds to nearest even, tl.dot widens its operands, and any
other arithmetic on bfloat16 is an error: kernels load, convert to float32, compute, and round at the store.
"""

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, ReduceScanOpInterface, TensorHandle

from paligemma.reference.params import round_bfloat16


def install() -> None:
    """Call once per process, before its first kernel runs. Does nothing if kernels are compiled."""
    if not triton.knobs.runtime.interpret or getattr(InterpreterBuilder, "is_right", False):
        return
    InterpreterBuilder.is_right = True
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
    check_tensor = ReduceScanOpInterface.check_tensor

    def checked_reduction(self, operands):
        if any(operand.dtype.scalar == tl.bfloat16 for operand in operands):
            raise TypeError("a reduction of bfloat16: go to float32 first")
        return check_tensor(self, operands)

    ReduceScanOpInterface.check_tensor = checked_reduction
    let_scalars_be_indices()
    patch_language_once()


def let_scalars_be_indices() -> None:
    """Allow range() of a scalar tensor.

    Triton before 3.7 calls int() on a one-element array, which is an error in NumPy 2.4.
    """
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        index = lambda self: int(np.asarray(self.handle.data).reshape(-1)[0])  # noqa: E731
        scope[0].set_attr(tensor, "__index__", index) if scope else setattr(tensor, "__index__", index)

    interpreter._patch_lang_tensor = patched


def patch_language_once() -> None:
    """Make the interpreter replace the functions of triton.language once a launch.

    By itself it replaces them at every call from one kernel function to another, which takes a third of its
    time.
    """
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def once(fn):
        languages = {value.__name__ for value in fn.__globals__.values() if value is tl or value is tl.core}
        if languages and languages <= patched:
            return None  # they are still replaced: a call from one function to another does not restore them
        patched.update(languages)
        return patch(fn)

    def launched(self, *args, **kwargs):
        patched.clear()
        try:
            launch(self, *args, **kwargs)
        finally:
            patched.clear()

    interpreter._patch_lang = once
    interpreter.GridExecutor.__call__ = launched


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
