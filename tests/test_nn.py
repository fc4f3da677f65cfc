"""Blocks against plain PyTorch: values, gradients, buffers, options, hooks, tracing and errors."""

import contextlib
import copy
import io
import pickle
import warnings
from collections import Counter
from functools import partial

import pytest
import torch
from _modules import called, compare, inference, lively, plainly, steady, step
from _torchvision import torchvision
from tolerances import assert_close_to_truth
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import fastres
import fastres.nn as fnn
from fastres import functional
from fastres.kernels import native
from fastres.ops import _running

resnet = torchvision.models.resnet
FrozenBatchNorm2d = torchvision.ops.misc.FrozenBatchNorm2d

BLOCKS = {
    "ConvBNAct2d": lambda: fnn.ConvBNAct2d(16, 24, 3, stride=2),
    "ConvBNAct2d without activation": lambda: fnn.ConvBNAct2d(16, 24, (1, 3), act="none"),
    "BasicBlock": lambda: fnn.BasicBlock(16, 16),
    "BasicBlock, option A": lambda: fnn.BasicBlock(16, 24, 2, fnn.shortcut("A", 16, 24, 2)),
    "BasicBlock, option B": lambda: fnn.BasicBlock(16, 24, 2, fnn.shortcut("B", 16, 24, 2)),
    "BasicBlock, option C": lambda: fnn.BasicBlock(16, 16, 1, fnn.shortcut("C", 16, 16)),
    "Bottleneck": lambda: fnn.Bottleneck(16, 4),
    "Bottleneck, grouped, dilated": lambda: fnn.Bottleneck(
        16, 8, 2, fnn.shortcut("B", 16, 32, 2), groups=4, base_width=16, dilation=2
    ),
    "PlainBlock": lambda: fnn.PlainBlock(16, 24, 2),
    "PlainBottleneck": lambda: fnn.PlainBottleneck(16, 8, 2),
    "PreActBasicBlock": lambda: fnn.PreActBasicBlock(16, 16),
    "PreActBasicBlock, option A": lambda: fnn.PreActBasicBlock(16, 24, 2, fnn.shortcut("A", 16, 24, 2)),
    "PreActBottleneck": lambda: fnn.PreActBottleneck(16, 4),
    "PreActBottleneck, option B": lambda: fnn.PreActBottleneck(16, 8, 2, fnn.shortcut("B", 16, 32, 2, None)),
}
NORMS = {
    "no momentum": partial(nn.BatchNorm2d, momentum=None),
    "no running statistics": partial(nn.BatchNorm2d, track_running_stats=False),
    "not affine": partial(nn.BatchNorm2d, affine=False),
    "tiny eps": partial(nn.BatchNorm2d, eps=1e-12),
    "group norm": partial(nn.GroupNorm, 4),
    "frozen": FrozenBatchNorm2d,
    "identity": nn.Identity,
}
every_block = pytest.mark.parametrize("make", BLOCKS.values(), ids=BLOCKS)
both_modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(channels=16, layout=torch.contiguous_format):
    return torch.randn(3, channels, 9, 9).to(torch.bfloat16).float().to(memory_format=layout)


@every_block
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_step_and_an_inference_agree_with_pytorch(make, layout, dtype):
    block = steady(make()) if dtype == torch.bfloat16 else lively(make())
    block, x = block.to(torch.bfloat16), images(layout=layout)
    for training in (True, False):
        compare(block.train(training), x, dtype)
        compare(block.train(training), x, dtype, run=inference)


def test_a_bias_before_batch_norm():
    """In evaluation; in training it has no effect, and its gradient is nothing but rounding."""
    block = lively(fnn.ConvBNAct2d(16, 24, bias=True)).eval()
    compare(block, images())
    compare(block, images(), run=inference)


def test_a_residual_joins_conv_bn_act():
    block, x, residual = lively(fnn.ConvBNAct2d(16, 16)), images(), images()
    for run in (step, inference):
        for training in (True, False):
            compare(
                block.train(training),
                x,
                ours=lambda m, x: m(x, residual.to(x.dtype)),
                plain=lambda m, x: plainly(m, x, residual.to(x.dtype)),
                run=run,
            )


