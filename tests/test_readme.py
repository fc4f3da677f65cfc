"""README keeps its word: its code runs, its commands and make's targets exist with these options, its names can be imported."""

import re
import shlex
import warnings

import pytest
import torch

import fastres
from benchmarks.report import EVIDENCE, README
from fastres import cli, models

pytestmark = pytest.mark.none
PAGES = [README, EVIDENCE]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def test_the_code_runs():
    """With smaller images; the training step on a CPU, where it runs as it is."""
    use, step = blocks(README, "python")
    names = {}
    exec(use.replace("8, 3, 224, 224", "2, 3, 64, 64"), names)
    assert names["logits"].shape == (2, 1000)
    batch = torch.randn(2, 3, 32, 32), torch.tensor([1, 2])
    given = {"torch": torch, "fastres": fastres, "model": models.cifar.resnet(8).train(), "loader": [batch] * 5}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch: the autocast is a GPU's
        exec(step, given)
    assert given["loss"].isfinite() and not given["step"].captured and "only a GPU" in given["step"].why


def commands(page):
    """The lines of shell blocks, without comments."""
    for line in "".join(blocks(page, "sh")).splitlines():
        if words := shlex.split(line, comments=True):
            yield words


@pytest.mark.parametrize("page", PAGES, ids=["README", "results"])
def test_the_commands_exist(page):
    targets = re.findall(r"^([a-z]+):", (README.parent / "Makefile").read_text(), re.MULTILINE)
    seen = []
    for words in commands(page):
        if words[0] == "make":
            assert words[1] in targets, words
        elif "fastres" in words:
            ours = words[words.index("fastres") + 1 :]
            assert cli._parser().parse_args(ours).command == ours[0]
        else:
            assert words[:2] == ["pip", "install"], words
        seen.append(words[0])
    assert seen


@pytest.mark.parametrize("page", PAGES, ids=["README", "results"])
def test_the_names_exist(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z]+)", text):
        assert re.search(rf"^{target}:", (README.parent / "Makefile").read_text(), re.MULTILINE), target
    for command in re.findall(r"`fastres ([a-z]+)", text):
        with pytest.raises(SystemExit) as leaving:
            cli._parser().parse_args([command, "--help"])
        assert leaving.value.code == 0
    for module in re.findall(r"`python -m (benchmarks[.\w]*)", text):
        assert (README.parent / module.replace(".", "/")).with_suffix(".py").exists() or (
            README.parent / module.replace(".", "/") / "__main__.py"
        ).exists(), module
    names = set(re.findall(r"\bfastres\.((?:functional|models|nn)\.\w+|[a-z_]\w*|Calibration)(?=[(`])", text))
    for name in names - {"safetensors"}:
        found = fastres
        for part in name.split("."):
            found = getattr(found, part)
    assert names
