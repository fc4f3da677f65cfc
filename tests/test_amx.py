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
    "test_int8.py::test_steps_compute_what_their_integers_say test_int8.py::test_the_same_for_any_number_of_threads "
    "test_conv_amx.py::test_outputs_and_input_gradients_are_exact_on_small_integers[seeds0]"
)
GRADIENT = "test_conv_amx.py::test_weight_gradients_are_exact_on_small_integers[seeds0]"


def test_the_emulated_registers_give_right_results_and_mistakes_are_caught(tmp_path):
    if native.why_not_cpu() or not native.cpu_features()["bf16_dot"]:
        pytest.skip("the kernel's other instructions need a processor with AVX-512 BF16")
    sound = [
        faults.Fault("none", f"cpu/{kernel}.cpp", "namespace {\n", "namespace {\n\n", tests, {}, kernel)
        for kernel, tests in (("conv_amx_kernel", SOUND), ("conv_backward_weight_amx_kernel", GRADIENT))
    ]
    planted = _plain_faults.AMX[::2]  # the scoreboard plants them all
    said = faults.of_cpp(tmp_path, [*sound, *planted])
    assert said[: len(sound)] == ["passed"] * len(sound)
    faults.assert_all_caught(planted, said[len(sound) :])
