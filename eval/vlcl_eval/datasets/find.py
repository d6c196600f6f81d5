"""Where a data set lies: `find_data_set` takes the first of three forms that it finds under the data root:

    ROOT/classification/mnist_20211008/{train.txt, train.zip, ...}     ELEVATER's own (vlcl_eval/datasets/native.py)
    ROOT/wds_vtab-cifar10/{train,test}/{0..N}.tar                      CLIP_benchmark's (vlcl_eval/datasets/folders.py)
    ROOT/NAME/{train,test}/CLASS/*.jpg                                 a folder a class (vlcl_eval/datasets/folders.py)

Few-shot subsets depend on the order of the images, so only the first form gives the benchmark's own subsets.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from vlcl.errors import UserError
from vlcl_eval.datasets import folders, native
from vlcl_eval.datasets.records import DataSet
from vlcl_eval.datasets.registry import find_benchmark, registered


def open_as_it_is(folder: Path, say: Callable[[str], None]) -> DataSet:
    """A folder of class folders with its own class names and prompts. UserError where it is none."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give one with a folder of pictures for each class, or --data-root DIR")
    if (own := folders.as_it_is(folder)) is None:
        raise UserError(
            f"{folder} has no folder of pictures for each class, nor train, val or test with such folders. If it holds "
            f"the benchmark's data sets: --data-root {folder}"
        )
    data, classes = own
    if classes.note:
        say(f"note: {folder}: {classes.note}")
    if classes.split != "test" and classes.split:
        say(f"note: {folder} has no test folder: {classes.split} is scored")
    return data


class NotThere(UserError):
    """A data set that is in none of the places where it could be."""


def find_data_set(root: Path, name: str, labels: str = "by-name") -> DataSet:
    """The data set `name` under `root`. `labels`: "by-name" maps a folder's class names to the benchmark's by name,
    "by-position" takes them in the order of the folder's own list. UserError where it is not there or not whole."""
    benchmark = registered(root).get(name) or find_benchmark(name)
    for find in (native.find, folders.find_wds, folders.find_class_folders):
        if found := find(root, benchmark, labels):
            return found
    looked = [
        str(root / benchmark.root_folder),
        *(str(root / wds.folder) for wds in benchmark.wds),
        str(root / benchmark.name),
    ]
    raise NotThere(
        f"no {benchmark.name} under {root}; looked for {', '.join(looked)}. What is there: vlcl data elevater {root}"
    )
