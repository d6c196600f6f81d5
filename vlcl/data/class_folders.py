"""A folder with a folder of pictures for each class, as people have it: its splits, its classes in order, and what they
are called in prompts. No torch.

    DIR/CLASS/*.jpg      or      DIR/{train,val,test}/CLASS/*.jpg

Folders called by numbers are in number order. Names stand in a file beside the folders (`NAME_FILES`), a line a class
or "FOLDER NAME"; without one classes are called as their folders, those with WordNet ids as ImageNet calls them.
What looks like a number or an id is never put into a prompt: UserError, or a note where it is one among names.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vlcl.errors import UserError

SUFFIXES = (
    ".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif", ".avif", ".jp2",
)  # fmt: skip
TEST, VAL, TRAIN = ("test",), ("val", "validation", "valid"), ("train", "training")
NAME_FILES = ("labels.txt", "label.txt", "classnames.txt", "class_names.txt", "classes.txt", "names.txt")
TEMPLATE = "a photo of a {}."
WORDNET_ID = re.compile(r"n\d{8}")
_NUMBERED = re.compile(r"\d+[ ._-]+(?=.*[^\W\d_]{2})")  # 001.Black_footed_Albatross
_ID = re.compile(
    r"[a-z]?[ _.-]*\d+|(?:id|idx|cls|class|label|category|cat|folder|dir|group|synset|wnid)[ _.-]*\d+"
    r"|n\d{8}|(?=.*\d)[0-9a-f]{8,}|(?=.*\d)[0-9a-f]{4,}(?:-[0-9a-f]{4,})+",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Classes:
    """The classes of a folder. `folders`: in the order of labels; `names`: of the same order, for prompts; `note`: what
    a user should know of them, "" where they are called as their folders."""

    root: Path
    split: str
    folders: tuple[str, ...]
    names: tuple[str, ...]
    templates: tuple[str, ...]
    note: str = ""

    def pictures(self) -> list[tuple[Path, int]]:
        """Files and labels, by class and then by name."""
        return [(path, label) for label, name in enumerate(self.folders) for path in pictures_in(self.root / name)]


def pictures_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def split_folders(folder: Path) -> dict[str, Path]:
    """The splits that are there, by their folders' names; {"": folder} where the classes lie in `folder` itself."""
    found = {name: folder / name for name in (*TEST, *VAL, *TRAIN) if _holds_classes(folder / name)}
    return found or ({"": folder} if _holds_classes(folder) else {})


def _holds_classes(root: Path) -> bool:
    below = (path for path in root.iterdir() if path.is_dir()) if root.is_dir() else ()
    return any(path.suffix.lower() in SUFFIXES for one in below for path in one.iterdir())


def find_classes(folder: Path, splits: Sequence[str]) -> Classes | None:
    """The classes of the first of `splits` that is there, or of the folder itself; None where there are none.

    UserError for other splits, for one class, and where what classes are called cannot be known.
    """
    there = split_folders(folder)
    if not there:
        return None
    split = next((name for name in splits if name in there), "")
    if split not in there:
        raise UserError(f"{folder} has {' and '.join(there)}, and no {' or '.join(splits)}")
    folders = in_order([x.name for x in there[split].iterdir() if x.is_dir() and not x.name.startswith(".")])
    if len(folders) < 2:
        raise UserError(f"{there[split]} holds one class, {folders[0]!r}; at least two are needed")
    names, templates, note = called(folders, there[split], folder)
    empty = [name for name in folders if not pictures_in(there[split] / name)]
    if empty:
        note += f"{'; ' * bool(note)}no picture in {_some(empty)}"
    if split and split not in TEST + VAL:
        note += f"{'; ' * bool(note)}the pictures are those of {split}"
    return Classes(there[split], split, tuple(folders), tuple(names), tuple(templates), note)


def in_order(folders: Sequence[str]) -> list[str]:
    """Numbers by their value, anything else by the letters."""
    return sorted(folders, key=(lambda x: (int(x), x)) if all(map(_is_number, folders)) else str)


