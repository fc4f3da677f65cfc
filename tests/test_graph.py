"""``fastres.graph``: graphed steps train as the step itself does. On the CPU a recording stands in for CUDA's graphs."""

import copy
import sys

import _recorded_graph
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres import info
from fastres.experiments import compare, rivals
from fastres.experiments.subject import load
from fastres.models import cifar

MODULE = sys.modules["fastres.graph"]
RATES = (0.5, 0.5, 0.25, 0.125, 0.5, 0.25, 0.25, 0.0625)  # the same in float32; five of them after the warm-up
BATCH = 4


@pytest.fixture
def recorded(monkeypatch):
    _recorded_graph.install(monkeypatch, MODULE)


@pytest.fixture
def same_bits():
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    yield torch.device("cuda")
    cudnn.deterministic, cudnn.benchmark = before


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), 0.5, momentum=0.9, dampening=0.5, weight_decay=1e-2, fused=True, **options)


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), 0.5, weight_decay=2**-6, capturable=True)


def batches(count, size=6, device="cpu", last=BATCH):
    generator = torch.Generator().manual_seed(1)
    sizes = [BATCH] * (count - 1) + [last]
    xs = [torch.randn(n, 3, size, size, generator=generator).to(device) for n in sizes]
    return [(x, torch.arange(len(x), device=device) % 5) for x in xs]


def training(model, optimizer, autocast=None):
    def step(x, y):
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(x)
            loss = F.cross_entropy(logits, y)
        loss.backward()
        optimizer.step()
        return {"loss": loss, "logits": logits}

    return step


def state(model, optimizer):
    """Everything a step leaves, by name."""
    found = {name: t.clone() for name, t in model.state_dict().items()}
    found |= {f"{name}.grad": p.grad.clone() for name, p in model.named_parameters()}
    for index, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        found |= {f"{index}.{key}": t.clone() for key, t in optimizer.state[p].items() if isinstance(t, torch.Tensor)}
    return found


