"""Layers in their fast form: equal outputs and gradients, and nothing else is touched."""

import copy

import pytest
import timm
import torch
from torch import nn

from polypseg import zoo
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.modeling.decoder_dpt import Fusion
from polypseg.training.fast_layers import (
    EarlyProjection,
    InterleavedConv2d,
    attention_by_products,
    early_projections,
    fast_layers,
    interleaved_convolutions,
)


@pytest.mark.parametrize("side", [(16, 16), (18, 14), (7, 9)])
@pytest.mark.parametrize(("taps", "dilation"), [(3, 2), (5, 2), (3, 12), (3, 24)])
def test_outputs_and_gradients_are_those_of_the_convolution(side, taps, dilation):
    torch.manual_seed(0)
    plain = nn.Conv2d(6, 6, taps, padding=dilation * (taps // 2), dilation=dilation, groups=6, bias=False).double()
    inputs = torch.randn(2, 6, *side, dtype=torch.float64)
    results = []
    for fast in (False, True):
        layer, x = copy.deepcopy(plain), inputs.clone().requires_grad_()
        with interleaved_convolutions(layer, enabled=fast) as count:
            assert count == int(fast)
            y = layer(x)
            y.square().sum().backward()
        results.append((y.detach(), x.grad, layer.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_a_model_keeps_its_weights_and_classes():
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="tf_efficientnet_lite0", decoder_channels=16))
    before = {name: type(layer) for name, layer in model.named_modules()}
    keys = list(model.state_dict())
    with interleaved_convolutions(model) as count:
        # Three 5x5 and one 3x3 of the dilated last stages, three rates of ASPP.
        assert count == 7 and list(model.state_dict()) == keys
    assert {name: type(layer) for name, layer in model.named_modules()} == before


def test_other_convolutions_are_left_alone():
    layers = nn.Sequential(
        nn.Conv2d(4, 4, 3, padding=1, groups=4, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, bias=False),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, stride=2, bias=False),
        nn.Conv2d(4, 8, 3, padding=2, dilation=2, groups=4, bias=False),
    )
    with interleaved_convolutions(layers) as count:
        assert count == 0


def test_attention_by_products_has_the_same_outputs_and_gradients():
    torch.manual_seed(0)
    plain = timm.layers.Attention(24, num_heads=3, qkv_bias=True).double()
    inputs = torch.randn(2, 7, 24, dtype=torch.float64)
    results = []
    for fast in (False, True):
        layer, x = copy.deepcopy(plain), inputs.clone().requires_grad_()
        with attention_by_products(layer, enabled=fast) as count:
            assert count == int(fast) and layer.fused_attn is not fast
            y = layer(x)
            y.square().sum().backward()
        assert layer.fused_attn
        results.append((y.detach(), x.grad, layer.qkv.weight.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [(10, 14), (9, 13)])  # twice the map's, and what an odd side leaves of it
def test_early_projections_have_the_same_outputs_and_gradients(size):
    torch.manual_seed(0)
    plain = Fusion(6, has_coarser=True).double()
    level, coarser = torch.randn(2, 2, 6, 5, 7, dtype=torch.float64)
    results = []
    for fast in (False, True):
        layer, x = copy.deepcopy(plain), level.clone().requires_grad_()
        with early_projections(layer, enabled=fast) as count:
            assert count == int(fast)
            y = layer(x, coarser, size)
            y.square().sum().backward()
        assert type(layer) is Fusion
        results.append((y.detach(), x.grad, layer.project.weight.grad, layer.project.bias.grad))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_layers_of_the_transformer_row_are_found():
    with torch.device("meta"):
        model = PolypSegForSemanticSegmentation(zoo.get("VT-NA-NA").config())
    with attention_by_products(model) as count:
        assert count == 12
    with early_projections(model) as count:
        assert count == 4


@pytest.mark.parametrize(("bf16", "enabled"), [(True, True), (False, True), (True, False)])
def test_all_fast_forms_serve_at_once_and_are_taken_back(bf16, enabled):
    layers = nn.ModuleList(
        [
            nn.Conv2d(4, 4, 3, padding=2, dilation=2, groups=4, bias=False),
            Fusion(6, has_coarser=True),
            timm.layers.Attention(24, num_heads=3),
        ]
    )
    convolution, fusion, attention = layers
    with fast_layers(layers, bf16=bf16, enabled=enabled):
        assert (type(convolution) is InterleavedConv2d) == (type(fusion) is EarlyProjection) == enabled
        assert attention.fused_attn is not (bf16 and enabled)
    assert type(convolution) is nn.Conv2d and type(fusion) is Fusion and attention.fused_attn
