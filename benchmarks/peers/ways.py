"""The ways to run a network that are compared, and how each is made ready.

Every way gets the same float32 network and, at each call, the same contiguous float32 images: converting them is part of its
time. Its maker runs in the way's own process and returns the call and its first result.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastres
from fastres import terminal
from fastres.errors import UnsupportedError
from fastres.experiments import rivals
from fastres.experiments.rivals import Rival

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
FREEZE, OPTIMIZE = "fastres.freeze", "fastres.optimize"
OWN = (FREEZE, OPTIMIZE)  # the others are compared with the first of these that was timed
NO_INT8 = {"int8": "PyTorch quantises whole networks with another package (torchao)"}
NO_BF16 = {"bf16": "ONNX Runtime has no bfloat16 convolution for the CPU (1.32: no implementation for Conv)"}


class Task(NamedTuple):
    """What a maker is given."""

    model: nn.Module
    x: Tensor
    dtype: torch.dtype
    threads: int
    calibration: list[Tensor]  # batches like x to quantise with; empty for other dtypes


Made = tuple[Callable[[], Any], Any]


class Way(NamedTuple):
    """One way: ``maker`` is ``module:function`` of a function from a Task to the call and its first result.

    Args:
        packages: modules it imports; import is no part of the time until ready.
        pinned: its threads are OpenMP's and pinned. Of other pools each thread would inherit the one core that the
            main thread is held to.
        refuses: why it is not tried, by dtype.
    """

    name: str
    maker: str
    packages: tuple[str, ...] = ()
    pinned: bool = True
    refuses: Mapping[str, str] = {}


WAYS = (
    Way(FREEZE, f"{__name__}:freeze"),
    Way(OPTIMIZE, f"{__name__}:optimize", refuses={"int8": "fastres.optimize keeps the model's dtype"}),
    Way("eager", f"{__name__}:eager", refuses=NO_INT8),
    Way("eager channels_last", f"{__name__}:channels_last", refuses=NO_INT8),
    Way("torch.compile", f"{__name__}:compiled", ("torch._inductor.compile_fx",), refuses=NO_INT8),
    Way("torch.compile + freezing", f"{__name__}:freezing", ("torch._inductor.compile_fx",), refuses=NO_INT8),
    Way("ONNX Runtime", f"{__name__}:onnx_runtime", ("onnx", "onnxruntime"), pinned=False, refuses=NO_BF16),
    Way("OpenVINO", f"{__name__}:openvino", ("openvino",), pinned=False),
)


def freeze(task: Task) -> Made:
    quantised = task.dtype == torch.int8
    options: dict[str, Any] = {"quantize": task.calibration} if quantised else {"dtype": task.dtype}
    frozen = fastres.freeze(task.model, task.x, **options)
    return _first(lambda: frozen(task.x))


def optimize(task: Task) -> Made:
    return _pytorch(rivals.OPTIMIZED, task)


def eager(task: Task) -> Made:
    return _pytorch(rivals.EAGER, task)


def channels_last(task: Task) -> Made:
    return _pytorch(rivals.CHANNELS_LAST, task)


def compiled(task: Task) -> Made:
    return _pytorch(rivals.COMPILE, task)


def freezing(task: Task) -> Made:
    return _pytorch(rivals.FREEZING, task)


def _pytorch(rival: Rival, task: Task) -> Made:
    layout = torch.channels_last if rival.layout == "channels_last" else torch.contiguous_format
    with rival.settings():
        run, _ = rival.prepare(task.model.to(task.dtype), task.x.to(task.dtype))
        return _first(lambda: run(task.x.to(task.dtype, memory_format=layout)))


def _first(call: Callable[[], Any]) -> Made:
    return call, call()


def onnx_runtime(task: Task) -> Made:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = task.threads, 1
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.onnx")
        torch.onnx.export(task.model, (task.x,), str(path), input_names=["x"], opset_version=17, dynamo=False)
        if task.dtype == torch.int8:
            path = _quantised_onnx(path, task.calibration)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"x": task.x.numpy()}
    return _first(lambda: session.run(None, feed)[0])


def _quantised_onnx(path: Path, batches: list[Tensor]) -> Path:
    """The model with unsigned activations and a signed scale for each output channel of a weight."""
    from onnxruntime import quantization
    from onnxruntime.quantization import CalibrationDataReader, QuantType

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches: Iterator[Tensor] = iter(batches)

        def get_next(self) -> dict[str, Any] | None:
            batch = next(self.batches, None)
            return None if batch is None else {"x": batch.numpy()}

    target = path.with_name("quantised.onnx")
    types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
    quantization.quantize_static(path, target, Reader(), per_channel=True, **types)
    return target


def openvino(task: Task) -> Made:
    import openvino as ov

    model = ov.convert_model(task.model, example_input=task.x, input=list(task.x.shape))
    if task.dtype == torch.int8:
        (nncf,) = terminal.need("OpenVINO in int8", "nncf", extra="bench")
        model = nncf.quantize(model, nncf.Dataset([batch.numpy() for batch in task.calibration]))
    precision = "bf16" if task.dtype == torch.bfloat16 else "f32"
    options = {"INFERENCE_PRECISION_HINT": precision, "INFERENCE_NUM_THREADS": task.threads}
    compiled = ov.Core().compile_model(model, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
    runs = compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
    if runs != precision:
        raise UnsupportedError(f"OpenVINO would run {runs} on this processor where {precision} was asked for")
    request, images = compiled.create_infer_request(), task.x.numpy()
    request.set_input_tensor(ov.Tensor(images, shared_memory=True))

    def call(images: Any = images) -> Any:  # which the request reads, but does not keep alive
        request.infer()
        return request.get_output_tensor().data

    return _first(call)
