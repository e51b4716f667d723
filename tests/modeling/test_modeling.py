"""What a user relies on in the model class: shapes, loss, initialization, save and load, sizes, errors."""

import copy
import math

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSemanticSegmentation

from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation, soft_dice_loss
from polypseg.modeling.encoders_polypseg import feature_levels, sincos_position_embedding

SMALL = {
    "resnet18": PolypSegConfig(encoder="resnet18", decoder="deeplabv3plus", decoder_channels=32),
    "tf_efficientnet_lite0": PolypSegConfig(encoder="tf_efficientnet_lite0", decoder_channels=32),
    "vit_tiny": PolypSegConfig(encoder="vit_tiny_patch16_224", decoder="dpt", decoder_channels=32),
    "resnet_dpt": PolypSegConfig(encoder="resnet18", decoder="dpt", decoder_channels=32),
    "vit_deeplabv3plus": PolypSegConfig(
        encoder="vit_tiny_patch16_224", decoder="deeplabv3plus", decoder_channels=32, decoder_dropout=0.1
    ),
    "vit_frozen": PolypSegConfig(
        encoder="vit_tiny_patch16_224",
        decoder="dpt",
        decoder_channels=32,
        position_embedding="sincos_mae",
        position_embedding_trainable=False,
    ),
}


@pytest.fixture(params=SMALL)
def model(request: pytest.FixtureRequest) -> PolypSegForSemanticSegmentation:
    torch.manual_seed(0)
    return PolypSegForSemanticSegmentation(SMALL[request.param])


def image(height: int = 64, width: int = 96, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_logits_are_zero_and_z(model):
    logits = model(image()).logits
    assert logits.shape == (2, 2, 64, 96)
    assert (logits[:, 0] == 0).all() and logits[:, 1].std() > 0


def test_every_trainable_parameter_receives_a_gradient(model):
    model(image(), labels=torch.rand(2, 64, 96)).loss.backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert all(p.requires_grad for p in model.parameters())
    if model.has_vit:
        trains = "encoder.pos_embed" in dict(model.named_parameters())
        assert trains == model.config.position_embedding_trainable


def test_saved_model_loads_through_auto_classes_with_equal_logits(model, tmp_path):
    model.eval().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).encoder == model.config.encoder
    loaded = AutoModelForSemanticSegmentation.from_pretrained(tmp_path).eval()
    assert isinstance(loaded, PolypSegForSemanticSegmentation)
    ours, theirs = model.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    # Some CPUs' kernels depend on where tensors lie in memory: observed 1e-6.
    torch.testing.assert_close(loaded(image()).logits, model(image()).logits, rtol=0, atol=1e-5)
    assert [n for n, p in loaded.named_parameters()] == [n for n, p in model.named_parameters() if p.requires_grad]


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny"])
def test_options_of_forward_do_what_they_do_in_transformers(name):
    model = PolypSegForSemanticSegmentation(copy.deepcopy(SMALL[name])).eval()  # its configuration is changed below
    labels = torch.rand(2, 64, 96)
    with torch.no_grad():
        plain = model(image(), labels=labels)
        loss, logits = model(image(), labels=labels, return_dict=False)
        assert torch.equal(loss, plain.loss) and torch.equal(logits, plain.logits) and plain.hidden_states is None
        assert len(model(image(), return_dict=False)) == 1
        shown = model(image(), output_hidden_states=True)
        features = model.extract_features(image())
        assert len(shown.hidden_states) == len(features) == len(model.levels)
        assert all(torch.equal(a, b) for a, b in zip(shown.hidden_states, features, strict=True))
        model.config.return_dict, model.config.output_hidden_states = False, True
        logits, hidden = model(image())
        assert torch.equal(logits, plain.logits) and len(hidden) == len(features)
        model.config.return_dict, model.config.output_hidden_states = True, False
    with pytest.raises(ValueError, match="no attention maps"):
        model(image(), output_attentions=True)
    model.config.output_attentions = True
    with pytest.raises(ValueError, match="no attention maps"):
        model(image())
    with pytest.raises(TypeError, match="label"):
        model(image(), label=labels)


@pytest.mark.parametrize(
    "fields", [{"num_labels": 3}, {"num_labels": 1}, {"id2label": {0: "polyp", 1: "other"}}, {"id2label": {1: "polyp"}}]
)
def test_other_labels_are_refused(fields):
    with pytest.raises(ValueError, match="background"):
        PolypSegConfig(**fields)
    config = PolypSegConfig(encoder="resnet10t", decoder_channels=8)
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(ValueError, match="background"):
        PolypSegForSemanticSegmentation(config)


