"""One process, or one group of ranks, at a time measures a model on a data set into a folder of results."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlcl import distributed
from vlcl.lock import LOCK, FolderLock


@contextmanager
def alone(folder: Path, weights: str, dataset: str) -> Iterator[None]:
    """Nobody else measures these weights on this data set into this folder meanwhile (a collective). UserError where
    somebody does."""
    name = hashlib.sha256(f"{weights} {dataset}".encode()).hexdigest()[:16]
    lock = FolderLock(folder, f"{LOCK}-{name}", f"{dataset} in {folder}", "give another --output")
    distributed.on_first(lock.acquire)
    try:
        yield
    finally:
        lock.release()