def train(step, model, optimizer, data, rates=RATES):
    """State and outputs after every step, at the rates that a scheduler would set."""
    found = []
    for (x, y), rate in zip(data, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        outputs = step(x, y)
        assert all(group["lr"] == rate for group in optimizer.param_groups)
        found.append(state(model, optimizer) | {name: t.clone() for name, t in outputs.items()})
    return found


def both(model, make, data, **options):
    """What the step leaves, and what the graphed one does, from the same start."""
    twin = copy.deepcopy(model)
    theirs = make(twin)
    torch.manual_seed(3)
    expected = train(training(twin, theirs, **options), twin, theirs, data)
    optimizer = make(model)
    step = fastres.graph(training(model, optimizer, **options), model, optimizer)
    torch.manual_seed(3)
    return step, train(step, model, optimizer, data), expected


def assert_same(found, expected):
    for number, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert set(ours) == set(theirs)
        wrong = [name for name in theirs if not torch.equal(ours[name], theirs[name])]
        assert not wrong, f"step {number}: {wrong}"


@pytest.mark.parametrize("last", [BATCH, 3])
def test_on_the_cpu_the_step_runs_and_says_so(last):
    step, found, expected = both(small(), sgd, batches(len(RATES), last=last))
    assert_same(found, expected)
    assert not step.captured and "on cpu" in step.why


def test_replayed_steps_are_the_step(recorded):
    step, found, expected = both(small(), sgd, batches(len(RATES)))
    assert step.captured and step.why is None
    assert_same(found, expected)


def test_a_rate_may_be_a_number_or_a_tensor_in_turn(recorded):
    rates = [*RATES[:-3], torch.tensor(0.5), RATES[-4], 0.25]  # after a tensor the number it came after
    data = batches(len(rates))
    model, twin = small(), small()
    twin.load_state_dict(model.state_dict())
    optimizer, theirs = sgd(model), sgd(twin)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    found = train(step, model, optimizer, data, rates)
    assert step.captured
    assert_same(found, train(training(twin, theirs), twin, theirs, data, rates))


def test_a_small_last_batch_runs_as_it_is(recorded):
    data = [*batches(6, last=3), *batches(2)]  # replays, the small one, and replays again
    step, found, expected = both(small(), sgd, data)
    assert step.captured
    assert_same(found, expected)


def test_first_calls_are_counted_until_the_capture(recorded):
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    for count, (x, y) in enumerate(batches(MODULE.WARM_UPS)):
        assert f"{count} of {MODULE.WARM_UPS}" in step.why
        step(x, y)
    step(x[:2], y[:2])
    assert not step.captured
    kept = step(x, y)["loss"]
    value = kept.clone()
    step(x + 1, y)
    assert step.captured and torch.equal(kept, value) and not kept.requires_grad


def evaluated(model, x):
    with torch.no_grad():
        found = model.eval()(x)
    model.train()
    return found


def follows_training(model, x):
    found = evaluated(model, x)
    fastres.refresh(model)
    assert torch.equal(found, evaluated(model, x))


def test_evaluation_sees_what_replays_wrote(recorded):
    model = fastres.optimize(small())
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    for x, y in batches(MODULE.WARM_UPS + 2):
        before = evaluated(model, x)
        step(x, y)
        assert not torch.equal(before, evaluated(model, x))
        follows_training(model, x)
    assert step.captured


def test_versions_are_counted_up(recorded):
    """Replays, fused optimizers and PyTorch's batch norm do not, but by them folded weights are known to be stale."""
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    owned = [*model.parameters(), *model.buffers()]
    for x, y in batches(MODULE.WARM_UPS + 2):
        before = [t._version for t in owned]
        step(x, y)
        assert all(t._version > version for t, version in zip(owned, before, strict=True))
    assert step.captured


@pytest.mark.parametrize(
    ("wrong", "error", "text"),
    [
        (lambda x, y: (x.double(), y), fastres.ArgumentError, "input 0 must be torch.float32 of shape"),
        (lambda x, y: (x, y.repeat(2)), fastres.ArgumentError, "input 1 must be torch.int64 of shape"),
        (lambda x, y: (x[:, :, 1:], y), fastres.ArgumentError, "another graph for another shape"),
        (lambda x, y: (x,), fastres.ArgumentError, "inputs must be 2 tensors, as in the first call, got 1"),
        (lambda x, y: (x.to("meta"), y), fastres.ArgumentError, "input 0 must be on cpu, like the parameters, got meta"),
        (lambda x, y: (x.requires_grad_(), y), fastres.ArgumentError, "input 0 must be without gradient"),
        (lambda x, y: (x, [1]), fastres.ArgumentTypeError, "input 1 must be a torch.Tensor, got list"),
    ],
)
def test_other_inputs_are_refused(wrong, error, text):
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    (x, y), (other, labels) = batches(2)
    step(x, y)
    before = state(model, optimizer)
    with pytest.raises(error, match=text):
        step(*wrong(other, labels))
    assert_same([state(model, optimizer)], [before])


def test_wrong_arguments_are_refused():
    model = small()
    optimizer = sgd(model)
    for arguments in ((None, model, optimizer), (print, "model", optimizer), (print, model, model)):
        with pytest.raises(fastres.ArgumentTypeError, match=r"fastres.graph: (step|model|optimizer) must be"):
            fastres.graph(*arguments)


@pytest.mark.parametrize(
    ("make", "what"),
    [(torch.optim.SGD, "fused=True"), (torch.optim.AdamW, "capturable=True"), (torch.optim.Adam, "capturable=True")],
)
def test_optimizers_that_read_their_rate_on_the_host_are_refused(recorded, make, what):
    model = small()
    options = [{}, {"fused": True}] if make is not torch.optim.SGD else [{}]
    for option in options:
        with pytest.raises(fastres.UnsupportedError, match=what):
            fastres.graph(print, model, make(model.parameters(), lr=0.1, **option))


def reads_a_value(step, model, optimizer):
    return lambda x, y: step(x, y)["loss"].item()


def schedules(step, model, optimizer):
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    return lambda x, y: (step(x, y), scheduler.step())


def accumulates(step, model, optimizer):
    def wrong(x, y):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return wrong


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (reads_a_value, "cannot be captured: operation not permitted when stream is capturing. It must not wait"),
        (schedules, "step changes the learning rate"),
        (accumulates, "zero_grad"),
    ],
)
def test_steps_that_a_replay_would_not_repeat_are_refused(recorded, change, text):
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(change(training(model, optimizer), model, optimizer), model, optimizer)
    with pytest.raises(fastres.UnsupportedError, match=text):
        for x, y in batches(MODULE.WARM_UPS + 1):
            step(x, y)
    assert not step.captured


def test_autocast_stands_inside(recorded):
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(fastres.UnsupportedError, match="under autocast"):
        step(*batches(1)[0])