def test_own_names_of_the_two_labels_are_kept(tmp_path):
    config = PolypSegConfig(id2label={0: "mucosa", 1: "lesion"}, num_labels=2)
    config.save_pretrained(tmp_path)
    kept = PolypSegConfig.from_pretrained(tmp_path)
    assert kept.id2label == {0: "mucosa", 1: "lesion"} and kept.label2id == {"mucosa": 0, "lesion": 1}


@pytest.mark.parametrize("size", [(224, 224), (352, 352), (512, 512), (224, 352), (240, 336)])
def test_other_sizes_work(model, size):
    with torch.no_grad():
        assert model.eval()(image(*size, batch=1)).logits.shape == (1, 2, *size)


@pytest.mark.parametrize("name", ["resnet18", "resnet_dpt"])
def test_convolutional_models_take_any_size(name):
    model = PolypSegForSemanticSegmentation(SMALL[name]).eval()
    assert model(image(101, 67)).logits.shape == (2, 2, 101, 67)


@pytest.mark.parametrize("name", ["vit_tiny", "vit_deeplabv3plus"])
def test_impossible_sizes_are_refused_in_english(name):
    vit = PolypSegForSemanticSegmentation(SMALL[name])
    with pytest.raises(ValueError, match=r"multiples of 16 pixels, not 100x64"):
        vit(image(100, 64))
    with pytest.raises(ValueError, match="too small"):
        vit(image(16, 64))
    with pytest.raises(ValueError, match=r"multiples of 16 pixels, not 100x100"):
        vit.check_image_size(100, 100)
    with pytest.raises(ValueError, match="batch of one"):
        PolypSegForSemanticSegmentation(SMALL["resnet18"]).train()(image(batch=1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder": "resnet5000"}, "timm knows no encoder 'resnet5000'"),
        ({"encoder": "resnet5000", "decoder": "dpt"}, "timm knows no encoder 'resnet5000'"),
        ({"encoder": "mixer_s16_224", "decoder": "dpt"}, "'mixer_s16_224' is no plain ViT and no CNN with strided"),
        ({"encoder": "vgg11"}, "'vgg11' is no plain ViT and no CNN with strided features at output stride 16"),
        ({"encoder": "swin_tiny_patch4_window7_224"}, "no plain ViT and no CNN"),
        ({"encoder": "vit_tiny_patch16_224", "decoder_channels": 0}, "must be positive"),
        ({"encoder": "vit_small_patch32_224"}, r"DeepLabV3\+ reads a ViT of 16x16 patches, not of \(32, 32\)"),
        ({"decoder": "unet"}, "unknown decoder 'unet'"),
        ({"position_embedding": "rotary"}, "unknown position_embedding"),
    ],
)
def test_impossible_configurations_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PolypSegForSemanticSegmentation(PolypSegConfig(**arguments))


def test_levels_come_from_the_strides_of_the_pyramid_and_the_depth_of_the_vit():
    levels = {name: PolypSegForSemanticSegmentation(config).levels for name, config in SMALL.items()}
    assert levels["resnet18"] == [1, 4] and levels["resnet_dpt"] == [1, 2, 3, 4]
    assert levels["vit_tiny"] == [2, 5, 8, 11] and levels["vit_deeplabv3plus"] == [2, 11]
    model = PolypSegForSemanticSegmentation(SMALL["vit_deeplabv3plus"])
    assert [tuple(x.shape) for x in model.extract_features(image(64, 96))] == [(2, 192, 16, 24), (2, 192, 4, 6)]


def test_dpt_refuses_a_pyramid_without_its_strides():
    class Info:
        def reduction(self) -> list[int]:
            return [2, 4, 16]

    encoder = nn.Identity()
    encoder.feature_info = Info()
    with pytest.raises(ValueError, match=r"stride 4, 8, 16 and 16, not \[2, 4, 16\]"):
        feature_levels(encoder, decoder="dpt")


def test_the_encoder_does_not_depend_on_the_decoder():
    """Else a grid of encoders and decoders would change two things at once."""
    for encoder in ("resnet10t", "vit_tiny_patch16_224"):
        encoders = []
        for decoder in ("deeplabv3plus", "dpt"):
            torch.manual_seed(0)
            config = PolypSegConfig(encoder=encoder, decoder=decoder, decoder_channels=8)
            encoders.append(PolypSegForSemanticSegmentation(config).eval())
        states = [model.encoder.state_dict() for model in encoders]
        assert states[0].keys() == states[1].keys()
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        torch.testing.assert_close(encoders[0].extract_features(image())[-1], encoders[1].extract_features(image())[-1])


