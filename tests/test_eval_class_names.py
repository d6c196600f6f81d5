"""Data sets, class names and templates are the benchmark's, and labels are matched by name or refused."""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from vlcl.errors import UserError
from vlcl_eval.datasets import class_names as module
from vlcl_eval.datasets.class_names import class_names, match_labels, templates
from vlcl_eval.datasets.registry import Benchmark, SplitFiles, benchmarks, find_benchmark, read_registry

REFERENCE = Path(__file__).parents[2] / "shared" / "reference" / "elevater_prompts.json"
ALL = [*(benchmark.name for benchmark in benchmarks()), "imagenet-1k"]
SPLITS = ("train", "val", "test")

# foolbox's sample pictures, as a person saw them; the last number of a name is the data set's own label
CIFAR10_SEEN = {
    "cifar10_00_3.png": "cat", "cifar10_01_8.png": "ship", "cifar10_03_0.png": "airplane", "cifar10_04_6.png": "frog",
    "cifar10_06_1.png": "automobile", "cifar10_11_9.png": "truck", "cifar10_12_5.png": "dog",
    "cifar10_13_7.png": "horse",
}  # fmt: skip
IMAGENET_SEEN = {
    "imagenet_01_559.jpg": "folding chair", "imagenet_02_438.jpg": "beaker",
    "imagenet_03_990.jpg": "horse chestnut seed", "imagenet_04_949.jpg": "strawberry", "imagenet_06_609.jpg": "jeep",
    "imagenet_08_915.jpg": "yurt", "imagenet_09_455.jpg": "bottle cap", "imagenet_10_541.jpg": "drum",
    "imagenet_13_471.jpg": "cannon", "imagenet_15_99.jpg": "goose", "imagenet_16_251.jpg": "Dalmatian",
    "imagenet_17_22.jpg": "bald eagle",
}  # fmt: skip
CIFAR100_SEEN = {
    "cifar100_00_49.png": "mountain", "cifar100_02_72.png": "seal", "cifar100_03_51.png": "mushroom",
    "cifar100_04_71.png": "sea", "cifar100_05_92.png": "tulip", "cifar100_06_15.png": "camel",
    "cifar100_09_0.png": "apple", "cifar100_11_75.png": "skunk", "cifar100_12_81.png": "streetcar",
    "cifar100_13_69.png": "rocket", "cifar100_14_40.png": "lamp", "cifar100_15_43.png": "lion",
    "cifar100_17_97.png": "wolf", "cifar100_18_70.png": "rose", "cifar100_19_53.png": "orange",
}  # fmt: skip


def names_of(name: str) -> list[str]:
    names = class_names(name)
    assert names is not None
    return names


def test_totals_are_the_published_ones() -> None:
    twenty = benchmarks()
    sizes = [{split: b.splits[split].num_images for split in SPLITS if split in b.splits} for b in twenty]
    assert len(twenty) == 20
    assert sum(b.num_classes for b in twenty) == 1151
    assert sum(size["train"] for size in sizes) == 638_429
    assert sum(size["test"] for size in sizes) == 192_677
    assert sum(len(templates(b.name)) for b in twenty) == 132
    assert sum(len(templates(b.name)) * b.num_classes for b in twenty) == 9_938


def test_every_data_set_is_consistent() -> None:
    for benchmark in map(find_benchmark, ALL):
        assert len(names_of(benchmark.name)) == benchmark.num_classes, benchmark.name
        assert all("{}" in template and "{c}" not in template for template in templates(benchmark.name))
        assert benchmark.metric in ("accuracy", "mean_per_class", "roc_auc", "11point_map")
        assert (benchmark.format == "coco") == (benchmark.labels is None)
        assert set(benchmark.splits) <= set(SPLITS)
        for wds in benchmark.wds:
            same_size = wds.num_test == benchmark.splits["test"].num_images
            assert same_size == (wds.note is None), f"{wds.folder}: the note is for another size"
    keys = [key for b in map(find_benchmark, ALL) for key in {module._letters(name) for name in (b.name, *b.aliases)}]
    assert len(set(keys)) == len(keys), "two data sets have the same alias"


