"""Compile every Triton kernel x configuration x dtype ahead of time, with no GPU, and read the machine code.

The ops' own host code runs on meta tensors of ResNet-50 sizes with ``launch`` replaced by a recorder, so what is
compiled is what a device would be asked to run.
"""

import concurrent.futures
import functools
import importlib
import itertools
import multiprocessing
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import _compile_report
import pytest
import torch

triton = pytest.importorskip("triton")
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

pytestmark = [
    pytest.mark.compile,
]

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # per block, by compute capability
DTYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64", torch.uint8: "u8"}
DTYPES |= {torch.int8: "i8", torch.int32: "i32"}
VARIANTS = ("KH", "CHANNELS_LAST", "POINTWISE", "FLAT", "DENSE_SHORTCUT", "MEAN", "PADDED", "stride_channel")
MMA = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ROOM = "fastres.kernels.triton"
# Bytes a thread may spill: none with the pinned Triton; newer ptxas gives up to four registers for a resident block.
SPILL = 0 if triton.__version__.startswith("3.6.") else 16


class Launch(NamedTuple):
    """One specialisation of one kernel, as the just-in-time compiler would see it; plain data, to cross processes."""

    module: str
    kernel: str
    dtype: str
    config: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    options: tuple[tuple[str, int], ...]


def specialize(kernel, args: tuple, keywords: dict, dtype: str, config: object) -> Launch:
    names = kernel.arg_names
    options = {name: value for name, value in keywords.items() if name not in names}
    values = dict(zip(names, args, strict=False)) | {k: v for k, v in keywords.items() if k in names}
    signature, constants, divisible = [], [], []
    for position, parameter in enumerate(kernel.params):
        value, kind = values[parameter.name], None
        if isinstance(value, TensorDescriptor):
            kind, aligned = f"tensordesc<{DTYPES[value.base.dtype]}{value.block_shape}>", False
        elif isinstance(value, torch.Tensor):
            kind = f"*{DTYPES[value.dtype]}"
            aligned = value.data_ptr() % 16 == 0
        elif isinstance(value, float) and not parameter.is_constexpr:
            kind, aligned = "fp32", False
        elif isinstance(value, int) and value != 1 and not parameter.is_constexpr:
            kind, aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0
        signature.append((parameter.name, kind or "constexpr"))
        if kind is None:
            constants.append((parameter.name, value))
        elif aligned:
            divisible.append(position)
    return Launch(
        kernel.fn.__module__, kernel.fn.__name__, dtype, str(config),
        tuple(signature), tuple(constants), tuple(divisible), tuple(options.items()),
    )  # fmt: skip


def image(dtype: torch.dtype, channels_last: bool, n: int = 256, c: int = 64, hw: int = 56) -> torch.Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(n, c, hw, hw, dtype=dtype, device="meta").to(memory_format=layout)


def run_elementwise(room, dtype: torch.dtype):
    x = image(dtype, False)
    for config in room["configs"].FLAT:
        yield config, lambda config=config: room["add_act"].add_act(x, x, "relu", config)
        yield config, lambda config=config: room["add_act"].add_act_backward(x, x, "relu", config)


def run_batch_norm(room, dtype: torch.dtype):
    parameter = torch.empty(64, device="meta")
    bn = room["bn_act"]
    for channels_last, table in ((True, room["configs"].CHANNELS_LAST), (False, room["configs"].CONTIGUOUS)):
        x = image(dtype, channels_last)
        bits = room["relu_mask"].empty(x, "relu")
        for config in table:
            yield config, lambda x=x, config=config: bn.statistics(x, config)
            for residual, second, training in ((None, None, True), (x, None, False), (x, x, True)):
                mask = None if residual is None else bits
                yield config, lambda x=x, r=residual, m=mask, config=config: bn.apply(
                    x, r, *[parameter] * 4, 1e-5, "relu", config, m
                )
                yield config, lambda x=x, s=second, m=mask, t=training, config=config: bn.backward(
                    x, s, m, x, *[parameter] * 4, 1e-5, "relu", t, config
                )
            if config != table[0]:  # the kernels of two norms hold more: they are offered in the first tile only
                continue
            norm = [parameter] * 4
            yield config, lambda x=x, bits=bits, config=config, norm=norm: room["bn_add_bn_act"].bn_add_bn_act(
                x, x, *norm, 1e-5, *norm, 1e-5, "relu", config, bits
            )
            for second in (None, x):
                yield config, lambda x=x, s=second, bits=bits, config=config, norm=norm[:3]: room[
                    "bn_add_bn_act"
                ].bn_add_bn_act_backward(
                    x, s, bits, x, x, *norm, 1e-5, *norm, 1e-5, "relu", config
                )
        yield None, lambda x=x, bits=bits: room["relu_mask"].make(x, bits)


