"""The demo, from its command to its two files: in full on small networks, and what it says where a check fails."""

import contextlib
import functools
import io
import json
import re

import pytest
import torch

from fastres import cli, models, terminal
from fastres.errors import UnsupportedError
from fastres.experiments import demo, rivals
from fastres.experiments.compare import compare
from fastres.experiments.digits import Curve, accuracy

pytestmark = pytest.mark.none


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """One run of the command on networks of 8 layers and small photos: exit code, stdout, stderr, folder."""
    for module in ("sklearn", "matplotlib", "rich"):
        pytest.importorskip(module, reason=f"the package {module} is not installed")
    folder, out, err = tmp_path_factory.mktemp("demo") / "new", io.StringIO(), io.StringIO()
    resnet, photos = models.cifar.resnet, demo.photos
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(models.cifar, "resnet", lambda depth, **options: resnet(8, **options))
        patch.setattr(models, "resnet18", functools.partial(resnet, 8))
        patch.setattr(demo, "photos", lambda: photos(32))
        patch.setattr(demo, "compare", lambda *args, seconds, **options: compare(*args, seconds=0.1, **options))
        code = cli.main(["demo", "--quick", "--epochs", "3", "--out", str(folder)])
    return code, out.getvalue(), err.getvalue(), folder


def test_both_networks_learn_alike(ran):
    result = json.loads((ran[3] / "demo.json").read_text())
    curves = result["training"]
    assert set(curves) == {"torch", "fastres"} and result["epochs"] == 3
    for curve in curves.values():
        assert len(curve["accuracies"]) == len(curve["epoch_seconds"]) == 3 and len(curve["losses"]) == 3 * 12
        assert curve["accuracies"][-1] > 0.3 and curve["losses"][-1] < curve["losses"][0]
    assert curves["torch"]["losses"][0] == pytest.approx(curves["fastres"]["losses"][0], abs=1e-4)  # the same weights
    assert all(result["checks"][f"{name} losses differ"]["ok"] for name in ("early", "epoch"))
    assert result["training_backends"]["bn_act_train"] and result["inference"][0]["backends"]["conv_bn_act"]


def test_every_way_is_judged_and_timed_on_both_networks(ran):
    result = json.loads((ran[3] / "demo.json").read_text())
    digits, photos = result["inference"]
    assert digits["model"] == "ResNet-20 on digits 256x1x16x16 float32"
    assert photos["model"] == "ResNet-18 on photos 8x3x32x32 float32"
    for network in (digits, photos):
        assert [row["rival"] for row in network["rows"]] == [way.name for way in demo.WAYS] and network["restored"]
        assert all(row["ok"] and row["error"] <= row["allowed"] and row["median_s"] > 0 for row in network["rows"])
    assert set(result["int8"]) in ({"accuracy", "float_accuracy"}, {"missing", "float_accuracy"})


def test_checks_say_what_they_found_and_decide_the_exit_code(ran):
    code, out, _, folder = ran
    result = json.loads((folder / "demo.json").read_text())
    for name, check in result["checks"].items():
        value, least, most = check["value"], check.get("must be at least"), check.get("must be at most")
        held = value if isinstance(value, bool) else value >= least if most is None else value <= most
        assert check["ok"] == held, name
        assert re.search(rf"^{'ok    ' if held else 'FAILED'} {name}: ", out, re.MULTILINE), name
    assert {"early losses differ", "test accuracy, fastres", "error, ResNet-18"} < set(result["checks"])
    assert code == (0 if result["ok"] else 1) and result["ok"] == all(c["ok"] for c in result["checks"].values())


def test_the_table_and_the_plot_are_there_and_the_steps_are_counted(ran):
    _, out, err, folder = ran
    for words in ("train ResNet-20 on digits, torch", "run ResNet-18, eager channels_last", "int8", "conv_bn_act on "):
        assert words in out
    assert out.rstrip().endswith(f"wrote {folder / 'demo.png'} and {folder / 'demo.json'}")
    assert (folder / "demo.png").read_bytes().startswith(b"\x89PNG")
    steps = [tuple(map(int, found)) for found in re.findall(r"^demo \[(\d+)/(\d+)\]", err, re.MULTILINE)]
    assert steps == [(number, len(steps)) for number in range(1, len(steps) + 1)]