CHANGES = {
    "mode": lambda model, optimizer: model.eval(),
    "momentum": lambda model, optimizer: optimizer.param_groups[0].update(momentum=0.5),
    "frozen": lambda model, optimizer: model[0].requires_grad_(False),
    "moved": lambda model, optimizer: setattr(model[0].weight, "data", model[0].weight.data.clone()),
    "loaded": lambda model, optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
    "added": lambda model, optimizer: optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]}),
}


@pytest.mark.parametrize("change", list(CHANGES))
def test_what_a_replay_would_not_follow_is_refused(recorded, change):
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    for x, y in batches(MODULE.WARM_UPS + 2):
        step(x, y)
    assert step.captured
    model.load_state_dict(copy.deepcopy(model.state_dict()))  # which stays in place
    step(x, y)
    CHANGES[change](model, optimizer)
    with pytest.raises(fastres.UnsupportedError, match="another graph"):
        step(x, y)


def test_torch_schedulers_go_on(recorded):
    model = small()
    optimizer = sgd(model)
    step = fastres.graph(training(model, optimizer), model, optimizer)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for count, (x, y) in enumerate(batches(6)):
        before = model[4].bias.detach().clone()
        momentum = step(x, y) and optimizer.state[model[4].bias]["momentum_buffer"]
        assert torch.equal(before - 0.5 * 0.5**count * momentum, model[4].bias)
        scheduler.step()


def test_the_rival_is_missing_without_a_gpu():
    rows = compare.compare(load("cifar.resnet8", batch=2, size=8, device="cpu"), [rivals.GRAPHED], training=True, seconds=0.01)
    assert "only a GPU" in rows[0]["missing"] and rows[0]["ok"]


def test_the_rival_is_captured(recorded, monkeypatch):
    subject = load("cifar.resnet8", batch=2, size=8, device="cpu")
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, **options: plain(*args, **{**options, "fused": True}))
    assert compare.captured_step(model, model, subject.x).func.captured


GPU = [pytest.param(make, dtype, backend, id=f"{make.__name__}-{dtype}-{backend}", marks=pytest.mark.cuda)
       for make, dtype in ((sgd, None), (sgd, torch.bfloat16), (adamw, torch.bfloat16))
       for backend in ("torch", "triton", "cuda")]  # fmt: skip


@pytest.mark.parametrize(("make", "dtype", "backend"), GPU)
def test_networks_train_to_the_same_bits(same_bits, make, dtype, backend):
    if not info.live(backend):
        pytest.skip(f"{backend} does not run here")
    model = fastres.optimize(cifar.resnet(20, num_classes=5).to(same_bits), channels_last=True)
    model.fc = nn.Sequential(nn.Dropout(0.3), model.fc)  # random numbers go on in a replay
    data = [*batches(len(RATES) - 1, 32, same_bits, last=3), *batches(1, 32, same_bits)]
    evaluated(model, data[0][0])
    with fastres.use(bn_act=backend, bn_add_act=backend):
        step, found, expected = both(model, make, data, autocast=dtype)
    assert step.captured
    assert_same(found, expected)
    follows_training(model, data[0][0])


@pytest.mark.cuda
def test_a_scaler_goes_on_in_a_graph(same_bits):
    found = []
    for graphed in (False, True):
        model = small().to(same_bits)
        optimizer, scaler = sgd(model), torch.amp.GradScaler("cuda", init_scale=2.0**8, growth_interval=2)

        def step(x, y, model=model, optimizer=optimizer, scaler=scaler):
            optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(model(x), y)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            return {"loss": loss, "scale": scaler._scale}

        step = fastres.graph(step, model, optimizer) if graphed else step
        found.append(train(step, model, optimizer, batches(len(RATES), device=same_bits)))
    assert step.captured and len({float(row["scale"]) for row in found[1]}) > 2
    assert_same(found[1], found[0])


@pytest.mark.cuda
def test_a_refused_capture_leaves_the_device_usable(same_bits):
    model = small().to(same_bits)
    optimizer = sgd(model)
    plain = training(model, optimizer)
    step = fastres.graph(reads_a_value(plain, model, optimizer), model, optimizer)
    x, y = batches(1, device=same_bits)[0]
    for _ in range(MODULE.WARM_UPS):
        step(x, y)
    stream = torch.cuda.current_stream()
    with pytest.raises(fastres.UnsupportedError, match="cannot be captured"):
        step(x, y)
    assert torch.cuda.current_stream() == stream
    assert torch.isfinite(plain(x, y)["loss"])
