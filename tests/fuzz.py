"""Inputs that are nearly right, for tests/test_fuzz.py: what is valid, changed in a few places.

In the suite each target gets the same few hundred inputs every time. `make fuzz` (VLCL_FUZZ_SECONDS=600) goes on with
other ones for that long, and prints the seed of the round that found something.
"""

from __future__ import annotations

import copy
import logging
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from vlcl.errors import UserError

LONG = float(os.environ.get("VLCL_FUZZ_SECONDS", "0"))
ROUND = 2000  # inputs with one seed
MEMORY = 4 << 30  # bytes beyond what this process has

Change = tuple[Any, ...]

TEXTS = [
    "", " ", "\0", "a\nb", "..", "/etc/passwd", "pipe:true", "{0..9}", "{", "[", "é\u202e", "\ud800", "x" * 3000, "1e3",
    "nan", "-1", "0", "null", "&a", "*a", "<<", "!!python/name:os.system", "train.zip@", "@", "%s", "{}", "{0.x}",
]  # fmt: skip
NUMBERS = [
    0,
    -1,
    1,
    2,
    7,
    2**31,
    2**53 + 1,
    -(2**63),
    2**64,
    10**30,
    0.5,
    -0.0,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
]


def nested(depth: int) -> Any:
    """Lists in lists; what is too deep for a parser has a test of its own, as that depends on the stack."""
    inner: Any = []
    for _ in range(depth):
        inner = [inner]
    return inner


values: st.SearchStrategy[Any] = st.one_of(
    st.sampled_from(TEXTS), st.sampled_from(NUMBERS),
    st.sampled_from([None, True, False, [], {}, [[]], [None], {"": 0}]),
    st.builds(nested, st.integers(1, 90)),
)  # fmt: skip
places = st.integers(0, 2**16)
document_changes = st.lists(
    st.tuples(st.sampled_from(["set", "set", "set", "drop", "add", "double", "copy"]), places, values),
    min_size=1,
    max_size=3,
)
byte_changes = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), places, st.integers(0, 255)),
        st.tuples(st.just("cut"), places),
        st.tuples(st.just("drop"), places, st.integers(1, 600)),
        st.tuples(st.just("double"), places, st.integers(1, 600)),
        st.tuples(st.just("put"), places, st.sampled_from([b"\0", b"\xff\xfe", b"{", b"]" * 9, b"[" * 40,
            b"NaN", b"1e999", b"9" * 5000, b"\r\n", b"\xed\xa0\x80", b"- ", b"? ", b": ", b"&a [*a, *a]", b"\t"])),
    ),
    min_size=1, max_size=3,
)  # fmt: skip


def changed_document(document: Any, changes: list[Change]) -> Any:
    """A copy of a tree of lists and mappings with other values, or none, at some of its places."""
    tree = [copy.deepcopy(document)]
    for kind, place, value in changes:
        value = copy.deepcopy(value)  # or changes would meet in one object, and in the next input
        spots = list(_spots(tree))
        parent, key = spots[place % len(spots)]
        if kind == "set":
            parent[key] = value
        elif kind == "drop" and parent is not tree:
            del parent[key]
        elif kind == "add" and isinstance(parent, dict):
            parent[str(value)] = value
        elif kind in ("add", "double") and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]) if kind == "double" else value)
        elif kind == "copy":
            other, name = spots[(place * 31 + 7) % len(spots)]
            parent[key] = copy.deepcopy(other[name])
    return tree[0]


def _spots(tree: Any) -> Any:
    for key in range(len(tree)) if isinstance(tree, list) else list(tree):
        yield tree, key
        if isinstance(tree[key], (list, dict)):
            yield from _spots(tree[key])


def changed_bytes(data: bytes, changes: list[Change]) -> bytes:
    """Some bytes other, gone, twice or more."""
    for kind, place, *more in changes:
        at = place % (len(data) + 1)
        if kind == "byte":
            data = data[:at] + bytes(more) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + more[0] :]
        elif kind == "double":
            data = data[: at + more[0]] + data[at:]
        else:
            data = data[:at] + more[0] + data[at:]
    return data


def answer(function: Callable[..., Any], *arguments: Any, error: type[Exception] = UserError) -> Any:
    """What it returns, or None where it raises the error that users see; nothing else may leave it."""
    try:
        return function(*arguments)
    except error as told:
        if not str(told).strip():
            raise AssertionError("an error that says nothing") from told
        return None


@contextmanager
def bounded_memory() -> Iterator[None]:
    """Who believes a length of 64 GiB fails within (on Linux)."""
    logging.disable(logging.WARNING)
    try:
        with _limit() if sys.platform == "linux" else nullcontext():
            yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _limit() -> Iterator[None]:
    import resource

    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def fuzz(target: Callable[..., None], examples: int, **inputs: st.SearchStrategy[Any]) -> None:
    """Call `target` with drawn inputs; what it raises is the finding. No time is spent on a smaller input for it."""
    checks = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much]

    def run(most: int, derandomize: bool) -> Callable[[], None]:
        chosen = settings(
            max_examples=most, derandomize=derandomize, database=None, deadline=None, suppress_health_check=checks,
            phases=[Phase.generate], report_multiple_bugs=False,
        )  # fmt: skip
        return chosen(given(**inputs)(target))

    if not LONG:
        run(examples, True)()
        return
    end, rounds = time.monotonic() + LONG, 0
    while time.monotonic() < end:
        number = random.SystemRandom().getrandbits(32)
        print(f"{target.__name__}: round {rounds}, seed {number}", flush=True)
        seed(number)(run(min(ROUND, examples), False))()
        rounds += 1
