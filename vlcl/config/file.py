"""A YAML file and `key=value` overrides -> one nested mapping, not yet checked. schema.py checks it.

YAML as people write it: `1e-3` is a number, a key given twice is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from vlcl.config.errors import Problem
from vlcl.errors import UserError

RIVALS = {"train.steps": "train.epochs", "train.epochs": "train.steps"}  # an override of one takes back the other


FLOAT = re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$")  # PyYAML takes 1e-3 for text,
BASE_60 = re.compile(r"^[-+]?\d+(:\d+)+(\.\d*)?$")  # and 3:20 for a number


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with numbers as in YAML 1.2 (3:20 is not 200), dates as text, and no key twice."""


class Dumper(yaml.SafeDumper):
    """Writes what Loader reads back."""


for _kind in (Loader, Dumper):
    _kind.add_implicit_resolver("tag:yaml.org,2002:float", FLOAT, list("-+.0123456789"))
Loader.yaml_implicit_resolvers = {
    first: [("tag:yaml.org,2002:str", BASE_60), *(x for x in resolvers if not x[0].endswith(":timestamp"))]
    for first, resolvers in Loader.yaml_implicit_resolvers.items()
}


def _mapping(loader: Loader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be a word", key_node.start_mark)
        if key_node.value in seen:
            text = f"key {key_node.value!r} is given twice"
            raise yaml.constructor.ConstructorError(None, None, text, key_node.start_mark)
        seen.add(key_node.value)
    loader.flatten_mapping(node)
    return {str(loader.construct_object(k, deep=True)): loader.construct_object(v, deep=True) for k, v in node.value}


Loader.add_constructor("tag:yaml.org,2002:map", _mapping)


def _load(text: str) -> Any:
    """What PyYAML makes of a text. YAMLError, too, where its constructors or the stack give up: `!!int x`, `0x_`."""
    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise yaml.YAMLError(f"a value cannot be read: {error}") from None


def shipped_configs() -> dict[str, Path]:
    """The experiments that come with vlcl, by name: `vlcl train openmoji` works wherever it is typed."""
    folder = Path(str(resources.files("vlcl_configs")))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def read_file(path: Path) -> dict[str, Any]:
    """The nested mapping in a YAML file, or in the shipped one of that name. UserError where it is not YAML."""
    if not path.is_file() and str(path) in shipped_configs():
        path = shipped_configs()[str(path)]
    if not path.is_file():
        raise UserError(f"there is no config file {str(path)!r}{_nearby(path)}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; give a YAML config such as configs/openmoji.yaml") from error
    try:
        values = _load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}{_yaml_mistake(error, text)}") from error
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no sections; it must look like\ndata:\n  train: SHARDS")
    return values


def merge(
    values: dict[str, Any],
    overrides: Sequence[str],
    known: set[str],
    sections: Sequence[str],
    unknown: Callable[[str], Problem],
) -> list[Problem]:
    """Write `section.key=value` overrides into `values`, the later over the earlier; returns the mistakes in them.

    An override of `loss.name` drops the file's settings of the loss it replaces, as these belong to that loss; one of
    `train.steps` drops an earlier `train.epochs`, and the other way round.
    """
    problems, parsed = [], []
    for override in overrides:
        key, equals, text = override.partition("=")
        key = key.strip()
        if not equals:
            problems.append(Problem((key,), f"{override!r}: an override looks like key=value, e.g. train.steps=100"))
        elif key not in known and key not in sections:
            problems.append(unknown(key))
        else:
            try:
                parsed.append((key, parse_value(text)))
            except yaml.YAMLError as error:
                problems.append(Problem((key,), f"{key}: {text!r} is not YAML{_yaml_mistake(error, text)}"))
    loss, new_names = values.get("loss"), [value for key, value in parsed if key == "loss.name"]
    if isinstance(loss, dict) and new_names and loss.get("name") != new_names[-1]:
        values["loss"] = {}
    for key, value in parsed:
        section, _, name = key.rpartition(".")
        target = values.setdefault(section, {}) if section else values
        if isinstance(target, dict):  # otherwise the section itself is wrong, and is reported as such
            target[name] = value
            if value is not None and key in RIVALS:
                target.pop(RIVALS[key].rpartition(".")[2], None)
    return problems


def parse_value(text: str) -> Any:
    """The value of an override: YAML, except that a pattern such as `{0000..0331}.tar` or `*.tar` is text."""
    try:
        return _load(text)
    except yaml.YAMLError:
        if text.lstrip()[:1] in ("[", '"', "'"):
            raise
        return text


def dump(values: dict[str, Any]) -> str:
    """YAML of a nested mapping, in its order."""
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)


def _yaml_mistake(error: yaml.YAMLError, text: str) -> str:
    """Place and reason, and what helps in the case that shard patterns fall into."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    if mark is None:
        return f": {problem}"
    line = text.splitlines()[mark.line] if mark.line < len(text.splitlines()) else ""
    hint = f"; put the text after the colon in quotes: {line.strip()}" if re.search(r":\s+[{*&%@`]", line) else ""
    return f", line {mark.line + 1}, column {mark.column + 1}: {problem}{hint}"


def _nearby(path: Path) -> str:
    """What may have been meant: the file's near namesakes in its own folder and in configs/."""
    if (path / "config.yaml").is_file():
        return f", which is a folder; the settings of that run are in {str(path / 'config.yaml')!r}"
    if "=" in path.name:
        return "; the first argument is the config file, overrides follow it"
    found: dict[str, Any] = {name: name for name in shipped_configs()}
    found |= {p.stem: p for folder in (Path("configs"), path.parent) for p in folder.glob("[!.]*.yaml")}
    if near := get_close_matches(path.stem, found, n=1):
        return f"; did you mean {str(found[near[0]])!r}?"
    return f"; there are: {', '.join(sorted(map(str, found.values())))}" if found else ""
