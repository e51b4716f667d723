"""LARS, parameter groups and schedules against the written rules."""

import numpy as np
import pytest
import torch

from polypseg.pretraining.encoders import build_encoder
from polypseg.pretraining.loop import build_optimizer
from polypseg.pretraining.mae import MAE
from polypseg.pretraining.optim import LARS, warmup_cosine
from polypseg.pretraining.recipe import load_pretraining_recipe


def lars_by_hand(weight, bias, gradients, *, lr, weight_decay, momentum=0.9, trust=0.001):
    """The rule in numpy, one parameter of two axes and one of one."""
    values, buffers = [weight.copy(), bias.copy()], [np.zeros_like(weight), np.zeros_like(bias)]
    for step in gradients:
        for i, gradient in enumerate(step):
            d = gradient
            if values[i].ndim > 1:
                d = d + weight_decay * values[i]
                sizes = np.linalg.norm(values[i]), np.linalg.norm(d)
                d = d * (trust * sizes[0] / sizes[1] if all(sizes) else 1.0)
            buffers[i] = momentum * buffers[i] + d
            values[i] = values[i] - lr * buffers[i]
    return values


def test_lars_follows_the_rule_over_200_steps():
    rng = np.random.default_rng(0)
    weight, bias = rng.normal(size=(5, 4)), rng.normal(size=5)
    gradients = [(rng.normal(size=(5, 4)), rng.normal(size=5)) for _ in range(200)]
    gradients[7] = (np.zeros((5, 4)), np.zeros(5))
    parameters = [torch.nn.Parameter(torch.tensor(x)) for x in (weight, bias)]
    optimizer = LARS(parameters, lr=0.6, weight_decay=1e-2)
    for step in gradients:
        for p, gradient in zip(parameters, step, strict=True):
            p.grad = torch.tensor(gradient)
        optimizer.step()
    for p, expected in zip(parameters, lars_by_hand(weight, bias, gradients, lr=0.6, weight_decay=1e-2), strict=True):
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-10)


def test_lars_takes_a_plain_step_from_a_zero_weight():
    p = torch.nn.Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    LARS([p], lr=0.5, weight_decay=0.1).step()
    assert torch.equal(p.detach(), torch.full((2, 2), -0.5))


def test_warmup_cosine_at_pinned_steps():
    def rate(step: int, floor: float = 0.0) -> float:
        return warmup_cosine(step, warmup_steps=10, total_steps=110, floor=floor)

    assert [rate(s) for s in (0, 1, 5, 10)] == pytest.approx([0, 0.1, 0.5, 1.0])
    assert [rate(s) for s in (35, 60, 110)] == pytest.approx([(1 + 2**-0.5) / 2, 0.5, 0.0], abs=1e-12)
    assert [rate(s, floor=0.001) for s in (60, 110)] == pytest.approx([0.001 + 0.999 / 2, 0.001])
    assert warmup_cosine(0, warmup_steps=0, total_steps=10) == 1.0


def test_peaks_of_the_full_recipes_are_the_published_ones():
    """moco 0.6 * 1536 / 256 = 3.6; ViT 4.5e-4; Barlow Twins 1.2 and 0.0288 / 6; MAE 4.5e-4."""
    published = {
        "pretrain_moco_v3_resnet50": ("lars", [3.6, 3.6]),
        "pretrain_moco_v3_vit_base": ("adamw", [4.5e-4]),
        "pretrain_barlow_twins_resnet50": ("lars", [1.2, 0.0288 / 6]),
        "pretrain_mae_vit_base": ("adamw", [4.5e-4, 4.5e-4]),
    }
    for name, (kind, peaks) in published.items():
        recipe = load_pretraining_recipe(name)
        tiny = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2))
        optimizer = build_optimizer(tiny, recipe.optimiser, total_batch_size=recipe.training.total_batch_size)
        assert recipe.optimiser.kind == kind
        assert [group["peak"] for group in optimizer.param_groups] == pytest.approx(peaks), name


def test_mae_decays_matrices_and_tokens_but_no_biases():
    """85 decayed and 167 other tensors of ViT-B with its decoder, of which tokens are decayed."""
    recipe = load_pretraining_recipe("pretrain_mae_vit_base")
    with torch.device("meta"):
        method = MAE(build_encoder("vit_base_patch16_224"))
    plain, decayed = sorted(
        build_optimizer(method, recipe.optimiser, total_batch_size=768).param_groups, key=lambda g: g["weight_decay"]
    )
    assert (plain["weight_decay"], decayed["weight_decay"]) == (0.0, 0.05)
    assert (len(decayed["params"]), len(plain["params"])) == (85, 167)
    assert any(p is method.mask_token for p in decayed["params"])


def test_moco_v3_vit_decays_everything_that_trains():
    recipe = load_pretraining_recipe("pretrain_moco_v3_vit_base")
    layer = torch.nn.Linear(2, 2)
    (group,) = build_optimizer(layer, recipe.optimiser, total_batch_size=768).param_groups
    assert len(group["params"]) == 2 and group["weight_decay"] == 0.1 and group["betas"] == (0.9, 0.999)