def run_pooling(room, dtype: torch.dtype):
    parameter, window = torch.empty(64, device="meta"), ((3, 3), (2, 2), (1, 1))
    pool, configs = room["bn_act_maxpool"], room["configs"]
    for channels_last, table in ((True, configs.POOLED_CHANNELS_LAST), (False, configs.POOLED_CONTIGUOUS)):
        x, y = image(dtype, channels_last, hw=112), image(dtype, channels_last)
        rest = (*[parameter] * 4, 1e-5, "relu")
        for config in table:
            yield config, lambda x=x, config=config, rest=rest: pool.bn_act_maxpool(x, *rest, *window, config)
            for training in (True, False):
                yield config, lambda x=x, y=y, t=training, config=config, rest=rest: pool.bn_act_maxpool_backward(
                    y, x, *rest, t, *window, config
                )


def run_convolution(room, dtype: torch.dtype):
    conv, configs = room["conv_bn_act"], room["configs"]
    bias = torch.empty(256, device="meta")
    x, limits = image(dtype, True, 256, 256, 14), configs.Limits(max(SHARED), 1 << 30)
    for tf32 in (True, False) if dtype == torch.float32 else (False,):
        for config in configs.conv_candidates(x.element_size(), tf32, limits, described=True):
            for k in (1,) if config.persistent else (1, 3):
                weight = torch.empty(256, k * k * 256, dtype=dtype, device="meta")
                geometry = ((k, k), (1, 1), (k // 2, k // 2), (1, 1))
                yield config, lambda w=weight, g=geometry, config=config, tf32=tf32: conv.conv_act(
                    x, w, bias, x, *g, "relu", tf32, config
                )
        for config in configs.conv_candidates(x.element_size(), tf32, limits, few=True):
            yield from few_channels(conv, dtype, config, tf32)


def few_channels(conv, dtype: torch.dtype, config, tf32: bool):
    """A stem, and a convolution in groups of four channels."""
    window = ((7, 7), (2, 2), (3, 3), (1, 1)), ((3, 3), (1, 1), (1, 1), (1, 1))
    stem, weight = image(dtype, True, 256, 3, 224), torch.empty(64, 147, dtype=dtype, device="meta")
    yield config, lambda: conv.conv_act(stem, weight, None, None, *window[0], "relu", tf32, config)
    x, grouped = image(dtype, True, 256, 128, 56), torch.empty(128, 36, dtype=dtype, device="meta")
    yield config, lambda: conv.conv_act(x, grouped, None, None, *window[1], "relu", tf32, config, 32)


# The main convolution's channels, kernel and side, the shortcut's channels and stride: ends of ResNet-50's first blocks, of
# ResNet-18's, and of a network of few channels.
ENDS = ((64, 1, 56, 64, 1), (128, 1, 28, 256, 2), (128, 3, 28, 64, 2))
NARROW_END = (16, 3, 56, 16, 2)


def run_joined(room, dtype: torch.dtype):
    joined, configs = room["conv_bn_add_conv_bn_act"], room["configs"]
    bias, limits = torch.empty(128, device="meta"), configs.Limits(max(SHARED), 1 << 30)
    for tf32, few in itertools.product((True, False) if dtype == torch.float32 else (False,), (False, True)):
        offered = configs.conv_candidates(dtype.itemsize, tf32, limits, few)
        for config, (c, k, side, c2, stride) in itertools.product(offered, (NARROW_END,) if few else ENDS):
            x, shortcut = image(dtype, True, 256, c, side), image(dtype, True, 256, c2, side * stride)
            weights = (torch.empty(128, depth, dtype=dtype, device="meta") for depth in (k * k * c, c2))
            geometry = ((k, k), (1, 1), (k // 2, k // 2), (1, 1), 1)
            main, other = ((w, bias) for w in weights)
            args = (x, *main, *geometry, shortcut, *other, (stride, stride), "relu", tf32, config)
            yield config, lambda args=args: joined.conv_add_conv_act(*args)


def run_integers(room, dtype: torch.dtype):
    """A 1x1, a 3x3 with padding and a residual, a linear layer, whose results are real numbers, a stem of images in words."""
    conv, limits = room["conv_int8"], room["configs"].Limits(max(SHARED), 1 << 30)
    residual = image(dtype, True, 256, 256, 14)
    calls = [(False, 256, 14, 1, (0, 0), None, True), (False, 256, 14, 3, (1, 1), residual, True)]
    calls += [(False, 2048, 1, 1, (0, 0), None, False), (True, 4, 224, 7, (3, 3), None, True)]
    calls += [(True, 4, 230, 7, (0, 0), None, True)]
    for few, channels, side, k, padding, added, integers in calls:
        x, weight = image(dtype, True, 256, channels, side), torch.empty(256, channels, k, k, dtype=dtype, device="meta")
        weight = weight.contiguous(memory_format=torch.channels_last)
        start, scale = torch.empty(256, dtype=torch.int32, device="meta"), torch.empty(256, device="meta")
        stride = (2, 2) if few else (1, 1)
        args = (x, added, weight, start, scale, scale, 0.5, -128, stride, padding, (1, 1), integers)
        for config in conv.offered(limits, few):
            yield config, lambda args=args, config=config: conv.conv_int8(*args, config)


def run_bytes(room, dtype: torch.dtype):
    """Images that are quantised, in both layouts, for a stem and without padding; a stem's pool and a network's last one."""
    images, pools = room["quantize_int8"], room["pool_int8"]
    for channels_last, padding in itertools.product((False, True), ((3, 3), (0, 0))):
        x = image(torch.float32, channels_last, 256, 3, 224)
        yield None, lambda x=x, padding=padding: images.quantize_int8(x, 50.0, 120, 4, padding)
    stem, last = image(dtype, True, 256, 64, 112), image(dtype, True, 256, 2048, 7)
    yield None, lambda: pools.pool_int8(stem, (3, 3), (2, 2), (1, 1), False, None, None)
    yield None, lambda: pools.pool_int8(last, (0, 0), (1, 1), (0, 0), False, 1.5, -20.0)


def collect() -> list[Launch]:
    """Every distinct launch the ops make over all configurations and dtypes."""
    names = ("configs", "add_act", "bn_act", "bn_act_maxpool", "bn_add_bn_act", "relu_mask", "conv_bn_act", "pointwise")
    names += ("conv_bn_add_conv_bn_act", "conv_int8", "quantize_int8", "pool_int8")
    floats = run_elementwise, run_batch_norm, run_pooling, run_convolution, run_joined
    room = {name: importlib.import_module(f"{ROOM}.{name}") for name in names}
    found: dict[Launch, Launch] = {}  # by what the compiler sees of it
    with pytest.MonkeyPatch.context() as patch:
        for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int8):
            for runs in (run_integers, run_bytes) if dtype == torch.int8 else floats:
                for config, call in runs(room, dtype):

                    def record(kernel, grid, like, *args, _dtype=dtype, _config=config, **options) -> None:
                        launch = specialize(kernel, args, options, DTYPES[_dtype], _config)
                        found.setdefault(launch._replace(dtype="", config=""), launch)

                    for name in names[1:]:
                        patch.setattr(room[name], "launch", record)
                    call()
    return list(found.values())


def compile_one(launch: Launch, capability: int) -> dict[str, Any]:
    """Compile one launch for one architecture; what the report needs of the result."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    attributes = {(position,): [["tt.divisibility", 16]] for position in launch.divisible}
    source = ASTSource(kernel, dict(launch.signature), dict(launch.constants), attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(launch.options))
    usage, ptx = resources(compiled.asm["cubin"]), compiled.asm["ptx"]
    constants = dict(launch.constants)
    dot = not {"PRECISION", "INTEGERS"}.isdisjoint(constants)
    return {
        "kernel": launch.kernel,
        "dtype": "tf32" if constants.get("PRECISION") == "tf32" else launch.dtype,
        "config": launch.config,
        "capability": capability,
        "arch": re.search(r"^\.target sm_(\w+)", ptx, re.M)[1],
        "variant": {k: v for k, v in constants.items() if k in VARIANTS},
        "registers": usage["REG"],
        "spilled": usage["STACK"] + usage["LOCAL"],
        "shared": compiled.metadata.shared,
        "mma": sum(ptx.count(name) for name in {MMA[capability], "mma.sync"}) if dot else None,
        "tensor_cores": MMA[capability] in ptx,
        "wgmma": MMA[90] in ptx,
        "copies_in": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.shared\S*\.global", ptx)),
        "copies_out": len(re.findall(r"cp\.async\.bulk\.tensor\.2d\.global\.shared", ptx)),
        "num_stages": dict(launch.options).get("num_stages"),
        "narrow": len(re.findall(r"(?:ld|st)\.global\S*(?<!v2)(?<!v4)\.b16", ptx)),
        "widest": max(access_bytes(ptx)),
        "narrowest": min(access_bytes(ptx)),
        "wide": bool(re.search(r"ld\.global\S*\.v4\.b32|ld\.global\S*\.v2\.b64|cp\.async\.cg\S* .*0x10", ptx)),
    }


def access_bytes(ptx: str) -> list[int]:
    """Bytes of every access to memory, the copies to shared memory among them."""
    plain = re.findall(r"(?:ld|st)\.global[.\w:]*?(?:\.v(\d))?\.b(\d+)", ptx)
    copied = re.findall(r"cp\.async\.c[ag]\S* .*?, (0x[0-9a-f]+)", ptx)
    return [int(count or 1) * int(bits) // 8 for count, bits in plain] + [int(size, 16) for size in copied]


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local memory of a cubin's one kernel, as cuobjdump reports them."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


@functools.cache
def report() -> list[dict[str, Any]]:
    """Every launch compiled for every capability it is offered on, in two processes."""
    tasks = [(launch, capability) for launch in collect() for capability in SHARED if offered(launch, capability)]
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        return list(pool.map(compile_one, *zip(*tasks, strict=True), chunksize=8))


def offered(launch: Launch, capability: int) -> bool:
    """Whether conv_candidates offers a convolution's configuration there; the other kernels' are offered everywhere."""
    if "conv" not in launch.kernel:
        return True
    configs = importlib.import_module(f"{ROOM}.configs")
    if launch.dtype == "i8":
        integers = importlib.import_module(f"{ROOM}.conv_int8")
        legal = integers.offered(configs.Limits(capability, SHARED[capability]), ("FLAT", True) in launch.constants)
        return launch.config in map(str, legal)
    itemsize, tf32 = 4 if launch.dtype == "fp32" else 2, ("PRECISION", "tf32") in launch.constants
    few, described = ("FLAT", True) in launch.constants, "pointwise" in launch.kernel
    legal = configs.conv_candidates(itemsize, tf32, configs.Limits(capability, SHARED[capability]), few, described)
    return launch.config in map(str, legal)


def faults(failed) -> list[tuple]:
    keys = ("kernel", "capability", "dtype", "config", "variant", "registers", "spilled", "shared", "narrow")
    return [tuple(row[key] for key in keys) for row in report() if failed(row)]


def test_every_configuration_is_compiled(capsys) -> None:
    configs = importlib.import_module(f"{ROOM}.configs")
    tables = (configs.FLAT, configs.CHANNELS_LAST, configs.CONTIGUOUS)
    tables += (configs.POOLED_CHANNELS_LAST, configs.POOLED_CONTIGUOUS)
    tables += (configs.CONV_PERSISTENT, configs.CONV_PERSISTENT_TF32)
    tables += (configs.CONV_TENSOR_CORE, configs.CONV_TF32, configs.CONV_IEEE, configs.CONV_FEW_CHANNELS)
    compiled = {(row["config"], row["capability"]) for row in report()}
    assert {(str(config), 90) for table in tables for config in table} <= compiled
    _compile_report.publish("triton", report(), capsys)


# Bytes that are let pass: convolutions in float32 are left to cuDNN where TF32 is allowed, and nobody has asked for them to be
# fast where it is not; the last tile of bn_act is offered to tuning alone.
SPILLS = {("_conv_act_kernel", "fp32"): 8, ("_conv_act_kernel", "tf32"): 8, ("_conv_add_conv_act_kernel", "fp32"): 8,
          ("_conv_add_conv_act_kernel", "tf32"): 160, ("bn_act_kernel", "fp32"): 8,
          # Of sm_100, in one tile of one kind of shortcut.
          ("_conv_add_conv_act_kernel", "fp16"): 8, ("_conv_add_conv_act_kernel", "bf16"): 8}  # fmt: skip


def test_no_spills() -> None:
    assert not faults(lambda row: row["spilled"] > max(SPILL, SPILLS.get((row["kernel"], row["dtype"]), 0)))


def test_shared_memory_fits() -> None:
    assert not faults(lambda row: row["shared"] > SHARED[row["capability"]])


def test_tensor_cores_where_meant() -> None:
    """16-bit and TF32 products on the capability's own instruction; IEEE fp32 on none; 8-bit ones on sm_100 by sm_80's."""
    integers = [row for row in report() if (row["dtype"], row["capability"]) == ("i8", 100) and row["mma"] is not None]
    older = {row["mma"] > 0 and not row["tensor_cores"] for row in integers}
    rows = faults(lambda row: row["mma"] is not None and row["tensor_cores"] != (row["dtype"] != "fp32"))
    assert older == {True} and not [row for row in rows if row[1:3] != (100, "i8")]


def test_wide_memory_accesses() -> None:
    """Activations move 16 bytes at a time, those of one byte too; a merge reads a handful of partials, the statistics a sample
    of 16 values; two bytes of a mask stand for sixteen elements.

    Windows over contiguous planes read every other element; few channels are gathered one by one, and
    images of another layout, or of which a row does not begin at a multiple of 16 bytes, value by value.
    """
    few = {"bn_statistics_kernel": 1, "bn_act_kernel": 1, "bn_add_bn_act_kernel": 1}
    rows = faults(lambda row: not (row["wide"] or row["copies_in"]) or row["narrow"] > few.get(row["kernel"], 0))
    rows = [row for row in rows if not ("maxpool" in row[0] and not row[4]["CHANNELS_LAST"]) and not row[4].get("FLAT")]
    rows = [row for row in rows if not ("quantize" in row[0] and (row[4]["PADDED"] or "stride_channel" in row[4]))]
    assert not [row for row in rows if "merge" not in row[0]]


def test_no_byte_of_a_network_in_integers_moves_alone() -> None:
    """Images are of whole words, so that their convolution reads words."""
    rows = [row for row in report() if row["dtype"] == "i8"]
    assert len({row["kernel"] for row in rows}) == 3
    assert not [row for row in rows if row["narrowest"] < 4]


def test_tensor_descriptors_move_tiles() -> None:
    """Both operands by copies that run ahead, through the whole ring; residual and output by copies too, and no others."""
    rows = [row for row in report() if row["kernel"] == "_conv_pointwise_act_kernel"]
    assert {row["capability"] for row in rows} == {90, 100}
    for row in rows:
        # A copy of each operand in the loop and for each stage before it but one, and the residual's.
        assert row["copies_in"] >= 2 * row["num_stages"] + 1 and row["copies_out"] >= 1, row
    assert not [row for row in report() if row["copies_in"] and row not in rows]
