"""Kernels' calls that are recorded once and made again: to the bit what Python's own way gives, only where the kind of
everything is the same, and never past a choice made anew."""

import copy
import gc
import weakref

import pytest
import torch
from tolerances import assert_close_to_truth
from torch import nn

import fastres
import fastres.nn as fnn
from fastres.dispatch import Backend
from fastres.experiments.twin import torch_twin
from fastres.nn import _fused, _plain, _stage
from fastres.ops import REGISTRY, _node
from fastres.ops._replay import Recorder

LAST = torch.channels_last
BLOCKS = {
    "basic": lambda: fnn.BasicBlock(16, 16),
    "option A": lambda: fnn.BasicBlock(16, 32, 2, fnn.shortcut("A", 16, 32, 2)),
    "projection": lambda: fnn.BasicBlock(16, 32, 2, fnn.shortcut("B", 16, 32, 2)),
    "bottleneck": lambda: fnn.Bottleneck(16, 4),
    "groups, projection": lambda: fnn.Bottleneck(16, 16, 2, fnn.shortcut("B", 16, 64, 2), groups=4, base_width=16),
    "plain": lambda: fnn.PlainBlock(16, 32, 2),
    "bias": lambda: fnn.ConvBNAct2d(16, 32, bias=True),
    "stage": lambda: _stage.Stage(fnn.Bottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2)), fnn.Bottleneck(32, 8)),
}


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """No recording of other tests; blocks of a stage keep the two gradients of a value apart, as on a GPU."""
    monkeypatch.setattr(_stage, "DEVICES", {"cuda", "cpu"})
    fastres.dispatch.forget()


@pytest.fixture
def formulas(monkeypatch):
    """How often a gradient was computed by the formulas."""
    found, original = [], _node._by_formulas
    monkeypatch.setattr(_node, "_by_formulas", lambda *args: found.append(1) or original(*args))
    return found


def images(seed=0, dtype=torch.float32, layout=LAST, device="cpu"):
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).contiguous(memory_format=layout).requires_grad_()


def step(block, x, amp=False):
    """Output and all gradients; the block's buffers are its own."""
    for p in (x, *block.parameters()):
        p.grad = None
    same = torch.backends.cudnn.flags(enabled=True, deterministic=True)
    with torch.autocast(x.device.type, torch.bfloat16, enabled=amp), same:
        y = block(x)
    seed = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device).view_as(y)
    with torch.backends.cudnn.flags(enabled=True, deterministic=True):
        y.backward(seed.contiguous(memory_format=LAST) if y.is_contiguous(memory_format=LAST) else seed)
    return [y.detach(), *(p.grad.clone() for p in (x, *block.parameters()) if p.grad is not None)]


def by_python(block, x, *options):
    """The step of a copy for which nothing is recorded or made again."""
    leaf = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_node._Call, "name", lambda self, tensors, needs: None)
        return step(copy.deepcopy(block), leaf, *options)


def assert_same_bits(found, expected):
    assert len(found) == len(expected)
    for index, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one.dtype == other.dtype and one.stride() == other.stride() and torch.equal(one, other), index


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_calls_made_again_have_the_bits_of_pythons(device, name, amp, layout, formulas):
    torch.manual_seed(0)
    block = BLOCKS[name]().to(device, memory_format=layout)
    x = images(layout=layout, device=device)
    step(block, x, amp)
    recorded = len(formulas)
    for seed in (1, 2):
        x, expected = images(seed, layout=layout, device=device), copy.deepcopy(block)
        found = step(block, x, amp)
        assert len(formulas) == recorded
        assert_same_bits(found, by_python(expected, x, amp))
        formulas.clear()
        recorded = 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_kinds_are_recorded_anew(dtype, formulas):
    """Dtypes, shapes, layouts, gradients' strides, parameters' dtypes, frozen parameters, another eps or stride."""
    torch.manual_seed(0)
    block = BLOCKS["projection"]().to(memory_format=LAST)
    step(block, images())
    changes = {
        "nothing": lambda b: b,
        "dtype": lambda b: b.to(dtype),
        "frozen": lambda b: b.to(torch.float32) and b.conv1.requires_grad_(False),
        "frozen norm": lambda b: b.bn2.requires_grad_(False),
        "eps": lambda b: setattr(b.bn1, "eps", 0.1),
        "stride": lambda b: (setattr(b.conv2, "stride", (2, 2)), setattr(b.downsample[0], "stride", (4, 4))),
        "layout of a weight": lambda b: setattr(b.conv2.weight, "data", b.conv2.weight.data.contiguous()),
        "no activation": lambda b: setattr(b, "relu", None),
    }
    for what, change in changes.items():
        change(block)
        for x in (images(1, block.bn1.weight.dtype), images(2, block.bn1.weight.dtype)):
            assert_same_bits(step(block, x), by_python(block, x)), what
    assert len(formulas) > 2 * len(changes)  # by_python's, and the first of each kind


