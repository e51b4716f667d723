"""Our decoders against segmentation_models_pytorch, in outputs: float64, randomized BatchNorm, <= 1e-10."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from marks import first_fast
from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation

smp = pytest.importorskip("segmentation_models_pytorch")
TOLERANCE = 1e-10  # observed: exactly 0 or a few 1e-14


def randomize(model: nn.Module) -> nn.Module:
    """Random weights of sensible size and random BatchNorm statistics, so that no term can hide."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(0, 0.1, generator=generator)
    return model.double().eval()


def copy_in_order(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in order of definition; shapes must agree one by one."""
    theirs, ours = list(source.state_dict().values()), target.state_dict()
    assert len(theirs) == len(ours)
    for (name, tensor), value in zip(ours.items(), theirs, strict=True):
        assert tensor.shape == value.shape, name
        tensor.copy_(value)


@pytest.mark.parametrize("encoder", ["resnet50", "resnet18"])
def test_deeplabv3plus_matches_smp(encoder):
    torch.manual_seed(0)
    reference = randomize(smp.DeepLabV3Plus(encoder, encoder_weights=None))
    ours = PolypSegForSemanticSegmentation(PolypSegConfig(encoder=encoder)).double().eval()
    ours.encoder.load_state_dict(reference.encoder.state_dict(), strict=True)
    with torch.no_grad():
        theirs = reference.decoder
        copy_in_order(theirs.aspp[0], ours.decoder.aspp)
        copy_in_order(theirs.aspp[1:], ours.decoder.refine)
        copy_in_order(theirs.block1, ours.decoder.skip)
        copy_in_order(theirs.block2, ours.decoder.fuse)
        copy_in_order(reference.segmentation_head, ours.decoder.head)
        x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
        expected, logits = reference(x), ours(x).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits[:, 1:], expected, rtol=0, atol=TOLERANCE)


def test_without_the_dilation_correction_the_outputs_differ():
    """The guard of the guard: timm's own layer4 has the same keys and other outputs."""
    ours = randomize(PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18")))
    x = torch.randn(1, 3, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        right = ours(x).logits
        ours.encoder.layer4[0].conv1.dilation = ours.encoder.layer4[0].conv1.padding = (1, 1)
        assert (ours(x).logits - right).abs().max() > 1e-4


def smp_dpt(encoder: str, width: int) -> nn.Module:
    model = smp.DPT(
        f"tu-{encoder}",
        encoder_weights=None,
        encoder_output_indices=[2, 5, 8, 11],
        decoder_readout="ignore",
        decoder_intermediate_channels=(width // 8, width // 4, width // 2, width),
        decoder_fusion_channels=256,
        dynamic_img_size=True,
    )
    model.decoder.fusion_blocks[0].residual_conv_block1 = nn.Identity()  # the reference skips this unit
    return model


def copy_dpt(reference: nn.Module, ours: PolypSegForSemanticSegmentation) -> None:
    unexpected = ours.encoder.load_state_dict(reference.encoder.model.state_dict(), strict=False).unexpected_keys
    assert set(unexpected) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}
    with torch.no_grad():
        copy_in_order(reference.decoder.reassemble_blocks, ours.decoder.reassemble)
        for theirs, fusion in zip(reference.decoder.fusion_blocks, ours.decoder.fusion[::-1], strict=True):
            copy_in_order(theirs, fusion)
        copy_in_order(reference.segmentation_head, ours.decoder.head)


@pytest.mark.parametrize("size", first_fast([(224, 224), (352, 352), (224, 352)]))
def test_dpt_matches_smp(size):
    torch.manual_seed(0)
    reference = randomize(smp_dpt("vit_tiny_patch16_224", 192))
    ours = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="vit_tiny_patch16_224", decoder="dpt"))
    ours = ours.double().eval()
    copy_dpt(reference, ours)
    x = torch.randn(1, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        expected, logits = reference(x), ours(x).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits[:, 1:], expected, rtol=0, atol=TOLERANCE)


def blocks_of(ours: PolypSegForSemanticSegmentation, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs of a timm ViT's blocks as maps on the patch grid, computed block by block without our code."""
    vit = timm.create_model(ours.config.encoder, num_classes=0, dynamic_img_size=True).double().eval()
    missing = vit.load_state_dict(ours.encoder.state_dict(), strict=False).missing_keys
    assert set(missing) == {"norm.weight", "norm.bias"}
    tokens, maps = vit._pos_embed(vit.patch_embed(x)), []
    for block in vit.blocks:
        tokens = block(tokens)
        grid = tokens[:, 1:].transpose(1, 2)
        maps.append(grid.unflatten(2, (x.shape[2] // 16, x.shape[3] // 16)))
    return maps


def test_deeplabv3plus_on_a_vit_is_smps_decoder_on_the_third_and_the_last_block():
    torch.manual_seed(0)
    theirs = smp.DeepLabV3Plus("resnet18", encoder_weights=None).decoder
    theirs = type(theirs)([0, 0, 192, 0, 0, 192], 5, 256, (12, 24, 36), 16, True, 0.5).double().eval()
    ours = randomize(
        PolypSegForSemanticSegmentation(PolypSegConfig(encoder="vit_tiny_patch16_224", decoder="deeplabv3plus"))
    )
    parts = {"aspp": "aspp.0", "refine": "aspp.1", "skip": "block1", "fuse": "block2"}
    head = ours.decoder.head
    with torch.no_grad():
        smp_state = theirs.state_dict()
        source = [
            tensor for part in parts for name, tensor in ours.decoder.state_dict().items() if name.startswith(part)
        ]
        for (name, tensor), value in zip(smp_state.items(), source, strict=True):
            assert tensor.shape == value.shape, name
            tensor.copy_(value)
        x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
        blocks = blocks_of(ours, x)
        skip = F.interpolate(blocks[2], scale_factor=4, mode="bilinear", align_corners=True)
        decoded = F.conv2d(theirs([None, None, skip, blocks[11]]), head.weight, head.bias)
        expected = F.interpolate(decoded, scale_factor=4, mode="bilinear", align_corners=True)
        logits = ours(x).logits
    assert expected.std() > 1e-3
    torch.testing.assert_close(logits[:, 1:], expected, rtol=0, atol=TOLERANCE)


@pytest.mark.slow
def test_dpt_on_a_cnn_is_smps_fusion_of_four_projected_levels():
    torch.manual_seed(0)
    reference = randomize(smp_dpt("vit_tiny_patch16_224", 192))
    pyramid = smp.DeepLabV3Plus("resnet18", encoder_weights=None).encoder.double().eval()  # dilates as ours does
    ours = randomize(PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18", decoder="dpt")))
    pyramid.load_state_dict(ours.encoder.state_dict(), strict=True)
    with torch.no_grad():
        for theirs, fusion in zip(reference.decoder.fusion_blocks, ours.decoder.fusion[::-1], strict=True):
            copy_in_order(theirs, fusion)
        copy_in_order(reference.segmentation_head, ours.decoder.head)
        x = torch.randn(2, 3, 96, 128, dtype=torch.float64)
        features, path = pyramid(x)[2:], None  # strides 4, 8, 16, 16
        strides = (2, 1, 1, 1)
        deepest_first = zip(ours.decoder.reassemble[::-1], features[::-1], strides, strict=True)
        for fusion, (projection, feature, stride) in zip(reference.decoder.fusion_blocks, deepest_first, strict=True):
            path = fusion(F.conv2d(feature, projection.weight, stride=stride, padding=1), path)
        expected, logits = reference.segmentation_head(path), ours(x).logits
    assert expected.std() > 1e-3 and expected.shape[2:] == (96, 128)
    torch.testing.assert_close(logits[:, 1:], expected, rtol=0, atol=TOLERANCE)


def parameter_count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_parameter_counts_are_the_references():
    resnet = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet50", decoder="deeplabv3plus"))
    assert parameter_count(resnet) == 26_677_585
    assert parameter_count(resnet.encoder) == 23_508_032
    vit = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="vit_base_patch16_224", decoder="dpt"))
    dead_unit, unused_norm = 1_180_672, 1_536  # the deepest fusion's first unit; the ViT's final norm
    assert parameter_count(vit) == 85_798_656 - unused_norm + 20_328_641 - dead_unit


@pytest.mark.slow
def test_the_other_pairs_differ_from_the_studys_by_their_decoders_inputs_only():
    """Counted by hand from the layers' sizes at width 256, with the encoders of the study's pairs."""
    encoders = {"resnet50": 23_508_032, "vit_base_patch16_224": 85_798_656 - 1_536}
    dpt, deeplab = (
        PolypSegForSemanticSegmentation(PolypSegConfig(encoder=encoder, decoder=decoder))
        for encoder, decoder in zip(encoders, ("dpt", "deeplabv3plus"), strict=True)
    )
    assert [parameter_count(dpt.encoder), parameter_count(deeplab.encoder)] == list(encoders.values())
    width, bn = 256, 2 * 256
    unit, project = 2 * (9 * width * width + bn), width * width + width
    head = 9 * width * width + bn + width + 1
    pyramid = 9 * width * (256 + 512 + 1024 + 2048)
    assert parameter_count(dpt.decoder) == pyramid + 7 * unit + 4 * project + head

    def pointwise(channels: int, out: int = width) -> int:
        return channels * out + 2 * out

    def separable(channels: int) -> int:
        return 9 * channels + pointwise(channels)

    aspp = 2 * pointwise(768) + 3 * separable(768) + pointwise(5 * width)
    rest = separable(width) + pointwise(768, 48) + separable(width + 48) + width + 1
    assert parameter_count(deeplab.decoder) == aspp + rest
