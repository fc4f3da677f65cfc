"""The bytes that the ops say they move, against the arithmetic of fused training: schemes b and b+ for ResNet-50.

Scheme b fuses batch norm, addition and ReLU, reads a bit for each ReLU at the end of a block, and leaves the sum of the two
gradients there to autograd; b+ takes that sum into the backward, as the ops do where they get both gradients, between
blocks. For 256 images of 224x224 in bfloat16 they move 88.5 and
83.5 GB in a step, 33.0 of them in convolutions.
"""

import collections

import pytest
import torch

from fastres import models
from fastres.nn import _fused, _stage
from fastres.ops import REGISTRY
from fastres.ops._op import Op

pytestmark = pytest.mark.none
BIT = 1 / 16  # of a bfloat16
SUM = 3  # passes: two gradients read, their sum written
# Passes over a tensor of the op's size, forward and backward.
SCHEMES = {
    "b": {"bn_act": (3, 5), "bn_add_act": (4 + BIT, 6 + SUM), "bn_add_bn_act": (5 + BIT, 8 + SUM + 2 * BIT)},
    "b+": {"bn_act": (3, 5), "bn_add_act": (4 + BIT, 7), "bn_add_bn_act": (5 + BIT, 10 + BIT)},
}
STEP_GB = {"b": 88.5, "b+": 83.5}
CONVOLUTIONS_GB = 33.0
IMAGES = 256
# Where the ops differ from the schemes, whose tables leave out the bit that bn_add_act's backward reads.
INSTEAD = {"bn_act": (0, 0), "bn_add_act": (0, BIT), "bn_add_bn_act": (0, 0)}


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("op", SCHEMES["b"])
def test_an_op_moves_what_the_scheme_says(op, scheme):
    x = torch.empty(2, 8, 4, 4, dtype=torch.bfloat16, device="meta")  # as on a GPU: some CPU kernels make more passes
    tensor = x.numel() * x.element_size()
    ends_a_block = op != "bn_act"
    summed = SUM if scheme == "b" and ends_a_block else 0  # by autograd, outside of the op
    second = (x,) if scheme == "b+" and ends_a_block else ()
    for name, given, passes, instead, outside in zip(
        (f"{op}_train", f"{op}_backward"), ((x,), (x, *second)), SCHEMES[scheme][op], INSTEAD[op], (0, summed), strict=True
    ):
        moved, _ = REGISTRY[name].cost(*given)
        assert moved / tensor + outside == passes + instead, name


@pytest.fixture(scope="module")
def step():
    """Elements by op, and the passes that the costs of all its calls make, in one training step of ResNet-50 on an image."""
    model = models.resnet50()
    elements, moved = collections.Counter(), collections.Counter()
    watch = _Watch(elements, moved)
    with watch:
        model(torch.randn(1, 3, 224, 224)).sum().backward()
    return elements, moved


def as_on_a_gpu(tensor):
    return tensor.to("meta", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype)


class _Watch(torch.utils._python_dispatch.TorchDispatchMode):
    """Counts every call, also those that are alike."""

    def __init__(self, elements, moved):
        super().__init__()
        self.elements, self.moved = elements, moved

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastres" and not func._opname.startswith("conv"):
            op = REGISTRY[func._opname]
            self.elements[op.name] += next(a for a in args if isinstance(a, torch.Tensor)).numel()
            elsewhere = [as_on_a_gpu(a) if isinstance(a, torch.Tensor) else a for a in args]
            self.moved[op.name] += op.cost(*elsewhere)[0] / 2
        return func(*args, **(kwargs or {}))


def test_the_elements_are_those_of_resnet50(step):
    elements, _ = step
    inner, identity, projection = (elements[f"{op}_train"] for op in SCHEMES["b"])
    stem = elements["bn_act_maxpool_train"]
    assert inner + identity + 2 * projection + stem == pytest.approx(11.11e6, rel=1e-3)  # outputs of convolutions
    assert inner + identity + projection + stem == pytest.approx(9.61e6, rel=1e-3)  # of ReLUs
    assert identity + projection == pytest.approx(5.52e6, rel=1e-3)  # of blocks


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_step_moves_what_the_scheme_says(step, scheme):
    elements, moved = step
    stem = sum(moved[f"bn_act_maxpool_{part}"] for part in ("train", "backward"))
    passes = sum(elements[f"{op}_train"] * sum(SCHEMES[scheme][op]) for op in SCHEMES[scheme])
    assert (stem + passes) * 2 * IMAGES / 1e9 == pytest.approx(STEP_GB[scheme] - CONVOLUTIONS_GB, rel=3e-3)


def test_the_ops_of_a_step_move_scheme_b_and_what_they_do_instead(step):
    elements, moved = step
    own = sum(moved.values()) + SUM * sum(elements[f"{op}_train"] for op in ("bn_add_act", "bn_add_bn_act"))
    stem = sum(moved[f"bn_act_maxpool_{part}"] for part in ("train", "backward"))
    expected = stem + sum(
        elements[f"{op}_train"] * (sum(SCHEMES["b"][op]) + sum(INSTEAD[op])) for op in SCHEMES["b"]
    )
    assert own == pytest.approx(expected, rel=1e-12)


def test_the_outputs_of_all_blocks_but_the_last_come_in_two(step, monkeypatch):
    call_split, found = Op.call_split, collections.Counter()

    def counted(op, *args, **options):
        found[op.name] += args[0].numel()
        return call_split(op, *args, **options)

    monkeypatch.setattr(Op, "call_split", counted)
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0)
    monkeypatch.setattr(_stage, "DEVICES", {"cpu"})  # as on a GPU
    models.resnet50()(torch.randn(1, 3, 224, 224))
    elements, _ = step
    assert found["bn_add_bn_act_train"] == elements["bn_add_bn_act_train"]
    assert found["bn_add_act_train"] == elements["bn_add_act_train"] - 2048 * 7 * 7