def test_parameters_that_thaw_get_gradients():
    block = BLOCKS["basic"]().to(memory_format=LAST)
    block.conv1.requires_grad_(False)
    step(block, images())
    step(block, images())
    assert block.conv1.weight.grad is None
    block.conv1.requires_grad_(True)
    x = images(1)
    assert_same_bits(step(block, x), by_python(block, x))
    assert block.conv1.weight.grad is not None


def test_gradients_of_other_strides_are_recorded_anew(formulas):
    block = BLOCKS["basic"]().to(memory_format=LAST)
    for layout in (LAST, torch.contiguous_format, LAST, torch.contiguous_format):
        x = images()
        y = block(x)
        seed = torch.linspace(-1, 2, y.numel()).view_as(y).contiguous(memory_format=layout)
        y.backward(seed)
        whole = block(x)
        (expected,) = torch.autograd.grad(whole, x, seed)
        assert torch.equal(x.grad, expected)
    assert len(formulas) == 2
    block(images()).sum().backward()  # whose gradient has one value
    assert len(formulas) == 3


def test_a_weight_of_two_layers_is_not_recorded(formulas):
    """It would be known by one of its names; a recording of another block serves both."""
    def tied():
        torch.manual_seed(0)
        block = BLOCKS["basic"]().to(memory_format=LAST)
        block.conv2.weight = block.conv1.weight
        return block

    block = tied()
    for seed in range(3):
        x = images(seed)
        assert_same_bits(step(block, x), by_python(block, x))
    assert len(formulas) == 6
    assert "come from Python every time: a tensor is given twice" in str(fastres.explain(nn.Sequential(block), images()))
    fastres.dispatch.forget()
    assert "come from Python" not in str(fastres.explain(nn.Sequential(block), images()))
    step(BLOCKS["basic"]().to(memory_format=LAST), images())
    formulas.clear()
    x = images(3)
    assert_same_bits(step(block, x), by_python(block, x))
    assert len(formulas) == 1


def test_a_choice_made_anew_is_followed(formulas, monkeypatch):
    """By the next forward pass, and by the next backward of one that ran before."""
    ran = []
    op = REGISTRY["bn_act_backward"]
    run_reference = op.reference
    watching = Backend("cpu", lambda *args: None, lambda: lambda *args: ran.append(1) or run_reference(*args))
    monkeypatch.setattr(op, "backends", (watching, op.backends[-1]))
    block, x = BLOCKS["basic"]().to(memory_format=LAST), images()
    with fastres.use(bn_act="torch"):
        step(block, x)
        step(block, x)
    assert not ran
    with fastres.use(bn_act="cpu"):
        step(block, x)
        step(block, x)
        assert len(ran) == 2
        y = block(x)
    with fastres.use(bn_act="torch"):
        y.backward(torch.ones_like(y), retain_graph=True)
        assert len(ran) == 2
    with fastres.use(bn_act="cpu"):
        y.backward(torch.ones_like(y))
        assert len(ran) == 3


def test_weights_that_are_not_finite_are_as_in_torch():
    """Winograd's kernels decline them at every call, recorded or not."""
    torch.manual_seed(0)
    block = fnn.BasicBlock(32, 32).to(memory_format=LAST)
    x = torch.randn(4, 32, 16, 16).contiguous(memory_format=LAST).requires_grad_()
    step(block, x)
    for value in (float("inf"), float("nan"), 1.0):
        with torch.no_grad():
            block.conv2.weight[3, 4, 1, 1] = value
        plain = torch_twin(block)
        leaf, wide = (x.detach().to(dtype, copy=True).requires_grad_() for dtype in (torch.float32, torch.float64))
        found = step(block, x), step(plain, leaf), step(copy.deepcopy(plain).double(), wide)
        for index, triple in enumerate(zip(*found, strict=True)):
            assert_close_to_truth(*triple, torch.float32, f"{value} {index}")


def test_what_a_step_made_is_freed(monkeypatch):
    """Neither the form nor a recording keeps a tensor; of a backward, what nobody reads again goes at once."""
    block = BLOCKS["bottleneck"]().to(memory_format=LAST)
    made, alive, original = [], [], torch.convolution

    def watched(*args):
        alive.append(sum(each() is not None for each in made))
        y = original(*args)
        made.append(weakref.ref(y))
        return y

    from fastres.ops import _replay

    monkeypatch.setitem(_replay._KNOWN, torch.ops.aten.convolution.default, watched)
    for _ in range(3):
        y = block(images())
        y.sum().backward()
        del y
        gc.collect()
        assert made and not any(each() is not None for each in made)
    calls = [gradients.calls._calls for form in _node._FORMS.values() for gradients in form.backward.values()]
    assert calls and all(sum(len(done) for *_, done in each) >= 5 for each in calls)