def test_what_only_few_data_sets_have() -> None:
    twenty = benchmarks()
    assert [b.name for b in twenty if b.multilabel] == ["voc-2007-classification"]
    assert [b.name for b in twenty if not b.center_crop] == ["kitti-distance"]
    assert [b.name for b in twenty if b.metric == "roc_auc"] == ["hateful-memes"]
    assert [b.name for b in twenty if b.metric == "mean_per_class"] == [
        "caltech-101", "fgvc-aircraft-2013b-variants102", "oxford-flower-102", "oxford-iiit-pets"
    ]  # fmt: skip
    assert find_benchmark("mnist").root_folder == "classification/mnist_20211008"
    assert find_benchmark("mnist").splits["test"] == SplitFiles("test.txt", ("val.zip",), 10_000)
    assert find_benchmark("gtsrb").labels == "labelmap.txt"
    assert list(find_benchmark("imagenet-1k").splits) == ["test"], "for zero-shot only"


def test_a_data_set_is_found_by_any_of_its_names() -> None:
    aliases = ("Flower102", "CIFAR_10", "cifar10", "eurosat-clip", "stanfordcar", "fgvc-aircraft-2013b", "ImageNet 1k")
    assert [find_benchmark(alias).name for alias in aliases] == [
        "oxford-flower-102", "cifar-10", "cifar-10", "eurosat_clip", "stanford-cars", "fgvc-aircraft-2013b-variants102",
        "imagenet-1k",
    ]  # fmt: skip


def test_an_unknown_data_set_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(UserError, match=r"'stanford-crs'.*did you mean stanford-cars\?") as error:
        find_benchmark("stanford-crs")
    assert all(name in str(error.value) for name in ALL)


def entry(**changes: object) -> dict[str, object]:
    usual = {
        "name": "leaves", "version": 1, "type": "classification_multiclass", "root_folder": "leaves_1",
        "labelmap": "labels.txt", "num_classes": 3,
        "train": {"index_path": "train.txt", "files_for_local_usage": ["train.zip"], "num_images": 30},
        "test": {"index_path": "test.txt", "files_for_local_usage": ["a.zip", "b.zip"], "num_images": 12},
    }  # fmt: skip
    return {key: value for key, value in {**usual, **changes}.items() if value is not None}


def registry(folder: Path, *entries: object) -> dict[str, Benchmark]:
    path = folder / "vision_datasets.json"
    path.write_text(json.dumps(list(entries)), encoding="utf-8")
    return read_registry(path)


def test_a_registry_gives_data_sets_of_ones_own(tmp_path: Path) -> None:
    found = registry(tmp_path, entry(), entry(name="tags", type="classification_multilabel", format="coco"))
    leaves, tags = found["leaves"], found["tags"]
    assert (leaves.metric, leaves.multilabel, leaves.center_crop, leaves.in_average) == ("accuracy", False, True, False)
    assert (leaves.format, leaves.root_folder, leaves.labels) == ("iris", "leaves_1", "labels.txt")
    assert list(leaves.splits) == ["train", "test"]
    assert leaves.splits["test"] == SplitFiles("test.txt", ("a.zip", "b.zip"), 12)
    assert (tags.metric, tags.multilabel, tags.format, tags.labels) == ("11point_map", True, "coco", None)


@pytest.mark.parametrize("versions", [(2, 10), (10, 2)])
def test_the_highest_version_counts(tmp_path: Path, versions: tuple[int, int]) -> None:
    entries = [entry(version=version, root_folder=f"leaves_{version}") for version in versions]
    broken = entry(num_classes="three")
    assert registry(tmp_path, broken, *entries)["leaves"].root_folder == "leaves_10"


