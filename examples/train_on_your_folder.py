"""Train on a folder of your own: pictures, and a .txt with its caption beside each, in subfolders too.

    python examples/train_on_your_folder.py PICTURES OUT [KEY=VALUE ...]

OUT gets the shards and the run. Settings as for `vlcl train` (docs/config.md): train.epochs=30 model.name=ViT-B-32
"""

import json
import sys
from pathlib import Path

import vlcl
from vlcl_data_prep.pack import pack_shards

HELD_OUT = 10  # every tenth picture is not trained on, but searched for
SETTINGS = [
    "model.name=ViT-Nano-8-64",  # trains on a laptop; take a larger one for pictures with details
    "train.epochs=10",
    "optim.lr=1e-3",
    "optim.warmup=50",
]


def write_lists(pictures: Path, out: Path) -> dict[str, Path]:
    """train.jsonl and val.jsonl: one picture with its caption a line, as `vlcl data pack` reads them."""
    captions = sorted(pictures.rglob("*.txt"))
    found = [
        (file, image) for file in captions for image in sorted(file.parent.glob(f"{file.stem}.*")) if image != file
    ]
    if len(found) < 2 * HELD_OUT:
        raise vlcl.UserError(
            f"{pictures} has {len(found)} pictures with a caption in a .txt; {2 * HELD_OUT} are needed"
        )
    lists = {}
    for split, keep in (("train", False), ("val", True)):
        chosen = [pair for number, pair in enumerate(found) if (number % HELD_OUT == 0) == keep]
        lists[split] = out / f"{split}.jsonl"
        rows = [
            {"image": str(image.resolve()), "text": file.read_text(encoding="utf-8").strip()} for file, image in chosen
        ]
        lists[split].write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return lists


def main(pictures: Path, out: Path, overrides: list[str]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    pairs = {}
    for split, rows in write_lists(pictures, out).items():
        packed = pack_shards(rows, out / "shards" / split, overwrite=True)  # with the manifest: it indexes them too
        pairs[split] = packed.pairs
        print(f"{split}: {packed.pairs} pairs, skipped {dict(packed.skipped)}")
    settings = [
        f"data.train={out / 'shards' / 'train'}", f"data.val={out / 'shards' / 'val'}", f"train.output={out / 'run'}",
        f"train.batch_size={min(64, pairs['train'])}", *SETTINGS, *overrides,
    ]  # fmt: skip
    scores = vlcl.train(vlcl.load_config(None, settings))
    print(f"a caption finds its picture first: {scores['val/text_to_image_R@1']:.1%} of {pairs['val']}")
    print(f"report: {out / 'run' / 'report.html'}")
    print(f"next: vlcl export {out / 'run'} my-clip")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
    except vlcl.UserError as error:
        sys.exit(f"error: {error}")
