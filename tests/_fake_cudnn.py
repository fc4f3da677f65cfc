"""A stand-in for cuDNN's Python frontend: the graphs that the acceptance run draws, computed by PyTorch in float32.

``refusal``: (stage, text) that every graph gets; ``wrong``: the number of an output, and what it is multiplied by.
"""

import types

import torch
import torch.nn.functional as F

__version__ = "0"
refusal: tuple[str, str] | None = None
wrong = (0, 1.0)
data_type = types.SimpleNamespace(HALF=torch.float16, BFLOAT16=torch.bfloat16, FLOAT=torch.float32)
heur_mode = types.SimpleNamespace(A="A", FALLBACK="FALLBACK")
reduction_mode = types.SimpleNamespace(ADD="ADD")


class cudnnGraphNotSupportedError(Exception):
    pass


def backend_version_string():
    return "9"


def create_handle():
    return "handle"


class Node:
    def __init__(self, compute):
        self.compute, self.is_output = compute, False

    def set_output(self, value):
        self.is_output = value
        return self

    def set_data_type(self, dtype):
        self.dtype = dtype
        return self

    def set_dim(self, dim):
        self.dim = dim
        return self

    def set_stride(self, stride):
        self.stride = stride
        return self


def _weight_gradient(image, loss, size, window):
    stride, padding, dilation = window["stride"], window["padding"], window["dilation"]
    return torch.nn.grad.conv2d_weight(image, size, loss, stride, padding, dilation)


class pygraph:
    def __init__(self, *, io_data_type, intermediate_data_type, compute_data_type, handle):
        assert io_data_type in (torch.float16, torch.bfloat16, torch.float32)
        assert intermediate_data_type is compute_data_type is torch.float32
        self.io, self.inputs, self.outputs, self.stages = io_data_type, {}, [], []

    def tensor(self, *, name, dim, stride, data_type):
        node = Node(lambda values: values[node])
        node.about = dim, stride, data_type
        assert name not in self.inputs
        self.inputs[name] = node
        return node

    def _made(self, compute):
        node = Node(lambda values: values.setdefault(node, compute(values)))
        self.outputs.append(node)
        return node

    def scale(self, *, input, scale):
        return self._made(lambda v: input.compute(v) * scale.compute(v))

    def bias(self, *, input, bias):
        return self._made(lambda v: input.compute(v) + bias.compute(v))

    def mul(self, *, a, b):
        return self._made(lambda v: a.compute(v) * b.compute(v))

    def relu(self, *, input):
        return self._made(lambda v: input.compute(v).relu().to(self.io).float())

    def relu_backward(self, *, loss, input):
        return self._made(lambda v: torch.where(input.compute(v) > 0, loss.compute(v), 0))

    def conv_fprop(self, *, image, weight, **window):
        return self._made(lambda v: F.conv2d(image.compute(v), weight.compute(v), None, **window))

    def conv_dgrad(self, *, loss, filter, **window):
        node = self._made(lambda v: torch.nn.grad.conv2d_input(node.dim, filter.compute(v), loss.compute(v), **window))
        return node

    def conv_wgrad(self, *, image, loss, **window):
        node = self._made(lambda v: _weight_gradient(image.compute(v), loss.compute(v), node.dim, window))
        return node

    def genstats(self, *, input):
        total = self._made(lambda v: input.compute(v).sum((0, 2, 3), keepdim=True))
        return [total, self._made(lambda v: input.compute(v).square().sum((0, 2, 3), keepdim=True))]

    def reduction(self, *, input, mode):
        assert mode == "ADD"
        return self._made(lambda v: input.compute(v).sum((0, 2, 3), keepdim=True))

    def _stage(self, name):
        self.stages.append(name)
        if refusal is not None and refusal[0] == name:
            raise cudnnGraphNotSupportedError(refusal[1])

    def validate(self):
        self._stage("validate")

    def build_operation_graph(self):
        self._stage("build_operation_graph")

    def create_execution_plans(self, modes):
        assert modes == ["A", "FALLBACK"]
        self._stage("create_execution_plans")

    def check_support(self):
        self._stage("check_support")

    def build_plans(self):
        self._stage("build_plans")

    def get_workspace_size(self):
        return 0

    def execute(self, buffers, workspace, handle):
        assert self.stages == ["validate", "build_operation_graph", "create_execution_plans", "check_support", "build_plans"]
        assert handle == "handle" and workspace.dtype is torch.uint8
        values = {}
        for node in self.inputs.values():
            dim, stride, dtype = node.about
            tensor = buffers[node]
            assert list(tensor.shape) == dim and tensor.dtype is dtype
            assert all(a == b for a, b, n in zip(tensor.stride(), stride, dim, strict=True) if n > 1)
            values[node] = tensor.float()
        for number, node in enumerate(node for node in self.outputs if node.is_output):
            assert list(buffers[node].shape) == node.dim and buffers[node].dtype is node.dtype
            buffers[node].copy_(node.compute(values) * (wrong[1] if number == wrong[0] else 1))
