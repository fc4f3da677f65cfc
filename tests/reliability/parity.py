"""R1, R2 and R14: random calls against float64, forward and backward, in memory with red zones and poison."""

import contextlib

import torch
from hypothesis import assume
from hypothesis import strategies as st

import fastres
from fastres.budget import Verdict, within_budget
from fastres.ops import REGISTRY, _mask
from reliability.board import Tally, scored
from reliability.calls import OPS, Call, calls, memory_of

DRAWS = (32, 512)  # the more where the fewer leave it to luck
LUCK = 4
TRIES = 600
BACKENDS = ("chosen", "cpu", "onednn")


@contextlib.contextmanager
def poisoned():
    """torch.empty hands out NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def tuple_of(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def forward(op, args: list, seed: int) -> list[torch.Tensor]:
    return [y.detach() for y in tuple_of(op(*args))]


def backward(op, args: list, seed: int) -> list[torch.Tensor]:
    """Gradients of all tensors but the statistics, for gradients of the outputs in another layout than theirs."""
    names = zip(op.parameters, args, strict=True)
    args = [
        a.detach().requires_grad_(not n.endswith(("mean", "var"))) if isinstance(a, torch.Tensor) else a
        for n, a in names
    ]
    outputs = [y for y in tuple_of(op(*args)) if y.requires_grad]
    generator = torch.Generator().manual_seed(seed)
    seeds = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16) for y in outputs]
    if seed % 2:
        seeds = [s.transpose(2, 3).contiguous().transpose(2, 3) if s.dim() == 4 else s for s in seeds]
    inputs = [a for a in args if isinstance(a, torch.Tensor) and a.requires_grad]
    found = torch.autograd.grad(
        outputs, inputs, [s.to(y.dtype) for s, y in zip(seeds, outputs, strict=True)], allow_unused=True
    )
    return [g for g in found if g is not None]


def in_double(args: list) -> list:
    return [a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in args]


def results(call: Call, backend: str, run, draws: int = 1) -> list[list[tuple]]:
    """Of each draw: ours, PyTorch's and the truth of each output or gradient; fails where memory around inputs was written."""
    op, drawn = REGISTRY[call.op], [call.arguments(draw) for draw in range(draws)]
    chosen = contextlib.nullcontext() if backend == "chosen" else fastres.use(**{call.op: backend})
    with poisoned(), chosen:
        own = [run(op, args, call.seed) for args in drawn]
    for draw, args in enumerate(drawn):
        pairs = zip(args, call.arguments(draw), strict=True)
        same = [torch.equal(memory_of(a), memory_of(b)) for a, b in pairs if isinstance(a, torch.Tensor)]
        assert all(same), "memory of an input was written"
    with fastres.use("torch"):
        others = [(run(op, args, call.seed), run(op, in_double(args), call.seed)) for args in drawn]
    return [list(zip(ours, *both, strict=True)) for ours, both in zip(own, others, strict=True)]


def judge(call: Call, backend: str, run) -> None:
    """Each output within budget. Of few values a single rounding decides: what misses it is judged over many draws."""
    if backend != "chosen":
        implementation = next((b for b in REGISTRY[call.op].backends if b.name == backend), None)
        assume(implementation is not None and implementation.why_not(*call.arguments()) is None)
    if run is backward and call.act == "relu" and "act" in REGISTRY[call.op].parameters:
        assume(not near_a_kink(call))
    (found,) = results(call, backend, run)
    for index, (own, theirs, _) in enumerate(found):
        assert (own.dtype, own.shape) == (theirs.dtype, theirs.shape), f"result {index}: {own.dtype} {tuple(own.shape)}"
    bits = [i for i, (own, *_) in enumerate(found) if own.dtype == torch.uint8]  # of this backend's own y
    assert all(torch.equal(found[i][0], _mask.pack(found[0][0], call.act)) for i in bits), "the mask is not that of y"
    missed = [i for i, row in enumerate(found) if i not in bits and not within_budget(*row, call.dtype).ok]
    for draws in DRAWS if missed else ():
        verdicts = over_draws(call, backend, run, missed, draws)
        missed = [index for index, verdict in verdicts.items() if not verdict.ok]
    for index in missed:
        assume(not torch_errs(call, run, index))
        verdict = verdicts[index]
        raise AssertionError(f"result {index} on {backend}: error {verdict.error:.3g}, allowed {verdict.allowed:.3g}")


def over_draws(call: Call, backend: str, run, indices: list[int], draws: int) -> dict[int, Verdict]:
    """The verdict on all draws of a result as one. Where two values a channel all but cancel, the largest errors of both sides
    are those of one rounding each, even over many draws: they may then differ by more if most draws are within budget.
    """
    found = results(call, backend, run, draws) if indices else []
    verdicts = {}
    for index in indices:
        rows = [draw[index] for draw in found]
        flat = [[t.double().flatten() for t in row] for row in rows]
        verdict = within_budget(*(torch.cat(column) for column in zip(*flat, strict=True)), call.dtype)
        mostly = sum(within_budget(*row, call.dtype).ok for row in rows) > 0.75 * draws
        verdicts[index] = verdict._replace(ok=verdict.ok or (mostly and verdict.error <= LUCK * verdict.allowed))
    return verdicts


def torch_errs(call: Call, run, index: int) -> bool:
    """Whether PyTorch alone misses the truth by far: its bfloat16 convolutions on AMX may, now and then (README's limits)."""
    if call.dtype != torch.bfloat16 or "conv" not in call.op:
        return False
    op, args = REGISTRY[call.op], call.arguments()
    with fastres.use("torch"):
        truth = run(op, in_double(args), call.seed)[index]
        answers = (run(op, args, call.seed)[index].double() for _ in range(TRIES))
        allowed = 16 * torch.finfo(call.dtype).eps * truth.abs().max()
        return not all(((answer - truth).abs() <= allowed).all() for answer in answers)


def near_a_kink(call: Call) -> bool:
    """Whether a value is so close to the ReLU's kink that rounding decides which gradient is right."""
    op, args = REGISTRY[call.op], in_double(call.arguments())
    args[op.parameters.index("act")] = "none"
    with fastres.use("torch"):
        z = tuple_of(op(*args))[0].abs()
    return bool(z.min() < 1e-5 * z.max())


def fuzz(tally: Tally, count: int, run, values: int, ops: tuple[str, ...] = OPS) -> None:
    pairs = st.tuples(calls(ops, values), st.sampled_from(BACKENDS))
    tally.fuzz(pairs, lambda pair: judge(*pair, run), count)


@scored("R1", "fuzz parity, forward: shapes × dtypes × layouts × flags, red zones, poison", full=20_000, short=400)
def parity_forward(tally: Tally, count: int) -> None:
    fuzz(tally, count, forward, 2)


@scored("R2", "fuzz parity, backward: every gradient", full=5000, short=200)
def parity_backward(tally: Tally, count: int) -> None:
    fuzz(tally, count, backward, 8)
