"""The base of modules that run fused steps."""

from typing import Any

from torch import nn

from fastres.ops import _fold


class FusedModule(nn.Module):
    """A module whose evaluation may use folded weights; switching its mode drops them.

    A fold notices every change of a parameter except writes through ``.data``, which some moving-average code
    makes between ``train()`` and ``eval()``; so both of these start afresh.
    """

    def _children(self, *names: str) -> list[Any]:
        """The layers of these names, without ``nn.Module.__getattr__``, which takes several times as long."""
        modules = self._modules
        return [modules[name] if name in modules else getattr(self, name) for name in names]

    def train(self, mode: bool = True) -> "FusedModule":
        if mode != self.training:
            _fold.forget(self.parameters())
        return super().train(mode)
