"""Several processes that train one model, as ``torchrun`` starts them; with one process, every step here is the identity."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastres import env


@dataclass(frozen=True)
class Processes:
    """This process's number, and how many there are."""

    rank: int = 0
    world: int = 1

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same bits in each."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def wait(self) -> None:
        if self.world > 1:
            dist.barrier()

    def wrap(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model whose gradients are the mean over all processes, and whose buffers are those of the first."""
        if self.world == 1:
            return model
        return DistributedDataParallel(model, device_ids=[device] if device.type == "cuda" else None)


# Gloo's thread needs the interpreter's lock to release the tensors of the last sum. PyTorch 2.13 holds that lock while it waits
# for the thread to end: a deadlock, if the group is destroyed before the thread is done.
_GRACE_S = 0.05


@contextlib.contextmanager
def started(device: str) -> Iterator[tuple[Processes, torch.device]]:
    """Join the processes that torchrun started, if it did, over NCCL on GPUs and gloo on CPUs; and this one's device."""
    place = env.torchrun()
    if place is None:
        yield Processes(), torch.device(device)
        return
    rank, world, local = place
    own = torch.device(device, local) if device == "cuda" else torch.device(device)
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo", rank=rank, world_size=world)
    try:
        yield Processes(rank, world), own
    finally:
        time.sleep(_GRACE_S)
        dist.destroy_process_group()


class _SumOverAll(torch.autograd.Function):
    """The sum over all processes; gradients are summed too, since every process's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone()
        dist.all_reduce(grad)
        return grad


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm over the batches of all processes, on any device: ``nn.SyncBatchNorm`` takes no CPU tensors.

    In float64, rounded once at the end, so that one process and several differ only by the rounding of everything else.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.double()
        count, dims, shape = x.numel() // x.shape[1], (0, 2, 3), (1, -1, 1, 1)
        sums = _SumOverAll.apply(torch.cat([wide.sum(dims), wide.new_tensor([count])]))
        total = sums[-1].detach()
        mean = sums[:-1] / total
        centred = wide - mean.view(shape)
        var = _SumOverAll.apply(centred.square().sum(dims)) / total
        self._track(mean.detach(), var.detach(), total)
        y = centred * torch.rsqrt(var + self.eps).view(shape)
        if self.affine:
            y = y * self.weight.double().view(shape) + self.bias.double().view(shape)
        return y.to(x.dtype)

    def _track(self, mean: Tensor, var: Tensor, total: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
        self.running_var.lerp_((var * total / (total - 1)).to(self.running_var.dtype), momentum)


def synchronized(model: nn.Module, device: torch.device) -> nn.Module:
    """The model with every batch norm over all processes: PyTorch's own on a GPU, ``SyncBatchNorm2d`` elsewhere."""
    if device.type == "cuda":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in list(model.modules()):
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
