"""The trainer: resumption to the bit, what stops it, schedules, and what a step is."""

import math
import resource
from dataclasses import replace

import pytest
import torch
from torch import nn

from fastres.errors import ArgumentError, DivergenceError
from fastres.models import cifar
from fastres.train import Data, Settings, Trainer, checkpoint, schedule
from fastres.train.data import Arrays
from fastres.train.processes import Processes

pytestmark = pytest.mark.none
FEW = Settings(epochs=3, batch=16, rate=0.05)


def some_images(count=64, classes=3):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pixels = torch.randn(count, 1, 8, 8, generator=generator) + labels.view(-1, 1, 1, 1)
    ones = torch.ones(1, 1, 1, 1)
    train, test = (
        Arrays(pixels[part], labels[part], 0 * ones, ones, shift=1, flips=True)
        for part in (slice(0, 48), slice(48, count))
    )
    return Data("some", train, test, tuple(map(str, range(classes))), 1, 8, "of the test")


class Net(nn.Module):
    """With dropout: what the model draws must be resumed too."""

    def __init__(self, classes=3):
        super().__init__()
        self.body = cifar.resnet(8, num_classes=8, in_channels=1)
        self.drop, self.fc = nn.Dropout(0.5), nn.Linear(8, classes)

    def forward(self, x):
        return self.fc(self.drop(self.body(x)))


def trainer(settings=FEW, out=None, **options):
    torch.manual_seed(1)
    return Trainer(Net(), some_images(), settings, out=out, **options)


def state(found):
    return {key: value.clone() for key, value in found._tensors().items()}


def assert_same(a, b):
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


FULL = replace(FEW, ema=0.8, smoothing=0.1, schedule="cosine", warmup=1.0, save_steps=1)


@pytest.mark.parametrize(
    "settings", [FEW, FULL, replace(FULL, amp="bf16"), replace(FEW, amp="fp16", schedule="plateau")]
)
def test_stopped_at_every_step_and_resumed_it_ends_with_the_same_bits(tmp_path, monkeypatch, settings):
    whole = trainer(settings)
    history = whole.run()
    step, stops = Trainer._one_step, []

    def stop_after_each(self, images, labels):
        if self.step > len(stops):
            stops.append(self.step)
            raise KeyboardInterrupt
        step(self, images, labels)

    monkeypatch.setattr(Trainer, "_one_step", stop_after_each)
    again = None
    while again is None:
        torch.manual_seed(99)  # whatever the process drew before
        resumed = trainer(settings, tmp_path)
        try:
            again = resumed.run()
        except KeyboardInterrupt:
            continue
    assert stops == list(range(1, 9)) and again == history
    assert_same(state(whole), state(resumed))
    assert trainer(settings, tmp_path).run() == history, "a finished run is left as it is"


def test_a_checkpoint_is_whole_whatever_happens_while_it_is_written(tmp_path, monkeypatch):
    first = {"a": torch.arange(3.0)}
    checkpoint.save(tmp_path, first, {"step": 1})
    for failing in ("replace", "fsync"):

        def fail(*arguments):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(f"os.{failing}", fail)
            with pytest.raises(
                OSError, match=r"step-2\.safetensors cannot be written \(No space left on device\); what was"
            ):
                checkpoint.save(tmp_path, {"a": torch.zeros(3)}, {"step": 2})
        tensors, found = checkpoint.load(tmp_path)
        assert found["step"] == 1 and torch.equal(tensors["a"], first["a"])
        assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "step-1.safetensors"]
    checkpoint.save(tmp_path, {"a": torch.zeros(3)}, {"step": 2})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.json", "step-2.safetensors"]


def test_a_full_disk_stops_with_a_message_and_loses_nothing(tmp_path):
    begun = trainer(FEW, tmp_path)
    begun.epoch(), begun.save()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(OSError, match=r"step-6\.safetensors cannot be written .* what was saved before is intact"):
            trainer(FEW, tmp_path).run()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    whole = trainer(FEW)
    assert trainer(FEW, tmp_path).run() == whole.run()


