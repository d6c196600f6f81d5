"""What a shell is offered after `vlcl train`: config files, and the keys of settings."""

from __future__ import annotations

from glob import glob, has_magic

from vlcl.config.errors import keys_of
from vlcl.config.file import shipped_configs
from vlcl.config.schema import Config


def config_files(incomplete: str) -> list[str]:
    """The configs that come with vlcl, YAML files, and folders on the way to some."""
    found = [] if has_magic(incomplete) else sorted([*glob(f"{incomplete}*.yaml"), *glob(f"{incomplete}*/")])
    return [name for name in shipped_configs() if name.startswith(incomplete)] + found


def setting_keys(incomplete: str) -> list[str]:
    """As far as the `=`."""
    return sorted({f"{key.path}=" for key in keys_of(Config) if key.path.startswith(incomplete)})