def test_a_known_name_keeps_the_benchmarks_metric_and_preprocessing(tmp_path: Path) -> None:
    test = {"index_path": "mine.json", "files_for_local_usage": ["mine.zip"], "num_images": 20}
    train = {"index_path": "train.json", "files_for_local_usage": ["train.zip"], "num_images": 0}
    changes = {"root_folder": "mine", "format": "coco", "labelmap": None, "num_classes": None}
    kitti = entry(name="kitti-distance", test=test, train=train, **changes)
    found = registry(tmp_path, kitti, entry(name="hateful-memes", **{**changes, "num_classes": 2}))
    assert (found["kitti-distance"].center_crop, found["kitti-distance"].num_classes) == (False, 4)
    assert found["kitti-distance"].in_average
    assert list(found["kitti-distance"].splits) == ["test"], "a split of 0 images is none"
    assert found["kitti-distance"].splits["test"].index == "mine.json"
    assert found["hateful-memes"].metric == "roc_auc"


def test_other_tasks_are_left_out(tmp_path: Path) -> None:
    boxes = {"name": "boxes", "version": 1, "type": "object_detection"}
    assert list(registry(tmp_path, boxes, entry(), {**boxes, "name": "both", "type": {"a": "b"}})) == ["leaves"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": None}, "entry 2: name is missing"),
        ({"root_folder": None}, r"entry 2 \(ferns\): root_folder is missing"),
        ({"labelmap": None}, "labelmap is missing"),
        ({"num_classes": None}, "num_classes is missing"),
        ({"num_classes": "3"}, "num_classes is '3'; it must be a whole number"),
        ({"version": True}, "version is True; it must be a whole number"),
        ({"type": "classification"}, "type is 'classification'; allowed are classification_multiclass and"),
        ({"type": None}, "type is None"),
        ({"format": "tsv"}, "format is 'tsv'; allowed are iris and coco"),
        ({"test": None}, "no test split"),
        ({"test": "test.txt"}, "test is 'test.txt'; it must be an object"),
        ({"test": {"index_path": "t", "files_for_local_usage": "t.zip"}}, "'t.zip'; it must be a list"),
        ({"train": {"index_path": "t", "num_images": -1}}, "train: num_images is -1"),
        ({"name": "leaves"}, "same name and version 1"),
        ({"name": "trees/ferns"}, "name is 'trees/ferns'.*leave out /"),
        ({"name": "trees,ferns"}, "leave out"),
        ({"name": "../ferns"}, "leave out"),
        ({"name": "cifar-10"}, "3 classes.*has 10.*a name of its own"),
    ],
)
def test_a_wrong_entry_is_named(tmp_path: Path, wrong: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        registry(tmp_path, entry(), entry(**{"name": "ferns", **wrong}))
    assert "vision_datasets.json" in str(error.value)


@pytest.mark.parametrize("content", [b"[{", b"\xff\xfe\x00", b"{}", b"[1]", b"", b"[" * 100_000])
def test_a_file_that_is_no_registry_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "r.json").write_bytes(content)
    with pytest.raises(UserError, match=r"registry .*r\.json (is not JSON|must be a JSON list)"):
        read_registry(tmp_path / "r.json")


@pytest.mark.parametrize(("name", "reason"), [("none.json", "No such file"), (".", "Is a directory")])
def test_a_missing_registry_is_named(tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(UserError, match=f"cannot be read: {reason}"):
        read_registry(tmp_path / name)


@pytest.mark.skipif(not REFERENCE.exists(), reason="the benchmark's own lists are not here")
@pytest.mark.parametrize("name", ALL)
def test_names_and_templates_are_the_benchmarks(name: str) -> None:
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))[name]
    assert class_names(name) == reference["classnames"]
    assert templates(name) == reference["templates"]


