"""What a global batch needs: BatchNorm, sums and gathered rows over all processes, on CPU as on GPU.

With them the number of processes changes no result: 1 process of 2N images gives what 2 processes of N give.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as distributed_functional
from accelerate import Accelerator
from timm.layers import BatchNormAct2d, convert_sync_batchnorm
from torch import Tensor, nn


def process_count() -> int:
    """How many processes share the work; 1 outside a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_index() -> int:
    """The rank of this process, 0 outside a distributed run."""
    return dist.get_rank() if process_count() > 1 else 0


def sum_over_processes(local: Tensor) -> Tensor:
    """Sum of a tensor over processes; its gradient reaches every process."""
    return local if process_count() == 1 else distributed_functional.all_reduce(local)  # type: ignore[no-any-return]


@torch.no_grad()
def gather_rows(local: Tensor) -> Tensor:
    """(N, ...) of each process -> (processes * N, ...) in rank order, without gradient; N is the same on all."""
    if process_count() == 1:
        return local
    rows = [torch.empty_like(local) for _ in range(process_count())]
    dist.all_gather(rows, local.contiguous())
    return torch.cat(rows)


def at_least_float32(x: Tensor) -> Tensor:
    """float16 and bfloat16 become float32; wider types stay."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def synchronize_batchnorm(model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """Make every BatchNorm of ``model`` use global-batch statistics; nothing changes with one process."""
    if accelerator.num_processes == 1:
        return model
    if accelerator.device.type != "cpu":
        return convert_sync_batchnorm(model)  # type: ignore[no-any-return]
    for module in model.modules():  # torch's SyncBatchNorm does not run on CPU
        if type(module) in _GLOBAL_BATCH:
            module.__class__ = _GLOBAL_BATCH[type(module)]
    return model


def global_batch_norm(x: Tensor, norm: Any) -> Tensor:
    """Normalize (B, C) or (B, C, H, W) with mean and variance over all processes; gradients flow through both.

    Uses the module's running statistics in evaluation mode, and updates them (unbiased variance) in training mode.
    Every process must hold the same number of values.
    """
    if not norm.training:
        return nn.functional.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    values = at_least_float32(x)
    others = [0, *range(2, x.ndim)]
    shape = (1, -1, *[1] * (x.ndim - 2))
    mean = _average_over_processes(values.mean(others))
    centered = values - mean.view(shape)  # two passes: E[x^2] - E[x]^2 cancels where the mean is large
    variance = _average_over_processes(centered.square().mean(others))
    with torch.no_grad():
        count = x.numel() / x.shape[1] * process_count()
        norm.num_batches_tracked += 1
        norm.running_mean.lerp_(mean.detach(), norm.momentum)
        norm.running_var.lerp_(variance.detach() * count / (count - 1), norm.momentum)
    scale = torch.rsqrt(variance + norm.eps)
    if not norm.affine:
        return (centered * scale.view(shape)).to(x.dtype)
    return (centered * (norm.weight * scale).view(shape) + norm.bias.view(shape)).to(x.dtype)


def _average_over_processes(local: Tensor) -> Tensor:
    """Mean of a tensor over processes that hold equally much; its gradient reaches every process."""
    return sum_over_processes(local) / process_count()


class GlobalBatchNorm1d(nn.BatchNorm1d):
    """BatchNorm1d over the global batch."""

    def forward(self, input: Tensor) -> Tensor:
        return global_batch_norm(input, self)


class GlobalBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm2d over the global batch."""

    def forward(self, input: Tensor) -> Tensor:
        return global_batch_norm(input, self)


class GlobalBatchNormAct2d(BatchNormAct2d):  # type: ignore[misc]
    """timm's BatchNorm with activation, over the global batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(global_batch_norm(x, self)))  # type: ignore[no-any-return]


_GLOBAL_BATCH: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: GlobalBatchNorm1d,
    nn.BatchNorm2d: GlobalBatchNorm2d,
    BatchNormAct2d: GlobalBatchNormAct2d,
}
