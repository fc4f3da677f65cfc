"""R4, R5 and R16: integers without tolerance, special values in every slot, the same bits every time."""

# ruff: noqa: E501

import itertools

import torch

import fastres
from fastres import functional
from fastres.ops import REGISTRY
from reliability.board import Tally, scored
from reliability.calls import LAYOUTS, OPS, Call, place
from reliability.parity import backward, forward, tuple_of

SPECIAL = {
    "nan": float("nan"), "inf": float("inf"), "-inf": -float("inf"), "-0": -0.0, "0": 0.0, "subnormal": 1e-40,
    "-subnormal": -1e-40, "max": torch.finfo(torch.float32).max, "-max": -torch.finfo(torch.float32).max,
}  # fmt: skip
# Their gradients are those of PyTorch's convolution, whose sums depend on the number of threads.
BY_PYTORCH = ("conv_bn_act", "conv_bn_act_maxpool", "conv_bn_add_act", "conv_bn_add_conv_bn_act")
FUNCTIONS = ("add_act", "bn_act", "bn_add_act", "bn_add_bn_act", "bn_act_maxpool", *BY_PYTORCH)


def integers(generator: torch.Generator, shape: tuple, most: int = 3) -> torch.Tensor:
    return torch.randint(-most, most + 1, shape, generator=generator).double()


def whole(call_op: str, shape: tuple, act: str, generator: torch.Generator) -> dict:
    """Arguments of a function for which every intermediate is a small whole number: variance 1 - eps with eps 1/2."""
    channels = shape[1]
    filters = 8 if "conv" in call_op else channels
    found = {"x": integers(generator, shape)}
    if "conv" in call_op:
        found |= {
            "conv_weight": integers(generator, (filters, channels, 3, 3), 1),
            "conv_bias": integers(generator, (filters,)),
        }
        found |= {"padding": 1}
    if call_op == "conv_bn_add_conv_bn_act":
        found |= {"shortcut": integers(generator, (shape[0], 4, 2 * shape[2], 2 * shape[3])), "shortcut_stride": 2}
        found |= {"shortcut_conv_weight": integers(generator, (filters, 4, 1, 1), 1), "shortcut_conv_bias": None}
    elif "add" in call_op:
        found["residual"] = integers(generator, (shape[0], filters, *shape[2:]))
    of_shortcut = {"bn_add_bn_act": ("residual_",), "conv_bn_add_conv_bn_act": ("shortcut_",)}.get(call_op, ())
    for prefix in ("", *of_shortcut) if "bn" in call_op else ():
        found |= {
            f"{prefix}running_mean": integers(generator, (filters,)),
            f"{prefix}running_var": torch.full((filters,), 0.5).double(),
        }
        found |= {
            f"{prefix}weight": integers(generator, (filters,), 2),
            f"{prefix}bias": integers(generator, (filters,)),
            f"{prefix}eps": 0.5,
        }
    return found | {"act": act}


def cast(found: dict, dtype: torch.dtype, layout: str) -> dict:
    parameters = torch.float64 if dtype == torch.float64 else torch.float32

    def one(name, value):
        if not isinstance(value, torch.Tensor):
            return value
        if name.endswith("conv_weight"):
            return value.to(dtype)
        return place(value.to(dtype), layout) if value.dim() == 4 else value.to(parameters)

    return {name: one(name, value) for name, value in found.items()}


