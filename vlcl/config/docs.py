"""docs/config.md, made from the records: a table a section, a row a key. `python -m vlcl.config > docs/config.md`."""

from __future__ import annotations

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vlcl.config.errors import describe, sections_of, show

TABLE_HEAD = """# Every setting

Written by `python -m vlcl.config > docs/config.md`; the source is `vlcl/config/`.

A setting goes into the YAML file, or after it on the command line as `section.key=value`, the value being YAML:
`vlcl train configs/cc3m.yaml data.train=shards/cc3m train.batch_size=512 'eval.templates=["a photo of a {}."]'`.
The later wins. `vlcl train CONFIG --print-config` shows what results, defaults included. All mistakes are reported at
once. An override of `loss.name` drops the file's other loss settings; one of `train.steps` drops `train.epochs`, and
the other way round."""


def key_table(model: type[BaseModel]) -> str:
    """docs/config.md: a table a section, a row a key."""
    lines = [TABLE_HEAD]
    for name, field in model.model_fields.items():
        sections = sections_of(field.annotation)
        for tag, section in sections.items():
            lines += ["", f"## {name}.name={tag}" if tag else f"## {name}", "", section.__doc__ or ""]
            fields = {f"{name}.{k}": f for k, f in section.model_fields.items() if not (tag and k == "name")}
            lines += _key_rows(fields)
    lines += ["", "## Outside the sections"]
    lines += _key_rows({name: f for name, f in model.model_fields.items() if not sections_of(f.annotation)})
    return "\n".join(lines) + "\n"


def _key_rows(fields: dict[str, FieldInfo]) -> list[str]:
    rows = ["", "| key | default | allowed | meaning |", "|---|---|---|---|"] if fields else []
    for path, field in fields.items():
        default = "required" if field.is_required() else f"`{show(field.get_default(call_default_factory=True))}`"
        cells = [f"`{path}`", default, describe(field.annotation, field.metadata), field.description or ""]
        rows.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return rows
