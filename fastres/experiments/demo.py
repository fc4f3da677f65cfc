"""The demo: residual networks on real images, in plain PyTorch and with fastres; do they agree, and how fast are they?"""

import json
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import info, models, terminal, tuner
from fastres.errors import UnsupportedError
from fastres.experiments import report, rivals
from fastres.experiments.compare import Row, compare, outcome
from fastres.experiments.digits import SIDE, Curve, Digits, accuracy, digits, train
from fastres.experiments.subject import Subject, enliven
from fastres.experiments.twin import torch_twin
from fastres.experiments.verify import verify
from fastres.frozen import Calibration, freeze

WAYS = (rivals.OPTIMIZED, rivals.EAGER, rivals.CHANNELS_LAST)
EPOCHS, QUICK_EPOCHS = 8, 5
LEAST_ACCURACY = 0.95
EARLY_STEPS = 5  # before training itself has amplified the rounding
MOST_DIFFERENCE = {"early losses": 1e-2, "epoch losses": 0.1, "test accuracy": 0.02, "int8 accuracy": 0.005}


def run(out: Path, *, epochs: int | None = None, quick: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Run the demo, print its table, write ``demo.json`` and ``demo.png``; the result says whether all checks held.

    Args:
        out: directory of the two files.
        epochs: of each of the two trainings.
        quick: fewer epochs and a smaller second network.
        quiet: print neither progress nor table.
    """
    terminal.need("the demo", "sklearn", "matplotlib", "rich")
    out.mkdir(parents=True, exist_ok=True)
    epochs = epochs or (QUICK_EPOCHS if quick else EPOCHS)
    with terminal.Progress("demo", 2 * epochs + 2 * (len(WAYS) + 2) + 2 * 4 + 1, quiet=quiet) as progress:
        data = digits()
        curves = train(data, epochs, progress.step)
        subjects = [_digit_subject(curves, data.test[0]), _photo_subject("resnet18" if quick else "resnet50")]
        networks = [_infer(subject, 3.0 if quick else 8.0, progress) for subject in subjects]
        progress.step("quantising ResNet-20")
        quantised = quantise(curves["fastres"].model, data)
    training = {name: curve.to_dict() for name, curve in curves.items()}
    checks = _check_training(curves) | _check_inference(networks) | _check_quantised(quantised)
    result = {
        **info.versions(), **info.machine(), "epochs": epochs, "training": training, "inference": networks, "int8": quantised,
        "training_backends": _training_backends(curves["fastres"], data.train[0]),
        "checks": checks, "ok": all(check["ok"] for check in checks.values()),
    }  # fmt: skip
    (out / "demo.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(out / "demo.png", result)
    if not quiet:
        _print(result, out)
    return result


def _infer(subject: Subject, seconds: float, progress: terminal.Progress) -> dict[str, Any]:
    """Compare the ways to run one network, and check that ``restore`` is exact."""

    def step(text: str) -> None:
        progress.step(f"{subject.name}: {text}")

    rows = compare(subject, WAYS, seconds=seconds, step=step)
    restored = verify(subject, step=step)["restored"]
    return {"model": subject.label, "rows": rows, "restored": restored, "backends": _backends(subject)}


def _digit_subject(curves: dict[str, Curve], images: Tensor) -> Subject:
    return Subject(
        "ResNet-20 on digits",
        torch_twin(curves["fastres"].model).eval(),
        images[:256].contiguous(),
        images.dtype,
    )


def _photo_subject(name: str) -> Subject:
    """A network of random weights on crops of scikit-learn's two sample photos."""
    torch.manual_seed(0)
    model = torch_twin(getattr(models, name)())
    enliven(model)
    return Subject(f"{name.replace('resnet', 'ResNet-')} on photos", model.eval(), photos(), torch.float32)


def photos(size: int = 224) -> Tensor:
    """Four crops of each of two photos, standardised: (8, 3, size, size)."""
    (datasets,) = terminal.need("the demo", "sklearn.datasets")
    crops = []
    for image in datasets.load_sample_images().images:
        photo = torch.tensor(image.copy()).permute(2, 0, 1).float()[None] / 255.0
        photo = F.interpolate(photo, scale_factor=0.75, mode="bilinear", antialias=True)
        height, width = photo.shape[2] - size, photo.shape[3] - size
        crops += [photo[:, :, top : top + size, left : left + size] for top in (0, height) for left in (0, width)]
    batch = torch.cat(crops)
    mean, deviation = batch.mean((0, 2, 3), keepdim=True), batch.std((0, 2, 3), keepdim=True)
    return ((batch - mean) / deviation).contiguous()


def quantise(model: nn.Module, data: Digits) -> dict[str, Any]:
    """Test accuracy of the trained network in 8-bit integers, or why this machine has none, beside that in float32."""
    images, labels = data.train
    plain = accuracy(torch_twin(model).eval(), *data.test)
    try:
        calibration = Calibration([(images[:256], labels[:256])], progress=False)
        frozen = freeze(torch_twin(model).eval(), data.test[0][:1], quantize=calibration)
    except UnsupportedError as error:
        return {"missing": str(error), "float_accuracy": plain}
    return {"accuracy": accuracy(frozen, *data.test), "float_accuracy": plain}


def _check_quantised(quantised: dict[str, Any]) -> dict[str, dict[str, Any]]:
    if "missing" in quantised:
        return {}
    value = abs(quantised["accuracy"] - quantised["float_accuracy"])
    most = MOST_DIFFERENCE["int8 accuracy"]
    return {"int8 accuracy differs": {"value": value, "must be at most": most, "ok": value <= most}}


def _backends(subject: Subject) -> dict[str, list[str]]:
    """The backends that run each op of the optimised network."""
    model, x = rivals.OPTIMIZED.prepare(torch_twin(subject.model), subject.x)
    return _ran(model, x)


def _training_backends(curve: Curve, images: Tensor) -> dict[str, list[str]]:
    return _ran(curve.model.train(), images[:8].contiguous(memory_format=torch.channels_last))


def _ran(model: Any, x: Tensor) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for op, args in tuner.record(model, x).values():
        found.setdefault(op.name, set()).add(op.explain(*args).backend.name)
    return {name: sorted(backends) for name, backends in sorted(found.items())}


def _check_training(curves: dict[str, Curve]) -> dict[str, dict[str, Any]]:
    theirs, ours = curves["torch"], curves["fastres"]
    steps = len(ours.losses) // len(ours.seconds)
    early = max(abs(a - b) for a, b in zip(theirs.losses[:EARLY_STEPS], ours.losses[:EARLY_STEPS], strict=True))
    means = [
        [statistics.fmean(c.losses[i : i + steps]) for i in range(0, len(c.losses), steps)] for c in (theirs, ours)
    ]
    by_epoch = max(abs(a - b) for a, b in zip(*means, strict=True))
    apart = abs(theirs.accuracies[-1] - ours.accuracies[-1])
    found = {"early losses": early, "epoch losses": by_epoch, "test accuracy": apart}
    checks = {
        f"{name} differ": {
            "value": value,
            "must be at most": MOST_DIFFERENCE[name],
            "ok": value <= MOST_DIFFERENCE[name],
        }
        for name, value in found.items()
    }
    for name, curve in curves.items():
        value = curve.accuracies[-1]
        checks[f"test accuracy, {name}"] = {
            "value": value,
            "must be at least": LEAST_ACCURACY,
            "ok": value >= LEAST_ACCURACY,
        }
    return checks


def _check_inference(networks: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    checks = {}
    for network in networks:
        row = next(row for row in network["rows"] if row["rival"] == rivals.FASTRES)
        name = network["model"].partition(" ")[0]
        value = {
            "value": row.get("error"),
            "torch": row.get("torch_error"),
            "must be at most": row.get("allowed"),
        }
        checks[f"error, {name}"] = {**value, "ok": bool(row.get("ok"))}
        checks[f"restore is exact, {name}"] = {"value": network["restored"], "ok": network["restored"]}
    return checks


def _print(result: dict[str, Any], out: Path) -> None:
    training = result["training"]
    seconds = {name: statistics.median(curve["epoch_seconds"]) for name, curve in training.items()}
    rows = [
        [
            f"train ResNet-20 on digits, {name}", f"{seconds[name]:.2f} s per epoch",
            "–" if name == "fastres" else report.times(seconds[name] / seconds["fastres"]),
            f"test accuracy {curve['accuracies'][-1]:.1%}", f"last loss {curve['losses'][-1]:.4f}",
        ]
        for name, curve in training.items()
    ]  # fmt: skip
    for network in result["inference"]:
        for row in network["rows"]:
            rows.append(_inference_cells(network["model"].partition(" on ")[0], row))
    quantised = result["int8"]
    found = quantised.get("missing") or f"test accuracy {quantised['accuracy']:.1%}"
    rows.append(["infer ResNet-20 on digits, int8", "–", "–", found, f"in float32 {quantised['float_accuracy']:.1%}"])
    terminal.table(
        "fastres demo", ("", "time", "fastres is", "result", "beside it"), rows,
        f"{result['cpu']}, {result['threads']} threads, torch {result['torch']}",
    )  # fmt: skip
    for part, ran in [
        ("training", result["training_backends"]),
        *((n["model"], n["backends"]) for n in result["inference"]),
    ]:
        print(f"{part}: " + ", ".join(f"{op} on {' and '.join(backends)}" for op, backends in ran.items()))
    for name, check in result["checks"].items():
        print(
            f"{'ok    ' if check['ok'] else 'FAILED'} {name}: "
            + ", ".join(_said(k, v) for k, v in check.items() if k != "ok")
        )
    print(f"wrote {out / 'demo.png'} and {out / 'demo.json'}")


def _said(key: str, value: Any) -> str:
    number = f"{value:.3g}" if isinstance(value, float) else str(value)
    return number if key == "value" else f"{key} {number}"


def _inference_cells(network: str, row: Row) -> list[str]:
    if outcome(row) != "timed":
        return [f"run {network}, {row['rival']}", outcome(row), "–", row.get("missing", ""), "–"]
    ratio = "–" if row["rival"] == rivals.FASTRES else report.times(row["ratio"])
    errors = f"error {row['error']:.2g}", f"torch's own {row['torch_error']:.2g}"
    return [f"run {network}, {row['rival']}", terminal.milliseconds(row["median_s"]), ratio, *errors]


def plot(path: Path, result: dict[str, Any]) -> None:
    """Loss and accuracy curves of both trainings, then bars of both networks' times."""
    pyplot = report.plotter()
    figure, axes = pyplot.subplots(2, 2, figsize=(11, 7), layout="constrained")
    styles = {"torch": (report.TORCH_COLOUR, "-", 3.5), "fastres": (report.FASTRES_COLOUR, "--", 1.6)}
    for name, curve in result["training"].items():
        colour, style, width = styles[name]
        seconds = statistics.median(curve["epoch_seconds"])
        label = f"{'plain PyTorch' if name == 'torch' else name}, {seconds:.2f} s per epoch"
        axes[0][0].plot(curve["losses"], color=colour, linestyle=style, linewidth=width, label=label)
        percent = [100 * value for value in curve["accuracies"]]
        axes[0][1].plot(
            range(1, len(percent) + 1),
            percent,
            color=colour,
            linestyle=style,
            linewidth=width,
            marker="o",
            markersize=4,
        )
    axes[0][0].set(yscale="log", xlabel="step", ylabel="training loss")
    axes[0][0].legend(fontsize=9, frameon=False)
    axes[0][0].set_title(f"ResNet-20 on digits ({SIDE}x{SIDE}), same seed", fontsize=10, loc="left")
    axes[0][1].axhline(100 * LEAST_ACCURACY, color="#cccccc", linewidth=1, zorder=0)
    axes[0][1].set(xlabel="epoch", ylabel="test accuracy, %", xticks=range(1, result["epochs"] + 1))
    axes[0][1].set_title("test accuracy", fontsize=10, loc="left")
    for axis, network in zip(axes[1], result["inference"], strict=True):
        report.draw_bars(axis, [row for row in network["rows"] if outcome(row) == "timed"])
        axis.set_title(f"inference: {network['model']}", fontsize=10, loc="left")
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(
        f"fastres demo — {result['cpu']}, {result['threads']} threads, torch {result['torch']}", fontsize=11
    )
    figure.savefig(path, dpi=140)
    pyplot.close(figure)
