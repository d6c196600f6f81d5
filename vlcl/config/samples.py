"""What the settings of `data` mean to the readers of samples (vlcl/data/decode.py). No torch."""

from __future__ import annotations

from dataclasses import fields

from vlcl.config.sections import DataConfig
from vlcl.data.decode import Keys, Limits


def keys_of(data: DataConfig) -> Keys:
    """Where captions and pictures are."""
    text = tuple(data.text_key) if isinstance(data.text_key, list) else data.text_key
    json_text = tuple(data.json_text_key) if isinstance(data.json_text_key, list) else data.json_text_key
    return Keys(data.image_key, text, json_text, data.text_lines)


def limits_of(data: DataConfig) -> Limits:
    """What one sample may ask for."""
    return Limits(**{field.name: getattr(data, field.name) for field in fields(Limits)})
