"""transformers' format, of models that one of its classes holds exactly (vlcl/hf).

The check asks two questions, kept apart. Do the towers compute the same from the same pixels and tokens? Over the
tolerance the export fails. And do processor and tokenizer make the same pixels and tokens of a picture and a text?
Where they cannot (resizing is done by another library, the mending of odd texts has limits) the difference is counted
and told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vlcl.data.decode import to_rgb
from vlcl.errors import UserError
from vlcl.export.check import (
    TOLERANCE,
    Findings,
    compare,
    cropped_pictures,
    drawn_pairs,
    smooth,
    transparent_pictures,
)
from vlcl.export.format import Format, Job, save_weights
from vlcl.hf.processor import PROCESSOR_FILES, TOKENIZER_FILES, write_processor
from vlcl.model import Built

if TYPE_CHECKING:
    from transformers import BatchEncoding

PIXELS = 0.02  # mean difference of normalised pixels; another mean, size or crop is far above it


class Transformers(Format):
    name = "transformers"
    files = frozenset({"config.json", "model.safetensors", *PROCESSOR_FILES, *TOKENIZER_FILES})
    card_place = 1

    def why_not(self, job: Job) -> str | None:
        return job.reason

    def label(self, job: Job) -> str | None:
        return f"{job.form.hf_class.name} (transformers)" if job.form else None

    def write(self, job: Job) -> None:
        assert job.form is not None
        save_weights(job.weights, job.folder / "model.safetensors", job.half)
        config = job.form.hf_config()
        config.dtype = "float16" if job.half else "float32"
        config.save_pretrained(job.folder)
        write_processor(job.folder, job.form, job.config, job.built.tokenize)

    @torch.no_grad()
    def check(self, job: Job) -> None:
        from transformers import AutoModel, AutoProcessor

        assert job.form is not None
        model: Any = AutoModel.from_pretrained(job.folder, local_files_only=True).float().eval()
        processor: Any = AutoProcessor.from_pretrained(job.folder, local_files_only=True)
        built, pairs, ref = job.built, job.pairs, job.stored

        def image(pixels: Tensor) -> Tensor:
            return _unit(model.get_image_features(pixel_values=pixels))

        def text(tokens: Tensor, **more: Tensor) -> Tensor:
            return _unit(model.get_text_features(input_ids=tokens, **more))

        more = {}
        if job.form.hf_class.wants_padding_mask:
            more["attention_mask"] = (ref.tokens_TL != model.config.text_config.pad_token_id).long()
        for tower, run in (("image", lambda: image(ref.pixels_BCHW)), ("text", lambda: text(ref.tokens_TL, **more))):
            compare(self.name, tower, run, ref, job.found, (model, job.form.stages[tower]))
        _check_processor(processor, built)
        side = ref.pixels_BCHW.shape[-1]
        seen = [to_rgb(x, job.background) for x in transparent_pictures()]
        pictures = [
            *pairs.images,
            *drawn_pairs().images,
            *cropped_pictures(side),
            *seen,
        ]  # some to resize, some to crop

        def difference(theirs: Sequence[Image.Image], ours: Sequence[Image.Image]) -> float:
            pixels = torch.stack([built.preprocess_eval(x) for x in ours])
            found = processor(images=list(theirs), return_tensors="pt").pixel_values
            return float((image(found) - ref.encoder.image(pixels)).abs().max())

        job.found.pictures = difference(pictures, pictures)
        job.found.transparent[self.name] = difference(transparent_pictures(), seen)
        length = ref.tokens_TL.shape[1]
        encoded = processor.tokenizer(
            list(pairs.texts), padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        _check_tokens(encoded, job, text)

    def usage(self, name: str, job: Job) -> list[str]:
        """The pipeline, where it can."""
        if job.form is not None and job.form.hf_class.fits_pipeline(job.length):
            return ["With transformers:", f"""```python
from PIL import Image
from transformers import pipeline  # it does not cut texts: longer ones than {job.length} tokens are an error

{job.open_picture}
classify = pipeline("zero-shot-image-classification", model="{name}")
print(classify(picture, candidate_labels=["cat", "dog"], hypothesis_template="a photo of a {{}}"))
```"""]  # fmt: skip
        return ["With transformers:", f"""```python
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")
texts = processor(text=["a photo of a cat", "a photo of a dog"], padding="max_length", max_length={job.length},
                  truncation=True, return_tensors="pt")
{job.open_picture}
pixels = processor(images=picture, return_tensors="pt").pixel_values
with torch.no_grad():
    print(model(pixel_values=pixels, **texts).logits_per_image)
```"""]  # fmt: skip

    def remark(self, job: Job) -> str | None:
        if job.form is None:
            return f"transformers has no class that computes the same ({job.reason}): the files are for open_clip."
        name, has_bias = job.form.hf_class.name, job.form.hf_class.has_logit_bias
        if not has_bias and getattr(job.built.encoder.clip, "logit_bias", None) is not None:
            return (
                f"It was trained with a bias of the logits, which `{name}` has no place for: rankings are the "
                "same, sigmoid probabilities are not."
            )
        if "logit_bias" in job.form.filled:
            return (
                f"It was trained without a bias of the logits: `{name}` has 0 there, and the sigmoid probabilities of "
                "transformers' pipeline are no probabilities. Compare their sizes only."
            )
        return None

    def note(self, found: Findings) -> str | None:
        if not found.other_tokens:
            return None
        return (
            f"note     {len(found.other_tokens)} odd texts of {found.texts} become other tokens in transformers than "
            "in training; the model card lists them"
        )

    def check_notes(self, found: Findings) -> list[str]:
        notes = []
        if found.pictures is not None:
            notes.append(
                "transformers resizes and crops pictures with another library: with each one's own preprocessing "
                f"features differ by up to {found.pictures:.1e}."
            )
        if found.other_tokens:
            notes += [
                "open_clip mends texts (HTML entities, broken encodings) before it cuts them into tokens; tokenizers "
                f"of transformers cannot do all of it. {len(found.other_tokens)} of the {found.texts} texts, all odd "
                "ones, become other tokens there:",
                "\n".join(f"- `{_short(sentence)}`" for sentence in found.other_tokens),
            ]
        return notes


def _check_processor(processor: Any, built: Built) -> None:
    """Pixels of smooth pictures: nothing to resize in one, in the other twice as much as fits; UserError where they
    differ by more than libraries' ways of resizing do."""
    size = built.config["preprocess_cfg"]["size"]
    height, width = (size, size) if isinstance(size, int) else size
    for image in (smooth(width, height, 0), smooth(4 * width, 2 * height, 1)):
        theirs = processor(images=[image], return_tensors="pt").pixel_values[0]
        ours = built.preprocess_eval(image)
        if theirs.shape != ours.shape or not float((theirs - ours).abs().mean()) <= PIXELS:
            raise UserError("the exported image processor makes other pixels of a picture than the model's own")


