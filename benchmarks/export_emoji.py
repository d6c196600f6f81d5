"""An exported model in four libraries: do they name held-out pictures alike, and how many right?

    vlcl data emoji data/emoji
    vlcl train configs/emoji.yaml data.train=data/emoji/google::data/emoji/apple::data/emoji/facebook \\
        data.val=data/emoji/twitter train.output=runs/emoji-twitter
    vlcl export runs/emoji-twitter emoji-clip --onnx
    python benchmarks/export_emoji.py emoji-clip data/emoji/twitter --figure docs/images/export_emoji.png

25 everyday things as Twemoji draws them (a vendor whose pictures training never saw): each is to be told from the 24
others by its name.
"""

from __future__ import annotations

import argparse
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlcl.data.decode import decode_image

NAMES = (
    "airplane", "banana", "carrot", "cat face", "clown face", "dog face", "fire", "french fries", "grapes", "guitar",
    "hot beverage", "octopus", "penguin", "pig face", "rainbow", "red apple", "rocket", "snowman", "soccer ball",
    "strawberry", "sunflower", "tiger face", "tomato", "umbrella", "watermelon",
)  # fmt: skip


def held_out(shards: Path) -> dict[str, Image.Image]:
    """The pictures of NAMES, by name."""
    found = {}
    for path in sorted(shards.glob("*.tar")):
        files: dict[str, dict[str, bytes]] = {}
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, suffix = member.name.partition(".")
                data = tar.extractfile(member)
                files.setdefault(key, {})[suffix] = data.read() if data else b""
        for sample in files.values():
            image = next(sample[x] for x in ("png", "webp", "jpg") if x in sample)
            found[sample["txt"].decode().strip()] = decode_image(image)
    return {name: found[name] for name in NAMES}


def with_transformers(folder: str, images: list[Image.Image], names: list[str]) -> list[int]:
    from transformers import pipeline

    classify = pipeline("zero-shot-image-classification", model=folder)
    results = [classify(image, candidate_labels=names, hypothesis_template="{}") for image in images]
    return [names.index(scores[0]["label"]) for scores in results]


def with_open_clip(folder: str, images: list[Image.Image], names: list[str]) -> list[int]:
    import open_clip
    import torch

    made: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model, _, preprocess = made
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        image = model.encode_image(torch.stack([preprocess(x) for x in images]), normalize=True)
        text = model.encode_text(tokenizer(names), normalize=True)
    return (image @ text.T).argmax(dim=1).tolist()


def with_sentence_transformers(folder: str, images: list[Image.Image], names: list[str]) -> list[int]:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(folder)
    return model.similarity(model.encode(images), model.encode(names)).argmax(dim=1).tolist()


def with_onnx_runtime(folder: str, images: list[Image.Image], names: list[str]) -> list[int]:
    import onnxruntime
    from transformers import AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    length = processor.tokenizer.model_max_length
    tokens = processor(text=names, padding="max_length", max_length=length, return_tensors="np").input_ids
    pixels = processor(images=images, return_tensors="np").pixel_values
    image, text = (
        np.asarray(onnxruntime.InferenceSession(f"{folder}/onnx/{tower}_encoder.onnx").run(None, {name: inputs})[0])
        for tower, name, inputs in (("image", "pixel_values", pixels), ("text", "input_ids", tokens))
    )
    return np.argmax(image @ text.T, axis=1).tolist()


def draw(images: list[Image.Image], names: list[str], answers: list[int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.5, 4.3), layout="constrained")
    places = list(figure.subplots(3, 9).flat)
    for axes in places:
        axes.set_axis_off()
    for i, (axes, image, answer) in enumerate(zip(places, images, answers)):
        right = answer == i
        axes.imshow(image)
        text = names[i] if right else f"{names[answer]}\n(is: {names[i]})"
        axes.set_title(text, fontsize=8, color="#1a7f37" if right else "#b3261e")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="made by vlcl export --onnx")
    parser.add_argument("shards", type=Path, help="folder with shards that training did not see")
    parser.add_argument("--figure", type=Path)
    options = parser.parse_args()
    found = held_out(options.shards)
    names, images = list(found), list(found.values())
    answers = {}
    for run in (with_transformers, with_open_clip, with_sentence_transformers, with_onnx_runtime):
        name = run.__name__.removeprefix("with_")
        answers[name] = run(options.folder, images, names)
        right = sum(answer == i for i, answer in enumerate(answers[name]))
        print(f"{name:22} {right} of {len(NAMES)} right")
    alike = len({tuple(found) for found in answers.values()}) == 1
    print("all libraries give the same answers" if alike else f"the libraries differ: {answers}")
    if options.figure:
        draw(images, names, answers["transformers"], options.figure)


if __name__ == "__main__":
    main()