def test_changed_in_place_between_is_noticed():
    block, x = BLOCKS["basic"]().to(memory_format=LAST), images()
    step(block, x)
    y = block(x)
    with torch.no_grad():
        block.conv2.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("name", ["basic", "projection", "stage"])
@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("low", [False, True])
def test_what_hooks_of_saved_tensors_lay_anew_is_what_it_was(name, large, low, formulas, monkeypatch):
    """As ``save_on_cpu`` brings it back from a GPU: contiguous. The masks of ReLUs stay in the order of what was saved."""
    monkeypatch.setattr(_fused, "MOST_IN_ONE_NODE", 0 if large else 2**20)
    torch.manual_seed(0)
    block = BLOCKS[name]().to(memory_format=LAST)
    plain = torch_twin(block)
    if low:
        block = fastres.optimize(nn.Sequential(*block) if name == "stage" else nn.Sequential(block), memory="low")
    step(block, images())
    formulas.clear()
    for again in (lambda t: t, lambda t: t.contiguous()):
        x, same = images(1), images(1)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, again):
            y = block(x)
        y.square().sum().backward()
        plain(same).square().sum().backward()
        torch.testing.assert_close(x.grad, same.grad, rtol=1e-3, atol=1e-3)
    assert large or low or len(formulas) == len([m for m in block.modules() if isinstance(m, (fnn.BasicBlock, fnn.Bottleneck))])


def test_forms_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(_node, "_MOST_FORMS", 3)
    block = BLOCKS["plain"]().to(memory_format=LAST)
    for size in range(4, 12):
        block(torch.randn(2, 16, size, size)).sum().backward()
        assert len(_node._FORMS) <= 3


def test_a_recorder_says_what_it_cannot_make_again():
    x, other = torch.randn(3), torch.randn(3)
    with Recorder([x]) as recorder:
        y = torch.clone(x)
        z = torch.clone(y)
    assert torch.equal(recorder.recording([z, x])([other])[0], other) and recorder.why_not is None
    with Recorder([x]) as recorder:
        unread = x + 1
        y = torch.clone(x)
    assert recorder.recording([y]) is not None and torch.equal(unread, x + 1)
    with Recorder([x]) as recorder:
        y = torch.clone(x)
        y.add_(1)
    assert recorder.recording([y]) is None and recorder.why_not.startswith("aten.add_.Tensor writes")
    with Recorder([x]) as recorder:
        y = torch.clone(other)
    assert recorder.recording([y]) is None and recorder.why_not == "a call reads a tensor that no recorded call computed"
    with Recorder([x]) as recorder:
        y = torch.clone(x + 1)
    assert recorder.recording([y]) is None and recorder.why_not == "a call reads a tensor that no recorded call computed"
    with Recorder([x, x]) as recorder:
        y = torch.clone(x)
    assert recorder.recording([y]) is None and recorder.why_not == "a tensor is given twice"
    with Recorder([x]) as recorder:
        pass
    assert recorder.recording([other]) is None and recorder.why_not == "a result was not computed by a recorded call"


@pytest.mark.parametrize("name", ["basic", "projection", "stage"])
def test_threads_share_recordings(name):
    """Each with its own model and inputs."""
    from concurrent.futures import ThreadPoolExecutor

    torch.manual_seed(0)
    blocks = [BLOCKS[name]().to(memory_format=LAST) for _ in range(4)]
    expected = [by_python(block, images(seed)) for seed, block in enumerate(blocks)]

    def steps(seed):
        found = [step(blocks[seed], images(seed)) for _ in range(20)]
        return found[-1]

    with ThreadPoolExecutor(4) as pool:
        for found, same in zip(pool.map(steps, range(4)), expected, strict=True):
            for one, other in zip(found, same, strict=True):
                torch.testing.assert_close(one, other)  # PyTorch's convolutions depend on the number of threads


def test_evaluation_and_hooks_go_their_own_way(formulas):
    block, heard = BLOCKS["basic"]().to(memory_format=LAST), []
    step(block, images())
    hook = block.bn1.register_forward_hook(lambda *_: heard.append(1))
    step(block, images())
    assert heard == [1]
    hook.remove()
    formulas.clear()
    step(block, images())
    assert not formulas
    block.eval()
    mean = block.bn1.running_mean.clone()
    step(block, images())
    assert torch.equal(block.bn1.running_mean, mean)
    assert isinstance(block.relu, nn.ReLU) and _plain.why_not(block.relu) is None