def test_orders_that_are_not_the_usual_ones() -> None:
    cifar100, food, caltech = names_of("cifar-100"), names_of("food-101"), names_of("caltech-101")
    assert (cifar100[0], cifar100.index("mountain"), cifar100[99]) == ("chimpanzee", 31, "bicycle")
    assert food[16:18] == ["cheesecake", "cheese plate"]
    assert caltech[36:39] == ["ewer", "centered face", "off-center face"]
    assert names_of("fer-2013") == ["angry", "disgusted", "fearful", "happy", "neutral", "sad", "surprised"]


def test_an_unknown_data_set_has_the_default_template() -> None:
    assert class_names("leaves") is None
    assert templates("leaves") == ["a photo of a {}"]


def test_a_caller_cannot_change_the_lists() -> None:
    for name, first in (("mnist", "0"), ("cifar-10", "airplane")):
        names_of(name).reverse()
        templates(name).clear()
        assert names_of(name)[0] == first
        assert templates(name)
    templates("leaves").clear()
    assert templates("leaves")


def test_without_clip_benchmark_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    module._clip_benchmark.cache_clear()
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)  # as if not installed
    assert names_of("cifar-10")[0] == "airplane", "lists of our own do not need it"
    with pytest.raises(UserError, match=r"pip install 'vlcl\[eval\]'"):
        class_names("mnist")


@pytest.mark.parametrize("lists", [{}, {"mnist": list("0123456798")}])
def test_another_list_of_clip_benchmark_is_refused(monkeypatch: pytest.MonkeyPatch, lists: dict) -> None:
    monkeypatch.setattr(module, "_clip_benchmark", lambda file: lists)
    with pytest.raises(UserError, match=r"'mnist' in clip-benchmark .*type: pip install 'clip-benchmark=="):
        class_names("mnist")
    with pytest.raises(UserError, match=r"'caltech101_vtab' in clip-benchmark"):
        class_names("caltech-101")


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from vlcl_eval.datasets.registry import benchmarks; "
        "from vlcl_eval.datasets.class_names import class_names;"
        "print([len(class_names(b.name)) for b in benchmarks()][0], 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "102 False\n"


def labelled(pattern: str) -> dict[str, int]:
    """File name -> label of foolbox's samples."""
    spec = importlib.util.find_spec("foolbox")
    if spec is None or spec.origin is None:
        pytest.skip("foolbox, which has the pictures, is not installed")
    found = {path.name: int(path.stem.rsplit("_", 1)[1]) for path in (Path(spec.origin).parent / "data").glob(pattern)}
    assert len(found) == 20
    return found


@pytest.mark.parametrize(
    ("name", "pattern", "seen"),
    [("cifar-10", "cifar10_*", CIFAR10_SEEN), ("imagenet-1k", "imagenet_*", IMAGENET_SEEN)],
)
def test_labels_name_what_the_pictures_show(name: str, pattern: str, seen: dict[str, str]) -> None:
    names, label = names_of(name), labelled(pattern)
    assert {file: names[label[file]] for file in seen} == seen


def test_cifar100_pictures_are_named_right_only_by_name() -> None:
    names, label = names_of("cifar-100"), labelled("cifar100_*")
    place = match_labels(sorted(name.replace(" ", "_") for name in names), names, "labels.txt")
    assert {file: names[place[label[file]]] for file in CIFAR100_SEEN} == CIFAR100_SEEN
    assert all(names[label[file]] != seen for file, seen in CIFAR100_SEEN.items()), "by position all are wrong"


@pytest.mark.parametrize("name", [name for name in ALL if name != "imagenet-1k"])
def test_names_in_any_order_and_spelling_find_their_place(name: str) -> None:
    expected = names_of(name)
    order = random.Random(0).sample(range(len(expected)), len(expected))
    written = [f" {expected[index].upper().replace(' ', '_').replace('-', '/')} " for index in order]
    assert match_labels(written, expected, "labels.txt") == order
    assert match_labels(expected, expected, "labels.txt") == list(range(len(expected)))


