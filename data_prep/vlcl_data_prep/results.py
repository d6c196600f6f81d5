"""Results of finished shards, kept in a hidden folder beside a command's output until that is whole: a command that was
interrupted goes on from them.

    .verify.tsv.shards/4f0c....safetensors    of a shard: facts as JSON, and arrays of 64-bit numbers

A file is named by what the result depends on: the command and its options, vlcl's version, the path or url of the shard
and, on this machine, its size and time. No pickle: whoever may write there still runs nothing.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
from array import array
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlcl import __version__
from vlcl.data.archive import local_path
from vlcl.data.urls import lasting
from vlcl.errors import UserError, counted, first_line, reason
from vlcl.files import replacing_file

Parts = tuple[Any, Mapping[str, array]]  # what JSON holds, and arrays of "Q"
LOCK = ".lock"
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Form:
    """How a result is kept. `parts_of` gives None for one that may be another the next time (a shard that could not be
    read): such a shard is read again."""

    parts_of: Callable[[Any], Parts | None]
    result_of: Callable[[Any, Mapping[str, array]], Any]


class Results:
    """key: what all results depend on beside their shards."""

    def __init__(self, folder: Path, form: Form, key: str) -> None:
        self.folder, self.form, self.key = folder, form, f"{__version__} {key}"
        self.finished = {path.stem for path in folder.glob("*.safetensors")}
        self._names: dict[str, str] = {}

    def __contains__(self, item: Any) -> bool:
        return self._name(item) in self.finished

    def save(self, item: Any, result: Any) -> bool:
        """Whether it is kept."""
        from safetensors import SafetensorError
        from safetensors.numpy import save_file

        parts = self.form.parts_of(result)
        if parts is None:
            return False
        import numpy as np

        facts, arrays = parts
        try:
            with replacing_file(self.folder / f"{self._name(item)}.safetensors") as temporary:
                values = {name: np.frombuffer(value, np.uint64) for name, value in arrays.items()}
                save_file(values, temporary, {"facts": json.dumps(facts)})
        except (OSError, SafetensorError) as error:
            logger.warning("%s: %s; what is finished is not kept", self.folder, first_line(error))
            return False
        self.finished.add(self._name(item))
        return True

    def load(self, item: Any) -> Any | None:
        """None where the file is damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.folder / f"{self._name(item)}.safetensors"
        try:
            with safe_open(path, "numpy") as file:
                facts = json.loads(file.metadata()["facts"])
                arrays = {name: array("Q", file.get_tensor(name).tobytes()) for name in file.keys()}  # noqa: SIM118
                return self.form.result_of(facts, arrays)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s cannot be read (%s): its shard is read again", path, first_line(error))
            return None

    def _name(self, item: Any) -> str:
        if not isinstance(item, str):
            return _hash([self.key, repr(item)])
        if item not in self._names:
            facts: list[Any] = [self.key, lasting(item)]
            if (path := local_path(item)) is not None:
                with suppress(OSError):  # what reads the shard will say it
                    stat = os.stat(path)
                    facts = [self.key, os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
            self._names[item] = _hash(facts)
        return self._names[item]


def _hash(facts: list[Any]) -> str:
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


@contextmanager
def kept_results(output: str, form: Form, key: str) -> Iterator[Results]:
    """The results that belong to an output file, gone when the block ends well. UserError where another process works
    on the same output."""
    folder = Path(output).absolute().with_name(f".{Path(output).name}.shards")
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / LOCK, timeout=0)
        lock.acquire()
    except Timeout:
        raise UserError(f"another process works on {output}: wait for it, stop it, or give another --output") from None
    except OSError as error:
        raise UserError(f"cannot write {folder}: {reason(error)}; give another --output") from None
    try:
        yield Results(folder, form, key)
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        if number := len(list(folder.glob("*.safetensors"))):
            print(f"{counted(number, 'shard')} kept: the same command goes on from there", file=sys.stderr, flush=True)
        raise
    finally:
        lock.release()
        with suppress(OSError):
            (folder / LOCK).unlink(missing_ok=True)
            folder.rmdir()  # OSError where there is more in it
