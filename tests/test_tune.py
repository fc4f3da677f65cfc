"""Tuning: what it validates, what it discards, what it stores, and what it leaves alone."""

import itertools
import json
import os
import stat
import threading
import warnings

import pytest
import torch

import fastres
from fastres import dispatch, models, tune, tuner
from fastres.dispatch import Backend
from fastres.errors import UnsupportedError
from fastres.ops import REGISTRY

CPU = torch.device("cpu")
pytestmark = pytest.mark.none


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("FASTRES_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("FASTRES_BACKEND", raising=False)
    dispatch.forget()
    yield tmp_path / "cache"
    dispatch.forget()


@pytest.fixture
def plant(monkeypatch):
    """Put one more backend in front of an op's."""

    def put(op, name, run, configs=None, why_not=lambda *args: None):
        def load(config=None):
            return run if config is None else (lambda *args: run(*args, config))

        backends = (Backend(name, why_not, load, configs), *REGISTRY[op].backends)
        monkeypatch.setattr(REGISTRY[op], "backends", backends)

    return put


def pair():
    return torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)


def test_a_wrong_backend_is_discarded_and_reported(plant):
    plant("add_act", "wrong", lambda x, r, act: torch.relu(x + r) + 1e-3)
    x, residual = pair()
    result = tuner.tune_call("add_act", x, residual, "relu", seconds=0.01)
    (wrong,) = [c for c in result.candidates if c.backend == "wrong"]
    assert wrong.seconds is None and "error" in wrong.failure and "allowed" in wrong.failure
    assert result.chosen.backend != "wrong"
    stored = json.loads(tune.cache_file(CPU).read_text())
    assert stored["failed"]["cpu"]["wrong"] == ["add_act"]
    assert "wrong" not in stored["validated"]["cpu"]


def test_a_backend_wrong_only_on_the_call_is_discarded(plant):
    """Right on every sample, wrong where the user needs it."""
    plant("add_act", "wrong", lambda x, r, act: torch.relu(x + r) + (1.0 if x.shape[0] == 5 else 0.0) * (act == "relu")
          if act == "relu" else x + r)  # fmt: skip
    x, residual = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    session = tuner.Session(CPU, seconds=0.01)
    session.tune(REGISTRY["add_act"], (x, residual, "relu"))
    assert "on this call" in session.failures()["add_act"]["wrong"]


def test_layers_of_other_widths_have_keys_of_their_own_and_similar_batches_have_one():
    keys = {
        (n, k): tune.key("conv", (torch.empty(n, 8, 4, 4), torch.empty(k, 8, 1, 1), None, (1, 1), (0, 0), (1, 1), 1))
        for n, k in itertools.product((33, 64), (48, 64))
    }
    assert keys[33, 48] == keys[64, 48] != keys[64, 64] == keys[33, 64]


def test_a_backend_that_raises_is_discarded(plant):
    def broken(*args):
        raise RuntimeError("no kernel image is available")

    plant("add_act", "broken", broken)
    result = tuner.tune_call("add_act", *pair(), "relu", seconds=0.01)
    assert "no kernel image" in next(c.failure for c in result.candidates if c.backend == "broken")


def test_the_choice_is_used_from_the_next_call_on(plant):
    calls = []

    def fast(x, r, act):
        calls.append(1)
        return torch.relu(x + r) if act == "relu" else x + r

    op, (x, residual) = REGISTRY["add_act"], pair()
    plant("add_act", "mine", fast)
    key = tune.key("add_act", (x, residual, "relu"))
    tune.store(CPU, {}, {key: {"backend": "torch"}})
    dispatch.forget()
    choice = op.explain(x, residual, "relu")
    assert (choice.backend.name, choice.source) == ("torch", "tuned")
    tune.store(CPU, {}, {key: {"backend": "mine"}})
    dispatch.forget()
    before = len(calls)
    op(x, residual, "relu")
    assert len(calls) == before + 1


def test_a_configuration_is_timed_stored_and_used(plant):
    used = []

    def run(x, r, act, config=None):
        used.append(config)
        if config != (2, 4):
            threading.Event().wait(0.002)  # slower
        return torch.relu(x + r) if act == "relu" else x + r

    plant("add_act", "mine", run, configs=lambda *args: [(1, 4), (2, 4)])
    x, residual = torch.randn(8, 64, 56, 56), torch.randn(8, 64, 56, 56)
    session = tuner.Session(CPU, seconds=0.05)
    result = session.tune(REGISTRY["add_act"], (x, residual, "relu"))
    assert {c.config for c in result.candidates if c.backend == "mine"} == {None, (1, 4), (2, 4)}
    tune.store(CPU, {}, {result.key: {"backend": "mine", "config": [2, 4]}})
    dispatch.forget()
    choice = REGISTRY["add_act"].explain(x, residual, "relu")
    assert choice.config == (2, 4)
    choice.load()(x, residual, "relu")
    assert used[-1] == (2, 4)
    tune.store(CPU, {}, {result.key: {"backend": "mine", "config": [9, 9]}})  # none of the legal ones
    dispatch.forget()
    assert REGISTRY["add_act"].explain(x, residual, "relu").config is None


