"""The ops: one page each. Importing this package registers all of them in ``REGISTRY`` and ``torch.ops.fastres``."""

from fastres.ops import (
    add_act,
    bn_act,
    bn_act_maxpool,
    bn_add_act,
    bn_add_bn_act,
    conv,
    conv_backward_bn_act,
    conv_bn_act,
    conv_bn_act_conv_bn_add_act,
    conv_bn_act_conv_bn_add_act_conv_bn_act,
    conv_bn_act_maxpool,
    conv_bn_add_act,
    conv_bn_add_conv_bn_act,
    conv_int8,
    conv_statistics,
    pool_int8,
    quantize_int8,
)
from fastres.ops._op import REGISTRY

__all__ = [
    "REGISTRY",
    "add_act",
    "bn_act",
    "bn_act_maxpool",
    "bn_add_act",
    "bn_add_bn_act",
    "conv",
    "conv_backward_bn_act",
    "conv_bn_act",
    "conv_bn_act_conv_bn_add_act",
    "conv_bn_act_conv_bn_add_act_conv_bn_act",
    "conv_bn_act_maxpool",
    "conv_bn_add_act",
    "conv_bn_add_conv_bn_act",
    "conv_int8",
    "conv_statistics",
    "pool_int8",
    "quantize_int8",
]