@every_block
@both_modes
def test_channels_last_goes_through(make, training):
    block, x = make().train(training), images(layout=torch.channels_last)
    results = [step(called, block, x), inference(called, block, x)]
    tensors = [results[0]["output"], results[0]["gradient of x"], results[1]["output"]]
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in tensors)


@pytest.mark.parametrize("norm_layer", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("cls", [fnn.BasicBlock, fnn.Bottleneck])
def test_norm_layers_and_their_options(cls, norm_layer):
    block = lively(cls(16, 8, 2, fnn.shortcut("B", 16, 8 * cls.expansion, 2, norm_layer), norm_layer=norm_layer))
    for training in (True, False):
        compare(block.train(training), images())
        compare(block.train(training), images(), run=inference)


def test_momentum_none_averages_over_steps():
    def three_steps(forward, module, x, context=contextlib.nullcontext):
        module = copy.deepcopy(module)
        for scale in (1, 2):
            forward(module, x * scale)
        return step(forward, module, x, context)

    compare(lively(fnn.BasicBlock(16, 16, norm_layer=NORMS["no momentum"])).train(), images(), run=three_steps)


@pytest.mark.parametrize("frozen", ["bn1.weight", "bn2.weight", "bn2.bias", "conv2.weight"])
def test_frozen_parameters_get_no_gradient(frozen):
    block = lively(fnn.BasicBlock(16, 16))
    block.get_parameter(frozen).requires_grad_(False)
    for training in (True, False):
        compare(block.train(training), images())


def test_sync_batch_norm_conversion_keeps_the_function():
    block = lively(fnn.BasicBlock(16, 24, 2, fnn.shortcut("B", 16, 24, 2))).eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(block))
    assert isinstance(converted.bn1, nn.SyncBatchNorm)
    compare(block, images(), ours=lambda m, x: converted.to(x.dtype)(x), run=inference)


def test_any_downsample_module_works():
    block = fnn.BasicBlock(16, 24, 2, nn.Sequential(nn.AvgPool2d(2, 2, ceil_mode=True), *fnn.shortcut("B", 16, 24)))
    compare(lively(block), images())
    compare(lively(block).eval(), images(), run=inference)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("make", [BLOCKS["BasicBlock, option B"], BLOCKS["Bottleneck"]])
def test_autocast(make, training):
    context = partial(torch.autocast, "cpu", torch.bfloat16)
    for run in (step, inference):
        compare(steady(make()).train(training), images(), run=run, context=context)


def penalty(forward, module, x, context=contextlib.nullcontext):
    """A gradient of a gradient, as in gradient penalties."""
    module, x = copy.deepcopy(module), x.clone().requires_grad_()
    y = forward(module, x)
    weights = torch.arange(y.numel(), dtype=torch.float64).cos().view(y.shape).to(y.dtype)
    (grad,) = torch.autograd.grad((y.square() * weights).sum(), x, create_graph=True)
    grad.square().sum().backward()
    return {f"gradient of {name}": p.grad for name, p in [*module.named_parameters(), ("x", x)]}


@every_block
@both_modes
def test_double_backward(make, training):
    compare(steady(make()).train(training), images(), run=penalty)


SELECTED = partial(create_selective_checkpoint_contexts, [torch.ops.aten.convolution.default])  # what is kept


@pytest.mark.parametrize("kind", ["BasicBlock, option A", "BasicBlock, option B"])
@both_modes
def test_checkpointing(kind, training):
    """Buffers too: they take a repeated batch twice, as PyTorch's do, also where a norm is the last that is repeated."""
    block = lively(BLOCKS[kind]()).train(training)
    for options in ({"use_reentrant": True}, {"use_reentrant": False}, {"use_reentrant": False, "context_fn": SELECTED}):
        run = partial(checkpoint, **options)
        compare(block, images(), ours=run, plain=lambda m, x, run=run: run(partial(plainly, m), x))


