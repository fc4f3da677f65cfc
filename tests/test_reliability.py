"""The scoreboard's short profile, and for each of its classes a planted fault that it finds."""

import contextlib
import itertools
import tempfile
from pathlib import Path

import pytest
import reliability
import test_planted_faults
import torch
from reliability import binary, children, far, installation, instrumented, static
from reliability.board import Found, Tally, run
from torch import nn

from fastres import dispatch
from fastres.frozen import build, file, int8
from fastres.ops import REGISTRY, _check
from fastres.optimize import whole

pytestmark = pytest.mark.cpu
BUILDING = ("R13", "R20", "R24")  # whose time goes into building the library or its kernels anew


def in_lanes(codes):
    return [pytest.param(code, marks=pytest.mark.compile) if code in BUILDING else code for code in codes]


@pytest.mark.parametrize("code", in_lanes(reliability.CLASSES))
def test_nothing_fails(code):
    result = run(code, "short")
    assert not result.failed, "\n".join(result.failures)
    assert result.ok, f"{result.tried} cases of {result.wanted}"
    if not result.tried:
        pytest.skip("; ".join(result.notes))


def wrong_kernel(patch, change, name="bn_act", only=lambda args: True):
    """The op's chosen function with its first output changed."""
    op = REGISTRY[name]
    choose = op._choose

    def faulty(key, args):
        right = choose(key, args)

        def run(*args):
            result = right(*args)
            first = result[0] if isinstance(result, tuple) else result
            if only(args):
                change(first)
            return result

        return run

    op._choices.clear()
    patch.setattr(op, "_choose", faulty)


def scale_last(y):
    if y.numel():
        y.view(-1)[-1:].mul_(1.001) if y.is_contiguous() else y.mul_(1.001)


def unlike_torch(args):
    """Whether the call is not the reference of a comparison."""
    return "*" not in dispatch._forced


def fault_values(patch):
    wrong_kernel(patch, scale_last, only=unlike_torch)


def fault_gradients(patch):
    wrong_kernel(patch, scale_last, "bn_act_backward", unlike_torch)


def fault_derivative(patch):
    wrong_kernel(patch, lambda grad: grad.mul_(1.5), "add_act_backward")


def fault_integers(patch):
    wrong_kernel(patch, lambda y: y.add_(torch.finfo(y.dtype).eps), only=unlike_torch)


def fault_nan(patch):
    wrong_kernel(patch, lambda y: y.nan_to_num_(), only=unlike_torch)


def fault_mutation(patch):
    """Every op writes into its first argument."""
    for name in REGISTRY:
        wrong_kernel(patch, lambda y: None, name, lambda args: args[0].detach().mul_(2) is None)


def fault_check(patch):
    patch.setattr(_check, "eps", lambda op, value: None)


def fault_stale(patch):
    """Folds and plans do not notice writes."""
    patch.setattr(whole._Made, "holds", lambda self: True)


def fault_luck(patch):
    """Every call computes something else."""
    calls = itertools.count(1)
    for name in REGISTRY:
        wrong_kernel(patch, lambda y: y.mul_(next(calls)), name)


def fault_file(patch):
    patch.setattr(file, "_need", lambda fine, what: None)


def fault_plan(patch):
    """ReLUs are left out."""
    patch.setattr(build._Builder, "on_relu", lambda self, x, *, y: self.pass_on(x, y))


def fault_scale(patch):
    """A convolution in 8-bit integers is scaled by a little more than it should be."""
    right = int8._packed_conv

    def packed(layer, scales):
        weight, constants = right(layer, scales)
        return weight, constants * 1.01

    patch.setattr(int8, "_packed_conv", packed)


def fault_memory(patch):
    """Every case writes past the end of its memory."""
    right = instrumented.run
    patch.setattr(instrumented, "run", lambda kind, library, *words, hidden="": right(kind, library, "planted", "address"))


def fault_setup(patch):
    """What cannot be built is no sentence but an exception."""
    right = installation.clone

    def clone(folder):
        setup = right(folder) / "setup.py"
        setup.write_text(setup.read_text().replace("except Unmet as reason", "except KeyError as reason"))
        return folder

    patch.setattr(installation, "clone", clone)


