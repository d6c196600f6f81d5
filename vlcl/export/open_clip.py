"""open_clip's format, which vlcl itself reads too: it holds any model."""

from __future__ import annotations

import json
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import PreprocessCfg, image_transform_v2

from vlcl import __version__
from vlcl.data.decode import to_rgb
from vlcl.errors import UserError
from vlcl.export.check import compare, transparent_pictures
from vlcl.export.format import Format, Job, save_weights
from vlcl.hf.processor import TOKENIZER_FILES
from vlcl.model import DualEncoder

CONFIG = "open_clip_config.json"
MARK = "exported_by"  # its key that says that vlcl wrote the folder


class OpenClip(Format):
    name = "open_clip"
    files = frozenset({CONFIG, "open_clip_model.safetensors", *TOKENIZER_FILES})
    card_place = 2
    tag = "open_clip"

    def label(self, job: Job) -> str:
        return "open_clip"

    def write(self, job: Job) -> None:
        save_weights(job.built.encoder.clip.state_dict(), job.folder / "open_clip_model.safetensors", job.half)
        marked = job.config | {MARK: f"vlcl {__version__}"}
        (job.folder / CONFIG).write_text(json.dumps(marked, indent=2) + "\n", encoding="utf-8")
        if job.form is None and isinstance(job.built.tokenize, HFTokenizer):  # else transformers' format writes it
            job.built.tokenize.save_pretrained(job.folder)

    @torch.no_grad()
    def check(self, job: Job) -> None:
        built, pairs, ref = job.built, job.pairs, job.stored
        model: Any = open_clip.create_model(f"local-dir:{job.folder}", require_pretrained=True).eval()
        tokenize = open_clip.get_tokenizer(f"local-dir:{job.folder}")
        transform: Any = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
        if not torch.equal(tokenize(pairs.texts), ref.tokens_TL):
            raise UserError("open_clip's tokenizer of the exported folder makes other tokens than the model's own")
        if not torch.equal(transform(pairs.images[0]), built.preprocess_eval(pairs.images[0])):
            raise UserError("open_clip's preprocessing of the exported folder makes other pixels than the model's own")
        encoder = DualEncoder(model)
        seen, as_they_are = (
            encoder.image(torch.stack([transform(x) for x in pictures]))
            for pictures in (
                [to_rgb(x, job.background) for x in transparent_pictures()], transparent_pictures(),
            )
        )  # fmt: skip
        job.found.transparent[self.name] = float((as_they_are - seen).abs().max())
        compare(self.name, "image", lambda: encoder.image(ref.pixels_BCHW), ref, job.found)
        compare(self.name, "text", lambda: encoder.text(ref.tokens_TL), ref, job.found)

    def usage(self, name: str, job: Job) -> list[str]:
        where = f"hf-hub:{name}" if "/" in name else f"local-dir:{name}"
        return ["With open_clip:", f"""```python
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("{where}")
tokenizer = open_clip.get_tokenizer("{where}")
model.eval()
{job.open_picture}
with torch.no_grad():
    image = model.encode_image(preprocess(picture)[None], normalize=True)
    texts = model.encode_text(tokenizer(["a photo of a cat", "a photo of a dog"]), normalize=True)
print((model.logit_scale.exp() * image @ texts.T).softmax(dim=-1))
```"""]  # fmt: skip
