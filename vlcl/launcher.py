"""What the launcher (torchrun, `accelerate launch`) asks for: devices, precision, processes, sharded towers."""

from __future__ import annotations

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    compare_versions,
)
from torch import nn

from vlcl import distributed
from vlcl.config import Config
from vlcl.errors import UserError, first_line
from vlcl.model import DualEncoder
from vlcl.sharding import Sharding, blocks, mesh_of_all


def precision_here() -> str:
    """What train.precision=null comes to on this machine."""
    return "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "fp32"


def make_accelerator(precision: str | None) -> Accelerator:
    precision = precision or precision_here()
    if precision == "fp16" and not torch.cuda.is_available():
        raise UserError("train.precision='fp16' needs a GPU; take fp32 or bf16 on a CPU")
    if torch.cuda.is_available():  # float32 beside half-precision towers, the loss, needs no more than tf32
        torch.set_float32_matmul_precision("highest" if precision == "fp32" else "high")
    # transformers would leave a text tower's weights out on all ranks but one, where accelerate alone puts them back
    os.environ.pop("FSDP_CPU_RAM_EFFICIENT_LOADING", None)
    AcceleratorState._reset_state()  # or a second run in one process could not have another precision
    try:
        accelerator = Accelerator(
            mixed_precision="no" if precision == "fp32" else precision,
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
        )
    except ValueError as error:
        raise UserError(f"accelerate does not take the launcher's settings: {first_line(error)[:300]}") from None
    if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(
            f"the launcher asks for {accelerator.distributed_type.value}; vlcl trains with plain data parallelism or "
            "FSDP2: answer no to it in `accelerate config`, or pass --multi_gpu or --use_fsdp --fsdp_version 2"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) != distributed.world_size():
        raise UserError(
            f"the launcher started {os.environ['WORLD_SIZE']} processes that do not know of each other (accelerate "
            "does so with --multi_gpu where there is no GPU). On CPUs: "
            "ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 -m vlcl.train ..."
        )
    return accelerator


def sharding_asked_for(config: Config, accelerator: Accelerator, encoder: DualEncoder) -> Sharding | None:
    """How the launcher wants the towers sharded; None where each rank is to have all of them. UserError for what is not
    done so."""
    plugin: Any = None
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
    elif os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and distributed.world_size() > 1:
        plugin = FullyShardedDataParallelPlugin()  # accelerate itself knows it on GPUs alone
    if plugin is None:
        return None
    parallel, norms = getattr(accelerator, "parallelism_config", None), nn.modules.batchnorm._BatchNorm
    for cannot, what, instead in (
        (getattr(plugin, "fsdp_version", 1) != 2, "fsdp_version: 1", "set fsdp_version: 2 (--fsdp_version 2)"),
        (compare_versions("accelerate", "<", "1.15"), "this version of accelerate", "pip install 'accelerate>=1.15'"),
        (getattr(plugin.cpu_offload, "pin_memory", None) is not None, "fsdp_offload_params", "set it to false"),
        (getattr(plugin, "activation_checkpointing_offload", False), "offloaded activations", "set it to false"),
        (bool(plugin.min_num_params), "SIZE_BASED_WRAP", "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        (bool(plugin.ignored_modules), "fsdp_ignored_modules", "leave it out"),
        (parallel is not None and parallel.tp_size * parallel.cp_size * parallel.sp_size > 1,
         "tensor, context or sequence parallelism", "leave dp_replicate_size and dp_shard_size alone above 1"),
        (config.model.kind == "views", "model.kind=views", "launch it without FSDP"),
        (any(isinstance(module, norms) for module in encoder.modules()), "BatchNorm", "launch it without FSDP"),
        (config.optim.name != "adamw", f"optim.name={config.optim.name}", "take optim.name=adamw"),
        (config.train.compile, "train.compile=true", "set train.compile=false"),
        (accelerator.mixed_precision == "fp16", "train.precision=fp16", "take train.precision=bf16"),
    ):  # fmt: skip
        if cannot:
            raise UserError(f"the launcher asks for FSDP, which vlcl does not do with {what}: {instead}")
    if plugin.activation_checkpointing:
        encoder.clip.set_grad_checkpointing()  # with dropout masks put back, which accelerate's own does not do
    mesh: Any = None if parallel is None else accelerator.torch_device_mesh
    dims = () if parallel is None else parallel.fsdp_dim_names
    classes = plugin.transformer_cls_names_to_wrap or ()
    if isinstance(classes, str):
        classes = tuple(name.strip() for name in classes.split(","))
    blocks(encoder, classes)  # it raises where there is none
    half = accelerator.mixed_precision == "bf16" and accelerator.device.type == "cuda"  # a CPU's norms want float32
    return Sharding(
        mesh_of_all(accelerator.device) if mesh is None else mesh[tuple(dims)],
        bool(plugin.reshard_after_forward), tuple(classes),
        torch.bfloat16 if half else None, lambda: accelerator.autocast(),
    )  # fmt: skip
