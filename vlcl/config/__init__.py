"""Every setting of a training run: the records (schema.py, losses.py, types.py), the file and its overrides (file.py),
what is said about mistakes (errors.py), docs/config.md (docs.py). No torch.
"""

from vlcl.config.losses import EMConfig, LossConfig
from vlcl.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
    dump_config,
    load_config,
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