@every_block
@both_modes
def test_compiles_to_one_graph(make, training, monkeypatch):
    """As the first thing that a process does: nothing has been checked or loaded before."""
    torch.compiler.reset()
    monkeypatch.setattr(functional.check_running, "_passed", set())
    monkeypatch.setattr(native, "_refusals", None)
    _running._loaded_update.cache_clear()
    block = lively(make()).train(training)
    compiled = {}

    def ours(module, x):
        compiled["forward"] = torch.compile(module, fullgraph=True, backend="aot_eager")
        return compiled["forward"](x)

    for run in (step, inference):
        compare(block, images(), ours=ours, run=run)


HOOKS = {
    "register_forward_pre_hook": lambda calls, name: lambda module, args: calls.update([name]),
    "register_forward_hook": lambda calls, name: lambda module, args, y: calls.update([name]),
    "register_full_backward_pre_hook": lambda calls, name: lambda module, grads: calls.update([name]),
    "register_full_backward_hook": lambda calls, name: lambda module, grads, more: calls.update([name]),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("make", [BLOCKS["BasicBlock, option B"], BLOCKS["Bottleneck"], BLOCKS["PreActBottleneck"]])
@both_modes
def test_hooks_fire_as_often_as_in_pytorch(make, kind, training):
    block = lively(make()).train(training)
    block.relu.inplace = False  # what full backward hooks ask for
    for name, _ in list(block.named_modules())[1:]:

        def hooked(forward, calls, module, x, name=name):
            getattr(module.get_submodule(name), kind)(HOOKS[kind](calls, name))
            return forward(module, x)

        fired, expected = Counter(), Counter()
        compare(block, images(), ours=partial(hooked, called, fired), plain=partial(hooked, plainly, expected))
        assert expected == Counter({name: 2 * fired[name]}), "plain PyTorch runs twice, the second time in float64"
        assert fired[name] > 0


def test_global_hooks_fire():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: calls.append(type(module)))
    try:
        lively(BLOCKS["BasicBlock, option B"]()).eval()(images())
    finally:
        handle.remove()
    assert Counter(calls) == Counter(
        [nn.Conv2d] * 3 + [nn.BatchNorm2d] * 3 + [nn.ReLU] * 2 + [nn.Sequential, fnn.BasicBlock]
    )


def test_replaced_layers_are_called():
    block, x = lively(fnn.BasicBlock(16, 16)).eval(), images()
    block.relu = nn.SiLU()
    compare(block, x, run=inference)
    block.bn1, block.conv2 = nn.Identity(), nn.utils.parametrizations.weight_norm(block.conv2)
    compare(block, x)