def test_damaged_checkpoints_are_told(tmp_path):
    trainer(replace(FEW, epochs=1), tmp_path).run()
    (tensors,) = tmp_path.glob("*.safetensors")
    content, text = tensors.read_bytes(), (tmp_path / checkpoint.STATE).read_text()
    for change in (
        lambda: tensors.write_bytes(content[:-1]),
        lambda: (tmp_path / checkpoint.STATE).write_text("{"),
        tensors.unlink,
    ):
        change()
        with pytest.raises(ArgumentError, match=r"cannot be resumed from .*; remove .* to start anew"):
            trainer(replace(FEW, epochs=1), tmp_path)
        tensors.write_bytes(content), (tmp_path / checkpoint.STATE).write_text(text)
    with pytest.raises(ArgumentError, match=r"holds another run \(epochs=1\)"):
        trainer(FEW, tmp_path)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(DivergenceError, match=r"at step \d: training stops, no checkpoint was written yet"):
        trainer(replace(FEW, rate=1e30)).run()
    good = trainer(replace(FEW, save_steps=1), tmp_path)
    good.epoch(), good.save()
    kept = checkpoint.load(tmp_path)
    resumed = trainer(replace(FEW, save_steps=1), tmp_path)
    resumed.data.train.images[:] = math.nan
    with pytest.raises(
        DivergenceError, match=f"loss is nan at step 4: training stops, the last good checkpoint stays in {tmp_path}"
    ):
        resumed.run()
    found = checkpoint.load(tmp_path)
    assert found[1] == kept[1]
    assert_same(found[0], kept[0])
    with torch.no_grad():
        resumed.model.fc.weight[0, 0] = math.inf
    with pytest.raises(DivergenceError, match="a weight is not finite"):
        resumed.save()


def test_requests_that_cannot_be_met():
    with pytest.raises(ArgumentError, match="batch must be at most 48"):
        trainer(replace(FEW, batch=49))
    with pytest.raises(ArgumentError, match="multiple of the 3 processes"):
        trainer(FEW, processes=Processes(0, 3))
    torch.manual_seed(0)
    with pytest.raises(ArgumentError, match=r"must give 3 logits, one for each class, got \(5,\)"):
        Trainer(Net(5), some_images(), FEW).run()


def test_schedules():
    def rates(name, warmup=0.0, errors=()):
        return [
            round(schedule.factor(name, done, warmup, errors), 6) for done in (0.0, 0.1, 0.49, 0.5, 0.74, 0.75, 0.99)
        ]

    assert rates("step") == [1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    assert rates("step", 0.1) == [0.1, 1, 1, 0.1, 0.1, 0.01, 0.01]
    cosine = rates("cosine", 0.1)
    assert cosine[:2] == [0.1, 1.0] and cosine[1:] == sorted(cosine[1:], reverse=True) and cosine[-1] < 0.001
    assert schedule.plateaus([0.5, 0.4] + [0.4] * 4) == 0 and schedule.plateaus([0.5, 0.4] + [0.4] * 5) == 1
    assert schedule.plateaus([0.5] * 11) == 2 and schedule.plateaus([0.5, *[0.6] * 4, 0.4, *[0.6] * 4]) == 0
    assert set(rates("plateau", errors=[0.5] * 6)) == {0.1}


def test_the_trainer_is_sgd_as_pytorch_does_it():
    """Without augmentation and dropout, one epoch by hand."""
    data, settings = some_images(), replace(FEW, epochs=1, schedule="cosine", smoothing=0.1, channels_last=False)
    data.train.shift = data.train.flips = 0
    torch.manual_seed(1)
    theirs, ours = (cifar.resnet(8, num_classes=3, in_channels=1) for _ in range(2))
    ours.load_state_dict(theirs.state_dict())
    Trainer(ours, data, settings).run()
    optimizer = torch.optim.SGD(theirs.parameters(), 0.05, 0.9, weight_decay=1e-4)
    schedule_ = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    from fastres.train.data import batches

    for keys in batches(48, 16, seed=0, epoch=0):
        images, labels = data.train.__getitems__(keys)
        optimizer.zero_grad()
        nn.functional.cross_entropy(theirs(images), labels, label_smoothing=0.1).backward()
        optimizer.step(), schedule_.step()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_the_average_is_of_the_weights():
    averaged = trainer(replace(FEW, epochs=1, ema=0.5))
    seen = []
    update = averaged.average.update_parameters
    averaged.average.update_parameters = lambda model: (seen.append(model.fc.bias.detach().clone()), update(model))
    (row,) = averaged.run()
    expected = seen[0]
    for bias in seen[1:]:
        expected = 0.5 * expected + 0.5 * bias
    assert torch.allclose(averaged.average.module.fc.bias, expected) and "average_test_error" in row
