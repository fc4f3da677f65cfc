"""The functions: what their docstrings say they equal, and what they say of wrong arguments."""

import functools

import numpy
import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close_to_truth
from torch.autograd import forward_ad

import fastres
import fastres.functional as FF

pytestmark = [
    pytest.mark.none,
    pytest.mark.filterwarnings("ignore:.*(quantize_per_tensor|nested tensors).*:UserWarning"),
]

N, C, SIZE = 2, 8, 6
STATISTICS = ("running_mean", "running_var")


def arguments(name, training=False, dtype=torch.float32):
    """Keyword arguments of a correct call."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    given = {"x": draw(N, C, SIZE, SIZE)}
    if name == JOINED:
        given |= {"shortcut": draw(N, 3, 2 * SIZE, 2 * SIZE), "shortcut_stride": 2, "shortcut_eps": 1e-3}
        given |= {"shortcut_conv_weight": draw(C, 3, 1, 1), "shortcut_conv_bias": draw(C), "shortcut_weight": draw(C)}
        given |= {"shortcut_running_mean": draw(C), "shortcut_running_var": draw(C).square() + 0.5, "shortcut_bias": draw(C)}
    elif "add" in name:
        given["residual"] = draw(N, C, SIZE, SIZE)
    if "conv" in name:
        given |= {"conv_weight": draw(C, C, 3, 3) / 8, "conv_bias": draw(C), "stride": 1, "padding": 1, "dilation": 1}
        given["groups"] = 1
    if "bn" in name:
        given |= {"running_mean": draw(C), "running_var": draw(C).square() + 0.5, "weight": draw(C), "bias": draw(C)}
        given |= {"eps": 1e-4} | ({} if name in EVALUATED else {"training": training, "momentum": 0.3})
    if name == STEM:
        given |= {"kernel_size": 3, "pool_stride": 2, "pool_padding": 1}
    elif "pool" in name:
        given |= {"kernel_size": 3, "stride": 2, "padding": 1}
    return given | {"act": "relu"}


def plainly(x, residual=None, act="relu", **given):
    """The composition that the docstrings name."""
    if "shortcut" in given:
        own = {key.removeprefix("shortcut_"): value for key, value in given.items() if key.startswith("shortcut")}
        residual = plainly(own.pop("shortcut"), act="none", padding=0, dilation=1, groups=1, **own)
    if "conv_weight" in given:
        names = ("conv_weight", "conv_bias", "stride", "padding", "dilation", "groups")
        x = F.conv2d(x, *(given[name] for name in names))
    if "eps" in given:
        names = (*STATISTICS, "weight", "bias")
        flags = given.get("training", False), given.get("momentum", 0.1), given["eps"]
        x = F.batch_norm(x, *(given[name] for name in names), *flags)
    x = x if residual is None else x + residual
    x = F.relu(x) if act == "relu" else x
    prefix = "pool_" if "pool_stride" in given else ""
    window = [given[name] for name in ("kernel_size", f"{prefix}stride", f"{prefix}padding") if "kernel_size" in given]
    return F.max_pool2d(x, *window) if window else x


JOINED, STEM = EVALUATED = "conv_bn_add_conv_bn_act", "conv_bn_act_maxpool"  # in evaluation alone
FUNCTIONS = ("add_act", "bn_act", "bn_add_act", "bn_act_maxpool", "conv_bn_act", "conv_bn_add_act", *EVALUATED)
TRAINED = [name for name in FUNCTIONS if "bn" in name and name not in EVALUATED]
CASES = [(name, training) for name in FUNCTIONS for training in (False, True) if name in TRAINED or not training]


@pytest.mark.parametrize(("name", "training"), CASES)
def test_a_function_equals_what_its_docstring_says(name, training):
    dtype = torch.float32
    own, theirs, exact = (arguments(name, training, d) for d in (dtype, dtype, torch.float64))
    for key in exact:  # the same rounded values
        exact[key] = own[key].double() if isinstance(own[key], torch.Tensor) else exact[key]
    found = [getattr(FF, name)(**own), plainly(**theirs), plainly(**exact)]
    assert_close_to_truth(*found, dtype, name)
    for key in STATISTICS if training else ():
        assert not torch.equal(own[key], arguments(name)[key])
        assert_close_to_truth(own[key], theirs[key], exact[key], dtype, key)


@pytest.mark.parametrize("name", TRAINED)
def test_a_tensor_momentum_is_the_number_it_holds(name):
    updated = []
    for momentum in (0.25, torch.tensor(0.25), torch.tensor([[0.25]])):
        given = arguments(name, training=True) | {"momentum": momentum}
        getattr(FF, name)(**given)
        updated.append([given[key] for key in STATISTICS])
    for number, *others in zip(*updated, strict=True):
        assert all(torch.allclose(number, other) for other in others)


@pytest.mark.parametrize(("name", "training"), CASES)
def test_derivatives_of_torch_func_and_of_forward_mode_are_pytorchs(name, training):
    """Which see PyTorch's operations, not an op: it would drop a tangent without a word."""
    given = arguments(name, training) | (dict.fromkeys(STATISTICS) if training else {})
    x, tangent = given.pop("x"), torch.randn(N, C, SIZE, SIZE, generator=torch.Generator().manual_seed(1))

    def forward_mode(function):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent

    found = []
    for function in (getattr(FF, name), plainly):
        call = functools.partial(function, **given)

        def loss(x, call=call):
            return call(x).square().sum()

        twice = torch.func.grad(lambda x, loss=loss: torch.func.grad(loss)(x).square().sum())
        results = [torch.func.jvp(call, (x,), (tangent,))[1], forward_mode(call), torch.func.grad(loss)(x), twice(x)]
        if not training:
            results.append(torch.vmap(torch.func.grad(loss))(torch.stack([x, tangent])))
        found.append(results)
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, rtol=1e-3, atol=1e-3 * theirs.abs().max().item())


