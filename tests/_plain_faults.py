"""Mistakes in Python and C++ sources; ``test`` names the tests of this folder that catch each."""

# ruff: noqa: E501

from test_planted_faults import Fault

PYTHON = [
    Fault("a fold survives a change of its parameters", "ops/_fold.py",
          "parameter._version != source[1] or parameter.data_ptr() != source[2]", "parameter.data_ptr() != source[2]",
          "test_nn.py::test_folds_follow_the_parameters", {}),
    Fault("a biased running variance", "ops/_running.py",
          "    else:  # the context would cost a sixth of the update\n        _update(running_mean, running_var, mean, var, momentum,"
          " values / (values - 1))",
          "    else:\n        _update(running_mean, running_var, mean, var, momentum, 1.0)",
          "test_functional.py::test_a_function_equals_what_its_docstring_says", {}),
    Fault("channels_last is lost", "kernels/layout.py", "not x.is_contiguous() and x.stride(1) == 1", "x.stride(1) == 0",
          "test_nn.py::test_channels_last_goes_through", {}),
    Fault("an eps of any value", "ops/_check.py", "if not 0 < value < float(\"inf\"):", "if False:",
          "test_functional.py::test_a_wrong_argument_is_named_and_nothing_is_changed", {}),
    Fault("a cache that others may write is read", "tune.py", "if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):", "if False:",
          "test_tune.py::test_a_foreign_cache_is_ignored", {}),
    Fault("a cache is written where it stands", "tune.py", "os.replace(temporary, path)", "path.write_text(text)",
          "test_tune.py::test_readers_never_see_a_part test_tune.py::test_the_cache_is_private_and_whole", {}),
    Fault("weights are unpickled", "models/_load.py", "torch.load(file, map_location=\"cpu\", weights_only=True)",
          "torch.load(file, map_location=\"cpu\", weights_only=False)", "test_weights.py::test_a_plain_pickle_is_refused", {}),
    Fault("momentum is not resumed", "train/engine.py", "momenta = _part(tensors, \"momentum.\")", "momenta: dict = {}",
          "test_train.py::test_stopped_at_every_step_and_resumed_it_ends_with_the_same_bits", {}),
    Fault("a hook sees a part of a gradient", "nn/_stage.py", "if _sequence.must_be_called(block):", "if False:",
          "test_stage.py::test_whoever_sees_a_value_sees_its_whole_gradient", {}),
    Fault("a convolution sees a part of a gradient", "nn/_stage.py", "is nn.Conv2d and _fused.why_not(module) is None", "is not None",
          "test_stage.py::test_whoever_sees_a_value_sees_its_whole_gradient", {}),
    Fault("a forward replaced on the class is passed by", "nn/_fused.py", "if kind.forward is not _FUSIBLE[kind]:", "if False:",
          "test_host.py::test_a_forward_replaced_on_the_class_is_called", {}),
    Fault("a plan survives a change of its network", "optimize/whole.py", "ids == self.ids and self.now() == self.marks",
          "True", "test_reliability.py::test_nothing_fails[R10]", {}),
    Fault("integers hide what is not finite", "frozen/device_int8.py", "mul_(0.0).float()", "zero_().float()",
          "test_frozen_int8.py::test_values_that_are_not_finite_give_nan_in_their_image_alone", {}),
    Fault("a kernel of integers that is not proven", "frozen/device_int8.py", "if None not in reasons:", "if False:",
          "test_frozen_int8.py::test_without_a_proven_kernel_it_is_refused_on_a_gpu", {}),
]  # fmt: skip
CPP = [
    Fault("ReLU as a maximum", "common/epilogue.h", "v < T{} ? T{} : v", "v > T{} ? v : T{}",
          "test_reliability.py::test_nothing_fails[R5]", {}, "add_act_kernel"),
    Fault("a gradient passes at zero", "common/epilogue.h", "y <= zero_up_to", "y < zero_up_to",
          "test_reliability.py::test_nothing_fails[R2]", {}, "add_act_kernel"),
    Fault("the residual is taken off", "cpu/add_act_kernel.cpp", "v += load<acc_t, L>(residual", "v -= load<acc_t, L>(residual",
          "test_reliability.py::test_nothing_fails[R4]", {}),
    Fault("the mean is folded into the bias", "common/epilogue.h", "(x - mean) * scale + bias", "x * scale + (bias - mean * scale)",
          "test_cpu_native.py::test_a_mean_far_from_zero_costs_no_digits", {}, "bn_act_kernel"),
    Fault("the mean gradient is not taken off", "common/epilogue.h", "(dz - mean_dz - (x - mean) * slope)",
          "(dz - (x - mean) * slope)", "test_reliability.py::test_nothing_fails[R2]", {}, "bn_act_kernel"),
    Fault("the second part of the gradient is dropped", "cpu/bn_kernel.h",
          "if constexpr (kTwo) grad_y += read<acc_t, L>(static_cast<const scalar_t*>(args.grad_y2) + offset, lanes);", "",
          "test_stage.py::test_a_step_has_the_bits_of_blocks_one_by_one", {}, "bn_add_act_kernel"),
    Fault("the last row is in no slice", "cpu/bn_kernel.h", "row_end = rows * (slice + 1) / args.slices;",
          "row_end = rows * (slice + 1) / args.slices - (slice + 1 == args.slices);",
          "test_reliability.py::test_nothing_fails[R1]", {}, "bn_act_kernel"),
]  # fmt: skip