def test_what_can_be_slower_is_chosen_where_tuning_found_it_the_fastest(monkeypatch):
    op, (x, residual) = REGISTRY["add_act"], pair()
    call = x, residual, "relu"
    mine = Backend("mine", lambda *args: None, lambda: op.reference, only_tuned=True)
    monkeypatch.setattr(op, "backends", (mine, *op.backends))
    choice = op.explain(*call)
    assert choice.backend.name != "mine" and "only where it was measured to be the fastest" in choice.refusals["mine"]
    tune.store(CPU, {}, {tune.key("add_act", call): {"backend": "mine"}})
    dispatch.forget()
    assert op.explain(*call).backend.name == "mine"


def test_never_slower_than_torch():
    def candidates(**seconds):
        return [tuner.Candidate(name, seconds=value) for name, value in seconds.items()]

    assert tuner.fastest(candidates(cpu=2.0, torch=1.0)).backend == "torch"
    assert tuner.fastest(candidates(cpu=1.0, torch=2.0)).backend == "cpu"
    assert tuner.fastest(candidates(cpu=1.015, triton=1.0, torch=2.0)).backend == "cpu"  # a tie: the page's order
    assert tuner.fastest(candidates(cpu=1.01, torch=1.0)).backend == "torch"


@pytest.mark.parametrize("training", [False, True])
def test_all_calls_of_a_model(training):
    torch.manual_seed(0)
    model = models.cifar.resnet(8).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    session = tuner.tune_model(model, torch.randn(2, 3, 16, 16), seconds=0.01)
    ops = {result.op for result in session.results}
    expected = {"bn_act_train", "bn_act_backward", "bn_add_act_train", "bn_add_act_backward"}
    assert ops == expected if training else ops == {"conv_bn_act", "conv_bn_add_act"}
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert set(json.loads(tune.cache_file(CPU).read_text())["choices"]) == {r.key for r in session.results}


def test_a_training_step_is_tuned_for_convolutions_that_find_statistics(plant):
    """Each whose output a batch norm takes, of a block as of its shortcut; against the convolution and the pass by itself."""
    block = fastres.nn.BasicBlock(4, 8, 2, fastres.nn.shortcut("B", 4, 8, 2))
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), block), torch.randn(2, 3, 6, 6)
    op = REGISTRY["conv_statistics"]
    assert op.name not in {each.name for each, _ in tuner.record(model, x).values()}
    plant(op.name, "mine", op.reference, why_not=lambda x, weight, *rest: None if weight.shape[0] == 8 else "of 8 channels")
    calls = [args for each, args in tuner.record(model, x).values() if each is op]
    assert sorted(args[1].shape[1:] for args in calls) == [(4, 1, 1), (4, 3, 3), (8, 3, 3)]
    result = tuner.Session(CPU, seconds=0.01).tune(op, calls[0])
    assert {c.backend: c.failure for c in result.candidates if c.refusal is None} == {"mine": None, "torch": None}


@pytest.mark.parametrize("channels", [8, 16])  # of convolutions by PyTorch, and by an op where the CPU has a kernel for them
def test_a_training_step_is_tuned_for_gradients_that_go_on_through_a_batch_norm(plant, channels):
    """Each of a convolution behind a batch norm; against the two backwards by themselves."""
    torch.manual_seed(0)
    block = fastres.nn.BasicBlock(4, channels, 2, fastres.nn.shortcut("B", 4, channels, 2))
    model, x = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1, bias=False), block), torch.randn(2, 3, 32, 32)
    model, x = (each.to(memory_format=torch.channels_last) for each in (model, x))
    op = REGISTRY["conv_backward_bn_act"]
    assert op.name not in {each.name for each, _ in tuner.record(model, x).values()}
    plant(op.name, "mine", op.reference, why_not=lambda *args: None if args[9] == (1, 1) else "of stride 1")
    ((_, args),) = [(each, args) for each, args in tuner.record(model, x).values() if each is op]
    assert args[1].shape == (channels, channels, 3, 3) and args[2].shape == (2, channels, 16, 16)
    result = tuner.Session(CPU, seconds=0.01).tune(op, args)
    assert {c.backend: c.failure for c in result.candidates if c.refusal is None} == {"mine": None, "torch": None}


def test_a_model_without_fused_ops_is_refused():
    with pytest.raises(UnsupportedError, match="optimize"):
        tuner.tune_model(torch.nn.Linear(2, 2), torch.randn(1, 2))


@pytest.mark.parametrize("training", [False, True])
def test_a_model_with_nothing_to_fuse_is_not_told_to_optimise_it(training):
    model = fastres.optimize(torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.GELU()).train(training))
    with pytest.raises(UnsupportedError, match="optimize found nothing to fuse"):
        tuner.tune_model(model, torch.randn(1, 2, 4, 4))


