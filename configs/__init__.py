"""The experiments, one YAML each (import package `vlcl_configs`): `vlcl train NAME` finds them anywhere."""
