"""Products in TF32, in the interpreter: of operands rounded to the nearest value of 10 bits behind the point."""

import pytest
import torch

from fastres.env import triton_interpret

pytestmark = pytest.mark.triton_interpreter
if not triton_interpret():
    pytest.skip("runs by itself with TRITON_INTERPRET=1", allow_module_level=True)
pytest.importorskip("triton")

from fastres.kernels.triton import configs, conv_bn_act, conv_bn_add_conv_bn_act  # noqa: E402
from fastres.kernels.triton.device import nearest_tf32  # noqa: E402

ONE = ((1, 1), (1, 1), (0, 0), (1, 1))  # kernel, stride, padding, dilation
CONFIGS = {"tiles": configs.CONV_TF32[0], "descriptors": configs.CONV_PERSISTENT_TF32[0]}


def rounded(x):
    """By way of its fraction in [0.5, 1): 11 bits of it, ties away from zero."""
    fraction, exponent = torch.frexp(x.double())
    return torch.ldexp((fraction.abs() * 2048 + 0.5).floor().copysign(fraction) / 2048, exponent).float()


def values():
    """Any numbers, and those next to the middle between two of TF32."""
    middle = 1 + 2**-11 * torch.arange(1.0, 33.0, 2)
    beside = [middle, torch.nextafter(middle, torch.tensor(0.0)), torch.nextafter(middle, torch.tensor(4.0))]
    x = torch.cat([*beside, -middle, torch.randn(192)])
    return torch.stack([x, x.flip(0) * 1e-30, x.roll(9) * 1e20, x.roll(5)]).reshape(1, 4, 16, 16)


def channels_last(x):
    return x.contiguous(memory_format=torch.channels_last)


def test_a_weight_is_rounded_once_where_it_is_packed():
    x = values()
    assert torch.equal(conv_bn_act.pack(x, True), rounded(conv_bn_act.pack(x, False)))
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    assert torch.equal(nearest_tf32(special).view(torch.int32), special.view(torch.int32))
    nan = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000], dtype=torch.int32).view(torch.float32)
    assert (nearest_tf32(nan).view(torch.int32) & 0x7FFFE000 > 0x7F800000).all()  # without the bits that TF32 has not


@pytest.mark.parametrize("config", CONFIGS)
def test_products_are_those_of_rounded_operands(config):
    """One product an output: exact, and different from that of operands cut off or left as they are."""
    x, weight = channels_last(values()), torch.diag(torch.tensor([1.0, 1 + 2**-11, -1.7182818, 0.1])).reshape(4, 4, 1, 1)
    y = conv_bn_act.conv_act(x, conv_bn_act.pack(weight, True), None, None, *ONE, "none", True, CONFIGS[config])
    scale = rounded(weight.sum(1)).reshape(4, 1, 1)
    assert torch.equal(y, rounded(x) * scale) and not torch.equal(y, x * scale)
    plain = conv_bn_act.conv_act(x, conv_bn_act.pack(weight, False), None, None, *ONE, "none", False, CONFIGS[config])
    assert torch.equal(plain, x * weight.sum(1).reshape(4, 1, 1))


def test_both_products_at_the_end_of_a_block():
    x = channels_last(values())
    weight = conv_bn_act.pack(torch.eye(4).reshape(4, 4, 1, 1) * 0.1, True)
    for main, shortcut in ((x, torch.zeros_like(x)), (torch.zeros_like(x), x)):
        args = main, weight, None, *ONE, 1, shortcut, weight, None, (1, 1)
        y = conv_bn_add_conv_bn_act.conv_add_conv_act(*args, "none", True, CONFIGS["tiles"])
        assert torch.equal(y, rounded(x) * rounded(torch.tensor(0.1)))


@pytest.mark.parametrize("config", CONFIGS)
def test_nan_and_infinity_stay(config):
    """Those of any bits: the sum that rounds a number would make a negative zero of a GPU's NaN."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7F800000, -0x800000], dtype=torch.int32)
    x = channels_last(bits.view(torch.float32).reshape(1, 1, 1, 5).expand(1, 4, 1, 5))
    weight = conv_bn_act.pack(torch.ones(4, 4, 1, 1), True)
    for act, last in (("none", -torch.inf), ("relu", 0.0)):
        y = conv_bn_act.conv_act(x, weight, None, None, *ONE, act, True, CONFIGS[config])
        assert y[..., :3].isnan().all() and (y[..., 3] == torch.inf).all() and (y[..., 4] == last).all()