def _check_tokens(encoded: BatchEncoding, job: Job, run: Callable[..., Tensor]) -> None:
    """Texts through the exported tokenizer: the same tokens, but for odd texts, and then the same features."""
    end, found = getattr(job.built.tokenize, "eot_token_id", None), job.found
    ours, theirs = job.stored.tokens_TL.tolist(), encoded.input_ids.tolist()
    same = [_used(a, end) == _used(b, end) for a, b in zip(ours, theirs)]
    found.other_tokens = [sentence for sentence, equal in zip(job.pairs.texts, same) if not equal]
    if plain := [sentence for sentence in found.other_tokens if _is_plain(sentence)]:
        raise UserError(f"the exported tokenizer makes other tokens of {plain[0]!r} than the model's own: not exported")
    more = {"attention_mask": encoded.attention_mask} if "attention_mask" in encoded else {}
    error = float((run(encoded.input_ids, **more) - job.stored.text_TD)[torch.tensor(same)].abs().max())
    if not error <= TOLERANCE:
        raise UserError(
            f"texts through the exported tokenizer give features that differ by {error:.1e} from the model's, though "
            "the words become the same tokens (their padding differs): not exported"
        )


def _unit(output: Any) -> Tensor:
    """transformers 5 returns a record whose pooler_output is the projected feature, 4 the feature itself."""
    return F.normalize(output if isinstance(output, Tensor) else output.pooler_output, dim=1)


def _used(tokens: list[int], end: int | None) -> list[int]:
    """Without the padding behind the end-of-text token, where libraries pad differently and it changes nothing."""
    return tokens if end is None or end not in tokens else tokens[: tokens.index(end) + 1]


def _is_plain(text: str) -> bool:
    """Whether no mending of texts has anything to do here."""
    return text.isascii() and text.isprintable() and not any(x in text for x in "&<") and " ".join(text.split()) == text


def _short(text: str) -> str:
    text = " ".join(text.split()).replace("`", "'")
    return text if len(text) <= 60 else text[:57] + "..."
