"""Forwards that a user may write, one line unlike the next: a graph where it tells all, else a refusal that says why."""

import copy
import functools
import re

import pytest
import torch
from _modules import lively
from torch import nn
from torch.utils._pytree import tree_leaves

import fastres
from fastres import models
from fastres.optimize.swap import state_of

pytestmark = pytest.mark.none
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


class Block(nn.Module):
    scale = 2

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.relu = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU()
        self.more = nn.ModuleList([nn.Conv2d(3, 3, 1)])
        self.register_buffer("shift", torch.ones(1))
        self.register_buffer("nothing", None)
        self.absent = None

    def forward(self, x):
        return self.relu(self.bn(self.conv(x)))

    @property
    def doubled(self):
        return 2

    def head(self, x):
        return self.bn(self.conv(x))

    @functools.wraps(head)
    def wrapped(self, x):
        return self.head(x)

    @functools.lru_cache  # noqa: B019
    def cached(self, x):
        return x


def goes_through_a_tensor(self, x):
    return self.relu(self.bn(self.conv(sum([row for row in x]))))  # noqa: C416


def hands_over_a_child(self, x):
    return self.relu(self.bn(self.conv(x))).add(self.more)


def hands_over_itself(self, x):
    return self.relu(self.bn(self.conv(x))).add(self)


def indexes_a_list(self, x):
    return self.relu(self.bn(self.conv(self.more[0](x))))


def goes_through_itself(self, x):
    for layer in self:
        x = layer(x)
    return self.relu(self.bn(self.conv(x)))


def reads_a_property(self, x):
    return self.relu(self.bn(self.conv(x))) * self.doubled


def calls_what_is_decorated(self, x):
    return self.relu(self.wrapped(x))


def calls_what_is_no_function(self, x):
    return self.relu(self.bn(self.conv(self.cached(x))))


def sets_a_number(self, x):
    self.seen = 1
    return self.relu(self.bn(self.conv(x)))


def reads_a_list(self, x):
    return self.relu(self.bn(self.conv(x))) * self.numbers


def checkpoints(self, x):
    return self.relu(self.bn(self.conv(x))) * self.use_checkpoint


def swallows_the_refusal(self, x):
    try:
        x = x if x.sum() else -x
    finally:
        return self.relu(self.bn(self.conv(x)))  # noqa: B012


def names_in_a_lambda(self, x):
    return self.relu(self.bn(self.conv((lambda z: z + torch.rand(1))(x))))


def goes_wrong(self, x):
    return self.relu(self.bn(self.conv(x))) + x.view(1, 0, 2).size(9)[7] + abs("x")


def closed_over():
    factor = 2

    def forward(self, x):
        return self.relu(self.bn(self.conv(x))) * factor

    return forward


REFUSED = {
    goes_through_a_tensor: "its forward iterates over a tensor",
    hands_over_a_child: "its forward hands a _Child to a function",
    hands_over_itself: "its forward hands a _Self to a function",
    indexes_a_list: "its forward indexes more, which may change unseen",
    goes_through_itself: "its forward iterates over itself",
    reads_a_property: "its forward uses self.doubled",
    calls_what_is_decorated: "is decorated or closes over variables",
    calls_what_is_no_function: "its forward uses self.cached",
    sets_a_number: "its forward uses seen",
    reads_a_list: "its forward reads numbers, a list that may change unseen",
    checkpoints: "it checkpoints its activations",
    swallows_the_refusal: "branches on a value of the input",
    names_in_a_lambda: "uses rand, whose effects a graph may not keep",
    goes_wrong: "its forward cannot be traced: ",
    closed_over(): "is decorated or closes over variables",
    torch.relu: "its forward is not a Python function",
}


def named(forward):
    return getattr(forward, "__name__", str(forward))


def of(forward):
    torch.manual_seed(0)
    model = lively(type("Mine", (Block,), {"forward": forward})()).eval()
    model.numbers, model.use_checkpoint = [2], True
    return model


@pytest.mark.parametrize("forward", REFUSED, ids=named)
def test_a_forward_that_a_graph_could_betray_is_left_alone(forward):
    model = nn.Sequential(of(forward))
    kind = type(model[0])
    (module,) = fastres.explain(fastres.optimize(model)).modules
    assert list(module.left) == ["0.bn"] and type(model[0]) is kind
    assert re.search(REFUSED[forward], module.left["0.bn"]), module.left


