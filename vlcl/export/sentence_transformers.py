"""sentence-transformers (6.2 and newer) loads transformers' files; some models need more of it."""

from __future__ import annotations

import json

from vlcl.export.format import Format, Job
from vlcl.hf.processor import write_json


class SentenceTransformers(Format):
    name = "sentence-transformers"
    files = frozenset({"modules.json", "sentence_bert_config.json"})
    card_place = 3
    tag = "sentence-transformers"

    def why_not(self, job: Job) -> str | None:
        return job.reason

    def write(self, job: Job) -> None:
        """A text tower that reads its last position needs texts padded in full, which is not the default."""
        if job.form is None or not job.form.hf_class.reads_last_token:
            return
        modules = [{"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"}]
        (job.folder / "modules.json").write_text(json.dumps(modules, indent=2) + "\n", encoding="utf-8")
        features = {kind: {"method": f"get_{kind}_features", "method_output_name": "pooler_output"}
                    for kind in ("text", "image")}  # fmt: skip
        content = {
            "transformer_task": "feature-extraction",
            "modality_config": features,
            "module_output_name": "sentence_embedding",
            "processing_kwargs": {"text": {"padding": "max_length", "max_length": job.length, "truncation": True}},
        }
        write_json(job.folder / "sentence_bert_config.json", content)

    def check(self, job: Job) -> None:
        """The towers are those of transformers' format, which is checked; the library itself is no dependency."""

    def usage(self, name: str, job: Job) -> list[str]:
        return ["With sentence-transformers (6.2 and newer):", f"""```python
from PIL import Image
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("{name}")
{job.open_picture}
image = model.encode(picture)
texts = model.encode(["a photo of a cat", "a photo of a dog"])
print(model.similarity(image, texts))
```"""]  # fmt: skip
