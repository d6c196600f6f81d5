"""Whether what `data.cache` keeps has room, in memory or on a disk."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import psutil

from vlcl.errors import UserError, counted

MEMORY = "memory"  # the value of data.cache that is no folder
SHARE = 0.5  # of the memory that is free, for the caches of all ranks of a machine together


@dataclass(frozen=True)
class Room:
    """What may be taken for the pairs of the setting `key`, in bytes, and how the error tells of it."""

    key: str
    place: str
    limit: int
    told: str

    @classmethod
    def in_memory(cls, key: str, ranks: int) -> Room:
        """ranks: processes of this machine that keep as much."""
        limit = int(free_memory() * SHARE / ranks)
        of = f"({SHARE:.0%} of the memory that is free, by {counted(ranks, 'rank')} of this machine)"
        return cls(key, MEMORY, limit, f"may take {size_in_words(limit)} {of}")

    @classmethod
    def on_disk(cls, key: str, place: Path) -> Room:
        free = shutil.disk_usage(place).free
        return cls(key, str(place), free, f"{size_in_words(free)} are free there")

    def check(self, taken: int, done: int, total: int) -> None:
        """Look ahead at 64 rows, 128, 256, ..., and at the limit itself. Raises UserError."""
        if taken > self.limit or (done >= 64 and done & (done - 1) == 0 and taken * total > self.limit * done):
            need = max(taken * total // max(done, 1), taken)
            other = "data.cache=FOLDER (it is mapped, not loaded)" if self.place == MEMORY else "another folder"
            raise UserError(
                f"data.cache={self.place}: the {total:,} pairs of {self.key} need about {size_in_words(need)}, and "
                f"{self.told}. Take {other}, or data.cache=null"
            )


def free_memory() -> int:
    """Bytes that this process could take: of the machine, or of its control group where that has a limit."""
    available = psutil.virtual_memory().available
    try:
        return min(available, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    except (OSError, ValueError):  # no such file, or "max"
        return available


def size_in_words(count: float) -> str:
    unit = next(power for power in (3, 2, 1, 0) if count >= 1000**power or power == 0)
    return f"{count / 1000**unit:.3g} {('bytes', 'kB', 'MB', 'GB')[unit]}"
