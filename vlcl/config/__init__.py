"""Every setting of a training run: the records (schema.py, sections.py, losses.py, types.py), the file and its
overrides (file.py), what is said about mistakes (errors.py), docs/config.md (docs.py). No torch.
"""

from vlcl.config.losses import EMConfig, LossConfig
from vlcl.config.optim import OptimConfig
from vlcl.config.schema import Config, dump_config, load_config
from vlcl.config.sections import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    TrainConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EMConfig",
    "EvalConfig",
    "LogConfig",
    "LossConfig",
    "ModelConfig",
    "OptimConfig",
    "TrainConfig",
    "dump_config",
    "load_config",
]