def test_photos_are_crops_of_two_photos_standardised():
    pytest.importorskip("sklearn", reason="the package scikit-learn is not installed")
    found = demo.photos(64)
    assert found.shape == (8, 3, 64, 64) and found.is_contiguous()
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.std((0, 2, 3)), torch.ones(3))
    assert len({image.sum().item() for image in found}) == 8


def curve(losses, accuracies):
    return Curve(torch.nn.Identity(), losses, accuracies, [1.0] * len(accuracies))


def test_trainings_apart_or_too_poor_fail():
    good, steady = [2.0, 1.5, 1.0, 0.5, 0.2, 0.1], [0.9, 0.97]

    def failing(losses, accuracies):
        checks = demo._check_training({"torch": curve(good, steady), "fastres": curve(losses, accuracies)})
        return {name for name, check in checks.items() if not check["ok"]}

    assert failing(good, steady) == set()
    assert failing([*good[:2], 1.05, *good[3:]], steady) == {"early losses differ"}
    assert failing([*good[:5], 0.7], steady) == {"epoch losses differ"}
    assert failing(good, [0.9, 1.0]) == {"test accuracy differ"}
    assert failing(good, [0.9, 0.94]) == {"test accuracy differ", "test accuracy, fastres"}


def test_a_wrong_or_missing_network_and_a_changed_restore_fail():
    missing = {"rival": rivals.FASTRES, "missing": "a reason"}
    wrong = {"rival": rivals.FASTRES, "error": 2.0, "torch_error": 0.5, "allowed": 1.0, "ok": False}
    checks = demo._check_inference(
        [
            {"model": "A on digits", "rows": [missing], "restored": True},
            {"model": "B on photos", "rows": [wrong], "restored": False},
        ]
    )
    assert {name for name, check in checks.items() if not check["ok"]} == {"error, A", "error, B", "restore is exact, B"}
    assert demo._inference_cells("A", missing)[1:4:2] == ["missing", "a reason"]
    assert demo._inference_cells("B", wrong)[1] == "wrong"


def test_int8_too_far_from_float_fails_and_where_there_is_none_nothing_is_checked(monkeypatch):
    assert demo._check_quantised({"missing": "no such instructions", "float_accuracy": 0.9}) == {}
    for value, ok in ((0.9, True), (0.8, False)):
        assert demo._check_quantised({"accuracy": value, "float_accuracy": 0.9})["int8 accuracy differs"]["ok"] is ok

    def refuse(*args, **options):
        raise UnsupportedError("no such instructions")

    monkeypatch.setattr(demo, "freeze", refuse)
    torch.manual_seed(0)
    model = models.cifar.resnet(8, in_channels=1).eval()
    images, labels = torch.randn(16, 1, 16, 16), torch.arange(16) % 10
    found = demo.quantise(model, demo.Digits((images, labels), (images, labels)))
    assert found == {"missing": "no such instructions", "float_accuracy": accuracy(model, images, labels)}


def test_json_goes_alone_to_stdout(monkeypatch, capsys, tmp_path):
    asked = {}
    for ok in (True, False):
        monkeypatch.setattr(demo, "run", lambda out, ok=ok, **options: asked.update(options, out=out) or {"ok": ok})
        assert cli.main(["demo", "--json", "--out", str(tmp_path)]) == (0 if ok else 1)
        assert json.loads(capsys.readouterr().out) == {"ok": ok}
    assert asked == {"epochs": None, "quick": False, "quiet": True, "out": tmp_path}


def test_progress_is_a_bar_on_a_terminal(monkeypatch):
    pytest.importorskip("rich", reason="the package rich is not installed")
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with terminal.Progress("work", 2) as progress:
        progress.step("one")
        progress.step("two")
        assert progress._bar.tasks[0].completed == 1 and progress._bar.tasks[0].description == "work: two"
    assert "work [1/2]" not in screen.getvalue() and "work: two" in screen.getvalue()