def called(folders: Sequence[str], root: Path, folder: Path) -> tuple[list[str], list[str], str]:
    """Names, templates, and a note, of class folders in `root`; a file of names is looked for there and in `folder`."""
    if file := names_file(root, folder):
        return names_of(file, folders), [TEMPLATE], f"class names are those of {file}"
    ids = [name for name in folders if WORDNET_ID.fullmatch(name)]
    if ids:
        names = imagenet_names(folders)
        if len(ids) == len(folders):
            return names, imagenet_templates(), (
                f"folders called by WordNet ids get ImageNet's names ({_some(names[:3])}, ...) and its 80 templates"
            )  # fmt: skip
        return names, [TEMPLATE], f"folders called by WordNet ids get ImageNet's names: {_some(imagenet_names(ids))}"
    if strange := [name for name in folders if _ID.fullmatch(name)]:
        how = f"write the names into {root / NAME_FILES[0]}, a line for each: FOLDER NAME"
        if len(strange) == len(folders):
            raise UserError(
                f"the folders of {root} are called {_some(strange)}: a prompt with a number or an id means nothing; "
                f"{how}"
            )
        return _plain(folders), [TEMPLATE], f"{_some(strange)} of {root} may be no names; if so, {how}"
    if all(map(_NUMBERED.match, folders)):
        names = _plain([_NUMBERED.sub("", name) for name in folders])
        return names, [TEMPLATE], f"the numbers before the names of classes are left out: {_some(names[:3])}, ..."
    return _plain(folders), [TEMPLATE], ""


def names_file(root: Path, folder: Path) -> Path | None:
    """The file of class names beside the folders, or one level up."""
    places = (place / name for place in dict.fromkeys((root, folder)) for name in NAME_FILES)
    return next((path for path in places if path.is_file()), None)


def names_of(file: Path, folders: Sequence[str]) -> list[str]:
    """The name of each folder: by lines "FOLDER NAME", by the line of its number (from 0, or from 1), or its own where
    the file has the same names. UserError where the file has none for it."""
    lines = read_names(file)
    pairs = (re.split(r"[\s,;:=]+", line, maxsplit=1) for line in lines)
    cut = {pair[0]: pair[1] for pair in pairs if len(pair) == 2}
    if all(name in cut for name in folders):
        return [cut[name].split(",")[0].strip() if WORDNET_ID.fullmatch(name) else cut[name] for name in folders]
    if all(map(_is_number, folders)):
        numbers = [int(name) for name in folders]
        first = 1 if min(numbers) == 1 and max(numbers) == len(lines) else 0
        if max(numbers) - first < len(lines):
            return [lines[number - first] for number in numbers]
        raise UserError(
            f"{file} has {len(lines)} names; the folders of {file.parent} should be numbered 0..{len(lines) - 1}"
        )
    by_name = {_plain([line])[0].casefold(): line for line in lines}
    if all(_plain([name])[0].casefold() in by_name for name in folders):
        return [by_name[_plain([name])[0].casefold()] for name in folders]
    lacking = [name for name in folders if name not in cut and _plain([name])[0].casefold() not in by_name]
    raise UserError(f"{file} does not say what the folder {lacking[0]} is called; write a line for each: FOLDER NAME")


def read_names(path: Path) -> list[str]:
    """A line a class: a blank one would move the labels after it."""
    try:
        names = [line.strip() for line in path.read_text("utf-8-sig").rstrip().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if "" in names:
        raise UserError(f"{path}, line {names.index('') + 1} is blank: label {names.index('')} would have no name")
    return names


def imagenet_names(folders: Sequence[str]) -> list[str]:
    """open_clip's names of ImageNet's classes for WordNet ids, other folders by their own. UserError for an id that is
    none of ImageNet's 1,000."""
    import open_clip
    from timm.data.imagenet_info import ImageNetInfo

    known = dict(zip(ImageNetInfo().label_names(), open_clip.IMAGENET_CLASSNAMES))
    if unknown := [name for name in folders if WORDNET_ID.fullmatch(name) and name not in known]:
        raise UserError(
            f"the folder {unknown[0]} is called by a WordNet id that is none of ImageNet's 1,000 classes: a prompt "
            f"with an id means nothing. Rename the folder, or write the names into {NAME_FILES[0]} beside the folders, "
            "a line for each: FOLDER NAME"
        )
    return [known.get(name) or _plain([name])[0] for name in folders]


def imagenet_templates() -> list[str]:
    """OpenAI's 80 for ImageNet, with `{}` for the class."""
    import open_clip

    return [template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES]


def _plain(folders: Sequence[str]) -> list[str]:
    return [name.replace("_", " ") for name in folders]


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