def test_spellings_that_are_the_same_name() -> None:
    expected = ["F-16A-B", "polka-dotted", "snoopy (cartoon beagle)", "diningtable", "Ram C V Van"]
    found = ["ram c/v van", "dining table", "Snoopy  (Cartoon_Beagle)", "polka dotted", "Ｆ-16A/B"]
    assert match_labels(found, expected, "labels.txt") == [4, 3, 2, 1, 0]


@pytest.mark.parametrize("pattern", ["{}", "{:02}", "{:05}"])
def test_numbers_in_order_stay_in_place(pattern: str) -> None:
    assert match_labels([pattern.format(i) for i in range(37)], names_of("oxford-iiit-pets"), "labels.txt") == [
        *range(37)
    ]


def test_numbers_out_of_order_are_names() -> None:
    as_text = sorted(str(i) for i in range(37))  # 0, 1, 10, 11, ...: how folders are listed
    with pytest.raises(UserError, match="not in the benchmark: '0', '1', '10'"):
        match_labels(as_text, names_of("oxford-iiit-pets"), "labels.txt")
    assert match_labels(list("9876543210"), names_of("mnist"), "labels.txt") == [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]


def test_another_number_of_names_is_refused() -> None:
    with pytest.raises(UserError, match=r"a/labels\.txt: the number of class names is 9, in the benchmark 10"):
        match_labels(names_of("cifar-10")[:9], names_of("cifar-10"), "a/labels.txt")


def test_names_without_partner_are_shown_on_both_sides() -> None:
    with pytest.raises(UserError) as error:
        match_labels([f"class {letter}" for letter in "abcdefg"], names_of("fer-2013"), "fer/labels.txt")
    text = str(error.value)
    assert text.startswith("fer/labels.txt: not in the benchmark: 'class a', 'class b'")
    assert "'class e' and 2 more; only in the benchmark: 'angry'" in text
    assert "Correct the names in fer/labels.txt, or --labels by-position takes their order as the benchmark's" in text


def test_a_few_other_spellings_are_shown_each_with_its_nearest() -> None:
    found = ["Angry", "Disgust", "Fear", "Happy", "Neutral", "Sad", "Surprise"]
    nearest = r"'Disgust' \(nearest: 'disgusted'\), 'Fear' \(nearest: 'fearful'\), 'Surprise' \(nearest: 'surprised'\)"
    with pytest.raises(UserError, match=f"3 of its 7 .*{nearest}; all others stand at the benchmark's place"):
        match_labels(found, names_of("fer-2013"), "labels.txt")
    found = ["Angry", "Disgust", "Fear", "Happy", "Sad", "Surprise", "Neutral"]  # where by-position would be wrong
    with pytest.raises(UserError, match=f"{nearest}; 2 of the names that do match stand at another place"):
        match_labels(found, names_of("fer-2013"), "labels.txt")


def test_punctuation_counts_where_it_alone_tells_names_apart() -> None:
    assert match_labels(["a-b", "a b", "c"], ["A B", "A-B", "C"], "labels.txt") == [1, 0, 2]
    with pytest.raises(UserError, match="more than once"):
        match_labels(["a_b", "a/b", "c"], ["A B", "A-B", "C"], "labels.txt")


def test_a_name_that_stands_twice_is_never_guessed() -> None:
    names = names_of("imagenet-1k")  # "missile" and "sunglasses" stand twice in it
    assert match_labels([name.upper() for name in names], names, "classnames.txt") == list(range(1000))
    with pytest.raises(UserError, match=r"more than once.*'sunglasses', 'missile'"):
        match_labels(names[::-1], names, "classnames.txt")
    with pytest.raises(UserError, match=r"only in the benchmark: 'dog'; more than once.*'cat'"):
        match_labels(["cat", "cat"], ["cat", "dog"], "labels.txt")
