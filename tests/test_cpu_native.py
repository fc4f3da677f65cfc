"""What only the native CPU ops can show: threads, misaligned storage, every 16-bit value, exact integers, error texts."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from fastres import functional
from fastres.kernels import native
from fastres.ops import REGISTRY, _mask

pytestmark = pytest.mark.cpu

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = [torch.contiguous_format, torch.channels_last]
WINDOW = ([3, 3], [2, 2], [1, 1])


@pytest.fixture(autouse=True)
def library():
    native.load()


def op(name):
    return getattr(torch.ops.fastres_C, f"cpu_{name}").default


def integers(shape, dtype, memory_format=torch.contiguous_format, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-3, 4, shape, generator=generator)
    return x.to(dtype).contiguous(memory_format=memory_format)


def shifted(x, elements):
    """A copy of x, same strides, that starts `elements` behind an aligned address."""
    storage = torch.empty(x.numel() + elements, dtype=x.dtype)
    return storage[elements:].as_strided(x.shape, x.stride()).copy_(x)


def every_op(x, residual, grad_y):
    """All results of one forward and backward of each op."""
    c = x.shape[1]
    weight, bias = torch.linspace(-1, 2, c), torch.linspace(1, -1, c)
    y, mean, var = op("bn_act_train")(x, weight, bias, 1e-5, "relu")
    z, *_, mask = op("bn_add_act_train")(x, residual, weight, bias, 1e-5, "relu")
    pooled, *_ = op("bn_act_maxpool_train")(x, weight, bias, 1e-5, "relu", *WINDOW)
    return [
        y,
        mean,
        var,
        z,
        mask,
        pooled,
        *op("bn_act_backward")(grad_y, x, weight, bias, mean, var, 1e-5, "relu", True),
        *op("bn_add_act_backward")(grad_y, None, mask, x, weight, mean, var, 1e-5, "relu"),
        *op("bn_add_act_backward")(grad_y, residual, mask, x, weight, mean, var, 1e-5, "relu"),
        *op("bn_act_maxpool_backward")(pooled, x, weight, bias, mean, var, 1e-5, "relu", True, *WINDOW),
        op("add_act")(x, residual, "relu"),
        op("add_act_backward")(grad_y, y, "relu"),
    ]


def same_bits(found, expected):
    return all(
        torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))
        for a, b in zip(found, expected, strict=True)
    )


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("shape", [(4, 17, 33, 31), (3, 64, 40, 40)])
def test_results_do_not_depend_on_the_number_of_threads(shape, memory_format):
    tensors = [torch.randn(shape).contiguous(memory_format=memory_format) for _ in range(3)]
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(every_op(*tensors))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_misaligned_storage_gives_the_same_bits(dtype, memory_format):
    tensors = [torch.randn(2, 17, 9, 7).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)]
    expected = every_op(*tensors)
    for offsets in [(1, 0, 0), (0, 3, 5), (1, 2, 7)]:
        assert same_bits(every_op(*[shifted(t, n) for t, n in zip(tensors, offsets, strict=True)]), expected)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 17, 331, 333), (4, 64, 192, 128)])
def test_outputs_beyond_the_caches_equal_those_within(shape, dtype, memory_format):
    if dtype in (torch.float32, torch.float64):
        shape = (4, shape[1], shape[2] // 2, shape[3])
    x, residual, grad_y = [
        torch.randn(shape).to(dtype).contiguous(memory_format=memory_format) for _ in range(3)
    ]
    c = shape[1]
    channels = torch.linspace(-1, 2, c), torch.linspace(1, -1, c), torch.zeros(c), torch.ones(c)

    def activations(x, residual, grad_y):
        y = op("bn_add_act")(x, residual, *channels, 1e-5, "relu")
        bits, parts = _mask.pack(y, "relu"), (None, residual)
        return [
            y,
            op("bn_act")(x, *channels, 1e-5, "relu"),
            op("bn_act_maxpool")(x, *channels, 1e-5, "relu", [1, 1], [1, 1], [0, 0]),
            op("bn_act_backward")(grad_y, x, *channels, 1e-5, "relu", False)[0],
            *(op("bn_add_act_backward")(grad_y, part, bits, x, channels[0], *channels[2:], 1e-5, "relu")[1] for part in parts),
            op("bn_act_maxpool_backward")(grad_y, x, *channels, 1e-5, "relu", False, [1, 1], [1, 1], [0, 0])[
                0
            ],
            op("add_act")(x, residual, "relu"),
            op("add_act_backward")(grad_y, y, "relu"),
        ]

    images = [activations(*one) for one in zip(x.split(1), residual.split(1), grad_y.split(1), strict=True)]
    assert same_bits(
        activations(x, residual, grad_y), [torch.cat(parts) for parts in zip(*images, strict=True)]
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value_passes(dtype):
    x = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(dtype)
    y = op("add_act")(x, torch.full_like(x, -0.0), "none")
    number = ~x.isnan()
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y[number].view(torch.int16), x[number].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_round_as_torch_rounds(dtype):
    a, b = [(torch.randn(1 << 16) * torch.randn(1 << 16).mul(6).exp()).to(dtype) for _ in range(2)]
    found, expected = op("add_act")(a, b, "none"), a + b
    assert torch.equal(found.isnan(), expected.isnan())  # infinities that cancel
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 17, 8, 9), (3, 32, 6, 6)])
def test_integers_are_exact(shape, dtype, memory_format):
    x, residual, grad_y = [integers(shape, dtype, memory_format, seed) for seed in range(3)]
    c = shape[1]
    weight, bias = integers((c,), torch.float32, seed=3), integers((c,), torch.float32, seed=4)
    mean, var = integers((c,), torch.float32, seed=5), torch.full((c,), 0.25)
    z = (x.double() - mean.view(-1, 1, 1)) * 2 * weight.double().view(-1, 1, 1) + bias.view(-1, 1, 1)
    assert torch.equal(op("bn_act")(x, weight, bias, mean, var, 0.0, "relu").double(), z.relu())
    y = op("bn_add_act")(x, residual, weight, bias, mean, var, 0.0, "relu")
    assert torch.equal(y.double(), (z + residual.double()).relu())
    dz = torch.where(y > 0, grad_y, 0)
    grads = op("bn_act_backward")(dz, x, weight, bias, mean, var, 0.0, "none", False)
    dz = dz.double()
    expected = [
        dz * 2 * weight.view(-1, 1, 1),
        (dz * (x.double() - mean.view(-1, 1, 1)) * 2).sum((0, 2, 3)),
        dz.sum((0, 2, 3)),
    ]
    assert all(torch.equal(found.double(), wanted) for found, wanted in zip(grads, expected, strict=True))


@pytest.mark.parametrize(
    "window", [WINDOW, ([1, 1], [1, 1], [0, 0]), ([2, 4], [3, 1], [1, 2]), ([5, 3], [1, 4], [2, 0])]
)
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("act", ["relu", "none"])
def test_pooling_breaks_ties_and_spreads_nan_as_torch(act, memory_format, window):
    x = integers((2, 19, 13, 11), torch.float32, memory_format)
    x[0, :, 3, 4], x[1, 2, :5, :5] = float("nan"), float("-inf")
    one, zero = torch.ones(19), torch.zeros(19)
    z = (x.relu() if act == "relu" else x.clone()).requires_grad_()
    expected = F.max_pool2d(z, *window)
    y = op("bn_act_maxpool")(x, one, zero, zero, one, 0.0, act, *window)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.nan_to_num(99), expected.detach().nan_to_num(99))
    grad_y = integers(y.shape, torch.float32, memory_format, 1)
    (dz,) = torch.autograd.grad(expected, z, grad_y)
    dz = torch.where(z <= 0, 0, dz) if act == "relu" else dz
    grad_x, _, grad_bias = op("bn_act_maxpool_backward")(
        grad_y, x, one, zero, zero, one, 0.0, act, False, *window
    )
    assert torch.equal(grad_x, dz)
    assert torch.equal(grad_bias, dz.sum((0, 2, 3)))


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("value", [100.0, 1e4, 1e-20, 0.1])
def test_a_constant_channel_has_no_variance(value, memory_format):
    x = torch.full((4, 5, 29, 31), value).contiguous(memory_format=memory_format)
    _, mean, var = op("bn_act_train")(x, None, None, 1e-5, "relu")
    assert torch.equal(var, torch.zeros(5))
    assert torch.equal(mean, x[0, :, 0, 0])


@pytest.mark.parametrize("memory_format", FORMATS)
def test_a_mean_far_from_zero_costs_no_digits(memory_format):
    x = (1e4 + torch.randn(2, 5, 9, 7)).contiguous(memory_format=memory_format)
    mean, var = torch.full((5,), 1e4), torch.ones(5)
    exact = (x.double() - 1e4) / (1 + 1e-5) ** 0.5
    torch.testing.assert_close(op("bn_act")(x, None, None, mean, var, 1e-5, "none").double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("memory_format", FORMATS)
def test_one_outlier_among_the_first_values_costs_no_digits(memory_format):
    x = torch.randn(8, 3, 64, 64).contiguous(memory_format=memory_format)
    x[0, :, 0, 0] = 1e4
    _, mean, var = op("bn_act_train")(x, None, None, 1e-5, "relu")
    torch.testing.assert_close(var.double(), x.double().var((0, 2, 3), unbiased=False), rtol=1e-5, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean((0, 2, 3)), rtol=0, atol=1e-5)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 16, 4, 4), (2, 17, 5, 3), (5, 3, 7, 7), (1, 1, 1, 2), (70, 40, 9, 11)])
def test_the_mask_is_that_of_the_output(shape, dtype, memory_format):
    """Also of NaN, zeros of both signs and what rounds to zero; every bit is written, those beyond the end as 0."""
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = torch.tensor([torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 1.0, -1.0, tiny, -tiny, 3 * tiny], dtype=dtype)
    generator = torch.Generator().manual_seed(0)
    residual = values[torch.randint(len(values), shape, generator=generator)].contiguous(memory_format=memory_format)
    x = torch.zeros(shape, dtype=dtype).contiguous(memory_format=memory_format)
    r_weight = torch.full((shape[1],), 0.5)  # of statistics 0 and 1: what is tiny may round to zero
    outputs = op("bn_add_act_train")(x, residual, None, None, 1e-5, "relu")
    assert torch.equal(outputs[-1], _mask.pack(outputs[0], "relu"))
    assert torch.equal(_mask.unpack(outputs[-1], x), ~(outputs[0] <= 0))
    outputs = op("bn_add_bn_act_train")(residual.nan_to_num(0, 1, -1), x, r_weight, None, 1e-5, None, None, 1e-5, "relu")
    assert torch.equal(outputs[-1], _mask.pack(outputs[0], "relu"))


X, V = torch.ones(2, 3, 4, 4), torch.ones(3)
BITS = torch.zeros(12, dtype=torch.uint8)
ERRORS = [
    (
        "add_act",
        (X, X[:1], "relu"),
        r"fastres.add_act: residual must be of the sizes of x, \(2, 3, 4, 4\), got \(1, 3, 4, 4\)",
    ),
    ("add_act", (X, X.double(), "relu"), "residual must be of the dtype of x"),
    ("add_act", (X, X.mT, "relu"), "residual must be of the strides of x"),
    ("add_act", (X[..., :2], X[..., :2], "relu"), "x must be dense and without overlap"),
    ("add_act", (X, X, "gelu"), "act must be 'relu' or 'none', got 'gelu'"),
    ("add_act", (X[:0], X[:0], "relu"), "x must be not empty"),
    ("add_act", (X.int(), X.int(), "relu"), "x must be float32, float16, bfloat16 or float64"),
    (
        "bn_act",
        (X, V[:2], None, V, V, 1e-5, "relu"),
        r"weight must be of size \(3,\), x's channels, got \(2,\)",
    ),
    ("bn_act", (X, None, None, V, V.int(), 1e-5, "relu"), "var must be float32"),
    ("bn_act", (X[0], None, None, V, V, 1e-5, "relu"), "x must be of 4 dimensions"),
    ("bn_act", (X[..., ::2], None, None, V, V, 1e-5, "relu"), "x must be dense and contiguous"),
    (
        "bn_act_train",
        (X[:1, :, :1, :1].contiguous(), None, None, 1e-5, "relu"),
        "x must be of more than 1 value per channel",
    ),
    (
        "bn_act_maxpool",
        (X, V, V, V, V, 1e-5, "relu", [3, 3], [2, 2], [2, 1]),
        "padding must be at most half of kernel_size 3, got 2",
    ),
    (
        "bn_act_maxpool",
        (X, V, V, V, V, 1e-5, "relu", [3, 3], [0, 2], [1, 1]),
        "stride must be two integers of at least 1",
    ),
    (
        "bn_act_maxpool",
        (X, V, V, V, V, 1e-5, "relu", [7, 3], [2, 2], [1, 1]),
        "kernel_size must be at most x's padded size 6, got 7",
    ),
    (
        "bn_act_maxpool_backward",
        (X, X, V, V, V, V, 1e-5, "relu", True, *WINDOW),
        "grad_y must be of the sizes of y",
    ),
    ("bn_add_act_backward", (X, None, BITS[:11], X, V, V, V, 1e-5, "relu"), r"mask must be contiguous and of size \(12,\)"),
    ("bn_add_act_backward", (X, None, BITS.int(), X, V, V, V, 1e-5, "relu"), "mask must be uint8"),
    ("bn_add_act_backward", (X, X[:1], BITS, X, V, V, V, 1e-5, "relu"), "grad_y2 must be of the sizes of x"),
    ("bn_add_bn_act_backward", (X, X.half(), BITS, X, X, V, V, V, 1e-5, V, V, V, 1e-5, "relu"), "grad_y2 must be of the dtype"),
    ("bn_add_bn_act_backward", (X, None, BITS, X, X, V, V, V, 1e-5, V, V, V, 1e-5, "none"), r"of size \(0,\)"),
]


@pytest.mark.parametrize(("name", "args", "message"), ERRORS)
def test_what_would_be_unsafe_raises(name, args, message):
    with pytest.raises(RuntimeError, match=message):
        op(name)(*args)


@pytest.mark.parametrize("act", ["relu", "none"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_weights_give_what_torch_gives(dtype, memory_format, training, act):
    generator = torch.Generator().manual_seed(0)
    x, residual, grad_y = (torch.randn(2, 19, 5, 3, generator=generator).to(dtype) for _ in range(3))
    x[0, :, 0, 0] = 0
    weight, bias = torch.ones(19, dtype=statistics(dtype)), torch.linspace(-1, 1, 19, dtype=statistics(dtype))
    weight[::3], weight[1::3] = float("inf"), -float("inf")
    mean, var = torch.linspace(-1, 1, 19, dtype=statistics(dtype)), torch.ones(19, dtype=statistics(dtype))
    x, residual, grad_y = (t.contiguous(memory_format=memory_format) for t in (x, residual, grad_y))
    for run, inputs in ((functional.bn_act, (x,)), (functional.bn_add_act, (x, residual))):
        leaves = [t.clone().requires_grad_() for t in (*inputs, weight, bias)]
        z = F.batch_norm(leaves[0], mean.clone(), var.clone(), *leaves[-2:], training)
        z = z + leaves[1] if len(inputs) == 2 else z
        expected = F.relu(z) if act == "relu" else z
        found = run(*leaves[:-2], mean.clone(), var.clone(), *leaves[-2:], training, act=act)
        grads = [torch.autograd.grad(y, leaves, grad_y) for y in (found, expected)]
        for a, b in zip((found, *grads[0]), (expected, *grads[1]), strict=True):
            assert torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isposinf(), b.isposinf())
            assert torch.equal(a.isneginf(), b.isneginf())


def statistics(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Malloc(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "free", "mapped", "blocks", "bytes", "most", "fast", "used", "idle", "top")
    ]


@pytest.mark.parametrize("op", REGISTRY)
def test_a_call_leaves_nothing_behind(op):
    """PyTorch's own conversion of a str argument of a native kernel leaves 48 bytes, at every call."""
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallinfo2"):
        pytest.skip("this C library does not tell what it has given out")
    library.mallinfo2.restype = _Malloc
    args = min(REGISTRY[op].samples(torch.device("cpu"), torch.float32), key=lambda sample: sample.args[0].numel()).args
    left = []
    for _ in range(4):  # the first rounds fill caches; other threads of the process may take some once
        before = library.mallinfo2().used
        for _ in range(500):
            REGISTRY[op](*args)
        left.append((library.mallinfo2().used - before) / 500)
    assert min(left[1:]) < 16, left
