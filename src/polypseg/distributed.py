"""BatchNorm over the whole batch of all processes, on CPU as on GPU, so that the process count changes no result."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed_functional
from accelerate import Accelerator
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn


def synchronise_batchnorm(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Make every BatchNorm2d of ``model`` use global-batch statistics; nothing changes with one process."""
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type != "cpu":
        return convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    for module in model.modules():  # torch's SyncBatchNorm does not run on CPU
        if type(module) is nn.BatchNorm2d:
            module.__class__ = GlobalBatchNorm2d
        elif type(module) is BatchNormAct2d:
            module.__class__ = GlobalBatchNormAct2d
    return model


def global_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Normalise (B, C, H, W) with the mean and variance over all processes; gradients flow through both.

    Uses the module's running statistics in evaluation mode, and updates them (unbiased variance) in training mode.
    Every process must hold the same number of values.
    """
    if not norm.training:
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    values = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    mean = _average_over_processes(values.mean((0, 2, 3)))
    centred = values - mean[:, None, None]  # two passes: E[x^2] - E[x]^2 cancels where the mean is large
    variance = _average_over_processes(centred.square().mean((0, 2, 3)))
    with torch.no_grad():
        count = x.numel() / x.shape[1] * dist.get_world_size()
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean.detach(), norm.momentum)
        norm.running_var.lerp_(variance.detach() * count / (count - 1), norm.momentum)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return (centred * scale[:, None, None] + norm.bias[:, None, None]).to(x.dtype)


def _average_over_processes(local: Tensor) -> Tensor:
    """Mean of a tensor over processes that hold equally much; its gradient reaches every process."""
    return distributed_functional.all_reduce(local) / dist.get_world_size()


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the global batch."""

    def forward(self, input: Tensor) -> Tensor:
        return global_batch_norm(input, self)


class GlobalBatchNormAct2d(BatchNormAct2d):  # type: ignore[misc]
    """timm's BatchNorm with activation, over the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(global_batch_norm(x, self)))  # type: ignore[no-any-return]
