"""What `vlcl data stats` shows: a page, and some lines for the terminal."""

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from html import escape
from itertools import pairwise

from vlcl.config import Config
from vlcl.config.samples import keys_of, limits_of
from vlcl.data.captions import captions_from
from vlcl.data.decode import BadSample, decode_image, image_bytes_from, wanted_files
from vlcl.data.shard import RawSample
from vlcl.errors import counted
from vlcl.files import replace_text
from vlcl_data_prep.pages import bars, header, page, share, thumbnail
from vlcl_data_prep.samples import Samples
from vlcl_data_prep.stats import Stats, seen_shares, training_of
from vlcl_data_prep.tally import Group, Repeated, hash_of, percentile

SIDES = (1, 32, 64, 128, 256, 512, 1024, 2048, 4096)
CHARACTERS = (1, 10, 20, 40, 80, 160, 320, 640, 1280)
TOKENS = (1, 9, 17, 33, 65, 129, 257)
KIBIBYTES = (1, 3, 5, 11, 33, 101, 301, 1025)
SHAPES = (  # least width over height, in hundredths
    (0, "taller than 3 : 1"), (34, "2 : 1 to 3 : 1, tall"), (50, "4 : 3 to 2 : 1, tall"), (76, "up to 4 : 3, tall"),
    (100, "square"), (101, "up to 4 : 3, wide"), (134, "4 : 3 to 2 : 1, wide"), (201, "2 : 1 to 3 : 1, wide"),
    (301, "wider than 3 : 1"),
)  # fmt: skip
SEEN = ((0, "less than a third"), (34, "34 to 50%"), (51, "51 to 67%"), (68, "68 to 89%"), (90, "90% or more"))
TRAINING = {
    "enlarged": "enlarged to it",
    "enlarged_twice_or_more": "of these, twice or more",
    "shrunk": "shrunk to it",
    "a_third_or_more_never_seen": "a third or more is never in view",
    "always_the_same_part": "always the same part, the middle",
}


def binned(counts: Counter[int], edges: Sequence[int]) -> dict[str, int]:
    """Counts between the edges, by the words for each; the empty ones at both ends are left out."""
    labels = [
        f"{first:,}" if last - first == 1 else f"{first:,} to {last - 1:,}" for first, last in pairwise(edges)
    ] + [f"{edges[-1]:,} or more"]
    return labelled(counts, list(zip(edges, labels)))


def labelled(counts: Counter[int], bins: Sequence[tuple[int, str]]) -> dict[str, int]:
    """Counts from the first value of each bin on; the empty ones at both ends are left out."""
    found = []
    for number, (first, label) in enumerate(bins):
        end = bins[number + 1][0] if number + 1 < len(bins) else None
        found.append((label, sum(n for value, n in counts.items() if first <= value and (end is None or value < end))))
    filled = [number for number, (_, count) in enumerate(found) if count]
    return dict(found[filled[0] : filled[-1] + 1]) if filled else {}


def as_text(found: Stats, config: Config) -> str:
    """What is worth reading on a terminal."""
    tally = found.tally
    used = f"{tally.used:,} that training uses ({share(tally.used, tally.samples)})"
    lines = [f"{counted(tally.samples, 'sample')}, {used}"]
    for reason, number in tally.dropped.most_common():
        row, key, detail = tally.examples[reason]
        detail = f": {detail[:90]}" if detail else ""
        lines.append(
            f"  left out: {number:,} {reason} ({share(number, tally.samples)}), first row {row} ({key}){detail}"
        )
    lines += [f"  {text}" for text in tally.broken[:5]]
    if not tally.used:
        return "\n".join(lines)
    for name, counts, unit in (
        ("short side", tally.short, "pixels"),
        ("captions", tally.characters, "characters"),
        ("captions", tally.tokens, "tokens"),
    ):
        if counts:
            low, middle, high = (percentile(counts, share) for share in (0.05, 0.5, 0.95))
            lines.append(f"{name}: {low:,} / {middle:,} / {high:,} {unit} (5% / median / 95%)")
    captions = tally.captions
    total = sum(number * samples for number, samples in captions.items())
    repeated = repeated_text(found.captions, total)
    lines.append(f"{counted(total, 'caption')}, {total / tally.used:.2f} a picture; {repeated}")
    lines.append(f"pictures: {repeated_text(found.pictures, tally.used)}")
    if found.inputs:
        numbers = dict(training_of(found, config))
        side, length = found.inputs.side, found.inputs.context_length
        lines.append(
            f"{config.model.name} ({side} pixels, {length} tokens): {share(numbers['enlarged'], tally.used)} of the "
            f"pictures are enlarged, {share(numbers['a_third_or_more_never_seen'], tally.used)} lose a third or more, "
            f"{share(numbers['captions_cut'], total)} of the captions lose their end"
        )
    return "\n".join(lines)


def repeated_text(repeated: Repeated, total: int) -> str:
    if not repeated.extra:
        return "none occurs twice"
    about = "about " * (repeated.of > 1)
    return (
        f"{about}{share(repeated.involved, total)} are not the only one of their kind ({about}{repeated.extra:,} extra)"
    )


def write_page(path: str, samples: Samples, found: Stats) -> None:
    """Write the page."""
    tally, config = found.tally, samples.config
    facts = {
        "Samples": f"{tally.samples:,} in {counted(len(found.rows.urls), 'shard')}",
        "Used by training": f"{tally.used:,} ({share(tally.used, tally.samples)})",
        "Captions": f"{sum(n * count for n, count in tally.captions.items()):,}",
        "Model": f"{config.model.name}, {found.inputs.side} pixels, {found.inputs.context_length} tokens"
        if found.inputs
        else "",
    }
    body = [header("vlcl data stats", samples.name, facts), *_left_out(found)]
    if tally.used:
        body += [
            _section("What training would do", [*_training(found, config)]),
            _section("Pictures", [*_pictures(found)]),
            _section("Captions", [*_captions(found)]),
            *_repeated(found, config),
        ]
    replace_text(path, page(samples.name, [part for part in body if part]))