def test_the_cache_is_private_and_whole(cache):
    path = tune.store(CPU, {"cpu": ["add_act"]}, {})
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    tune.store(CPU, {"cpu": ["bn_act"]}, {"k": {"backend": "cpu"}})
    data = tune.read(path)
    assert data["validated"]["cpu"]["cpu"] == ["add_act", "bn_act"]
    assert os.listdir(cache) == [path.name]  # no temporary file left behind


def test_a_later_verdict_replaces_an_earlier_one():
    tune.store(CPU, {"cuda": ["add_act", "bn_act"]}, {})
    path = tune.store(CPU, {}, {}, {"cuda": ["add_act"]})
    data = tune.read(path)
    assert data["validated"]["cpu"]["cuda"] == ["bn_act"] and data["failed"]["cpu"]["cuda"] == ["add_act"]
    data = tune.read(tune.store(CPU, {"cuda": ["add_act"]}, {}))
    assert data["validated"]["cpu"]["cuda"] == ["add_act", "bn_act"] and data["failed"]["cpu"]["cuda"] == []


def test_readers_never_see_a_part():
    """A reader beside a writer finds every version whole."""
    path = tune.store(CPU, {}, {})
    stop, failures = threading.Event(), []

    def read():
        while not stop.is_set():
            try:
                tune.read(path)
            except ValueError as error:
                failures.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    for number in range(100):
        tune.store(CPU, {}, {f"key {number}": {"backend": "torch"}})
    stop.set()
    reader.join()
    assert not failures and len(tune.read(path)["choices"]) == 100


CORRUPT = {
    "cut": '{"format": 1, "validated": {',
    "empty": "",
    "binary": "\x00\x01",
    "list": "[]",
    "other format": '{"format": 99, "validated": {}, "choices": {}}',
    "choices a list": '{"format": 1, "validated": {}, "choices": []}',
    "choice a string": '{"format": 1, "validated": {}, "choices": {"k": "cpu"}}',
    "config of text": '{"format": 1, "validated": {}, "choices": {"k": {"backend": "cpu", "config": ["rm"]}}}',
    "validated a number": '{"format": 1, "validated": {"cpu": {"cpu": 3}}, "choices": {}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("content", CORRUPT.values(), ids=CORRUPT.keys())
def test_a_corrupt_cache_warns_once_and_is_never_overwritten(cache, content):
    cache.mkdir(mode=0o700)
    path = tune.cache_file(CPU)
    path.write_text(content)
    x, residual = pair()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            dispatch.forget()
            fastres.functional.add_act(x, residual)
    assert [str(w.message) for w in caught if "tuning cache" in str(w.message)].__len__() == 1
    with pytest.raises(UnsupportedError, match="left as it is"):
        tuner.tune_call("add_act", x, residual, "relu", seconds=0.01)
    assert path.read_text() == content


def test_a_foreign_cache_is_ignored(cache, tmp_path):
    path = tune.store(CPU, {}, {"k": {"backend": "cpu"}})
    cache.chmod(0o777)
    with pytest.raises(ValueError, match="others may write"):
        tune.read(path)
    path.unlink()
    with pytest.raises(UnsupportedError, match="others may write"):
        tune.store(CPU, {}, {"k": {"backend": "cpu"}})
    assert not path.exists()
    cache.chmod(0o700)
    tune.store(CPU, {}, {"k": {"backend": "cpu"}})
    elsewhere = tmp_path / "elsewhere.json"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match="symbolic link"):
        tune.read(path)


@pytest.mark.parametrize("home", ["a file", "unknown"])
def test_without_a_home_there_is_no_cache_and_no_warning(home, monkeypatch, tmp_path):
    monkeypatch.delenv("FASTRES_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home == "a file":
        (tmp_path / "home").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
    else:  # as of a user without an entry among the system's

        def unknown():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr("fastres.env.Path.home", unknown)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastres.functional.add_act(torch.ones(3), torch.ones(3))
    with pytest.raises(UnsupportedError, match=r"nothing can be stored in .*FASTRES_CACHE_DIR"):
        tune.check_writable(CPU)


def test_results_of_another_torch_are_not_used(cache):
    path = tune.store(CPU, {}, {"k": {"backend": "cpu"}})
    data = json.loads(path.read_text())
    data["torch"] = "0.0"
    path.write_text(json.dumps(data))
    tune.store(CPU, {}, {"new": {"backend": "torch"}})
    assert set(tune.read(path)["choices"]) == {"new"}


def test_a_backend_that_loses_nan_is_discarded(plant):
    def maximum(x, r, act):
        return torch.fmax(x + r, torch.zeros_like(x)) if act == "relu" else x + r

    plant("add_act", "maximum", maximum)
    x, residual = pair()
    result = tuner.tune_call("add_act", x, residual, "relu", seconds=0.01)
    (found,) = [c for c in result.candidates if c.backend == "maximum"]
    assert found.seconds is None and found.failure.startswith("on a NaN in float32")