@scored("R4", "integers: exactly equal, no tolerance", full=400, short=200)
def exactly(tally: Tally, count: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, 5, 3), (1, 16, 4, 4), (2, 3, 7, 1), (1, 17, 3, 3), (3, 32, 2, 2), (1, 1, 1, 1), (2, 64, 6, 5))
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    rows = itertools.product(shapes, ("relu", "none"), dtypes, LAYOUTS, FUNCTIONS)
    rows = [row for index, row in enumerate(rows)][:: max(1, len(shapes) * 2 * 4 * 8 * len(FUNCTIONS) // count)]
    for shape, act, dtype, layout, name in rows:
        found = cast(whole(name, shape, act, generator), dtype, layout)
        with tally.case(f"{name} {shape} {act} {dtype} {layout}"), torch.no_grad():
            y = getattr(functional, name)(**found)
            with fastres.use("torch"):
                truth = getattr(functional, name)(
                    **{k: v.double() if isinstance(v, torch.Tensor) else v for k, v in found.items()}
                )
            assert y.dtype == dtype and torch.equal(y, truth.to(dtype)), f"{(y.double() - truth).abs().max()} apart"


def classes_agree(own: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """NaN and infinities in the same places, zeros with the same sign where both are zero."""
    assert own.dtype == theirs.dtype and own.shape == theirs.shape, what
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(own), kind(theirs)), f"{what}: {kind.__name__} stands elsewhere"
    zeros = (own == 0) & (theirs == 0)
    assert torch.equal(own.signbit()[zeros], theirs.signbit()[zeros]), f"{what}: signs of zeros differ"


def as_in_torch(op, args: list, own: tuple) -> None:
    """As in PyTorch in one of the two memory formats, where an infinite weight makes it differ from itself: one scales by
    weight / sigma and shifts, the other takes the mean off first.
    """
    said = []
    for layout in (torch.preserve_format, torch.contiguous_format, torch.channels_last):
        given = [
            a.contiguous(memory_format=layout)
            if isinstance(a, torch.Tensor) and a.dim() == 4 and layout is not torch.preserve_format
            else a
            for a in args
        ]
        with fastres.use("torch"):
            theirs = tuple_of(op(*given))
        try:
            for index, pair in enumerate(zip(own, theirs, strict=True)):
                classes_agree(*pair, f"output {index}")
        except AssertionError as error:
            said.append(str(error))
        else:
            return
    raise AssertionError("; ".join(said))


@scored("R5", "NaN, ±infinity, ±0, subnormals and the largest number in every tensor slot", full=700, short=300)
def special(tally: Tally, count: int) -> None:
    rows = []
    for name in OPS:
        op = REGISTRY[name]
        slots = [
            i
            for i, a in enumerate(op.samples(torch.device("cpu"), torch.float32)[0].args)
            if isinstance(a, torch.Tensor)
        ]
        rows += itertools.product([name], slots, SPECIAL, ("contiguous", "channels_last"), ("relu", "none"))
    for name, slot, value, layout, act in rows[:: max(1, len(rows) // (count + count // 10))]:
        op = REGISTRY[name]
        args = [
            a.clone() if isinstance(a, torch.Tensor) else a
            for a in op.samples(torch.device("cpu"), torch.float32)[0].args
        ]
        if "act" in op.parameters:
            args[op.parameters.index("act")] = act
        if "train" in name and "max" in value and op.parameters[slot] in ("x", "residual"):
            continue  # in channels_last the largest number overflows the float32 sum of its channel's mean
        args[slot].view(-1)[:: max(2, args[slot].numel() // 3)] = SPECIAL[value]
        args = [
            place(a, layout) if isinstance(a, torch.Tensor) and a.dim() == 4 and n != "weight" else a
            for n, a in zip(op.parameters, args, strict=True)
        ]
        with tally.case(f"{name} {op.parameters[slot]}={value} {layout} {act}"):
            own = tuple_of(op(*args))
            as_in_torch(op, args, own)


@scored("R16", "the same bits from 50 runs, and from 1, 2 and 4 threads but where PyTorch's convolution has other ones", full=40, short=8)
def determinism(tally: Tally, count: int) -> None:
    threads = torch.get_num_threads()
    shapes = ((3, 64, 28, 28), (2, 24, 17, 13), (4, 128, 7, 7), (2, 256, 14, 14))
    rows = list(itertools.product(shapes, OPS))[: max(count, 1)] if count < 40 else list(itertools.product(shapes, OPS))
    for shape, name in rows:
        conv, pool = "conv" in name, "pool" in name
        window = ((3, 3), (1, 1), (1, 1), (1, 1)) if conv else ((3, 3), (2, 2), (1, 1)) if pool else ()
        call = Call(
            name,
            shape,
            torch.float32,
            ("channels_last",) * 2,
            "relu",
            1e-5,
            (True, True),
            window,
            (32, 1, False) if conv else (),
        )
        args = call.arguments()
        with tally.case(f"{name} {shape}"):
            try:
                for run in (forward, backward):
                    first = {}
                    for repeat in range(50):
                        torch.set_num_threads((1, 2, 4)[repeat % 3])
                        found = run(REGISTRY[name], args, 0)
                        plain = run is backward or REGISTRY[name].fallback is not None  # has no kernel for the CPU
                        team = torch.get_num_threads() if plain and name in (*BY_PYTORCH, "conv_statistics") else 1
                        for index, (a, b) in enumerate(zip(first.setdefault(team, found), found, strict=True)):
                            assert torch.equal(a, b), f"{run.__name__} {index} with {torch.get_num_threads()} threads"
            finally:
                torch.set_num_threads(threads)
