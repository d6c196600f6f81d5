"""Search a folder of pictures by text, with a model that `vlcl export RUN MODEL` wrote. It needs transformers alone.

python examples/search_pictures_by_text.py MODEL PICTURES "a red umbrella"
"""

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

SHOWN = 5
BATCH = 64  # pictures in memory at a time
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def on_white(path: Path) -> Image.Image:
    """As training saw pictures: what is transparent shows `data.background`, white unless it was set."""
    picture = Image.open(path).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


@torch.no_grad()
def search(model_folder: str, pictures: Path, query: str) -> list[tuple[float, Path]]:
    """All pictures with their similarity to the query, the best first."""
    model = AutoModel.from_pretrained(model_folder).eval()
    processor = AutoProcessor.from_pretrained(model_folder)
    length = model.config.text_config.max_position_embeddings
    text = processor(text=[query], padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    paths = sorted(path for path in pictures.rglob("*") if path.suffix.lower() in SUFFIXES)
    found = []
    for start in range(0, len(paths), BATCH):
        some = paths[start : start + BATCH]
        images = [on_white(path) for path in some]
        pixels = processor(images=images, return_tensors="pt").pixel_values
        scores = model(pixel_values=pixels, **text).logits_per_text[0]
        found += zip(scores.tolist(), some)
    return sorted(found, reverse=True)


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    for score, path in search(sys.argv[1], Path(sys.argv[2]), sys.argv[3])[:SHOWN]:
        print(f"{score:7.2f}  {path}")
