"""``python -m benchmarks.acceptance.smoke``: the first samples of every op on every backend of this device.

Small enough to run under compute-sanitizer; results are judged elsewhere.
"""

import sys

import torch

from benchmarks import command, harness
from fastres import tuner
from fastres.dispatch import GPU_KERNELS
from fastres.ops import REGISTRY

SAMPLES = 4  # of each op, in both memory formats


def main() -> int:
    command.Parser("acceptance.smoke", "Run the first samples of every op on every backend of this device.").parse_args()
    ran = smoke(harness.device())
    print(f"{ran} calls")
    return 0 if ran else 1


def smoke(place: torch.device) -> int:
    """How many calls ran."""
    ran = 0
    wanted = GPU_KERNELS if place.type == "cuda" else ("cpu", "onednn")
    for op in REGISTRY.values():
        for dtype in (torch.float32, torch.bfloat16):
            for _, args in list(tuner.laid_out_samples(op, place, dtype))[: 2 * SAMPLES]:
                for backend in op.backends:
                    if backend.name in wanted and backend.why_not(*args) is None:
                        backend.load()(*args)
                        ran += 1
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return ran


if __name__ == "__main__":
    sys.exit(command.run(main))
