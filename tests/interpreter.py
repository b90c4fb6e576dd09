"""Triton's interpreter, without what it repeats: half of a kernel's time here was spent on it.

At every call of a device function it looks through the whole language for functions to replace by its own, which the
launch has done already and only the end of the launch undoes. Here each module's functions cause that once a launch.
It also writes a table of number types at every cast and load, to read one entry of it: here it reads what it read.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

from tests.bfloat16 import mend_bfloat16
from tests.bounds import check_every_address


def prepare_the_interpreter() -> None:
    """Quicker, right for bfloat16, and with every address checked; where kernels are interpreted. Idempotent."""
    if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
        replace_the_language_once_a_launch()
        mend_bfloat16()
        check_every_address()


def replace_the_language_once_a_launch() -> None:
    """Idempotent; Triton must be importable, and interpreting."""
    from triton.runtime import interpreter

    replace, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    if replace.__module__ == __name__:
        return
    look_up, known = interpreter._get_np_dtype, {}

    def remembered(dtype: Any) -> Any:
        name = dtype.scalar.name
        if name not in known:
            known[name] = look_up(dtype)
        return known[name]

    interpreter._get_np_dtype = remembered
    done: set[int] = set()

    def once(function: Any) -> Any:
        # A module's functions share their globals, which decide what is replaced. Only the launch keeps the answer.
        if id(function.__globals__) in done:
            return None
        done.add(id(function.__globals__))
        return replace(function)

    def launched(executor: Any, *args: Any, **kwargs: Any) -> Any:
        done.clear()
        try:
            return launch(executor, *args, **kwargs)
        finally:
            done.clear()

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = once, launched
