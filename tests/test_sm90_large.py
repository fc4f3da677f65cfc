"""The kernels for sm_90a and those of clusters at sizes of real networks, on a GPU alone: many tiles for each multiprocessor,
whose rings and barriers go round, and kernels that begin before those that they depend on have ended."""

from typing import NamedTuple

import _hopper
import pytest
import torch
import torch.nn.functional as F
from _cuda_calls import run as run_native
from _hopper import CL
from test_bn_cluster import same_bits
from test_sm90_chain import Case as Chain
from test_sm90_chain import act
from test_sm90_chain import run as run_chain
from test_sm90_wide import ONE, Case

from fastres.ops import _conv_wide

pytestmark = pytest.mark.cuda
AGAIN = 20  # runs that have to give the same bits
WIDE = {
    "whole": Case(64, 64, 56, 56, 64, residual=False),
    "whole, two share x": Case(128, 128, 28, 28, 128),
    "by tap, four share x": Case(256, 256, 14, 14, 256, residual=False),
    "by tap, 7x7 pixels": Case(256, 512, 7, 7, 512),
    "1x1, much depth": Case(256, 1024, 14, 14, 256, ONE),
    "1x1, much width": Case(64, 64, 56, 56, 256, ONE),
    "stride 2": Case(64, 128, 56, 56, 128, stride=2),
}
CHAINS = {"64 channels": Chain(64, 64, 56, 56, 256), "128 channels": Chain(128, 128, 28, 28, 512)}


@pytest.fixture
def device():
    return _hopper.device("cuda")


class Drawn(NamedTuple):
    """Small integers and halves, drawn on the device; sums of them are exact in every order."""

    generator: torch.Generator
    dtype: torch.dtype

    def __call__(self, most, *size, of=1.0):
        there = {"generator": self.generator, "device": self.generator.device}
        values = torch.randint(-most, most + 1, size, **there) * (torch.rand(size, **there) < of)
        return values.to(self.dtype).contiguous(memory_format=CL) if len(size) == 4 else values.float()


def drawing(device, dtype=torch.bfloat16):
    return Drawn(torch.Generator(device).manual_seed(0), dtype)


def wide_arguments(case, device):
    """x, weight, bias, residual and the result; few weights are not 0, so that bfloat16 holds all sums."""
    draw = drawing(device)
    x, weight = draw(1, case.n, case.c, case.h, case.w), draw(1, case.k, case.c, *case.kernel, of=0.02)
    z = F.conv2d(x.double(), weight.double(), None, *case.geometry)
    bias, residual = draw(4, case.k), draw(9, *z.shape) if case.residual else None
    y = z + bias.double().view(-1, 1, 1) + (0.0 if residual is None else residual.double())
    return (x, weight, bias, residual), z, y


@pytest.mark.parametrize("name", WIDE)
def test_many_tiles_of_the_wide_convolution(device, name):
    case = WIDE[name]
    (x, weight, bias, residual), z, y = wide_arguments(case, device)
    packed = weight.permute(0, 2, 3, 1).contiguous()
    for _ in range(AGAIN):
        found = torch.ops.fastres_C.sm90_conv_wide(x, packed, bias, residual, *case.geometry, "relu")
        assert torch.equal(found, y.relu().to(found))
    stored, mean, var = torch.ops.fastres_C.sm90_conv_wide_statistics(x, packed, *case.geometry)
    assert torch.equal(stored, z.to(stored))
    exact = z.to(stored).double()
    torch.testing.assert_close(mean.double(), exact.mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), exact.var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)
    for _ in range(AGAIN):
        again = torch.ops.fastres_C.sm90_conv_wide_statistics(x, packed, *case.geometry)
        assert all(map(torch.equal, again, (stored, mean, var)))


