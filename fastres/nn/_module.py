"""The base of modules that run fused steps."""

from typing import Any

from torch import nn

from fastres import functional


class FusedModule(nn.Module):
    """A module whose evaluation may use folded weights: switching mode drops them.

    A fold notices every change of a parameter but a write through ``.data``, as some moving-average code
    makes between ``train()`` and ``eval()``; so both calls start afresh.
    """

    def _children(self, *names: str) -> list[Any]:
        """The layers of these names, past ``nn.Module.__getattr__``, which takes several times as long."""
        modules = self._modules
        return [modules[name] if name in modules else getattr(self, name) for name in names]

    def train(self, mode: bool = True) -> "FusedModule":
        if mode != self.training:
            functional.forget_folds(self.parameters())
        return super().train(mode)
