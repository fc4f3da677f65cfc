"""Several processes, in one: a group of one over gloo, and threads that stand for two processes."""

import copy
import functools
import threading

import pytest
import torch
import torch.distributed as dist
from _torchvision import torchvision
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastres
from fastres.models import cifar
from fastres.nn import BasicBlock
from fastres.train import processes
from fastres.train.processes import Processes, SyncBatchNorm2d, started, synchronized

pytestmark = pytest.mark.none
CPU = torch.device("cpu")
ResNet = torchvision.models.ResNet


@pytest.fixture
def alone(monkeypatch):
    """What torchrun would tell the only process that it starts."""
    monkeypatch.setattr(processes.env, "torchrun", lambda: (0, 1, 0))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "0")


def test_without_torchrun_every_step_is_the_identity(monkeypatch):
    monkeypatch.setattr(processes.env, "torchrun", lambda: None)
    model = nn.Linear(2, 2)
    with started("cpu") as (found, device):
        assert found == Processes() and device == CPU and not dist.is_initialized()
        values = torch.ones(2)
        assert found.sum(values) is values and found.wrap(model, device) is model
        found.wait()


def test_the_group_ends_with_the_block_even_after_an_error(alone):
    with pytest.raises(KeyError), started("cpu") as (found, device):
        assert (found.rank, found.world, device) == (0, 1, CPU) and dist.get_backend() == "gloo"
        raise KeyError
    assert not dist.is_initialized()


def test_gpus_are_joined_over_nccl_each_process_on_its_own(monkeypatch):
    asked = []
    monkeypatch.setattr(processes.env, "torchrun", lambda: (5, 8, 1))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(device))
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **options: asked.append((backend, options)))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: asked.append("end"))
    with started("cuda") as (found, device):
        assert found == Processes(5, 8) and device == torch.device("cuda", 1)
    assert asked == [device, ("nccl", {"rank": 5, "world_size": 8}), "end"]


def test_a_model_is_wrapped_for_its_gradients_to_be_the_mean(alone):
    with started("cpu") as (_, device):
        torch.manual_seed(0)
        model, x = nn.Linear(3, 2), torch.randn(4, 3)
        several = Processes(0, 2)  # as one of two would; the group has but this one
        wrapped = several.wrap(copy.deepcopy(model), device)
        assert isinstance(wrapped, DistributedDataParallel)
        for each in (wrapped, model):
            each(x).square().sum().backward()
        assert torch.equal(wrapped.module.weight.grad, model.weight.grad)
        several.wait()
        assert several.sum(torch.ones(2)).tolist() == [1, 1]


def test_gradients_stay_right_while_a_wrapped_model_is_optimised_and_restored(alone):
    """DistributedDataParallel copies gradients by the strides that weights had when it was made."""
    with started("cpu"):
        torch.manual_seed(0)
        model, x = BasicBlock(8, 8), torch.randn(2, 8, 5, 5)
        for before in (False, True):
            ours, theirs = copy.deepcopy(model), copy.deepcopy(model)
            fastres.optimize(ours, channels_last=True) if before else None
            wrapped = DistributedDataParallel(ours)
            for change in (lambda it: fastres.optimize(it, channels_last=True), fastres.restore, lambda it: it):
                for each in (change(wrapped), theirs):
                    each.zero_grad()
                    each(x).square().sum().backward()
                for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
                    torch.testing.assert_close(own.grad, other.grad, rtol=1e-3, atol=1e-3)


def gradients(model, forward):
    """Of the first two steps of training."""
    torch.manual_seed(1)
    x = torch.randn(4, 3, 16, 16, dtype=torch.float64)
    optimizer, found = torch.optim.SGD(model.parameters(), lr=1e-3), []
    for _ in range(2):
        optimizer.zero_grad()
        forward(x).square().mean().backward()
        found += [parameter.grad.clone() for parameter in model.parameters()]
        optimizer.step()
    return found


class Evasive:
    """As a proxy of something that is not there."""

    @property
    def __class__(self):
        raise RuntimeError("asked for its class")


@pytest.mark.parametrize("case", ["wrapper", "wrapped", "part", "larger", "restored"])
def test_gradients_are_those_of_a_plain_model_whichever_module_is_optimised(alone, case):
    """The wrapper is found too where the module given is in it, or has what is in it. In float64: rounding flips no ReLU."""
    with started("cpu"):
        torch.manual_seed(0)
        plain, evasive = cifar.resnet(8).double(), Evasive()
        model = copy.deepcopy(plain)
        if case == "restored":
            fastres.optimize(model, channels_last=True)
        wrapped = DistributedDataParallel(model)
        half_made = DistributedDataParallel.__new__(DistributedDataParallel)
        if case == "restored":
            fastres.restore(model)
        else:
            larger = nn.Sequential(model, nn.Softmax(1))
            given = {"wrapper": wrapped, "wrapped": model, "part": model.layer2, "larger": larger}[case]
            fastres.optimize(given, channels_last=True)
        for own, other in zip(gradients(model, wrapped), gradients(plain, plain), strict=True):
            assert (own - other).norm() <= 1e-6 * other.norm()
        del evasive, half_made


