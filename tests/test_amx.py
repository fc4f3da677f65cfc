"""The convolutions in tile registers, on any processor with AVX-512: the registers are emulated (amx_on_cpu/tiles.h)."""

import _plain_faults
import pytest
import test_planted_faults as faults

from fastres.kernels import native

pytestmark = pytest.mark.compile
SOUND = (
    "test_conv_cpu.py::test_any_geometry test_conv_cpu.py::test_one_row_of_taps_over_few_channels "
    "test_conv_cpu.py::test_windows_that_meet_no_pixel_give_the_bias "
    "test_conv_cpu.py::test_the_same_bits_however_pixels_and_channels_are_shared_out "
    "test_int8.py::test_steps_compute_what_their_integers_say test_int8.py::test_the_same_for_any_number_of_threads"
)


def test_the_emulated_registers_give_right_results_and_mistakes_are_caught(tmp_path):
    if native.why_not_cpu() or not native.cpu_features()["bf16_dot"]:
        pytest.skip("the kernel's other instructions need a processor with AVX-512 BF16")
    sound = faults.Fault("none", "cpu/conv_amx_kernel.cpp", "namespace {\n", "namespace {\n\n", SOUND, {}, "conv_amx_kernel")
    said = faults.of_cpp(tmp_path, [sound, *_plain_faults.AMX])
    assert said[0] == "passed"
    faults.assert_all_caught(_plain_faults.AMX, said[1:])
