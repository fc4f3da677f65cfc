"""What a network in 8-bit integers computes, in PyTorch: for its tests, and for the scoreboard, whose many processes import no
more than they need.
"""

import copy

from fastres.frozen.calibrate import result


def emulated(frozen, x):
    """The plan's own arithmetic by PyTorch: each value the integer that the plan holds, in float64; what is half way between
    two of them but for less than float32 tells is half way, as to the plan, whose ratios of scales are often of 64ths."""
    scales, network = frozen.scales, frozen.network

    def stored(value, real):
        scale = scales.get(value)
        return real if scale is None else (real / scale.scale + scale.zero).float().round().clamp(0, 255).double()

    def real(value, held):
        scale = scales.get(value)
        return held if scale is None else (held - scale.zero) * scale.scale

    values = {network.x: stored(network.x, x.double())}
    for layer in network.layers:
        exact = copy.copy(layer)
        if layer.scale is not None:
            exact.weight = layer.weight.double() * layer.scale.double().view(-1, 1, 1, 1)
        elif layer.weight is not None:
            exact.weight = layer.weight.double()
        operands = {v: real(v, values[v]) for v in (layer.x, layer.residual) if v is not None}
        values[layer.y] = stored(layer.y, result(exact, operands))
    return network.result([values[y] for y in network.outputs])
