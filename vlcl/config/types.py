"""What every section of the settings shares: the base record, and the kinds of numbers and texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from vlcl.config.errors import Allowed

Fraction = Annotated[float, Field(ge=0, lt=1)]  # 1 excluded
Rate = Annotated[float, Field(gt=0, le=1)]  # 0 excluded
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Scale = Annotated[float, Field(ge=1)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(min_length=1), Allowed("text (not empty)")]
Words = Annotated[list[Word], Field(min_length=1), Allowed("a list of texts")]
Template = Annotated[str, Field(pattern=r"\{\}")]


class Section(BaseModel):
    """What every section shares: frozen, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
