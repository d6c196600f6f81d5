"""How an exported folder is used: the snippets of its model card, which a test runs as they stand."""

from __future__ import annotations

from vlcl.export.onnx import FILES


def usage(name: str, form: str | None, length: int, onnx: bool) -> list[str]:
    """Paragraphs and snippets. `form`: transformers' class, if there is one; `length`: of texts, in tokens."""
    texts = '["a photo of a cat", "a photo of a dog"]'
    where = "" if "/" in name else f" Run this from the folder that holds `{name}`."
    parts = [f"`picture.jpg` is any picture of yours.{where}"]
    if form:
        parts += ["With transformers:", _transformers_usage(name, form, length)]
    where = f"hf-hub:{name}" if "/" in name else f"local-dir:{name}"
    parts += ["With open_clip:", f"""```python
import open_clip
import torch
from PIL import Image

model, _, preprocess = open_clip.create_model_and_transforms("{where}")
tokenizer = open_clip.get_tokenizer("{where}")
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open("picture.jpg").convert("RGB"))[None], normalize=True)
    texts = model.encode_text(tokenizer({texts}), normalize=True)
print((model.logit_scale.exp() * image @ texts.T).softmax(dim=-1))
```"""]  # fmt: skip
    if form:
        parts += ["With sentence-transformers (6.2 and newer):", f"""```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
image = model.encode(Image.open("picture.jpg").convert("RGB"))
texts = model.encode({texts})
print(model.similarity(image, texts))
```"""]  # fmt: skip
    if onnx:
        parts += [_onnx_usage(name)]
    return parts


def _transformers_usage(name: str, form: str, length: int) -> str:
    """The pipeline, where it can; its texts of SigLIP models are of 64 tokens, whatever the model wants."""
    if form in ("CLIPModel", "MetaClip2Model") or (form == "SiglipModel" and length == 64):
        return f"""```python
from transformers import pipeline  # it does not cut texts: longer ones than {length} tokens are an error

classify = pipeline("zero-shot-image-classification", model="{name}")
print(classify("picture.jpg", candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {{}}"))
```"""
    return f"""```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
texts = processor(text=["a photo of a cat", "a photo of a dog"], padding="max_length", max_length={length},
                  truncation=True, return_tensors="pt")
pixels = processor(images=Image.open("picture.jpg").convert("RGB"), return_tensors="pt").pixel_values
with torch.no_grad():
    print(model(pixel_values=pixels, **texts).logits_per_image)
```"""


def _onnx_usage(name: str) -> str:
    files = [f'"{name}/{file}"' for file in FILES.values()]
    if "/" in name:
        files = [f'hf_hub_download("{name}", "{file}")' for file in FILES.values()]
    fetch = "from huggingface_hub import hf_hub_download\n" if "/" in name else ""
    return f"""With ONNX Runtime (`onnx/*.onnx`, float32, any batch size; vectors of length 1), here with open_clip's
preprocessing from above:

```python
import onnxruntime
{fetch}
encode_image = onnxruntime.InferenceSession({files[0]})
encode_text = onnxruntime.InferenceSession({files[1]})
pixels = preprocess(Image.open("picture.jpg").convert("RGB"))[None].numpy()
[image] = encode_image.run(None, {{"pixel_values": pixels}})
[texts] = encode_text.run(None, {{"input_ids": tokenizer(["a photo of a cat", "a photo of a dog"]).numpy()}})
print(image @ texts.T)
```"""
