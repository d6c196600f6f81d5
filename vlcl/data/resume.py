"""Where a resumed run goes on in the data: each stream where it stood, whichever rank reads it now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from vlcl.data.order import Layout
from vlcl.data.stream import Position

Cursors = dict[int, tuple[int, int]]
_ORDER = ("slices", "streams", "shuffle")  # settings of the order that a user may put back


def find_place(
    name: str, meta: Mapping[str, Any], now: Mapping[str, Any], order: Layout, cursors_of: Callable[[int], Cursors]
) -> tuple[Position, str]:
    """The place of a checkpoint, `name`, in `order`, and what to tell; "" where this run is the same, ranks and all.

    meta: the checkpoint's number of the next `batch` and `layout`, the record of its order and ranks. now: that of this
    run. cursors_of: what a rank of the checkpoint has saved of its streams.
    """
    old, first_stream = _as_now(meta["layout"])
    changed = [key for key, value in old.items() if key != "world" and now[key] != value]
    if changed:
        return _near(meta["batch"], old, order), _told(name, old, changed)
    same_ranks = old["world"] == order.world
    cursors: Cursors = {}
    for rank in [order.rank] if same_ranks else range(old["world"]):
        for number, place in cursors_of(rank).items():  # a rank may know where a stream of another was once
            stream = rank * first_stream + number
            cursors[stream] = max(place, cursors.get(stream, (0, 0)))
    position = Position(meta["batch"], cursors)
    if same_ranks:
        return position, ""
    return position, (
        f"{name} is of {old['world']} ranks, these are {order.world}: the same global batches go on, no pair of the "
        "epoch is left out or comes twice; the random generators of each rank (dropout) begin anew"
    )


def _as_now(layout: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
    """The record of a checkpoint's order, and by how much its numbers of streams differ from one rank to the next.

    Before there were slices, each rank had streams (numbered from 0) and a shuffle buffer of its own: the order of as
    many slices as ranks, and of a buffer that is so many times as large.
    """
    if "slices" in layout:
        return dict(layout), 0
    world = layout["world"]
    return {**layout, "slices": world, "shuffle": layout["shuffle"] * world}, layout["streams"]


def _near(batch: int, old: Mapping[str, Any], order: Layout) -> Position:
    """The same place of the epoch, where the order is another one: as far into each stream."""
    epoch, pairs = divmod(batch * old["global_batch"], old["epoch_pairs"])
    done = pairs / old["epoch_pairs"]
    cursors: Cursors = {}
    if order.shard_probabilities is None:
        for stream in (stream for phase in range(order.streams) for stream in order.streams_of(phase)):
            cursors[stream] = epoch, int(sum(map(len, order.segment(epoch, stream))) * done)
    return Position(int((epoch + done) * order.steps_per_epoch), cursors)


def _told(name: str, old: Mapping[str, Any], changed: list[str]) -> str:
    text = (
        f"{', '.join(changed)} changed since {name}: the data goes on at the same place of the epoch, dealt anew; some "
        "pairs of this epoch may come twice and some not at all"
    )
    if set(changed) <= set(_ORDER):
        text += f". With {' '.join(f'data.{key}={old[key]}' for key in changed)} the same batches would go on"
    return text