def test_an_op_refuses_forward_mode_in_words():
    x = torch.randn(2, 3)
    op = torch.ops.fastres.add_act
    with pytest.raises(fastres.UnsupportedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: op(x, x, "relu"), (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(fastres.UnsupportedError, match="no forward-mode derivative"):
        op(forward_ad.make_dual(x, x), x, "relu")
    assert torch.equal(torch.vmap(lambda x: op(x, x, "relu"))(x), (x + x).relu())


@pytest.mark.parametrize("name", TRAINED)
def test_running_buffers_that_are_negated_views_are_updated_as_others(name):
    own, theirs = (arguments(name, training=True) for _ in range(2))
    own |= {key: torch._neg_view(-own[key]) for key in STATISTICS}
    y, expected = getattr(FF, name)(**own), getattr(FF, name)(**theirs)
    assert torch.equal(y, expected) and all(own[key].is_neg() for key in STATISTICS)
    assert all(torch.allclose(own[key], theirs[key]) for key in STATISTICS)


@pytest.mark.parametrize(("name", "training"), CASES)
def test_an_empty_batch_is_empty_and_updates_nothing(name, training):
    given = arguments(name, training)
    given |= {key: given[key][:0] for key in ("x", "residual", "shortcut") if key in given}
    before = {key: given[key].clone() for key in STATISTICS if key in given}
    y = getattr(FF, name)(**given)
    assert y.shape == (0, C, *([3, 3] if "pool" in name else [SIZE, SIZE]))
    assert all(torch.equal(given[key], value) for key, value in before.items())


def wrong_tensors(shape):
    """What must not stand in the place of a tensor of this shape."""
    zeros = torch.zeros(shape)
    return {
        "NumPy": numpy.zeros(shape, "float32"), "list": [1.0], "number": 1.5, "str": "x",
        "rank": zeros[..., None], "int64": zeros.long(), "bool": zeros.bool(), "complex": zeros.to(torch.complex64),
        "float8": zeros.to(torch.float8_e4m3fn), "sparse": zeros.to_sparse(), "mkldnn": zeros.to_mkldnn(),
        "other device": zeros.to("meta"), "quantised": torch.quantize_per_tensor(zeros, 0.1, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.zeros(3), torch.zeros(2)]),
    }  # fmt: skip


WINDOW = [0, -1, None, "same", (1, 1, 1), 2.0, True, (1, -1), 10**20]
WRONG = {
    "training": [None, 1, "yes", torch.tensor(True)],
    "momentum": [
        None, "x", torch.ones(2), torch.tensor(True), torch.tensor(0.5j), torch.tensor(0.5).to_sparse(), 0.5j,
    ],
    "eps": [0.0, -1.0, None, "x", float("nan"), float("inf"), True],
    "act": [None, "gelu", 1, b"relu"],
    "kernel_size": [*WINDOW, 100],
    "stride": WINDOW,
    "padding": WINDOW[1:],
    "dilation": WINDOW,
    "groups": [0, -1, 3, None, "1", 1.0, True, 10**20],
}
WRONG |= {"shortcut_eps": WRONG["eps"], "shortcut_stride": [*WINDOW, 3]}
WRONG |= {"pool_stride": WINDOW, "pool_padding": [*WINDOW[1:], 2]}
OPTIONAL = [f"{prefix}{name}" for prefix in ("", "shortcut_") for name in ("weight", "bias", "conv_bias")]


def wrong_values(name, value):
    if not isinstance(value, torch.Tensor):
        return WRONG[name]
    missing = [] if name in OPTIONAL else [None]
    return missing + list(wrong_tensors(tuple(value.shape)).values())


@pytest.mark.parametrize("autograd", [False, True])
@pytest.mark.parametrize(("name", "training"), CASES)
def test_a_wrong_argument_is_named_and_nothing_is_changed(name, training, autograd):
    faults = []
    getattr(FF, name)(**arguments(name, training))  # what passed before must not let another argument pass
    for parameter, value in arguments(name, training).items():
        for wrong in wrong_values(parameter, value):
            if training and wrong is None and parameter in STATISTICS:
                wrong = 3  # None, for both, is allowed there
            given = arguments(name, training)
            given["x"].requires_grad_(autograd)
            given[parameter] = wrong
            before = {key: given[key].clone() for key in STATISTICS if key in given and key != parameter}
            try:
                getattr(FF, name)(**given)
                faults.append(f"{parameter}={wrong!r:.40} passes")
            except (fastres.ArgumentError, fastres.ArgumentTypeError) as error:
                if not str(error).startswith(f"fastres.{name}: ") or parameter not in str(error):
                    faults.append(f"{parameter}={wrong!r:.40}: {error}")
            if any(not torch.equal(given[key], value) for key, value in before.items()):
                faults.append(f"{parameter}={wrong!r:.40} changes a buffer")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"conv_weight": torch.zeros(C, 4, 3, 3)}, "x must be of 4 channels"),
        ({"conv_weight": torch.zeros(9, C, 3, 3)}, "conv_bias must be of shape (9,)"),
        ({"conv_weight": torch.zeros(C, 0, 3, 3)}, "x must be of 0 channels"),
        ({"dilation": 50}, "kernel must be no larger than x's padded size (8, 8), got (101, 101)"),
        ({"residual": torch.zeros(N, C, SIZE, 1)}, "residual must be of"),
        ({"x": torch.zeros(N, C, SIZE, SIZE).double()}, "x must be of conv_weight's dtype"),
        ({"running_mean": torch.zeros(C + 1)}, "running_mean must be of shape (8,)"),
        ({"weight": torch.zeros(C + 1)}, "weight must be of shape (8,)"),
    ],
)
@pytest.mark.parametrize("training", [False, True])
def test_shapes_that_do_not_fit_are_named(training, change, text):
    given = arguments("conv_bn_add_act", training) | change
    with pytest.raises(fastres.ArgumentError) as error:
        FF.conv_bn_add_act(**given)
    assert f"fastres.conv_bn_add_act: {text}" in str(error.value)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"shortcut": torch.zeros(N, 4, 2 * SIZE, 2 * SIZE)}, "shortcut must be of 3 channels"),
        ({"shortcut": torch.zeros(N, 3, SIZE, SIZE)}, "shortcut must be projected to the output's shape (2, 8, 6, 6)"),
        ({"shortcut_conv_weight": torch.zeros(C, 3, 3, 3)}, "shortcut_conv_weight must be of a kernel of 1x1"),
        ({"shortcut": torch.zeros(N, 3, 2 * SIZE, 2 * SIZE).double()}, "shortcut must be of shortcut_conv_weight's dtype"),
        ({"shortcut_running_var": torch.zeros(C + 1)}, "shortcut_running_var must be of shape (8,)"),
        ({"shortcut_running_mean": None}, "shortcut_running_mean must be a torch.Tensor"),
    ],
)
def test_a_shortcut_that_does_not_fit_is_named(change, text):
    with pytest.raises((fastres.ArgumentError, fastres.ArgumentTypeError)) as error:
        FF.conv_bn_add_conv_bn_act(**arguments(JOINED) | change)
    assert f"fastres.{JOINED}: {text}" in str(error.value)


