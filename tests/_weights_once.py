"""A fixture for modules of tests that freeze the same networks again and again to 8 bits."""

import hashlib

import pytest
import torch

from fastres.frozen import int8

FOUND: dict[tuple, tuple] = {}


@pytest.fixture(scope="module", autouse=True)
def weights_once():
    """Equal weights are quantised once: seventeen scales are tried for each, most of the time of freezing a large network."""
    right = int8.quantized_weight

    def quantized_weight(weight):
        values = weight.detach().contiguous()
        key = weight.shape, weight.dtype, hashlib.sha256(values.view(torch.uint8).numpy()).digest()
        if key not in FOUND:
            FOUND[key] = right(weight)
        return tuple(t.clone() for t in FOUND[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(int8, "quantized_weight", quantized_weight)
        yield