def fault_abi(patch):
    """The library asks for what PyTorch 2.9 does not promise."""
    patch.setattr(binary, "TARGET", "0x0209000000000000")


def fault_eval(patch):
    """Code is made of what a user says."""
    folder = tempfile.TemporaryDirectory()
    Path(folder.name, "eval.py").write_text("print(eval(input()))\n")
    patch.setattr(static, "SHIPPED", [Path(folder.name)])
    patch.setattr(static, "planted", folder, raising=False)  # which keeps it until the fault is undone


def fault_networks(patch):
    wrong_kernel(patch, scale_last, "bn_act_train", unlike_torch)
    wrong_kernel(patch, scale_last, "bn_add_act_train", unlike_torch)


def fault_states(patch):
    """Weights that are loaded are rounded."""
    right = nn.Module.load_state_dict

    def load(self, state, *args, **options):
        return right(self, {k: v.bfloat16().to(v.dtype) for k, v in state.items()}, *args, **options)

    patch.setattr(nn.Module, "load_state_dict", load)


def fault_zones(patch):
    """Every call of an op writes one byte behind its output."""
    patch.setattr(
        children,
        "PREFIX",
        """
import ctypes
from fastres.ops._op import Op
right = Op.__call__
def call(self, *args):
    y = right(self, *args)
    if hasattr(y, "untyped_storage") and y.numel():
        ctypes.memset(y.untyped_storage().data_ptr() + y.untyped_storage().nbytes(), 0, 1)
    return y
Op.__call__ = call
""",
    )


def fault_index(patch):
    """Values further away than 32 bits reach are not found."""
    right = far.spread
    patch.setattr(far, "spread", lambda tensor, dim, distance: right(tensor, dim, distance).zero_())


def fault_leak(patch):
    """Every op keeps what it gave."""
    patch.setattr(
        children,
        "PREFIX",
        """
from fastres.ops._op import Op
right, kept = Op.__call__, []
def call(self, *args):
    y = right(self, *args)
    kept.append(bytes(4096))
    return y
Op.__call__ = call
""",
    )


def fault_write(patch):
    """Files are written where they stand, a half at a time."""
    patch.setattr(
        children,
        "PREFIX",
        """
import time
from fastres import files
def write(path, content, mode=0o666):
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
        file.flush()
        time.sleep(0.01)
        file.write(content[len(content) // 2 :])
files.replace = write
""",
    )


def fault_planting(patch):
    """Nothing is planted, so nothing is caught."""
    patch.setattr(test_planted_faults, "apply", lambda fault, file: None)


FAULTS = {
    "R1": fault_values, "R2": fault_gradients, "R3": fault_derivative, "R4": fault_integers, "R5": fault_nan,
    "R6": fault_mutation, "R7": fault_check, "R8": fault_networks, "R9": fault_states, "R10": fault_stale,
    "R13": fault_memory, "R14": fault_zones, "R15": fault_index, "R16": fault_luck, "R18": fault_leak, "R20": fault_setup,
    "R21": fault_abi, "R22": fault_file, "R23": fault_write, "R24": fault_planting, "R26": fault_eval,
    "F1": fault_plan, "F2": fault_scale,
}  # fmt: skip


def test_every_class_has_a_fault():
    assert FAULTS.keys() == reliability.CLASSES.keys()


@pytest.mark.parametrize("code", in_lanes(FAULTS))
def test_a_planted_fault_is_found(code, monkeypatch):
    with contextlib.ExitStack() as undo:
        for op in REGISTRY.values():
            undo.callback(op._choices.clear)
        FAULTS[code](monkeypatch)
        found = reliability.CLASSES[code]
        tally = Tally(one=True)  # more failures of the same fault would say no more
        with contextlib.suppress(Found):
            found.tries(tally, found.short)
        monkeypatch.undo()
    if tally.notes and not tally.tried:
        pytest.skip("; ".join(tally.notes))
    assert tally.failed, f"{code} did not find its fault among {tally.tried} cases"