def asks_whether_there_is_a_child(self, x):
    x = self.relu(self.bn(self.conv(x))) if self.relu else x
    return x if self.absent is None and self.nothing is None else -x


def multiplies_by_a_constant_of_the_class(self, x):
    return self.relu(self.bn(self.conv(x))) * self.scale


def adds_a_buffer(self, x):
    return self.relu(self.bn(self.conv(x))) + self.shift


def calls_a_method_of_its_own(self, x):
    return self.relu(self.head(x))


def lists_what_it_adds(self, x):
    return self.relu(self.bn(self.conv(sum([x for _ in range(2)]))))


KEPT = (
    asks_whether_there_is_a_child, multiplies_by_a_constant_of_the_class, adds_a_buffer, calls_a_method_of_its_own,
    lists_what_it_adds,
)  # fmt: skip


@pytest.mark.parametrize("forward", KEPT, ids=named)
def test_a_forward_that_a_graph_tells_whole_is_fused_and_computes_the_same(forward):
    model = of(forward)
    with torch.no_grad():
        expected = model(X)
        report = fastres.explain(fastres.optimize(model))
        assert report.counts["conv_bn_act"] == 1 and not report.modules[0].left
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


class Grandchild(Block):
    def forward(self, x):
        return super(Grandchild, self).forward(x) + x  # noqa: UP008


def test_super_by_name_is_followed():
    torch.manual_seed(0)
    model = lively(Grandchild()).eval()
    with torch.no_grad():
        expected = model(X)
        assert fastres.explain(fastres.optimize(model)).counts["conv_bn_act"] == 1
        torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)


class Greedy(nn.ReLU):
    def __bool__(self):
        raise MemoryError


def test_a_lack_of_memory_is_no_refusal():
    """The next time there may be enough: nothing is concluded, and the model stays as it is."""
    model = of(asks_whether_there_is_a_child)
    model.relu = Greedy()
    kind = type(model)
    with pytest.raises(MemoryError):
        fastres.optimize(model)
    assert type(model) is kind and state_of(model) is None


class Child(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.calls, self.seen = nn.Conv2d(16, 16, 1), 0, [0]

    def forward(self, x):
        return self.conv(x)

    def twice(self, x):
        return self.conv(self.forward(x))

    def count(self):
        self.calls += 1


class Nested(nn.Module):
    """A network whose forward, one of those below, looks into its children."""

    def __init__(self):
        super().__init__()
        self.stem, self.child = models.cifar.resnet(8), Child()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(16, 16, 1), nn.ReLU()) for _ in range(3))
        self.named = nn.ModuleDict({"a": nn.Conv2d(16, 16, 1), "b": nn.ReLU()})


def loops(self, x):
    x = self.stem.relu(self.stem.bn1(self.stem.conv1(x)))
    for index, block in enumerate(self.blocks):
        x = block(x) if index else block[0](x)
    return x


def reads_items(self, x):
    x, found = self.stem.conv1(x), {}
    for name, layer in self.named.items():
        x = layer(x)
        found[name] = x
    return list(found.values())


def indexes(self, x):
    x = self.stem.conv1(x)
    return self.blocks[len(self.blocks) - 1](x) + self.named["a"](x) + self.blocks[1:][0](x)


def calls_a_method(self, x):
    return self.child.twice(self.stem.layer1(self.stem.conv1(x)))


def counts(self, x):
    self.child.count()
    return self.child(self.stem.conv1(x))


def notes(self, x):
    self.child.seen.append(1)
    return self.child(self.stem.conv1(x))


def names(self, x):
    self.blocks[0].name = "first"
    return self.child(self.stem.conv1(x))


@torch.no_grad()
@pytest.mark.cpu
@pytest.mark.parametrize("forward", [loops, reads_items, indexes, calls_a_method, counts, notes, names])
def test_a_forward_may_look_into_its_children_but_leave_no_mark_there(forward):
    torch.manual_seed(0)
    model = lively(type("Network", (Nested,), {"forward": forward})()).eval()
    plain = copy.deepcopy(model)
    fastres.optimize(model)
    for y, other in zip(tree_leaves(model(X)), tree_leaves(plain(X)), strict=True):
        torch.testing.assert_close(y, other, rtol=1e-4, atol=1e-4)
    leaves_marks = forward in (counts, notes, names)
    assert (state_of(model).whole.run(model, X, True) is None) == leaves_marks
    model(X), plain(X)
    assert (model.child.calls, model.child.seen) == (plain.child.calls, plain.child.seen)
