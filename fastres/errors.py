"""The exceptions fastres raises on purpose."""

from collections.abc import Mapping

import torch


class ArgumentError(ValueError):
    """An argument has the wrong value, shape, dtype, device or layout: what must be, what was got, what to do."""


class ArgumentTypeError(TypeError):
    """An argument is not of the type it must be."""


class UnsupportedError(RuntimeError):
    """Something was asked for explicitly (a backend, a strict optimisation) and cannot be had; the text says why."""


class VerificationError(RuntimeError):
    """An optimised model missed the error budget on the user's own input; the model was restored."""


class DivergenceError(RuntimeError):
    """Training came to a loss that is not finite; what was saved before stands."""


def must(op: str, parameter: str, what: str, got: object, do: str = "") -> ArgumentError:
    """Build the one form of message: ``fastres.OP: PARAMETER must be WHAT, got GOT (DO)``."""
    return ArgumentError(f"fastres.{op}: {parameter} must be {what}, got {got}{f' ({do})' if do else ''}")


def must_type(op: str, parameter: str, what: str, got: object) -> ArgumentTypeError:
    """The same message where the type itself is wrong."""
    return ArgumentTypeError(f"fastres.{op}: {parameter} must be {what}, got {type(got).__name__}")


def renamed(
    error: ArgumentError | ArgumentTypeError, op: str, names: Mapping[str, str]
) -> ArgumentError | ArgumentTypeError:
    """An op's error as the function of the same name words it, which may call a parameter differently."""
    where, _, message = str(error).partition(": ")
    parameter, _, rest = message.partition(" must be ")
    if where.removesuffix("_train") == f"fastres.{op}":
        parameter = names.get(parameter, parameter)
    return type(error)(f"fastres.{op}: {parameter} must be {rest}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, which says nothing about the next attempt."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
