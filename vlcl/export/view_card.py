"""The model card of an image tower that was trained alone."""

from __future__ import annotations

from typing import Any

from vlcl.export.check import Findings
from vlcl.export.run_facts import RunFacts


def view_card(
    name: str, config: dict[str, Any], architecture: str, width: int, plain: bool, found: Findings,
    facts: RunFacts | None, license: str | None,
) -> str:  # fmt: skip
    """README.md in Markdown. plain: whether there is a folder vit/."""
    pictures, views = config["preprocess_cfg"], config["views"]
    head = ["---", "library_name: timm", "tags: [image-feature-extraction, timm, self-supervised]"]
    head += [f"license: {license}"] * bool(license) + ["---", ""]
    lines = [
        *head, f"# {name}", "",
        f"An image tower trained on pictures alone by MoCo-v3's recipe with [vlcl](https://pypi.org/project/vlcl/): "
        f"`{views['name']}`, pictures of {pictures['size'][0]} x {pictures['size'][0]}, {width} features. It has no "
        "text tower and no classifier.", "",
        "```python", "import timm", f'model = timm.create_model("local-dir:{name}", pretrained=True).eval()',
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))",
        f"features = model(transform(image)[None])  # [1, {width}]", "```", "",
        "transformers loads the same folder (`AutoModel`, `AutoImageProcessor`; timm must be installed): "
        "`model(**processor(image, return_tensors=\"pt\")).pooler_output`.", "",
    ]  # fmt: skip
    if plain:
        lines += [f'`{name}/vit` is a `ViTModel`: `ViTModel.from_pretrained("{name}/vit", add_pooling_layer=False)`, '
                  "whose `last_hidden_state[:, 0]` are the features.", ""]  # fmt: skip
    lines += _training(facts)
    errors = ", ".join(f"{library} {error:.1e}" for library, error in found.errors.items())
    lines += [
        "## Checked", "",
        f"Largest difference to the model itself, of features of length 1, on {found.images} pictures "
        f"({found.origin}): {errors}.", "",
        f"timm's architecture: `{architecture}`. Pictures: mean {_numbers(pictures['mean'])}, standard deviation "
        f"{_numbers(pictures['std'])}, {pictures['interpolation']}.", "",
    ]  # fmt: skip
    return "\n".join(lines)


def _training(facts: RunFacts | None) -> list[str]:
    if facts is None:
        return []
    rows = {
        "loss": facts.setting("loss.name"), "batch size": facts.setting("train.batch_size"), "step": facts.step,
        "learning rate": facts.setting("optim.lr"), "training pictures": facts.environment.get("pairs"),
    }  # fmt: skip
    rows |= {name: f"{value:.1%}" for name, value in facts.scores().items() if name.endswith("top1")}
    table = [f"| {key} | {x} |" for key, x in rows.items() if x is not None]
    return ["## Training", "", "| | |", "|---|---|", *table, ""]


def _numbers(values: Any) -> str:
    return ", ".join(f"{value:.3f}" for value in values)
