"""The in-place epilogue of a convolution that has none of its own."""

from torch import Tensor

from fastres.kernels import native


def add_act_(y: Tensor, residual: Tensor | None, act: str) -> Tensor:
    """``y = act(y + residual)`` in place, in one pass where the native library is there; y is fresh, dense, on the CPU."""
    if residual is None and act == "none":
        return y
    if native.why_not("cpu_add_act_") is None:
        native.op("cpu_add_act_")(y, residual, act)
        return y
    if residual is not None:
        y.add_(residual)
    return y.relu_() if act == "relu" else y
