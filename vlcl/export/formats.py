"""The formats that `vlcl export` writes, in the order in which they are written and checked."""

from __future__ import annotations

from vlcl.export.format import Format
from vlcl.export.onnx import Onnx
from vlcl.export.open_clip import OpenClip
from vlcl.export.sentence_transformers import SentenceTransformers
from vlcl.export.transformers import Transformers

FORMATS: tuple[Format, ...] = (OpenClip(), Transformers(), SentenceTransformers(), Onnx())