def _section(title: str, panels: Sequence[str]) -> str:
    shown = [panel for panel in panels if panel]
    return f'<section><h2>{title}</h2><div class="panels">{"".join(shown)}</div></section>' if shown else ""


def _left_out(found: Stats) -> Iterator[str]:
    tally = found.tally
    if tally.broken:
        items = "".join(f"<p>{escape(text)}</p>" for text in tally.broken[:20])
        yield f'<section><h2 class="bad">Broken shards</h2>{items}</section>'
    rows = "".join(
        f"<tr><td>{escape(reason)}<p class='small'>row {tally.examples[reason][0]}, "
        f"{escape(tally.examples[reason][1])}: {escape(tally.examples[reason][2][:300])}</p></td>"
        f"<td>{kind}</td><td>{number:,}</td></tr>"
        for kind, counts in (("sample", tally.dropped), ("caption", tally.left_out))
        for reason, number in counts.most_common()
    )
    text = "<p>Nothing: every sample and every caption can be used.</p>"
    if rows:
        head = "<thead><tr><th>Reason, and the first</th><th>What</th><th>Number</th></tr></thead>"
        text = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>'
    yield f"<section><h2>Left out</h2>{text}</section>"


def _training(found: Stats, config: Config) -> Iterator[str]:
    if found.inputs is None:
        return
    tally, numbers = found.tally, dict(training_of(found, config))
    side, length = found.inputs.side, found.inputs.context_length
    shown = {label: numbers[name] for name, label in TRAINING.items()}
    how = "the middle square, as in evaluation" if config.data.augment == "none" else "a random crop"
    yield bars(
        f"Pictures, for an input of {side} × {side}", f"By the short side and the shape; training takes {how}.",
        shown, tally.used,
    )  # fmt: skip
    yield bars(
        "How much of a picture is seen at once", "Share of its area in the largest crop that training takes.",
        labelled(seen_shares(config, tally)[0], SEEN), tally.used,
    )  # fmt: skip
    total = tally.characters.total()
    fits = {f"fit into {length} tokens": total - numbers["captions_cut"], "lose their end": numbers["captions_cut"]}
    yield bars("Captions", "What is cut is never seen; data/truncated counts it while training.", fits, total)
    changes = dict(tally.changes.most_common())
    yield bars("Changed by the decoder", "docs/data.md says how.", changes, tally.used)


def _pictures(found: Stats) -> Iterator[str]:
    tally = found.tally
    yield bars("Short side", "Pixels.", binned(tally.short, SIDES), tally.used)
    yield bars("Long side", "Pixels.", binned(tally.long, SIDES), tally.used)
    yield bars("Shape", "Width to height, upright.", labelled(tally.aspect, SHAPES), tally.used)
    yield bars("File size", "KiB.", binned(tally.kibibytes, KIBIBYTES), tally.used)
    yield bars("Format", "By content, whatever the name.", dict(tally.formats.most_common()), tally.used)
    yield bars("Mode", "Pillow's words.", dict(tally.modes.most_common()), tally.used)


def _captions(found: Stats) -> Iterator[str]:
    tally = found.tally
    total = tally.characters.total()
    yield bars("Length in characters", "", binned(tally.characters, CHARACTERS), total)
    yield bars("Length in tokens", "With those of start and end.", binned(tally.tokens, TOKENS), tally.tokens.total())
    yield bars("Captions of a picture", "", binned(tally.captions, (1, 2, 3, 5, 6, 11)), tally.used)


def _repeated(found: Stats, config: Config) -> Iterator[str]:
    """The captions and pictures that occur most often, looked up by row."""
    tally, data = found.tally, config.data
    total = tally.characters.total()
    firsts = {group.first for group in (*found.captions.most, *found.pictures.most)}
    keys, limits = keys_of(data), limits_of(data)
    looked_up = found.rows.read(sorted(firsts), wanted_files(keys, limits))
    there = {row: sample for row, sample in looked_up if isinstance(sample, RawSample)}
    captions: dict[str, int] = {}
    for group in found.captions.most:
        if (sample := there.get(group.first)) is None:
            continue
        for text in captions_from(sample.files, keys, limits).texts:
            if hash_of(text.encode()) == group.value:
                captions[_short(text)] = group.count
    yield _section("Repeated", [
        bars("Captions", f"Letter by letter: {repeated_text(found.captions, total)}.", captions, total),
        bars("Pictures", f"Byte by byte: {repeated_text(found.pictures, tally.used)}.",
             {"alone": max(tally.used - found.pictures.involved, 0), "not alone": found.pictures.involved}, tally.used),
    ])  # fmt: skip
    cards = []
    for group in found.pictures.most:
        with suppress(BadSample, KeyError):
            files = there[group.first].files
            image = decode_image(image_bytes_from(files, keys), limits, data.background)
            text = captions_from(files, keys, limits).texts[0]
            cards.append(_card(group, thumbnail(image, text), text))
    if cards:
        yield f'<section><h2>The most repeated pictures</h2><div class="samples">{"".join(cards)}</div></section>'


def _card(group: Group, picture: str, text: str) -> str:
    return (
        f'<article class="sample"><div class="shown">{picture}</div><h3>{group.count:,} times</h3>'
        f'<p class="small">rows {group.first} to {group.last}</p><ul><li>{escape(text)}</li></ul></article>'
    )


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
