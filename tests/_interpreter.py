"""Triton's interpreter without what takes half of its time and finds nothing here."""

import dataclasses
import types

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Leave out the check of each sum and product for overflow, which results would show, and exchange functions once.

    The interpreter puts its own functions in place of the language's ahead of a kernel, and again at each call of a function
    inside it, where they are in place already.
    """
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    patch = interpreter._patch_lang

    def patch_once(function):
        modules = [value for value in function.__globals__.values() if isinstance(value, types.ModuleType)]
        missing = any(module in (tl, tl.core) and tl.core.is_builtin(module.load) for module in modules)
        return patch(function) if missing else interpreter._LangPatchScope()

    interpreter._patch_lang = patch_once