@pytest.mark.parametrize("name", ["resnet_dpt", "vit_deeplabv3plus"])
@pytest.mark.slow
def test_a_few_steps_lower_the_loss_of_the_other_pairs(name):
    torch.manual_seed(0)
    model = PolypSegForSemanticSegmentation(SMALL[name]).train()
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    pixels, labels = image(64, 64, batch=4), torch.zeros(4, 64, 64)
    labels[:, 16:48, 16:48] = 1
    for _ in range(6):
        loss = model(pixels, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[1] < losses[0] and losses[-1] < losses[0] - 0.1


def test_gradient_checkpointing_changes_no_gradient(model):
    model.eval()  # no dropout, no BatchNorm update between the two passes
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        if enable:
            model.gradient_checkpointing_enable()
            assert model.is_gradient_checkpointing and model.encoder.grad_checkpointing
        model(image(), labels=torch.rand(2, 64, 96, generator=torch.Generator().manual_seed(2))).loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-4, atol=1e-6)
    model.gradient_checkpointing_disable()
    assert not model.encoder.grad_checkpointing


def test_input_statistics_follow_the_encoder():
    assert PolypSegConfig(encoder="resnet50").image_mean == [0.485, 0.456, 0.406]
    assert PolypSegConfig(encoder="tf_efficientnet_lite0").image_std == [0.5, 0.5, 0.5]
    assert PolypSegConfig(encoder="resnet50", image_mean=[0.1, 0.2, 0.3]).image_mean == [0.1, 0.2, 0.3]


