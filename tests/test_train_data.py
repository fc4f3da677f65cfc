"""The images of ``fastres train``: CIFAR-10 from disk, folders of image files, and what chance does to them."""

import pickle

import pytest
import torch
from torch.utils.data import DataLoader

from fastres.errors import ArgumentError
from fastres.train import cifar10, data, digits, folder, images
from fastres.train.cifar import PIXELS

pytestmark = pytest.mark.none
PER_FILE = 12


def records(seed):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (PER_FILE, PIXELS), dtype=torch.uint8, generator=generator)
    return pixels, torch.randint(0, 10, (PER_FILE,), generator=generator).tolist()


def python_layout(folder, protocol=2):
    numpy = pytest.importorskip("numpy", reason="the package numpy is not installed")
    folder.mkdir()
    for seed, name in enumerate([*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]):
        pixels, labels = records(seed)
        batch = {"data": numpy.array(pixels.numpy()), "labels": labels, "batch_label": "one", "filenames": ["a.png"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return folder


def binary_layout(folder):
    folder.mkdir()
    for seed, name in enumerate([*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]):
        pixels, labels = records(seed)
        (folder / name).write_bytes(
            b"".join(bytes([label]) + bytes(row.tolist()) for row, label in zip(pixels, labels, strict=True))
        )
    return folder


@pytest.mark.parametrize("layout", [python_layout, binary_layout])
def test_cifar10_is_read_in_both_layouts(tmp_path, layout):
    name = "cifar-10-batches-py" if layout is python_layout else "cifar-10-batches-bin"
    where = layout(tmp_path / name)
    for path in (where, tmp_path):
        found = cifar10(path)
        assert found.counts() == (5 * PER_FILE, PER_FILE) and found.channels == 3 and found.size == 32
        for dataset, seeds in ((found.train, range(5)), (found.test, [5])):
            pixels = torch.cat([records(seed)[0] for seed in seeds]).view(-1, 3, 32, 32)
            assert torch.equal(dataset.images, pixels)
            assert dataset.labels.tolist() == [label for seed in seeds for label in records(seed)[1]]


def test_both_layouts_hold_the_same(tmp_path):
    one, other = python_layout(tmp_path / "a"), binary_layout(tmp_path / "b")
    assert cifar10(one).fingerprint == cifar10(other).fingerprint


def test_torchvision_reads_the_layout_that_the_tests_write(tmp_path, monkeypatch):
    from _torchvision import torchvision

    python_layout(tmp_path / "cifar-10-batches-py")
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "_check_integrity", lambda self: True)
    monkeypatch.setattr(kind, "_load_meta", lambda self: None)
    theirs, ours = kind(str(tmp_path)), cifar10(tmp_path).train
    assert (
        torch.equal(torch.from_numpy(theirs.data).permute(0, 3, 1, 2), ours.images)
        and theirs.targets == ours.labels.tolist()
    )


def test_a_pickle_of_python_2_is_read(tmp_path):
    """The kind that the archive holds: its strings are bytes."""
    where = python_layout(tmp_path / "cifar")
    pixels, labels = records(9)
    raw = "".join(f"\\x{byte:02x}" for byte in pixels.flatten().tolist())
    array = (
        "cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
        f"(I1\n(I{PER_FILE}\nI{PIXELS}\ntcnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntbI00\nS'{raw}'\ntb"
    )
    listed = "(l" + "".join(f"I{label}\na" for label in labels)
    (where / "test_batch").write_text(f"(dS'data'\n{array}sS'labels'\n{listed}s.")
    found = cifar10(where).test
    assert torch.equal(found.images, pixels.view(-1, 3, 32, 32)) and found.labels.tolist() == labels


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_names_a_function_is_refused_and_runs_nothing(tmp_path):
    where, harmed = python_layout(tmp_path / "cifar"), tmp_path / "harmed"
    for content in (
        pickle.dumps({b"data": Bomb(harmed), b"labels": []}),
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n.",
    ):
        (where / "data_batch_3").write_bytes(content)
        with pytest.raises(ArgumentError, match=r"which CIFAR-10 files never contain; refusing to read it"):
            cifar10(where)
    assert not harmed.exists()


def damaged(where):
    """Files that are not CIFAR-10's, and what is said about each."""
    numpy = pytest.importorskip("numpy", reason="the package numpy is not installed")
    good = numpy.zeros((2, PIXELS), numpy.uint8)
    yield b"", "cannot be read"
    yield (where / "data_batch_1").read_bytes()[:1000], "cannot be read"
    for batch, words in (
        ([1, 2], "must hold the array"), ({b"data": good}, "must hold the array"),
        ({b"data": b"raw", b"labels": [1]}, "must hold the array"),
        ({b"data": good, b"labels": ["cat", 1]}, "must hold the array"),
        ({b"data": good, b"labels": [1]}, "a label for each image"),
        ({b"data": good, b"labels": [1, 10]}, "labels from 0 to 9"),
        ({b"data": good.astype("float32"), b"labels": [1, 1]}, "of 3072 bytes"),
        ({b"data": good[:, :9], b"labels": [1, 1]}, "of 3072 bytes"),
    ):  # fmt: skip
        yield pickle.dumps(batch, 2), words


def test_damaged_files_are_told(tmp_path):
    where = python_layout(tmp_path / "cifar")
    for content, words in damaged(where):
        (where / "data_batch_2").write_bytes(content)
        with pytest.raises(ArgumentError, match=words) as told:
            cifar10(where)
        assert "data_batch_2" in str(told.value)
    (where / "data_batch_2").unlink()
    with pytest.raises(ArgumentError, match="data_batch_2 is missing"):
        cifar10(where)
    binary = binary_layout(tmp_path / "binary")
    (binary / "test_batch.bin").write_bytes(bytes(100))
    with pytest.raises(ArgumentError, match="records of 3073 bytes, got 100"):
        cifar10(binary)
    with pytest.raises(ArgumentError, match="nothing is downloaded"):
        cifar10(tmp_path)


def picture(path, colour, size=(40, 30), kind="PNG"):
    Image = pytest.importorskip("PIL.Image", reason="the package pillow is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, kind)


def two_classes(path, count=5):
    for number in range(count):
        picture(path / "red" / f"{number}.png", (200 + number, 0, 0))
        picture(path / "blue" / f"{number}.jpg", (0, 0, 200 + number), (31, 57), "JPEG")
    return path


def test_a_folder_without_a_test_part_is_split_class_by_class(tmp_path):
    found = folder(two_classes(tmp_path), size=16)
    assert found.classes == ("blue", "red") and found.counts() == (8, 2)
    x, labels = found.test.__getitems__([(0, 0), (0, 1)])
    assert x.shape == (2, 3, 16, 16) and sorted(labels.tolist()) == [0, 1]
    for image, label in zip(x, labels, strict=True):
        shown = image * torch.tensor(images.DEVIATION).view(3, 1, 1) + torch.tensor(images.MEAN).view(3, 1, 1)
        assert shown.mean((1, 2)).argmax() == (2 if label == 0 else 0)
    assert folder(tmp_path, size=16).fingerprint == found.fingerprint


def test_a_folder_with_a_test_part_is_taken_as_it_is(tmp_path):
    two_classes(tmp_path / "train"), two_classes(tmp_path / "val", 2)
    assert folder(tmp_path, size=16).counts() == (10, 4)


def test_crops_are_what_pillow_and_torchvision_make(tmp_path):
    from _torchvision import torchvision
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (64, 96, 3), dtype=torch.uint8, generator=generator)
    path = tmp_path / "noise.png"
    Image.frombytes("RGB", (96, 64), bytes(noise.flatten().tolist())).save(path)
    x, _ = images.Files([(path, 0)], 56, augment=False, seed=0).__getitems__([(0, 0)])
    transforms = torchvision.transforms
    theirs = transforms.Compose([
        transforms.Resize(64), transforms.CenterCrop(56), transforms.ToTensor(),
        transforms.Normalize(images.MEAN, images.DEVIATION),
    ])(Image.open(path))  # fmt: skip
    assert torch.allclose(x[0], theirs, atol=1e-6)


def test_what_is_drawn_depends_on_seed_epoch_and_image_alone(tmp_path):
    two_classes(tmp_path)
    gradient = [bytes([x, y, 0]) for y in range(30) for x in range(40)]
    for file in (tmp_path / "red").iterdir():
        pytest.importorskip("PIL.Image").frombytes("RGB", (40, 30), b"".join(gradient)).save(file)
    for make in (lambda seed: folder(tmp_path, 16, seed=seed).train, shifted):
        dataset, keys = make(0), [(3, index) for index in range(len(make(0)))]
        one = dataset.__getitems__(keys)[0]
        assert torch.equal(one, dataset.__getitems__(keys)[0])
        assert torch.equal(one[1:], dataset.__getitems__(keys[1:])[0])
        assert not torch.equal(one, dataset.__getitems__([(4, index) for _, index in keys])[0])
        assert not torch.equal(one, make(1).__getitems__(keys)[0])


def shifted(seed):
    pixels = torch.arange(8 * 3 * 32 * 32).view(8, 3, 32, 32) % 251
    ones = torch.ones(1, 3, 1, 1)
    return data.Arrays(pixels.to(torch.uint8), torch.arange(8), 0 * ones, ones, shift=4, flips=True, seed=seed)


def test_the_shift_pads_with_zeros_and_mirrors_half():
    dataset = shifted(0)
    plain = dataset.images.float()
    seen, mirrored = set(), 0
    for epoch in range(40):
        x = dataset.__getitems__([(epoch, 0)])[0][0]
        flipped = [x.flip(2), x]
        padded = torch.nn.functional.pad(plain[0], (4, 4, 4, 4))
        places = [
            (t, s, f)
            for t in range(9)
            for s in range(9)
            for f in (0, 1)
            if torch.equal(padded[:, t : t + 32, s : s + 32], flipped[1 - f])
        ]
        assert len(places) == 1, "every crop is a shift of the image, mirrored or not"
        seen.add(places[0][:2])
        mirrored += places[0][2]
    assert len(seen) > 20 and 10 < mirrored < 30


def broken_folders(path):
    """What is wrong with a folder, and the words that say so."""
    empty = path / "empty"
    empty.mkdir()
    yield empty, "at least two classes, got none"
    picture(path / "one" / "red" / "1.png", "red")
    yield path / "one", "at least two classes, got one, red"
    (path / "hollow" / "a").mkdir(parents=True), (path / "hollow" / "b").mkdir()
    yield path / "hollow", r"no training image of 2 classes \('a', 'b'\)"
    single = two_classes(path / "single")
    for file in sorted((single / "red").iterdir())[1:]:
        file.unlink()
    yield single, "no test image of class 'red'"
    split = two_classes(path / "split" / "train").parent
    picture(split / "test" / "red" / "1.png", "red")
    yield split, "no test image of class 'blue'"
    picture(split / "test" / "blue" / "1.png", "blue"), picture(split / "test" / "green" / "1.png", "green")
    yield split, "class 'green', unknown in"
    yield path / "nowhere", "must name a directory"


def test_bad_folders_are_told(tmp_path):
    for path, words in broken_folders(tmp_path):
        with pytest.raises(ArgumentError, match=words):
            folder(path, 16)


def test_corrupt_images_are_left_out_and_counted_or_refused(tmp_path):
    from PIL import Image

    two_classes(tmp_path)
    whole = (tmp_path / "red" / "0.png").read_bytes()
    (tmp_path / "red" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "red" / "text.jpg").write_text("no picture")
    (tmp_path / "red" / "nothing.png").write_bytes(b"")
    Image.new("I;16", (20, 20), 30000).save(tmp_path / "red" / "deep.png")
    found = folder(tmp_path, 16)
    assert found.notes["skipped"] == [f"red/{name}" for name in ("cut.png", "deep.png", "nothing.png", "text.jpg")]
    assert sum(found.counts()) == 10
    with pytest.raises(ArgumentError, match=r"red/cut\.png cannot be read .* without --strict it is left out"):
        folder(tmp_path, 16, strict=True)


def test_batches_cover_an_epoch_and_are_shared_out_evenly():
    whole = data.batches(50, 8, seed=1, epoch=2)
    assert len(whole) == 6 and len({index for batch in whole for _, index in batch}) == 48
    assert data.batches(50, 8, seed=1, epoch=2, skip=4) == whole[4:]
    halves = [data.batches(50, 8, seed=1, epoch=2, rank=rank, world=2) for rank in (0, 1)]
    assert [sorted(a + b) for a, b in zip(*halves, strict=True)] == [sorted(batch) for batch in whole]
    assert data.batches(50, 8, seed=1, epoch=3) != whole != data.batches(50, 8, seed=2, epoch=2)
    assert sorted(data.in_order(7, 2, rank=0, world=2)[0] + data.in_order(7, 2, rank=1, world=2)[0]) == [
        (0, i) for i in range(4)
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing_and_leave_the_models_chance_alone():
    dataset, chosen = shifted(0), data.batches(8, 4, seed=0, epoch=0)
    torch.manual_seed(5)
    one, other = (list(data.loader(dataset, chosen, workers, False)) for workers in (0, 2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
    drawn = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(drawn, torch.rand(3)) and isinstance(data.loader(dataset, chosen, 0, False), DataLoader)


def test_digits_are_split_without_overlap():
    pytest.importorskip("sklearn", reason="the package scikit-learn is not installed")
    found = digits()
    assert found.counts() == (1438, 359) and found.size == 8
    rows = [{image.numpy().tobytes() for image in half.images} for half in (found.train, found.test)]
    assert len(rows[0] | rows[1]) > 1790
    assert digits(16, channels=3).train.images.shape == (1438, 3, 16, 16)
