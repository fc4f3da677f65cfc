"""Kernels with one mistake each: a named test must fail on every one of them.

A fault is one replacement in a copy of the sources. CUDA kernels are compiled for the CPU as in test_cuda.py, Triton's run
in the interpreter, each with the rest of the sources as they are. Here the first two of each kernel are tried; all of them, and
those in Python and C++ (_plain_faults.py), by the scoreboard.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import _cluster_faults
import _cuda_on_cpu
import _int8_faults
import pytest
import torch

pytestmark = pytest.mark.compile
ROOT = Path(__file__).resolve().parents[1]
FP32 = "torch.float32"
TILES = ROOT / "tests" / "amx_on_cpu" / "tiles.h"
SM90, HALF = "cuda/sm90_conv_bn_act_kernel.cu", {"dtype": "torch.float16"}
WIDE = "cuda/sm90_conv_wide_kernel.cu"
FINISH, SUMS = "cuda/device/sm90_wide_finish.cuh", "cuda/device/sm90_wide_sums.cuh"  # of it
CHAIN = "cuda/sm90_conv_bn_act_conv_bn_add_act_kernel.cu"
FEW, FEW_ROWS, FEW_BACKWARD = "cuda/conv_kernel.cu", "cuda/device/conv_rows.cuh", "cuda/conv_backward_kernel.cu"
POOLED = "cuda/conv_bn_act_maxpool_kernel.cu"
JOINED = "conv_bn_add_conv_bn_act.py"
NHWC, NCHW = {"layout": "channels_last", "dtype": FP32}, {"layout": "contiguous_format", "dtype": FP32}


class Fault(NamedTuple):
    """One mistake: in ``file``, ``wrong`` in place of ``right``; ``test`` with ``arguments`` catches it."""

    mistake: str
    file: str
    right: str
    wrong: str
    test: str
    arguments: dict
    kernel: str = ""  # CUDA: what is compiled anew, where file is a header


CUDA = [
    Fault("no tail behind the last vector", "cuda/add_act_kernel.cu", "block == 0 && rest < p.numel", "false",
          "test_add_act_of_any_size", {"dtype": FP32}),
    Fault("ReLU as a maximum", "common/epilogue.h", "v <= T{} ? T{} : v", "v > T{} ? v : T{}",
          "test_special_values", {"dtype": FP32}, "add_act_kernel"),
    Fault("the CPU's ReLU", "cuda/add_act_kernel.cu", "gpu_relu(z)", "relu(z)", "test_special_values", {"dtype": FP32}),
    Fault("gradient passes at zero", "common/epilogue.h", "y <= zero_up_to", "y < zero_up_to",
          "test_special_values", {"dtype": FP32}, "add_act_kernel"),
    Fault("unbiased variance", "cuda/bn_statistics_kernel.cu", "static_cast<double>(g.elements)",
          "static_cast<double>(g.elements - 1)", "test_statistics_are_accurate", {"layout": "channels_last"}),
    Fault("statistics about zero", "cuda/bn_statistics_kernel.cu", "return mean * mean > 16.0f * var ? mean : 0.0f;",
          "return 0.0f;", "test_statistics_are_accurate", {"layout": "contiguous_format"}),
    Fault("the last split is not merged", "cuda/device/bn_merge.cuh", "channel < g.channels ? g.splits : 0",
          "channel < g.channels ? g.splits - 1 : 0", "test_samples", {"name": "bn_act_train", **NHWC}, "bn_statistics_kernel"),
    Fault("no barrier behind the table", "cuda/device/batch_norm.cuh", "entry[row];\n  }\n  __syncthreads();",
          "entry[row];\n  }", "test_samples", {"name": "bn_act", **NHWC}, "bn_act_kernel"),
    Fault("threads beyond the last channel run", "cuda/device/batch_norm.cuh",
          "if (lane >= tile.channels) end = first;", "", "test_partitions", {"name": "bn_act", **NHWC}, "bn_act_kernel"),
    Fault("the next image is not skipped to", "cuda/device/batch_norm.cuh", "offset_ += next_image_;", "",
          "test_partitions", {"name": "bn_act", **NCHW}, "bn_act_kernel"),
    Fault("the mean is not taken off", "cuda/device/bn_backward.cuh", "x_j - affine[kMean][lane], sums", "x_j, sums",
          "test_samples", {"name": "bn_act_backward", **NHWC}, "bn_act_backward_kernel"),
    Fault("no border", "cuda/device/pool.cuh", "return v < 0 ? 0 : v < size ? v : size - 1;", "return v;",
          "test_misaligned_in_poison", {"name": "bn_act_maxpool", **NHWC}, "bn_act_maxpool_kernel"),
    Fault("a window that the ReLU stops has a tap", "cuda/bn_act_maxpool_backward_kernel.cu",
          "p.bn.relu && best.value[j] <= 0.0f ? kNoTap", "false ? kNoTap",
          "test_samples", {"name": "bn_act_maxpool_backward", **NCHW}),
    Fault("a window of a strip that the ReLU stops has a tap", "cuda/bn_act_maxpool_backward_kernel.cu", "stopped ? kNoTap",
          "false ? kNoTap", "test_samples", {"name": "bn_act_maxpool_backward", **NHWC}),
    Fault("the row above a strip is taken for its first", "cuda/device/pool_strip.cuh", "Row low = fetch(2 * first - 1);",
          "Row low = fetch(2 * first);", "test_pooling_finds_the_positions_that_torch_finds", NHWC, "bn_act_maxpool_kernel"),
    Fault("the next windows keep all of the last ones", "cuda/device/pool_strip.cuh", "best = below;", "",
          "test_pooling_in_strips_of_several_rows", {}, "bn_act_maxpool_kernel"),
    Fault("one row of windows is forgotten", "cuda/bn_act_maxpool_backward_kernel.cu",
          "rows = (pool.kernel.h - 1) / pool.stride.h + 1", "rows = (pool.kernel.h - 1) / pool.stride.h",
          "test_samples", {"name": "bn_act_maxpool_backward", **NCHW}),
    Fault("the bits of a byte the other way round", "cuda/device/batch_norm.cuh", "? 0u : 1u) << j;", "? 0u : 1u) << (7 - j);",
          "test_samples", {"name": "bn_add_act_train", **NHWC}, "bn_add_act_kernel"),
    Fault("every vector reads the first bits of a byte", "cuda/device/batch_norm.cuh", ".v[0]) >> (offset % 8)", ".v[0])",
          "test_samples", {"name": "bn_add_act_backward", **NHWC}, "bn_add_act_backward_kernel"),
    Fault("the second part of the gradient is dropped", "cuda/device/bn_backward.cuh",
          "if constexpr (kTwo) grad_y_j += to_float(grad_y2_in[slot].v[j]);", "",
          "test_samples", {"name": "bn_add_act_backward", **NHWC}, "bn_add_act_backward_kernel"),
    Fault("the second part is in the sums alone", "cuda/bn_add_bn_act_backward_kernel.cu",
          "input.bn.grad_y = params.residual.grad_x;", "", "test_samples", {"name": "bn_add_bn_act_backward", **NHWC}),
    Fault("the shortcut is normalised as the block is", "cuda/bn_add_bn_act_kernel.cu", "fill_affine(p.residual, c",
          "fill_affine(p.bn, c", "test_samples", {"name": "bn_add_bn_act", **NHWC}),
    Fault("a stage is given up while products read it", SM90, "wait_for_products<1>();", "wait_for_products<2>();",
          "test_exact_on_small_integers", {"name": "3x3", **HALF}),
    Fault("operands are not waited for", SM90, "s.full[slot.index].wait(slot.parity);", "",
          "test_exact_on_small_integers", {"name": "3x3", **HALF}),
    Fault("a buffer is filled before its output is stored", SM90,
          "wait_for_stores();\n    prepare(p, s, ahead);", "prepare(p, s, ahead);\n    wait_for_stores();",
          "test_exact_on_small_integers", {"name": "several tiles of each block, a ring that goes round", **HALF}),
    Fault("the residual is not waited for", SM90, "s.ready[group].wait(part.parity());", "",
          "test_exact_on_small_integers", {"name": "several tiles of each block, a ring that goes round", **HALF}),
    Fault("the output is not in the swizzle", SM90, "((j % 8) ^ (row % 8)) * 16", "(j % 8) * 16",
          "test_exact_on_small_integers", {"name": "one tile", **HALF}),
    Fault("the dilation is forgotten in one direction", SM90, "down += h.dilation", "++down",
          "test_exact_on_small_integers", {"name": "3x3 dilated", **HALF}),
    Fault("a stage of a shared tile is given up by one warpgroup", SM90, "kReleases = 4 * kParts", "kReleases = 4",
          "test_exact_on_small_integers", {"name": "3x3, tiles of both warpgroups", **HALF}),
    Fault("the bias of the shortcut is dropped", SM90, "if (p.with_shortcut && inside) bias[0]", "if (false) bias[0]",
          "test_a_projected_shortcut_is_added", {"name": "tails everywhere", "stride": 2, "monkeypatch": None}),
    Fault("the ReLU comes before the residual", SM90, "if (p.with_residual) v += to_float(result.v[k]);",
          "if (p.with_residual) v = gpu_relu(v) + to_float(result.v[k]);",
          "test_exact_on_small_integers", {"name": "one tile", **HALF}),
    Fault("a slice is given up by one block of a cluster", WIDE, "kGroups / P::kParts * p.cluster", "kGroups / P::kParts",
          "test_wide_is_exact", {"name": "1x1, four blocks share x", **HALF}),
    Fault("all blocks of a cluster load the first boxes", WIDE, "tile.place() + first * p.box", "tile.place()",
          "test_wide_is_exact", {"name": "1x1, four blocks share x", **HALF}),
    Fault("a half of a slice is filled once the other is given up", WIDE, "s.x_empty[slice.index][part].wait",
          "s.x_empty[slice.index][0].wait", "test_wide_is_exact", {"name": "7x7 stride 2, by tap", **HALF}),
    Fault("a tap is given up while products read it", WIDE, "wait_for_products<1>();", "wait_for_products<2>();",
          "test_wide_is_exact", {"name": "3x3 stride 2, by tap, partial depth", **HALF}),
    Fault("the second warpgroup reads the first one's places", WIDE, "s.x[slice.index] + group * kGroupPlaces * kRowBytes",
          "s.x[slice.index]", "test_wide_is_exact", {"name": "one row, one column", **HALF}),
    Fault("the lines between images are counted as pixels", FINISH, "line = 0, pixel_row -= p.rows - p.out.height;",
          "line = 0;", "test_wide_is_exact", {"name": "tails of channels, images that end inside a chunk", **HALF},
          "sm90_conv_wide_kernel"),
    Fault("columns between rows are stored", FINISH, "column < p.out.width && line", "line",
          "test_wide_is_exact", {"name": "one row, one column", **HALF}, "sm90_conv_wide_kernel"),
    Fault("the dilation of rows is forgotten", WIDE, "down * h.dilation * p.columns", "down * p.columns",
          "test_wide_is_exact", {"name": "dilated", **HALF}),
    Fault("the ReLU comes before the residual", FINISH, "if (adds) y[k] += to_float(residual.v[k]);",
          "if (adds) y[k] = gpu_relu(y[k]) + to_float(residual.v[k]);",
          "test_wide_is_exact", {"name": "part of a tile", **HALF}, "sm90_conv_wide_kernel"),
    Fault("what is between is laid out before the products end", CHAIN, "held.slice = slice;\n    }\n    end_products(acc);",
          "held.slice = slice;\n    }", "test_chain_is_exact", {"name": "part of a tile", **HALF}),
    Fault("a part is filled before it is stored", CHAIN, "wait_for_stores_but<1>();", "", "test_chain_is_exact",
          {"name": "128 channels, several tiles of each block", **HALF}),
    Fault("a part's residual is not waited for", CHAIN, "s.part_full[number][buffer.index].wait(buffer.parity);", "",
          "test_chain_is_exact", {"name": "128 channels, several tiles of each block", **HALF}),
    Fault("a slice is given up by one group", CHAIN, "s.x_empty[i].init(4 * kGroups)", "s.x_empty[i].init(4)",
          "test_chain_is_exact", {"name": "several tiles of each block, images that end inside a part", **HALF}),
    Fault("the second group reads the first one's middle", CHAIN, "s.middle[number][k / 4] + column",
          "s.middle[0][k / 4] + column", "test_chain_is_exact", {"name": "dilated", **HALF}),
    Fault("the second half has the bias of the first", CHAIN, "bias_of(p.bias, 64 * slice)", "bias_of(p.bias, 0)",
          "test_chain_is_exact", {"name": "128 channels", **HALF}),
    Fault("lines between images are counted as pixels", CHAIN, "y >= p.height; y -= p.rows", "y >= p.height; y -= p.height",
          "test_chain_is_exact", {"name": "one row, one column", **HALF}),
    Fault("what is between the convolutions is not activated", CHAIN, "bias, p.relu, s.middle", "bias, false, s.middle",
          "test_chain_is_exact", {"name": "part of a tile", **HALF}),
    Fault("a part is given up while the next convolution reads it", CHAIN, "init(kNext ? 5 : 1)", "init(1)",
          "test_a_chain_of_three_is_exact", {"name": "dilated"}),
    Fault("the next convolution adds one part of a column four times", CHAIN, "acc[64 * half + 16 * kPart])", "acc[64 * half])",
          "test_a_chain_of_three_is_exact", {"name": "7x1"}),
    Fault("places that are no pixels are in the statistics", SUMS, "vote(walk.pixel() >= 0)", "vote(true)",
          "test_statistics_are_those_of_what_is_stored", {"name": "few channels", **HALF}, "sm90_conv_wide_kernel"),
    Fault("both warpgroups write the first one's statistics", SUMS, "part = place / kGroupPlaces",
          "part = place / 512 * 2", "test_statistics_are_those_of_what_is_stored", {"name": "few channels", **HALF},
          "sm90_conv_wide_kernel"),
    Fault("statistics of what is not yet rounded", WIDE, "if constexpr (kEnd == End::kStatistics) round_all<scalar_t>(acc);",
          "", "test_statistics_are_those_of_what_is_stored", {"name": "few channels", "dtype": "torch.bfloat16"}),
    Fault("all parts are taken for full", "cuda/conv_statistics_kernel.cu", "p.counts[part]", "256.0f",
          "test_statistics_are_those_of_what_is_stored", {"name": "few channels", **HALF}),
    Fault("the mean is not taken off where gradients are summed", SUMS, "fmaf(own, to_float(x.v[k]) - affine[i][kMean],",
          "fmaf(own, to_float(x.v[k]),", "test_gradients_are_those_of_the_two_ops", {"name": "few channels", **HALF},
          "sm90_conv_wide_kernel"),
    Fault("the mean is added where gradients are summed", SUMS, "fmaf(own, to_float(x.v[k]) - affine[i][kMean],",
          "fmaf(own, to_float(x.v[k]) + affine[i][kMean],", "test_gradients_are_those_of_the_two_ops",
          {"name": "few channels", **HALF}, "sm90_conv_wide_kernel"),
    Fault("the ReLU's mask is that of the gradient", SUMS, "masked<scalar_t>(v[k], z, relu)",
          "masked<scalar_t>(v[k], v[k], relu)", "test_gradients_are_those_of_the_two_ops", {"name": "few channels", **HALF},
          "sm90_conv_wide_kernel"),
    Fault("the gradient passes where z rounds to 0", SUMS, "masked<scalar_t>(v[k], z, relu)", "masked<float>(v[k], z, relu)",
          "test_gradients_are_those_of_the_two_ops", {"name": "few channels", **HALF}, "sm90_conv_wide_kernel"),
    Fault("sums of gradients that are not yet rounded", SUMS, "const float own = to_float(stored.v[k]);",
          "const float own = dz[k];", "test_sums_are_of_what_is_stored", {"dtype": "torch.bfloat16"}, "sm90_conv_wide_kernel"),
    Fault("gradients beyond the edges are in the sums", FINISH, "inside[i] = vote(place >= 0)", "inside[i] = vote(true)",
          "test_gradients_are_those_of_the_two_ops", {"name": "few channels", **HALF}, "sm90_conv_wide_kernel"),
    Fault("of a quad's columns all look at the first one's place", FINISH, "now.inside[pair] >> 4 * (lane % 4)",
          "now.inside[pair]", "test_gradients_are_those_of_the_two_ops", {"name": "few channels", **HALF},
          "sm90_conv_wide_kernel"),
    Fault("the window is not turned", WIDE, "p.turned ? p.taps - 1 - tap - i", "false ? 0",
          "test_gradients_are_those_of_the_two_ops", {"name": "few channels", **HALF}),
    Fault("the last part of the gradients is not merged", WIDE, "launch_bn_backward_merge(norm, stream)",
          "[&] { auto fewer = norm; --fewer.geometry.splits; return launch_bn_backward_merge(fewer, stream); }()",
          "test_gradients_are_those_of_the_two_ops", {"name": "one row, one column", **HALF}),
    Fault("values beside a run are left to weights of zero", FEW, "two &= cut.last", "two &= ~0u",
          "test_what_is_not_finite_stands_where_it_stands_in_torch", {"name": "stem", **HALF}),
    Fault("the value that aligns a run is left to a weight of zero", FEW, "two &= cut.first", "two &= ~0u",
          "test_what_is_not_finite_stands_where_it_stands_in_torch", {"name": "stem", **HALF}),
    Fault("rows of x are not waited for", FEW, "wait_for_copies<0>();", "",
          "test_forward_is_exact_on_small_integers", {"name": "stem", **HALF}),
    Fault("no barrier behind the rows of x", FEW, "wait_for_copies<0>();\n  __syncthreads();", "wait_for_copies<0>();",
          "test_forward_is_exact_on_small_integers", {"name": "stem, several parts of a block", **HALF}),
    Fault("the lines of a part of the columns follow one another", FEW_ROWS, "p.column_parts == 1 ? pixel", "true ? pixel",
          "test_forward_is_exact_on_small_integers", {"name": "rows and columns in parts", **HALF}, "conv_kernel"),
    Fault("pixels beyond a part are left to gradients of zero", FEW_BACKWARD, "if (left < 16)", "if (false)",
          "test_what_is_not_finite_stands_where_it_stands_in_torch", {"name": "for small images, odd", **HALF}),
    Fault("a tile is read while it is being copied", FEW_BACKWARD, "wait_for_copies<kRing - 2>();", "wait_for_copies<kRing>();",
          "test_gradient_is_exact_on_small_integers", {"name": "stem", **HALF}),
    Fault("a tile is overwritten while it is read", FEW_BACKWARD, "next = tile + kRing - 1;",
          "next = tile + kRing;",
          "test_gradient_is_exact_on_small_integers", {"name": "a ring that goes round", **HALF}),
    Fault("rows of x are overwritten while they are read", FEW_BACKWARD,
          "__syncthreads();  // the part before is done with", "",
          "test_gradient_is_exact_on_small_integers", {"name": "two parts of a block", **HALF}),
    Fault("the last share is not merged", FEW_BACKWARD, "share < p.shares; share", "share < p.shares - 1; share",
          "test_gradient_is_exact_on_small_integers", {"name": "stem", **HALF}),
    Fault("a warp's own row stands for the one below its share", POOLED, "handed_by(thread_now(strip) - 32)",
          "handed_by(thread_now(strip))", "test_pooling_is_exact_on_small_integers", {"name": "a share within a unit", **HALF}),
    Fault("the column left of a unit is forgotten", POOLED, "if (unit > 0)", "if (false)",
          "test_pooling_is_exact_on_small_integers", {"name": "odd sizes, channels to spare", **HALF}),
    Fault("the row above a strip is forgotten", POOLED, "if (strip.above) {", "if (false) {",
          "test_pooling_is_exact_on_small_integers", {"name": "a share within a unit", **HALF}),
    Fault("a row below the image is pooled", POOLED, "has_lower ? finished<scalar_t>(acc[k / 2], 1, k % 2) : Eight{}",
          "finished<scalar_t>(acc[k / 2], 1, k % 2)",
          "test_pooling_is_exact_on_small_integers", {"name": "odd sizes, channels to spare", **HALF}),
    Fault("columns are read before all are there", POOLED, "  __syncthreads();\n  pool_edges(p, s);", "  pool_edges(p, s);",
          "test_pooling_is_exact_on_small_integers", {"name": "odd sizes, channels to spare", **HALF}),
    *(Fault(*fault) for fault in _cluster_faults.FAULTS),
]  # fmt: skip
TRITON = [
    *(Fault(*fault) for fault in _int8_faults.FAULTS),
    Fault("offsets of 32 bits", "device.py", "numel <= 2**30", "numel <= 2**33",
          "test_offsets_of_64_bits", {"monkeypatch": None}),
    Fault("ReLU that loses NaN", "device.py", "tl.where(v <= 0, 0.0, v)", "tl.where(v > 0, v, 0.0)",
          "test_special_values_add_act", {}),
    Fault("no mask on the tail of the statistics", "batch_norm.py", "delta = tl.where(valid, d - mean, 0.0)",
          "delta = d - mean", "test_statistics_far_from_zero", {"layout": "torch.channels_last", "few_programs": None}),
    Fault("the last partial is not merged", "batch_norm.py",
          "m2 = tl.load(partial_m2_ptr + partial, mask=p < programs,",
          "m2 = tl.load(partial_m2_ptr + partial, mask=p < programs - 1,",
          "test_statistics_far_from_zero", {"layout": "torch.channels_last", "few_programs": None}),
    Fault("no border in pooling", "bn_act_maxpool.py", "inside = valid & (y >= 0) & (y < height) & (x >= 0) & (x < width)",
          "inside = valid & (y >= 0) & (y < height) & (x < width)", "test_pooling_finds_the_positions_that_torch_finds",
          {"act": "relu"}),
    Fault("a mask that loses NaN", "relu_mask.py", "passes = (y <= 0) == 0", "passes = y > 0",
          "test_the_mask_is_that_of_the_output",
          {"shape": [3, 24, 4, 6], "layout": "torch.channels_last", "few_programs": None}),
    Fault("the second part of the gradient is dropped", "bn_add_bn_act.py",
          " + tl.load(grad_y2_ptr + offset, mask=valid, other=0.0).to(tl.float32)", "",
          "test_two_batch_norms", {"dtype": FP32, "layout": "torch.channels_last", "few_programs": None}),
    Fault("every group reads the first one's channels", "conv_bn_act.py", "pixel, group * C_IN, n", "pixel, 0, n",
          "test_conv_act", {"dtype": FP32, "convolution": [3, 2, 1, 1, 12, 18, 3]}),
    Fault("the shortcut's stride is forgotten", JOINED, "out_height, out_width, shortcut_stride_h, shortcut_stride_w,",
          "out_height, out_width, 1, 1,", "test_any_end_of_a_block", {"dtype": FP32, "ends": [1, 1, 32, 1, 48, 33, 2]}),
    Fault("the shortcut's bias is left out", JOINED, " + load_parameter(shortcut_bias_ptr, n, n_valid, 0.0)", "",
          "test_any_end_of_a_block", {"dtype": FP32, "ends": [1, 1, 24, 1, 17, 40, 1]}),
    Fault("no mask on the tail of the channels", "conv_bn_act.py", "if FLAT or C_IN % BLOCK_K != 0:", "if FLAT:",
          "test_no_channel_beyond_the_shortcuts_is_read", {}),
    Fault("a later group skips the shortcut's first channels", JOINED, "shortcut_ptr, shortcut_weight_ptr, pixel, 0, n",
          "shortcut_ptr, shortcut_weight_ptr, pixel, group, n",
          "test_any_end_of_a_block", {"dtype": FP32, "ends": [3, 1, 36, 3, 18, 8, 2]}),
    Fault("a program does no more than its first tile", "pointwise.py", "tl.program_id(0) + i * tl.num_programs(0)",
          "tl.program_id(0)", "test_any_size", {"dtype": FP32, "channels": [24, 40]}),
    Fault("the depth's end is left out", "pointwise.py", "range(0, C_IN, BLOCK_K)", "range(0, C_IN - BLOCK_K + 1, BLOCK_K)",
          "test_any_size", {"dtype": FP32, "channels": [24, 40]}),
    Fault("an address that is not aligned", "../layout.py", "if t.data_ptr() % ALIGNMENT else t", "if False else t",
          "test_memory_around_is_neither_read_nor_written", {}),
    Fault("descriptors on any device", "configs.py", "capability=90, persistent", "capability=80, persistent",
          "test_it_is_chosen_where_descriptors_can_describe_the_call", {"monkeypatch": None}),
    Fault("operands are cut off to TF32", "device.py", "bits = (x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000",
          "bits = x.to(tl.int32, bitcast=True) & -0x2000", "test_both_products_at_the_end_of_a_block", {}),
    Fault("a NaN carries into a zero", "device.py", "tl.where(x == x, bits.to(tl.float32, bitcast=True), float(\"nan\"))",
          "bits.to(tl.float32, bitcast=True)", "test_nan_and_infinity_stay", {"config": "tiles"}),
    Fault("the last band has as many rows as the others", "device.py", "tl.minimum(tiles_m - first, GROUP_M)", "GROUP_M",
          "test_any_size", {"dtype": FP32, "channels": [24, 40]}),
]  # fmt: skip


def apply(fault: Fault, file: Path) -> None:
    text = file.read_text()
    assert text.count(fault.right) == 1, f"{fault.mistake}: {text.count(fault.right)} places in {fault.file} to plant it"
    file.write_text(text.replace(fault.right, fault.wrong))


def faulty_library(fault: Fault, folder: Path) -> tuple[tuple, tuple]:
    """A kernel of faulty sources, and the build edge of a library with it; the other objects are those of the sound one."""
    recipes = _cuda_on_cpu.tools()[1]
    shutil.copytree(recipes.CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cpu", "*.py", "__pycache__"))
    apply(fault, folder / "csrc" / fault.file)
    name, kernel = folder.name, fault.kernel or Path(fault.file).stem
    objects = [path for path in _cuda_on_cpu.load() if path.stem != kernel]
    compiled = (f"{name}.o", folder / "csrc" / "cuda" / f"{kernel}.cu", [f"-I{folder / 'csrc'}"])
    return compiled, (f"{name}.so", "link", [f"{name}.o", *objects], ["-ldl", "-lubsan"])  # torch's is there: _faults.py


def caught(tasks: list, folder: Path) -> list[str]:
    """What the named tests said of the faults."""
    file = folder / "tasks.json"
    file.write_text(json.dumps(tasks))
    interpret = {"TRITON_INTERPRET": "1"} if tasks[0][0] == "triton" else {}
    paths = os.pathsep.join(map(str, [ROOT, ROOT / "tests"])) if tasks[0][0] == "cuda" else str(ROOT / "tests")
    environment = {**os.environ, **interpret, "PYTHONPATH": paths}
    script = Path(__file__).with_name("_faults.py")
    subprocess.run([sys.executable, script, file], env=environment, cwd=folder, check=True, capture_output=True)
    return json.loads(file.read_text())


def assert_all_caught(faults: list[Fault], said: list[str]) -> None:
    """A failed assertion, threads that wait for ever, or a signal (a misaligned or wild access): no other error counts."""
    words = dict(zip((fault.mistake for fault in faults), said, strict=True))
    assert not {mistake: word for mistake, word in words.items() if not word.startswith(("AssertionError", "device", "signal"))}


def first_of_each_kernel(faults: list[Fault], most: int = 2) -> list[Fault]:
    by_kernel: dict[str, list[Fault]] = {}
    for fault in faults:
        by_kernel.setdefault(fault.kernel or Path(fault.file).stem, []).append(fault)
    return [fault for found in by_kernel.values() for fault in found[:most]]


def of_cuda(room: Path, faults: list[Fault]) -> list[str]:
    """What the tests say of faults in CUDA kernels."""
    _cuda_on_cpu.load()
    toolchain, recipes = _cuda_on_cpu.tools()
    rules, kernels, edges, tasks = dict(_cuda_on_cpu.rules()), [], [], []
    rules["cxx"] = rules["cxx"].replace(toolchain.quoted([f"-I{recipes.CSRC}"]), "")  # each copy has headers of its own
    for index, fault in enumerate(faults):
        folder = room / f"fault{index}"
        folder.mkdir()
        kernel, library = faulty_library(fault, folder)
        kernels.append(kernel)
        edges.append(library)
        tasks.append(["cuda", str(room / library[0]), fault.test, fault.arguments])
    toolchain.run_ninja(room, rules, [*_cuda_on_cpu.kernel_edges(room, kernels, ["-O0"]), *edges])
    return caught(tasks, room)


def package(folder: Path) -> Path:
    """A copy of the package to plant a fault in, with the native library beside it."""
    shutil.copytree(ROOT / "fastres", folder / "fastres", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder / "fastres"


def of_triton(room: Path, faults: list[Fault]) -> list[str]:
    pytest.importorskip("triton")
    tasks = []
    for index, fault in enumerate(faults):
        folder = room / f"fault{index}"
        apply(fault, package(folder) / "kernels" / "triton" / fault.file)
        tasks.append(["triton", str(folder), fault.test, fault.arguments])
    return caught(tasks, room)


def of_python(room: Path, faults: list[Fault]) -> list[str]:
    """Those of Python, which run with the native library as it is."""
    tasks = []
    for index, fault in enumerate(faults):
        copy = package(room / f"fault{index}")
        for library in (ROOT / "fastres").glob("*.so"):
            (copy / library.name).symlink_to(library)
        apply(fault, copy / fault.file)
        tasks.append(["plain", str(copy.parent), fault.test, fault.arguments])
    return caught(tasks, room)


def of_cpp(room: Path, faults: list[Fault]) -> list[str]:
    """One kernel from faulty sources, for this machine's level; the other objects are those of the build in place."""
    toolchain, recipes = _cuda_on_cpu.tools()
    sound, cxx = recipes.WORK / "cpu", toolchain.find_cxx()
    if not (sound / "module.o").is_file():
        recipes.build_cpu({"built": [], "kernels": {}}, explicit=True)
    capability = torch.backends.cpu.get_cpu_capability()
    level = 4 if "AVX512" in capability else 3 if "AVX2" in capability else 1
    edges, tasks = [], []
    for index, fault in enumerate(faults):
        folder = room / f"fault{index}"
        copy, kernel = package(folder), fault.kernel or Path(fault.file).stem
        shutil.copytree(recipes.CSRC, folder / "csrc", ignore=shutil.ignore_patterns("cuda", "*.py", "__pycache__"))
        apply(fault, folder / "csrc" / fault.file)
        emulated = shutil.copy(TILES, folder / "csrc/cpu/tiles.h") if "amx" in kernel else None
        faulty = f"fault{index}.{kernel}.o"
        flags = [f"-DFASTRES_CPU_LEVEL={level}", *recipes.LEVELS[level], f"-I{folder / 'csrc'}", "-O1"]
        edges.append((faulty, "cxx", [folder / "csrc" / "cpu" / f"{kernel}.cpp"], flags))
        objects = sorted(sound.glob("*.o"), key=lambda path: path.stem.rpartition(".")[2] if "." in path.stem else "")
        objects = [faulty if path.name == f"{kernel}.{level}.o" else path for path in objects]
        objects = [path for path in objects if emulated is None or path != sound / "conv_amx_kernel.1.o"]
        link = [f"-L{toolchain.find_torch()['root']}/lib", "-ltorch_cpu"]
        edges.append((copy / recipes.PRODUCTS["cpu"], "link", objects, link))
        tasks.append(["plain", str(folder), fault.test, fault.arguments])
    rules = recipes.cxx_rules(cxx)
    rules["cxx"] = rules["cxx"].replace(toolchain.quoted([f"-I{recipes.CSRC}"]), "")
    toolchain.run_ninja(room, rules, edges)
    return caught(tasks, room)


def test_faults_in_cuda_kernels_are_caught(tmp_path) -> None:
    faults = first_of_each_kernel(CUDA)
    assert_all_caught(faults, of_cuda(tmp_path, faults))


def test_faults_in_triton_kernels_are_caught(tmp_path) -> None:
    faults = first_of_each_kernel(TRITON)
    assert_all_caught(faults, of_triton(tmp_path, faults))
