"""vlcl: vision-language pretraining with the EM-augmented contrastive loss.

The names of `__all__` are what a notebook uses (docs/api.md). Importing this package is cheap: a name's module, and
torch where that needs it, is imported when the name is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlcl.checkpoint import load_model
    from vlcl.compare.command import compare
    from vlcl.config import Config, load_config
    from vlcl.data.reader import Decoder, samples_at
    from vlcl.errors import UserError
    from vlcl.export.command import export_model
    from vlcl.from_config import open_sources, train_pipeline
    from vlcl.gradient_bias.command import bias
    from vlcl.gradient_bias.measure import measure
    from vlcl.logs import read_metrics
    from vlcl.losses import build_loss
    from vlcl.model import build_model
    from vlcl.train import train
    from vlcl.zeroshot import recall_at_k

__version__ = "0.1.0"

_HOMES = {
    "Config": "vlcl.config",
    "Decoder": "vlcl.data.reader",
    "UserError": "vlcl.errors",
    "bias": "vlcl.gradient_bias.command",
    "build_loss": "vlcl.losses",
    "build_model": "vlcl.model",
    "compare": "vlcl.compare.command",
    "export_model": "vlcl.export.command",
    "load_config": "vlcl.config",
    "load_model": "vlcl.checkpoint",
    "measure": "vlcl.gradient_bias.measure",
    "open_sources": "vlcl.from_config",
    "read_metrics": "vlcl.logs",
    "recall_at_k": "vlcl.zeroshot",
    "samples_at": "vlcl.data.reader",
    "train": "vlcl.train",
    "train_pipeline": "vlcl.from_config",
}

__all__ = [
    "Config",
    "Decoder",
    "UserError",
    "__version__",
    "bias",
    "build_loss",
    "build_model",
    "compare",
    "export_model",
    "load_config",
    "load_model",
    "measure",
    "open_sources",
    "read_metrics",
    "recall_at_k",
    "samples_at",
    "train",
    "train_pipeline",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = import_module(_HOMES[name])
    # `train` and `compare` are modules, too: once imported they are attributes of this package, and callable.
    return globals().get(name) or getattr(home, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
