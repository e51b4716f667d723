"""Optimizers and schedules of the three methods, per step: LARS, parameter groups, warm-up and half cosine."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017) as the pretraining literature uses it.

    A parameter p of more than one axis: d = g + wd p, d <- d * trust * |p| / |d| (factor 1 where a norm is 0). Others,
    biases and normalization: d = g, neither decay nor scaling. Buffer b <- momentum b + d, then p <- p - lr b.
    """

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                d = p.grad
                if p.ndim > 1:
                    d = d.add(p, alpha=group["weight_decay"])
                    d = d * _trust_ratio(p, d, trust=group["trust"])
                state = self.state[p]
                if not state:
                    state["buffer"] = torch.zeros_like(p)
                state["buffer"].mul_(group["momentum"]).add_(d)
                p.sub_(state["buffer"], alpha=group["lr"])
        return loss


def _trust_ratio(p: Tensor, d: Tensor, *, trust: float) -> Tensor:
    """trust |p| / |d|, or 1 where either norm is 0; stays on the device."""
    p_norm, d_norm = p.norm(), d.norm()
    return torch.where((p_norm > 0) & (d_norm > 0), trust * p_norm / d_norm, 1.0)


def warmup_cosine(step: int, *, warmup_steps: float, total_steps: int, floor: float = 0.0) -> float:
    """The learning rate of a step (from 0) as a share of its peak: linear from 0, then half a cosine down to ``floor``.

    The first step of a warm-up has a rate of exactly 0.
    """
    if step < warmup_steps:
        return step / warmup_steps
    share = (step - warmup_steps) / max(1.0, total_steps - warmup_steps)
    return floor + (1 - floor) * (1 + math.cos(math.pi * min(1.0, share))) / 2