@pytest.mark.parametrize("name", [name for name, case in WIDE.items() if case.stride == 1])
def test_many_tiles_of_gradients_that_go_on_through_a_batch_norm(device, name):
    """The bits of the two backwards apart."""
    case, draw = WIDE[name], drawing(device)
    (x, weight, _, _), z, _ = wide_arguments(case, device)
    grad_y = draw(1, *z.shape)
    exact = torch.ops.aten.convolution_backward(
        grad_y.double(), x.double(), weight.double(), [case.k], *case.geometry, False, [0, 0], 1, [True, False, False]
    )[0]
    norm = (draw(2, case.c), draw(2, case.c) / 4, draw(1, case.c), draw(1, case.c).abs() + 0.5, 1e-5, "relu")
    expected = run_native("bn_act_backward", exact.to(x).contiguous(memory_format=CL), x, *norm, True)
    for _ in range(AGAIN):
        found = _conv_wide.run_gradient(grad_y, weight, x, *norm, *case.geometry, 1)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", CHAINS)
def test_many_tiles_of_a_chain(device, name):
    case, draw = CHAINS[name], drawing(device)
    x, residual = draw(1, case.n, case.c, case.h, case.w), draw(9, case.n, case.k, case.h, case.w)
    weight, last = draw(1, case.c, case.c, 3, 3, of=0.04), draw(1, case.k, case.c, 1, 1, of=0.1)
    following, biases = draw(1, case.c, case.k, 1, 1, of=0.02), [draw(4, k) for k in (case.c, case.k, case.c)]
    middle = act(F.conv2d(x.double(), weight.double(), biases[0].double(), 1, case.padding), "relu")
    y = (F.conv2d(middle, last.double(), biases[1].double()) + residual.double()).relu().to(x)
    z = F.conv2d(y.double(), following.double(), biases[2].double()).relu().to(x)
    for _ in range(AGAIN):
        args = x, weight, biases[0], last, biases[1], residual, case
        assert torch.equal(run_chain(*args), y)
        assert all(map(torch.equal, run_chain(*args, (following, biases[2])), (y, z)))


@pytest.mark.parametrize("shape", [(32, 256, 14, 14), (64, 512, 7, 7), (8, 64, 56, 56), (8, 256, 56, 56)], ids=str)
def test_many_clusters_have_the_bits_of_two_passes(device, shape):
    draw = drawing(device)
    x, residual = (draw(9, *shape) + torch.rand(shape, device=device).bfloat16() for _ in range(2))
    x, residual = (t.contiguous(memory_format=CL) for t in (x, residual))
    parameters = draw(2, shape[1]), draw(2, shape[1])
    for _ in range(AGAIN):
        y, mean, var, mask = torch.ops.fastres_C.cluster_bn_add_act_train(x, residual, *parameters, 1e-5, "relu")
        expected = torch.ops.fastres_C.bn_add_act_given(x, residual, *parameters, mean, var, 1e-5, "relu")
        assert all(map(same_bits, (y, mask), expected))
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), correction=0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [1, 3])
def test_a_kernel_waits_for_the_one_before_it(device, kernel):
    """Each moves the channels by one; all of them in one graph, where the next is launched before the one before it ends."""
    x, steps = drawing(device)(9, 64, 64, 28, 28), 16
    weight = torch.zeros(64, 64, kernel, kernel, dtype=x.dtype, device=device)
    weight[:, :, kernel // 2, kernel // 2] = torch.eye(64, device=device).roll(1, 0)
    packed, padding = weight.permute(0, 2, 3, 1).contiguous(), (kernel // 2,) * 2
    nothing, half = torch.zeros(64, device=device), torch.zeros_like(x)

    def walk(y):
        for step in range(steps):
            if step % 2:
                y = torch.ops.fastres_C.sm90_conv_wide(y, packed, nothing, None, ONE, padding, ONE, "none")
            else:
                y = torch.ops.fastres_C.sm90_conv_act(
                    y, packed, nothing, half, None, None, None, ONE, padding, ONE, ONE, "none"
                )
        return y

    expected = x.roll(steps, 1)
    assert torch.equal(walk(x), expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = walk(x)
    for _ in range(AGAIN):
        y.zero_()
        graph.replay()
        assert torch.equal(y, expected)
