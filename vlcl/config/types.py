"""What every section of the settings shares: the base record, and the kinds of numbers and texts."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

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
StageName = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
Stages = Annotated[list[StageName], Allowed('a list of "module:function"')]
Share = Annotated[float, Field(ge=0, le=1)]


def _hue(jitter: list[float]) -> list[float]:
    if jitter[3] > 0.5:
        raise ValueError("half a turn is all there is")
    return jitter


def _strength(values: list[int]) -> list[int]:
    if values[0] < 1 or values[1] > 30:
        raise ValueError("torchvision's RandAugment has 31 strengths")
    return values


def _in_order(pair: list[float]) -> list[float]:
    if pair[0] > pair[1]:
        raise ValueError("the smaller one comes first")
    return pair


Range = Annotated[
    list[Positive], Field(min_length=2, max_length=2), AfterValidator(_in_order),
    Allowed("two numbers > 0, the smaller first"),
]  # fmt: skip
ShareRange = Annotated[
    list[Rate], Field(min_length=2, max_length=2), AfterValidator(_in_order),
    Allowed("two numbers > 0 and <= 1, the smaller first"),
]  # fmt: skip
ColourJitter = Annotated[
    list[NotNegative], Field(min_length=4, max_length=4), AfterValidator(_hue),
    Allowed("four numbers >= 0, the fourth <= 0.5"),
]  # fmt: skip
RandAugment = Annotated[
    list[Index], Field(min_length=2, max_length=2), AfterValidator(_strength),
    Allowed("two whole numbers: operations >= 1, strength >= 0 and <= 30"),
]  # fmt: skip
Colours = Annotated[
    list[Share], Field(min_length=3, max_length=3), Allowed("three numbers >= 0 and <= 1: red, green, blue")
]
ColourScales = Annotated[  # of a normalization
    list[Rate], Field(min_length=3, max_length=3), Allowed("three numbers > 0 and <= 1: red, green, blue")
]


class Section(BaseModel):
    """What every section shares: frozen, strict types, no unknown keys, finite numbers."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