def test_state_dict_pickle_and_copies(tmp_path):
    block, x = lively(BLOCKS["BasicBlock, option B"]()).eval(), images()
    expected = inference(called, block, x)["output"]
    other = resnet.BasicBlock(16, 24, 2, nn.Sequential(resnet.conv1x1(16, 24, 2), nn.BatchNorm2d(24)))
    other.load_state_dict(block.state_dict(), strict=True)
    again = BLOCKS["BasicBlock, option B"]()
    again.load_state_dict(other.state_dict(), strict=True)
    file = io.BytesIO()
    torch.save(block.state_dict(), file)
    file.seek(0)
    reloaded = BLOCKS["BasicBlock, option B"]()
    reloaded.load_state_dict(torch.load(file, weights_only=True))
    for copied in (again.eval(), reloaded.eval(), copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(inference(called, copied, x)["output"], expected)


def test_a_copy_trains_by_itself():
    block, x = lively(fnn.BasicBlock(16, 16)), images()
    before = inference(called, block.eval(), x)["output"]
    twin = copy.deepcopy(block).train()
    optimizer = torch.optim.SGD(twin.parameters(), lr=1.0)
    twin(x).sum().backward()
    optimizer.step()
    assert torch.equal(inference(called, block, x)["output"], before)
    compare(twin.eval(), x, run=inference)


def change_by_optimizer(block):
    for parameter in block.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(block.parameters(), lr=0.5).step()


def change_by_loading(block):
    block.load_state_dict({name: value + 1 for name, value in block.state_dict().items()})


def change_behind_the_counter(block):
    for parameter in block.parameters():
        parameter.data.add_(1)
    block.train().eval()


def change_running_statistics(block):
    block.train()(images().to(block.conv1.weight.dtype))
    block.eval()


@pytest.mark.parametrize(
    "change", [change_by_optimizer, change_by_loading, change_behind_the_counter, change_running_statistics]
)
def test_folds_follow_the_parameters(change):
    block, x = lively(BLOCKS["BasicBlock, option B"]()).eval(), images()

    def around_the_change(forward, module, x, context=contextlib.nullcontext):
        torch.manual_seed(3)
        module = copy.deepcopy(module)
        before = inference(forward, module, x)["output"]
        with torch.no_grad():
            forward(module, x)
        change(module)
        with torch.no_grad():
            return {"before": before, "after": forward(module, x)}

    compare(block, x, run=around_the_change)


def test_tracers_see_the_modules():
    block = lively(BLOCKS["BasicBlock, option B"]()).eval()
    graph = torch.fx.symbolic_trace(block)
    assert {n.target for n in graph.graph.nodes if n.op == "call_module"} == {
        "conv1", "bn1", "relu", "conv2", "bn2", "downsample.0", "downsample.1",
    }  # fmt: skip
    compare(block, images(), ours=lambda m, x: torch.fx.symbolic_trace(m)(x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of torch.jit, still used to export
        compare(block, images(), ours=lambda m, x: torch.jit.trace(m, x)(x), run=inference)
        torch.jit.trace(block, images())  # compares what it sees with and without gradients


def test_function_transforms():
    block, x = lively(BLOCKS["Bottleneck"]()).eval(), images()

    def per_sample(forward, module, x, context=contextlib.nullcontext):
        names = dict(module.named_parameters())

        def loss(parameters, x):
            with torch.nn.utils.stateless._reparametrize_module(module, parameters):
                return forward(module, x[None]).square().sum()

        return torch.func.vmap(torch.func.grad(loss), (None, 0))({k: v.detach() for k, v in names.items()}, x)

    def tangent(forward, module, x, context=contextlib.nullcontext):
        y, dy = torch.func.jvp(partial(forward, module), (x,), (x.cos(),))
        return {"y": y, "dy": dy}

    compare(block, x, run=per_sample)
    compare(block, x, run=tangent)


def test_option_a_is_the_identity_padded():
    x = images().requires_grad_()
    y = fnn.shortcut("A", 16, 24, 2)(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2]) and not y[:, 16:].any()
    assert not list(fnn.ZeroPadShortcut(16, 24, 2).parameters())
    assert fnn.shortcut("A", 16, 16) is None and fnn.shortcut("B", 16, 16) is None
    assert isinstance(fnn.shortcut("C", 16, 16), nn.Sequential)


@pytest.mark.parametrize(("side", "grad"), [(8, True), (300, True), (8, False)])
def test_a_block_of_one_convolution(side, grad):
    """Small inputs run as one autograd node; large ones, and those without autograd, layer by layer."""

    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn, self.relu = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()

        def forward(self, x):
            return self.relu(self.bn(self.conv(x)) + x)

    torch.manual_seed(0)
    plain, x = One(), torch.randn(2, 8, side, side)
    block, exact = fastres.optimize(copy.deepcopy(plain)), copy.deepcopy(plain).double()
    with torch.set_grad_enabled(grad):
        found = [module(x.to(module.bn.weight.dtype)).detach() for module in (block, plain, exact)]
    assert_close_to_truth(*found, torch.float32)
    assert_close_to_truth(block.bn.running_var, plain.bn.running_var, exact.bn.running_var, torch.float32)