def test_a_model_whose_wrapper_is_gone_is_free_again(alone):
    with started("cpu"):
        model = cifar.resnet(8)
        DistributedDataParallel(model)
        weight = fastres.optimize(model, channels_last=True).layer1[0].conv1.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert fastres.restore(model).layer1[0].conv1.weight.is_contiguous()


def test_a_model_is_optimised_in_contiguous_layout_and_then_sharded(alone):
    """As the refusal of the other order says. Each stage, and what is left, is gathered by itself."""
    with started("cpu"):
        torch.manual_seed(0)
        plain = ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1], num_classes=10).double()
        model, mesh = copy.deepcopy(plain), init_device_mesh("cpu", (1,))
        fastres.optimize(model, strict=True, channels_last=False)
        for part in (model.layer1, model.layer2, model.layer3, model.layer4, model):
            fully_shard(part, mesh=mesh)
        found = [grad.full_tensor() for grad in gradients(model, model)]
        for own, other in zip(found, gradients(plain, plain), strict=True):
            torch.testing.assert_close(own, other)
        for own, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.full_tensor(), other)
        for own, other in zip(model.buffers(), plain.buffers(), strict=True):
            torch.testing.assert_close(own, other)
        with torch.no_grad():
            x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
            torch.testing.assert_close(model.eval()(x), plain.eval()(x))
        fully_shard(plain, mesh=mesh)
        with pytest.raises(fastres.UnsupportedError, match="optimize the model before it is sharded, with channels_last=False"):
            fastres.optimize(plain)


def test_it_says_what_torchrun_told(monkeypatch):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        assert processes.env.torchrun() is None
        monkeypatch.setenv(name, value)
    assert processes.env.torchrun() == (3, 4, 1)


class Together:
    """``all_reduce`` among threads, each of which stands for a process."""

    def __init__(self, count):
        self.barrier, self.given, self.own = threading.Barrier(count, timeout=60), [None] * count, threading.local()

    def all_reduce(self, values):
        self.given[self.own.number] = values.clone()
        self.barrier.wait()
        total = sum(self.given)
        self.barrier.wait()
        values.copy_(total)

    def run(self, works):
        results = [None] * len(works)

        def one(number):
            self.own.number = number
            results[number] = works[number]()

        threads = [threading.Thread(target=one, args=(number,)) for number in range(len(works))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def step(model, x, grad):
    x = x.clone().requires_grad_()
    y = model(x)
    y.backward(grad)
    return y.detach(), x.grad


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_over_two_processes_is_that_over_both_batches(monkeypatch, momentum, affine):
    """In float64, where what is left is rounding alone; the halves are of different sizes."""
    torch.manual_seed(0)
    whole = nn.BatchNorm2d(3, momentum=momentum, affine=affine).double()
    if affine:
        nn.init.uniform_(whole.weight), nn.init.uniform_(whole.bias)
    parts = [synchronized(nn.Sequential(copy.deepcopy(whole)), CPU) for _ in range(2)]
    assert all(type(part[0]) is SyncBatchNorm2d for part in parts)
    together = Together(2)
    monkeypatch.setattr(dist, "all_reduce", together.all_reduce)
    for _ in range(2):
        x, grad = (torch.randn(5, 3, 4, 4, dtype=torch.float64) for _ in range(2))
        y, grad_x = step(whole, x, grad)
        halves = [(x[:2], grad[:2]), (x[2:], grad[2:])]
        found = together.run([functools.partial(step, part, *half) for part, half in zip(parts, halves, strict=True)])
        torch.testing.assert_close(torch.cat([first for first, _ in found]), y)
        torch.testing.assert_close(torch.cat([second for _, second in found]), grad_x)
    for part in parts:
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(part[0].get_buffer(name), buffer)
    if affine:
        torch.testing.assert_close(sum(part[0].weight.grad for part in parts), whole.weight.grad)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(parts[0].eval()(x), whole.eval()(x))


def test_batch_norm_without_statistics_tracks_none(monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", lambda values: None)
    plain = nn.BatchNorm2d(3, track_running_stats=False).double()
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = synchronized(nn.Sequential(copy.deepcopy(plain)), CPU)
    torch.testing.assert_close(found(x), plain(x))
    assert found[0].running_mean is None


def test_on_a_gpu_it_is_pytorchs_own():
    model = synchronized(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()), torch.device("cuda"))
    assert type(model[0]) is nn.SyncBatchNorm
