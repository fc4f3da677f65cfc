"""Recorded operations as layers of a static plan: batch norm folded, additions and ReLUs joined to what they follow."""

import itertools

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from fastres.errors import UnsupportedError
from fastres.frozen import weights
from fastres.frozen.arguments import Refused, constant, has_room, layer_name, of_channels, pair, stem
from fastres.frozen.layers import ONE, Layer, Network, Output, Pair
from fastres.frozen.record import Recording, Value
from fastres.frozen.values import Values
from fastres.ops import _fold

_END_IN_RELU = ("conv", "linear", "bn", "add", "upsample", "gate")
_WHOLE = 2**31  # where a slice ends that takes all there is, whatever the size of the images


def network(name: str, recording: Recording) -> Network:
    """The layers of a recorded network.

    Raises:
        UnsupportedError: listing every operation that a plan has no step for.
    """
    builder = _Builder(recording)
    layers, ends = builder.build(), list(map(builder.value, recording.ys))
    outputs = list(dict.fromkeys(ends))
    returned = [Output(outputs.index(end), len(y.shape) == 2) for end, y in zip(ends, recording.ys, strict=True)]
    form = tree_map(lambda place: returned[place], recording.form)
    return Network(name, layers, recording.x, recording.x.shape[1], outputs, form)


