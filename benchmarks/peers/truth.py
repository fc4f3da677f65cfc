"""The process that computes what results are held against: logits in float64, and eager PyTorch's own at each dtype.

Writes them to the file its order names, and answers with an empty object.
"""

import json
import sys

import torch
from torch import Tensor

from benchmarks.peers.ways import DTYPES
from benchmarks.peers.worker import answers
from fastres import budget
from fastres.experiments.subject import laid_out, load


def main() -> None:
    channel, order = answers(), json.loads(sys.argv[1])
    with torch.no_grad():
        torch.save(references(order), order["truth"])
    print(json.dumps({}), file=channel)


def references(order: dict) -> dict[str, Tensor]:
    """The truth, and by dtype the worse one of eager PyTorch's results in its two memory formats."""
    place = {"batch": order["batch"], "size": order["size"], "device": "cpu"}
    exact = load(order["model"], **place)
    truth = exact.model.double()(exact.x.double())
    found = {"truth": truth}
    for dtype in ("fp32", "bf16"):
        model = load(order["model"], **place).model.to(DTYPES[dtype])
        results = []
        for layout in (torch.contiguous_format, torch.channels_last):
            x = exact.x.to(DTYPES[dtype], memory_format=layout)
            results.append(laid_out(model, layout)(x).double())
        found[dtype] = max(results, key=lambda result: budget.error(result, truth))
    return found


if __name__ == "__main__":
    main()