class TestInitialization:
    """The reference's standard deviations, not transformers' N(0, 0.02)."""

    def test_deeplabv3plus_is_kaiming_uniform_with_a_xavier_head(self):
        torch.manual_seed(0)
        decoder = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18")).decoder
        for layer in (
            decoder.aspp.branches[0][0],
            decoder.aspp.project[0],
            decoder.fuse[1],
            decoder.aspp.branches[1][0],
        ):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.05)
            assert layer.weight.abs().max() <= math.sqrt(6 / fan_in)
        assert decoder.head.weight.std().item() == pytest.approx(math.sqrt(2 / 257), rel=0.15)
        assert decoder.head.bias.item() == 0

    def test_dpt_is_pytorch_default(self):
        torch.manual_seed(0)
        decoder = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="vit_tiny_patch16_224", decoder="dpt")).decoder
        for layer in (decoder.fusion[0].refine.body[1], decoder.reassemble[3][0], decoder.fusion[0].project):
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(3 * fan_in), rel=0.05)
        assert 0 < decoder.fusion[0].project.bias.abs().max() <= 1 / math.sqrt(256)

    def test_resnet_is_torchvision_default(self):
        torch.manual_seed(0)
        encoder = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18")).encoder
        weight = encoder.layer3[0].conv1.weight  # (256, 128, 3, 3): Kaiming normal, fan out
        assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)
        gains = [m.weight for m in encoder.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all((gain == 1).all() for gain in gains)

    def test_vit_is_timm_default(self):
        torch.manual_seed(0)
        encoder = PolypSegForSemanticSegmentation(SMALL["vit_tiny"]).encoder
        assert encoder.blocks[0].attn.qkv.weight.std().item() == pytest.approx(0.02, rel=0.05)
        assert encoder.pos_embed.std().item() == pytest.approx(0.02, rel=0.05)
        assert encoder.blocks[0].attn.qkv.bias.abs().max() == 0


DROPPED = {
    "everything": lambda key: True,
    "encoder": lambda key: key.startswith("encoder."),
    "decoder": lambda key: key.startswith("decoder."),
    "some": lambda key: (
        "running_" in key or key.endswith(("num_batches_tracked", "pos_embed", ".bias", "norm1.weight"))
    ),
}
UNSAVED = PolypSegConfig(encoder="resnetblur18", decoder_channels=8)  # has buffers that no file holds


class TestMissingWeights:
    """Whatever a checkpoint lacks starts as in a new model: transformers builds without memory before it loads."""

    @pytest.mark.parametrize(
        ("name", "dropped"),
        [
            *((name, "everything") for name in ("resnet18", "tf_efficientnet_lite0", "vit_tiny", "unsaved")),
            *((name, dropped) for name in ("vit_frozen", "resnet18") for dropped in ("encoder", "some")),
            ("resnet_dpt", "decoder"),
        ],
    )
    def test_they_get_the_references_initialization(self, name, dropped):
        config = SMALL.get(name, UNSAVED)
        torch.manual_seed(2)
        new = PolypSegForSemanticSegmentation(config)
        kept = {k: v.clone() + 1 for k, v in new.state_dict().items() if not DROPPED[dropped](k)}
        torch.manual_seed(2)
        loaded, report = PolypSegForSemanticSegmentation.from_pretrained(
            None, config=config, state_dict=dict(kept), output_loading_info=True
        )
        expected = dict([*new.named_parameters(), *new.named_buffers()])
        assert set(report["missing_keys"]) == new.state_dict().keys() - kept.keys()
        for name, tensor in [*loaded.named_parameters(), *loaded.named_buffers()]:
            if name in kept:
                assert torch.equal(tensor, kept[name]), name
            elif name.startswith("encoder.") or (tensor.ndim < 2 and not name.endswith("bias")):
                assert torch.equal(tensor, expected[name]), name
            else:  # drawn after the encoder, as often as the encoder lacks something: the same distribution
                assert tensor.isfinite().all() and tensor.abs().max() < 2, name
                if tensor.numel() > 200:
                    assert tensor.std().item() == pytest.approx(expected[name].std().item(), rel=0.2), name

    def test_a_complete_checkpoint_draws_nothing(self, tmp_path):
        PolypSegForSemanticSegmentation(SMALL["vit_frozen"]).save_pretrained(tmp_path)
        torch.manual_seed(3)
        wanted = torch.rand(1)
        torch.manual_seed(3)
        PolypSegForSemanticSegmentation.from_pretrained(tmp_path)
        assert torch.equal(torch.rand(1), wanted)

    def test_tensors_of_another_shape_are_drawn_too(self, tmp_path):
        PolypSegForSemanticSegmentation(SMALL["vit_tiny"]).save_pretrained(tmp_path)
        loaded = PolypSegForSemanticSegmentation.from_pretrained(
            tmp_path, decoder_channels=8, ignore_mismatched_sizes=True
        )
        assert all(tensor.isfinite().all() for tensor in loaded.state_dict().values())
        assert loaded.decoder.head[0].weight.std().item() == pytest.approx(1 / math.sqrt(3 * 72), rel=0.1)


def test_sincos_tables_follow_their_definition():
    rows, columns, width = 3, 5, 16
    frequencies = [10000 ** (-4 * j / width) for j in range(width // 4)]
    table = sincos_position_embedding("sincos_moco_v3", grid=(rows, columns), width=width)[0]
    swapped = sincos_position_embedding("sincos_mae", grid=(rows, columns), width=width)[0]
    for r in range(rows):
        for c in range(columns):
            halves = [[f(x * w) for f in (math.sin, math.cos) for w in frequencies] for x in (r, c)]
            expected = torch.tensor(halves)
            torch.testing.assert_close(table[r * columns + c], expected.flatten(), rtol=0, atol=1e-5)
            torch.testing.assert_close(swapped[r * columns + c], expected.flip(0).flatten(), rtol=0, atol=1e-5)


def test_frozen_table_is_in_the_model():
    model = PolypSegForSemanticSegmentation(SMALL["vit_frozen"])
    table = sincos_position_embedding("sincos_mae", grid=(14, 14), width=192)
    torch.testing.assert_close(model.encoder.pos_embed[:, 1:], table)
    assert (model.encoder.pos_embed[:, 0] == 0).all()


class TestSoftDiceLoss:
    def test_equals_the_formula_computed_by_hand(self):
        logits = torch.tensor([[[0.0, 0.0]], [[math.log(3), -math.log(3)]]])  # p = 1/2, 1/2 and 3/4, 1/4
        labels = torch.tensor([[[1.0, 0.0]], [[0.5, 1.0]]])
        first = 1 - 2 * 0.5 / (0.5 + 1)
        second = 1 - 2 * (0.375 + 0.25) / (0.5625 + 0.0625 + 0.25 + 1)
        assert soft_dice_loss(logits, labels).item() == pytest.approx((first + second) / 2, abs=1e-6)

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match="do not fit"):
            soft_dice_loss(torch.zeros(1, 4, 4), torch.zeros(1, 2, 2))

    def test_empty_label_is_finite(self):
        assert torch.isfinite(soft_dice_loss(torch.full((1, 4, 4), -50.0), torch.zeros(1, 4, 4)))