class _Builder(Values):
    def __init__(self, recording: Recording) -> None:
        super().__init__(recording)
        self.refused: dict[str, int] = {}

    def build(self) -> list[Layer]:
        for operation in self.recording.operations:
            if operation.result.constant is not None:
                continue
            take = getattr(self, "on_" + stem(operation.target), None)
            try:
                if take is None or operation.target.endswith("out") or not has_room(take, operation.args):
                    raise Refused
                take(*operation.args, y=operation.result)
            except Refused:
                self.refused[operation.target] = self.refused.get(operation.target, 0) + 1
        if self.refused:
            what = ", ".join(f"{target} ({count}x)" for target, count in sorted(self.refused.items()))
            raise UnsupportedError(f"fastres.freeze: a plan has no step for {what}; use fastres.optimize for such networks")
        return self.needed()

    # ---- one method an operation, with its arguments -----------------------------------------------

    def on_convolution(self, x, weight, bias, stride, padding, dilation, transposed, _, groups, *, y):
        if len(x.shape) == 3 and x.shape == y.shape and not transposed and groups == 1:
            self.along_channels(x, weight, bias, stride, padding[0], dilation[0], y)
            return
        if transposed or len(weight.shape) != 4:
            raise Refused
        pairs = [pair(value) for value in (stride, padding, dilation)]
        rows = weights.own(constant(weight))
        bias = torch.zeros(len(rows), device=rows.device) if bias is None else weights.own(constant(bias))
        self.add(_conv(x, weight, (rows, bias), *pairs, groups, y))

    def on_native_batch_norm(self, x, weight, bias, mean, var, training, _, eps, *, y):
        if training or mean is None or len(x.shape) != 4:
            raise Refused
        parameters = [constant(p) for p in (weight, bias, mean, var)]
        conv = self.private(x, "conv")
        if conv is not None:
            conv.weight, conv.bias = _fold.fold((conv.weight, conv.bias, *parameters), eps)
            self.rename(conv, y)
            return
        self.add(Layer("bn", layer_name(mean), x, y, weight=weights.batch_norm(*parameters, eps)))

    def along_channels(self, x, weight, bias, stride, padding, dilation, y):
        """A convolution of features, (N, 1, C), as one of images that are one pixel high, of one channel."""
        features = self.value(x)
        if x.shape[1] != 1 or features.shape[1] != x.shape[2] or stride != [1]:
            raise Refused
        batch, _, length = x.shape
        line, convolved, back = map(self.between, ((batch, 1, 1, length), (batch, 1, 1, length), (batch, length, 1, 1)))
        rows = weights.own(constant(weight))[:, :, None]
        added = torch.zeros(1, device=rows.device) if bias is None else weights.own(constant(bias))
        self.add(Layer("turn", "turn", features, line))
        self.add(_conv(line, weight, (rows, added), ONE, (0, padding), (1, dilation), 1, convolved))
        self.add(Layer("turn", "turn", convolved, back))
        self.pass_on(back, y)

    on_cudnn_batch_norm = on_native_batch_norm

    def on__native_batch_norm_legit_no_training(self, x, weight, bias, mean, var, momentum, eps, *, y):
        self.on_native_batch_norm(x, weight, bias, mean, var, False, momentum, eps, y=y)

    def on_bn_act(self, x, weight, bias, mean, var, eps, act, *, y):
        self.on_bn_add_act(x, None, weight, bias, mean, var, eps, act, y=y)

    def on_bn_add_act(self, x, residual, weight, bias, mean, var, eps, act, *, y):
        normalised, added = self.between(x.shape), self.between(x.shape)
        self.on_native_batch_norm(x, weight, bias, mean, var, False, 0.0, eps, y=normalised)
        if residual is not None:
            self.on_add(normalised, residual, y=added)
        last = normalised if residual is None else added
        if act == "relu":
            self.on_relu(last, y=y)
        else:
            self.pass_on(last, y)

    def on_conv_bn_act(self, x, *parameters, y):
        self.on_conv_bn_add_act(x, None, *parameters, y=y)

    def on_conv_bn_add_act(self, x, residual, weight, bias, g, b, m, v, eps, stride, padding, dilation, groups, act, *, y):
        pairs = [pair(value) for value in (stride, padding, dilation)]
        rows, *others = map(constant, (weight, bias, g, b, m, v))
        conv = _conv(x, weight, _fold.fold((rows.float(), *others), eps), *pairs, groups, y)
        conv.residual = None if residual is None else self.value(residual)
        conv.relu = act == "relu"
        self.add(conv)

    def on_conv_bn_add_conv_bn_act(self, x, shortcut, *parameters, y):
        main, own, act = parameters[:11], parameters[11:-1], parameters[-1]
        residual = self.between(y.shape)
        self.on_conv_bn_act(shortcut, *own, (0, 0), (1, 1), 1, "none", y=residual)
        self.on_conv_bn_add_act(x, residual, *main, act, y=y)

    def on_conv_bn_act_maxpool(self, x, *parameters, y):
        pooled = self.between(y.shape)
        self.on_conv_bn_act(x, *parameters[:-3], y=pooled)
        self.on_max_pool2d_with_indices(pooled, *parameters[-3:], y=y)

    def activate(self, function: str, x: Value, y: Value, low: float = 0.0, high: float = 0.0) -> None:
        x, y = self.value(x), self.stored(x, y)
        self.add(Layer("activation", function, x, y, function=function, low=float(low), high=float(high)))

    def on_sigmoid(self, x, *, y):
        self.activate("sigmoid", x, y)

    def on_silu(self, x, *, y):
        self.activate("silu", x, y)

    def on_hardsigmoid(self, x, *, y):
        self.activate("hardsigmoid", x, y)

    def on_hardswish(self, x, *, y):
        self.activate("hardswish", x, y)

    def on_leaky_relu(self, x, slope=0.01, *, y):
        self.activate("leaky_relu", x, y, slope)

    def on_hardtanh(self, x, low=-1.0, high=1.0, *, y):
        self.activate("clamp", x, y, low, high)

    def on_mul(self, x, factor, *, y):
        if isinstance(factor, Value) and x.constant is factor.constant is None:
            pairs = [(a, b) for a, b in ((x, factor), (factor, x)) if self.fits(a, b, y)]
            if not pairs:
                raise Refused
            x, gate = max(pairs, key=lambda pair: self.is_gate(pair[1]))
            self.add(Layer("gate", "gate", x, y, gate=self.value(self.expanded.get(gate, gate))))
            return
        x, factor = (factor, x) if x.constant is not None else (x, factor)
        self.scale_and_shift(x, of_channels(x, factor), None, y)

    def fits(self, x: Value, gate: Value, y: Value) -> bool:
        """Whether a gate has a value for each channel of x."""
        return x not in self.expanded and x.shape == y.shape and (gate in self.expanded or gate.shape == (*x.shape[:2], 1, 1))

    def is_gate(self, x: Value) -> bool:
        """Whether a value is the activation that scales channels; where images have one pixel, both factors look alike."""
        layer = self.makers.get(self.value(x))
        return layer is not None and layer.function in ("sigmoid", "hardsigmoid")

    def on_div(self, x, divisor, *, y):
        self.scale_and_shift(x, of_channels(x, divisor).reciprocal(), None, y)

    def on_sub(self, x, shift, alpha=1, *, y):
        self.scale_and_shift(x, None, -alpha * of_channels(x, shift), y)

    def scale_and_shift(self, x: Value, scale: Tensor | None, shift: Tensor | None, y: Value) -> None:
        """``x * scale + shift`` by channels, in the layer before where that is linear, else as a batch norm."""
        layer, rows = self.private(x, "conv", "bn"), weights.scale_and_shift(scale, shift)
        if layer is None:
            self.add(Layer("bn", "scale and shift", x, y, weight=rows.float()))
            return
        layer.weight, layer.bias = weights.with_rows(layer.weight, layer.bias, rows)
        self.rename(layer, y)

    def on_add(self, x, residual, alpha=1, *, y):
        if isinstance(residual, Value) and (x.constant is not None or residual.constant is not None):
            x, shift = (residual, x) if x.constant is not None else (x, residual)
            self.scale_and_shift(x, None, alpha * of_channels(x, shift), y)
            return
        if not isinstance(residual, Value) or alpha != 1 or x.shape != residual.shape:
            raise Refused
        if len({(*self.value(operand).shape, 1, 1)[:4] for operand in (x, residual)}) > 1:
            raise Refused  # flattened from images of other sizes
        y = self.stored(x, y)
        operands = (x, residual), (residual, x)
        for kinds, (first, second) in itertools.product((("upsample",), ("conv", "linear", "gate")), operands):
            layer = self.private(first, *kinds)
            if layer is not None:  # it moves here, where both operands exist
                self.found.remove(layer)
                self.found.append(layer)
                layer.residual = self.value(second)
                self.rename(layer, y)
                return
        self.add(Layer("add", "add", x, y, residual=self.value(residual)))

    def on_upsample_nearest2d(self, x, size, scale_h=None, scale_w=None, *, y):
        """Without scales, what y is added to or put beside says how large it is, for images of any size."""
        if any(scale is not None and scale != int(scale) for scale in (scale_h, scale_w)):
            raise Refused
        self.add(Layer("upsample", "upsample", x, y, stride=(int(scale_h or 0), int(scale_w or 0))))

    def on_add_act(self, x, residual, act, *, y):
        self.on_add(x, residual, y=y)
        self.makers[self.value(y)].relu = act == "relu"

    def on_relu(self, x, *, y):
        x, y = self.value(x), self.stored(x, y)
        layer = self.makers.get(x)
        if layer is not None and layer.kind in _END_IN_RELU and not layer.relu and self.uses[x] == 1:
            layer.relu = True
            self.rename(layer, y)
            return
        self.add(Layer("relu", "relu", x, y, relu=True))

    def on_max_pool2d_with_indices(self, x, kernel, stride=(), padding=(0, 0), dilation=(1, 1), ceil=False, *, y):
        if pair(dilation) != ONE:
            raise Refused
        window = pair(kernel), pair(stride or kernel), pair(padding)
        self.add(Layer("max_pool", "max_pool", x, y, None, False, *window, ceil=ceil))

    def on_avg_pool2d(self, x, kernel, stride=(), padding=(0, 0), ceil=False, with_padding=True, divisor=None, *, y):
        kernel, padding = pair(kernel), pair(padding)
        if divisor is None and with_padding and padding != (0, 0):
            divisor = kernel[0] * kernel[1]
            if ceil:  # windows then end where the padding does
                raise Refused
        self.add(Layer("avg_pool", "avg_pool", x, y, None, False, kernel, pair(stride or kernel), padding, ceil=ceil,
                       divisor=divisor or 0))  # fmt: skip

    def on_mean(self, x, dims, keepdim=False, dtype=None, *, y):
        if len(x.shape) != 4 or not isinstance(dims, list) or sorted(dim % 4 for dim in dims) != [2, 3]:
            raise Refused
        self.add(Layer("avg_pool", "mean", x, y, kernel=(0, 0)))

    def on__adaptive_avg_pool2d(self, x, size, *, y):
        if tuple(size) == (1, 1):
            self.add(Layer("avg_pool", "mean", x, y, kernel=(0, 0)))
        elif tuple(size) == x.shape[2:]:
            self.add(Layer("avg_pool", "adaptive_pool", x, y, expects=pair(size)))
        else:
            raise Refused

    def on_addmm(self, bias, x, weight, beta=1, alpha=1, *, y):
        source, rows = self.value(x), constant(weight).t()
        added = rows.new_zeros(len(rows)) if bias is None else constant(bias)
        if beta != 1 or alpha != 1 or added.shape != rows.shape[:1]:
            raise Refused
        kernel = pair(source.shape[2:]) if len(source.shape) == 4 else ONE
        rows = rows.reshape(len(rows), -1, *kernel)
        self.add(Layer("linear", layer_name(weight), source, y, None, False, kernel, out_channels=len(rows),
                       expects=kernel, weight=weights.own(rows), bias=weights.own(added)))  # fmt: skip

    def on_mm(self, x, weight, *, y):
        self.on_addmm(None, x, weight, y=y)

    def on_view(self, x, shape, *, y):
        flat = len(y.shape) == 2 and y.shape[0] == x.shape[0]
        pixels = len(x.shape) == 4 and len(y.shape) == 4 and y.shape == x.shape
        channels = (*self.value(x).shape, 1, 1)[1:4]
        line = channels[1:] == ONE and y.shape[1:] in ((1, channels[0]), channels)
        if not isinstance(shape, list) or not (flat or pixels or line) or y.shape[0] != x.shape[0]:
            raise Refused
        self.pass_on(self.value(x), y)

    on__unsafe_view = on_view

    def on_squeeze(self, x, dims=None, *, y):
        """Of the pixels only; without ``dims`` it would take a batch of one image too."""
        dims = [dims] if isinstance(dims, int) else dims or [0]
        if x.shape[2:].count(1) != len(x.shape[2:]) or any(dim % len(x.shape) < 2 for dim in dims):
            raise Refused
        self.pass_on(self.value(x), y)

    def on_expand(self, x, shape, *_, y):
        """Of a value for each channel."""
        if len(y.shape) != 4 or x.constant is not None or x.shape != (*y.shape[:2], 1, 1):
            raise Refused
        self.uses[self.value(x)] += self.uses[y] - 1
        self.expanded[y] = self.value(x)

    def on_clone(self, x, *_, y):
        self.pass_on(self.value(x), y)

    def on_as_strided_(self, x, shape, strides, *_, y):
        if tuple(shape) != x.shape:
            raise Refused
        self.pass_on(self.value(x), y)

    def on_empty(self, *_, y):
        pass  # the unused outputs of a batch norm in evaluation

    def on_slice(self, x, dim=0, start=None, end=None, step=1, *, y):
        dim %= len(x.shape)
        if len(x.shape) == 4 and dim == 1 and step == 1 and y.shape[1] != x.shape[1]:
            begin = range(x.shape[1])[slice(start, end)].start
            self.add(Layer("slice", "slice", x, y, out_channels=y.shape[1], begin=begin))
            return
        whole = not start and (end is None or end >= _WHOLE or (dim == 1 and end >= x.shape[1]))
        if not whole or (step != 1 and dim not in (2, 3)) or len(x.shape) != 4:
            raise Refused
        if step == 1:
            self.pass_on(self.value(x), y)
            return
        stride = (step, 1) if dim == 2 else (1, step)
        before = self.private(x, "pad")
        if before is not None:
            before.stride = (before.stride[0] * stride[0], before.stride[1] * stride[1])
            self.rename(before, y)
            return
        self.add(Layer("pad", "subsample", x, y, stride=stride, out_channels=x.shape[1]))

    def on_cat(self, tensors, dim=0, *, y):
        first, *others = map(self.value, tensors)
        pixels = {(*value.shape, 1, 1)[2:4] for value in (first, *others)}
        fits = len(pixels) == 1 and (len(y.shape) == 4 or (len(y.shape) == 2 and pixels == {ONE}))
        if not fits or dim % len(y.shape) != 1 or any(value.constant is not None for value in (first, *others)):
            raise Refused
        enlarged = [layer for value in (first, *others) if (layer := self.makers.get(value)) and layer.kind == "upsample"]
        enlarged = [layer for layer in enlarged if self.uses[layer.y] == 1 and layer.residual is None]
        fixed = [value for value in (first, *others) if self.makers.get(value) not in enlarged]
        for layer in enlarged if fixed else ():  # they move here, where what they are put beside exists
            layer.like = fixed[0]
            self.found.remove(layer)
            self.found.append(layer)
        expects = ONE if len(y.shape) == 2 else None  # else flattened images would be side by side, not their channels
        self.add(Layer("cat", "cat", first, y, others=tuple(others), expects=expects))

    def on_constant_pad_nd(self, x, pad, value=0, *, y):
        if len(pad) != 6 or any(pad[:5]) or pad[5] < 0 or value != 0:
            raise Refused
        before = self.private(x, "pad")
        if before is not None:
            before.out_channels, before.name = y.shape[1], "zero_pad"
            self.rename(before, y)
            return
        self.add(Layer("pad", "zero_pad", x, y, out_channels=y.shape[1]))


def _conv(
    x: Value, weight: Value, own: tuple[Tensor, Tensor], stride: Pair, padding: Pair, dilation: Pair, groups: int, y: Value
) -> Layer:
    rows, bias = own
    return Layer("conv", layer_name(weight), x, y, None, False, pair(rows.shape[2:]), stride, padding, dilation, groups,
                 out_channels=len(rows), weight=rows, bias=bias)  # fmt: skip
