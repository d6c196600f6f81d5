"""BatchNorm whose statistics are those of all ranks' batches. torch's own works on GPUs alone."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vlcl import distributed

Module = TypeVar("Module", bound=nn.Module)


class RankBatchNorm(_BatchNorm):
    """BatchNorm of any dimension over all ranks' batches, which must be of one size; in a world of one, and in eval
    mode, torch's.

    mean = mean over ranks, batch and places of x;  var = the same of (x - mean)^2;  y = (x - mean) / sqrt(var + eps)
    """

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"BatchNorm takes [B, C, ...], got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or distributed.world_size() == 1:
            return super().forward(input)
        dims = [dim for dim in range(input.dim()) if dim != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        mean_C = distributed.all_mean_to_train(x.mean(dims))
        centred = x - mean_C.view(shape)
        var_C = distributed.all_mean_to_train(centred.square().mean(dims))
        self._remember(mean_C.detach(), var_C.detach(), x.numel() // x.shape[1] * distributed.world_size())
        y = centred * (var_C + self.eps).rsqrt().view(shape)
        if self.affine:
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return y.to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean_C: Tensor, var_C: Tensor, count: int) -> None:
        """Move the running statistics as torch's BatchNorm does: with the unbiased variance."""
        if not self.track_running_stats or self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean_C.to(self.running_mean), factor)
        self.running_var.lerp_((var_C * count / max(count - 1, 1)).to(self.running_var), factor)


def over_ranks(module: Module, cuda: bool) -> Module:
    """`module` with every BatchNorm in it over all ranks, the same parameters and buffers in it; itself in a world of
    one. cuda: by torch's own, which is for GPUs."""
    if distributed.world_size() == 1:
        return module
    if cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(module)  # pyright: ignore[reportReturnType]
    for parent in module.modules():
        for name, child in parent.named_children():
            if isinstance(child, _BatchNorm) and not isinstance(child, RankBatchNorm):
                setattr(parent, name, _converted(child))
    return module


def _converted(norm: _BatchNorm) -> RankBatchNorm:
    new = RankBatchNorm(norm.num_features, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    new._parameters, new._buffers = norm._parameters, norm._buffers
    return new.train(norm.training)