def test_running_buffers_come_together_and_own_their_memory():
    for change, text in (
        ({"running_var": None}, "running_mean and running_var must be both tensors or both None"),
        ({"running_var": torch.ones(1).expand(C)}, "running_var must be a tensor of its own memory"),
    ):
        given = arguments("bn_act", training=True) | change
        before = given["running_mean"].clone()
        with pytest.raises(fastres.ArgumentError, match=f"fastres.bn_act: {text}"):
            FF.bn_act(**given)
        assert torch.equal(given["running_mean"], before)


class Cut(torch.autograd.Function):
    """Passes values on, and no gradient back."""

    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return None


@pytest.mark.parametrize(("name", "training"), CASES)
def test_no_gradient_of_y_is_no_gradient(name, training):
    given = arguments(name, training)
    x = given["x"].requires_grad_()
    Cut.apply(getattr(FF, name)(**given)).sum().backward()
    assert x.grad is None


@pytest.mark.parametrize(("name", "training"), [*CASES, ("bn_add_bn_act", False), ("bn_add_bn_act", True)])
def test_a_result_without_a_relu_may_be_written_to(name, training):
    """As batch norm's own may, and an addition's: an activation in place follows."""
    given = arguments(name, training) | {"act": "none"}
    if name == "bn_add_bn_act":
        given |= {f"residual_{key}": given[key].clone() for key in (*STATISTICS, "weight", "bias")}
    grads = []
    for writes in (True, False):
        x = given["x"].clone().requires_grad_()
        y = getattr(FF, name)(**given | {"x": x})
        (F.leaky_relu_(y, 0.1) if writes else F.leaky_relu(y, 0.1)).sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize("name", [name for name in TRAINED if "conv" not in name])
def test_a_batch_in_training_may_come_before_the_backward_of_one_in_evaluation(name):
    """PyTorch takes the buffers as they are then; these the ones that made the result."""
    grads = []
    for disturbed in (True, False):
        given = arguments(name)
        x = given["x"].requires_grad_()
        y = getattr(FF, name)(**given)
        if disturbed:
            getattr(FF, name)(**given | {"x": x.detach(), "training": True})
        y.sum().backward()
        grads.append(x.grad)
    assert torch.equal(*grads)
