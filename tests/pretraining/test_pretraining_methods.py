"""The three methods against closed forms and independent oracles: losses, heads, initialization, what trains."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
from lightly.loss import BarlowTwinsLoss
from lightly.models import utils as lightly_utils
from lightly.models.modules import MaskedVisionTransformerDecoderTIMM, MaskedVisionTransformerTIMM

from polypseg.errors import UsageError
from polypseg.pretraining.barlow_twins import BarlowTwins, cross_correlation, redundancy_loss
from polypseg.pretraining.encoders import build_encoder, encode
from polypseg.pretraining.mae import MAE, choose_patches, patchify, unpatchify
from polypseg.pretraining.moco_v3 import MoCoV3, contrastive_loss

CNN, VIT = "test_resnet", "test_vit"  # timm's smallest of each family
VIEWS = {"moco_v3": 2, "barlow_twins": 2, "mae": 1}


def small_method(name: str, encoder: str) -> torch.nn.Module:
    torch.manual_seed(0)
    network = build_encoder(encoder)
    if name == "moco_v3":
        return MoCoV3(network, hidden_width=32, output_width=16, temperature=0.2)
    if name == "barlow_twins":
        return BarlowTwins(network, projector_width=32)
    return MAE(network, image_size=64, decoder_width=16, decoder_depth=1, decoder_heads=2)


def small_batch(method: torch.nn.Module, *, images: int = 8, size: int = 64) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    views = torch.randn(images, method.views, 3, size, size, generator=generator)
    noise = [torch.rand(images, method.patches, generator=generator)] if isinstance(method, MAE) else []
    return [views, *noise]


ALL = [("moco_v3", CNN), ("moco_v3", VIT), ("barlow_twins", CNN), ("barlow_twins", VIT), ("mae", VIT)]


# -- MoCo v3 ---------------------------------------------------------------------------------------------------------


def test_contrastive_loss_by_hand():
    """Two orthogonal pairs: each row's logits are (1/t, 0), so the loss is 2 t ln(1 + e^(-1/t))."""
    pair = torch.eye(2, dtype=torch.float64)
    for t in (0.2, 1.0):
        assert float(contrastive_loss(pair, pair, temperature=t)) == pytest.approx(2 * t * math.log1p(math.exp(-1 / t)))
    swapped = pair.flip(0)  # now the positive is the orthogonal key
    assert float(contrastive_loss(pair, swapped, temperature=1.0)) == pytest.approx(2 * math.log(1 + math.e))


def test_contrastive_loss_finds_its_positives_among_all_processes_keys():
    keys = torch.nn.functional.normalize(torch.randn(6, 4, dtype=torch.float64), dim=1)
    whole = contrastive_loss(keys, keys, temperature=0.5)
    parts = [contrastive_loss(keys[2 * r : 2 * r + 2], keys, temperature=0.5, process=r) for r in range(3)]
    assert float(torch.stack(parts).mean()) == pytest.approx(float(whole), abs=1e-12)


@pytest.mark.parametrize(("temperature", "m"), [(1.0, 256), (0.2, 256)])
def test_contrastive_loss_of_unrelated_unit_vectors_is_2_tau_ln_m(temperature, m):
    """Both directions together start at about 4 tau ln M; in 256 dimensions similarities are small (std 1/16)."""
    torch.manual_seed(0)
    q, k = (torch.nn.functional.normalize(torch.randn(m, 256), dim=1) for _ in range(2))
    loss = contrastive_loss(q, k, temperature=temperature)
    assert float(loss) == pytest.approx(2 * temperature * math.log(m), rel=0.02)


@pytest.mark.parametrize("encoder", [CNN, VIT])
def test_moco_v3_starts_at_about_4_tau_ln_m(encoder):
    method = small_method("moco_v3", encoder).train()
    loss = float(method(*small_batch(method, images=32)).loss.detach())
    assert loss == pytest.approx(4 * 0.2 * math.log(32), rel=0.25), loss


def test_moco_v3_heads_are_the_papers():
    with torch.device("meta"):
        heads = {name: MoCoV3(build_encoder(name), temperature=1.0) for name in ("resnet50", "vit_base_patch16_224")}

    def shapes(module):
        return {key: tuple(value.shape) for key, value in module.state_dict().items() if value.ndim}

    batchnorm = lambda n, affine: {  # noqa: E731
        f"{n}.{key}": (4096,) if affine else (256,)
        for key in (["weight", "bias"] if affine else []) + ["running_mean", "running_var"]
    }
    resnet, vit = heads["resnet50"], heads["vit_base_patch16_224"]
    assert shapes(resnet.projector) == {
        "0.weight": (4096, 2048),
        **batchnorm(1, True),
        "3.weight": (256, 4096),
        **batchnorm(4, False),
    }
    assert shapes(resnet.predictor) == {"0.weight": (4096, 256), **batchnorm(1, True), "3.weight": (256, 4096)}
    assert shapes(vit.projector) == {
        "0.weight": (4096, 768), **batchnorm(1, True), "3.weight": (4096, 4096), **batchnorm(4, True),
        "6.weight": (256, 4096), **batchnorm(7, False),
    }  # fmt: skip
    assert shapes(vit.predictor) == {
        "0.weight": (4096, 256),
        **batchnorm(1, True),
        "3.weight": (256, 4096),
        **batchnorm(4, False),
    }
    assert len(resnet.encoder.state_dict()) == 318 and len(vit.encoder.state_dict()) == 150


def test_momentum_branch_follows_the_formula_exactly():
    method = small_method("moco_v3", CNN).double()
    with torch.no_grad():
        for p in [*method.encoder.parameters(), *method.projector.parameters()]:
            p.add_(torch.randn_like(p))
    before = {key: value.clone() for key, value in method.momentum_encoder.named_parameters()}
    for share, m in ((0.0, 0.99), (0.25, 1 - 0.005 * (1 + math.cos(math.pi / 4))), (0.5, 0.995), (1.0, 1.0)):
        method.start_step(share)
        online = dict(method.encoder.named_parameters())
        for key, value in method.momentum_encoder.named_parameters():
            expected = m * before[key] + (1 - m) * online[key]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-14)
            before[key] = value.clone()
    assert not any(p.requires_grad for p in method.momentum_encoder.parameters())


def test_moco_v3_vit_is_initialized_as_the_paper_says():
    method = MoCoV3(build_encoder("vit_tiny_patch16_224"), hidden_width=8, output_width=8, temperature=0.2)
    encoder = method.encoder
    width = encoder.embed_dim
    for block in encoder.blocks:
        bound = math.sqrt(6 / (width + width))  # Q, K and V are width x width each
        assert 0.99 * bound < float(block.attn.qkv.weight.detach().abs().max()) <= bound
        assert float(block.attn.qkv.bias.detach().abs().max()) == 0
        bound = math.sqrt(6 / (width + 4 * width))
        assert 0.99 * bound < float(block.mlp.fc1.weight.detach().abs().max()) <= bound
    projection = encoder.patch_embed.proj
    bound = math.sqrt(6 / (3 * 16 * 16 + width))
    assert 0.99 * bound < float(projection.weight.abs().max()) <= bound and float(projection.bias.abs().max()) == 0
    assert 0 < float(encoder.cls_token.abs().max()) < 1e-5
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}


def sincos_by_definition(grid: int, width: int, *, column_first: bool) -> np.ndarray:
    """[sin, cos] of each coordinate with frequencies 10000^(-j / (width / 4)), one number at a time."""
    quarter = width // 4
    table = np.zeros((1 + grid * grid, width))
    for row in range(grid):
        for column in range(grid):
            first, second = (column, row) if column_first else (row, column)
            for j in range(quarter):
                w = 10000.0 ** (-j / quarter)
                table[1 + row * grid + column, j] = math.sin(first * w)
                table[1 + row * grid + column, quarter + j] = math.cos(first * w)
                table[1 + row * grid + column, 2 * quarter + j] = math.sin(second * w)
                table[1 + row * grid + column, 3 * quarter + j] = math.cos(second * w)
    return table


@pytest.mark.parametrize("name", ["moco_v3", "mae"])
def test_position_tables_by_definition(name):
    """Rows first for MoCo v3, columns first for MAE; float32 frequencies leave 1e-6."""
    method = small_method(name, "vit_tiny_patch16_224")
    table = method.encoder.pos_embed[0].detach().numpy()
    np.testing.assert_allclose(table, sincos_by_definition(14, 192, column_first=name == "mae"), atol=5e-6)
    if name == "mae":
        decoder = method.decoder_pos_embed[0].detach().numpy()
        np.testing.assert_allclose(decoder, sincos_by_definition(4, 16, column_first=True), atol=5e-6)


# -- Barlow Twins ----------------------------------------------------------------------------------------------------


def test_redundancy_loss_is_zero_for_identical_decorrelated_embeddings():
    """Columns of a Hadamard matrix without the constant one: mean 0, variance 1, uncorrelated."""
    two = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    z = torch.kron(torch.kron(two, two), two)[:, 1:]
    assert float(redundancy_loss(cross_correlation(z, z), off_diagonal_weight=0.0051)) == pytest.approx(0, abs=1e-24)
    assert float(redundancy_loss(cross_correlation(z, -z), off_diagonal_weight=0.0051)) == pytest.approx(4 * 7)


def test_redundancy_loss_by_hand():
    c = torch.tensor([[0.5, 0.2], [-0.1, 1.0]], dtype=torch.float64)
    assert float(redundancy_loss(c, off_diagonal_weight=0.1)) == pytest.approx(0.25 + 0.1 * (0.04 + 0.01))


def test_barlow_twins_loss_and_gradients_equal_lightlys():
    torch.manual_seed(0)
    a, b = (torch.randn(32, 64, dtype=torch.float64, requires_grad=True) for _ in range(2))
    theirs = BarlowTwinsLoss(lambda_param=0.0051)(a, b)
    expected = torch.autograd.grad(theirs, (a, b))
    norm = torch.nn.BatchNorm1d(64, affine=False).double()
    ours = redundancy_loss(cross_correlation(norm(a), norm(b)), off_diagonal_weight=0.0051)
    assert float(ours) == pytest.approx(float(theirs), rel=1e-12)
    for mine, other in zip(torch.autograd.grad(ours, (a, b)), expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12)


def test_barlow_twins_projector_is_the_papers():
    with torch.device("meta"):
        method = BarlowTwins(build_encoder("resnet50"))
    state = {key: tuple(value.shape) for key, value in method.projector.state_dict().items() if value.ndim > 1}
    assert state == {"0.weight": (8192, 2048), "3.weight": (8192, 8192), "6.weight": (8192, 8192)}
    assert not any("bias" in key for key, value in method.projector.named_parameters() if value.ndim > 1)
    assert not method.normalise.affine and method.normalise.eps == 1e-5


# -- MAE -------------------------------------------------------------------------------------------------------------


def test_mae_keeps_49_of_196_patches_those_of_least_noise():
    noise = torch.rand(3, 196)
    kept, mask, rank = choose_patches(noise, keep=int(196 * 0.25))
    assert kept.shape == (3, 49) and mask.sum(1).tolist() == [147.0] * 3
    for row in range(3):
        assert set(kept[row].tolist()) == set(noise[row].argsort()[:49].tolist())
        assert mask[row, kept[row]].sum() == 0
        assert torch.equal(noise[row].argsort()[rank[row]], torch.arange(196))
    assert MAE(build_encoder(VIT), image_size=224, decoder_width=8, decoder_depth=1, decoder_heads=1).kept == 49


def test_patchify_orders_row_column_channel_and_is_inverted_by_unpatchify():
    images = torch.arange(2 * 3 * 8 * 8, dtype=torch.float64).reshape(2, 3, 8, 8)
    patches = patchify(images, size=4)
    assert patches.shape == (2, 4, 48)
    row, column, channel = 2, 1, 2
    assert patches[1, 3, (row * 4 + column) * 3 + channel] == images[1, channel, 4 + row, 4 + column]
    assert torch.equal(unpatchify(patches, size=4, grid=2), images)
    assert torch.equal(patches, lightly_utils.patchify(images, patch_size=4))


def test_mae_equals_lightlys_on_equal_weights():
    """Encoder, decoder and loss; lightly keeps the patches that we keep. Observed difference of the loss: 1e-7."""
    torch.manual_seed(0)
    method = MAE(build_encoder("vit_tiny_patch16_224"), decoder_width=64, decoder_depth=2, decoder_heads=4).eval()
    with torch.no_grad():
        for p in method.parameters():  # biases and gains too
            p.add_(0.02 * torch.randn_like(p))
    images, noise = torch.randn(2, 3, 224, 224), torch.rand(2, 196)
    tokens, mask, rank = method.encode(images, noise)
    loss = method.reconstruction_loss(images, method.decode(tokens, rank), mask)

    vit = MaskedVisionTransformerTIMM(timm.create_model("vit_tiny_patch16_224", num_classes=0))
    vit.vit.load_state_dict(method.encoder.state_dict())
    decoder = MaskedVisionTransformerDecoderTIMM(num_patches=196, embed_dim=64, depth=2, num_heads=4)
    decoder.blocks.load_state_dict(method.decoder_blocks.state_dict())
    decoder.norm.load_state_dict(method.decoder_norm.state_dict())
    decoder.pos_embed.data.copy_(method.decoder_pos_embed)
    order = noise.argsort(1) + 1  # lightly counts the class token
    keep = torch.cat([torch.zeros(2, 1, dtype=torch.long), order[:, :49]], dim=1)
    hidden = order[:, 49:]
    theirs = vit.encode(images, idx_keep=keep)
    torch.testing.assert_close(tokens, theirs, rtol=0, atol=1e-5)
    sequence = lightly_utils.repeat_token(method.mask_token, (2, 197))
    sequence = lightly_utils.set_at_index(sequence, keep, method.decoder_embed(theirs))
    decoded = decoder.decode(decoder.add_pos_embed(sequence))
    painted = method.decoder_pred(lightly_utils.get_at_index(decoded, hidden))
    target = lightly_utils.get_at_index(lightly_utils.patchify(images, 16), hidden - 1)
    expected = torch.nn.functional.mse_loss(painted, lightly_utils.normalize_mean_var(target))
    assert float(loss) == pytest.approx(float(expected), abs=2e-6)


def test_mae_is_initialized_as_its_authors_do():
    method = MAE(build_encoder("vit_tiny_patch16_224"), decoder_width=64, decoder_depth=1, decoder_heads=4)
    width = 192
    bound = math.sqrt(6 / (width + 3 * width))  # Q, K and V as one matrix
    assert 0.99 * bound < float(method.encoder.blocks[0].attn.qkv.weight.abs().max()) <= bound
    bound = math.sqrt(6 / (768 + width))
    assert 0.99 * bound < float(method.encoder.patch_embed.proj.weight.abs().max()) <= bound
    assert float(method.encoder.cls_token.std()) == pytest.approx(0.02, rel=0.3)
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embed", "decoder_pos_embed"}


def test_mae_reconstruction_undoes_the_target_normalization():
    """A decoder that predicts the normalized truth must give back the image."""
    method = small_method("mae", VIT)
    images, noise = torch.rand(2, 3, 64, 64), torch.rand(2, 16)
    truth = patchify(images, size=16)
    mean, variance = truth.mean(-1, keepdim=True), truth.var(-1, keepdim=True)
    method.decode = lambda tokens, rank: (truth - mean) / (variance + 1e-6).sqrt()
    masked, painted = method.reconstruct(images, noise)
    torch.testing.assert_close(painted, images, rtol=0, atol=1e-5)
    assert float((masked == 0).float().mean()) == pytest.approx(0.75)


# -- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "encoder"), ALL)
def test_what_should_train_does_and_what_is_frozen_does_not(name, encoder):
    method = small_method(name, encoder).train()
    before = copy.deepcopy(method.state_dict())
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # gains that start at zero let no gradient pass in the first step
        method.zero_grad()
        method(*small_batch(method)).loss.backward()
        optimizer.step()
    without = [key for key, p in method.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert [key for key in without if not key.endswith("qkv.bias")] == []  # the key bias of attention has none
    after = method.state_dict()
    trained = {key for key, p in method.named_parameters() if p.requires_grad}
    still = {key for key, value in before.items() if torch.equal(value, after[key])}
    assert not trained & still
    frozen = {key for key, p in method.named_parameters() if not p.requires_grad}
    assert frozen <= still


@pytest.mark.slow
@pytest.mark.parametrize(("name", "encoder"), ALL)
def test_overfits_a_small_set(name, encoder):
    """Forty AdamW steps on eight images; the pinned shares leave room above what was observed."""
    method = small_method(name, encoder).train()
    batch = small_batch(method)
    optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for _ in range(40):
        method.start_step(0.0)
        loss = method(*batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    share = {"moco_v3": 0.75, "barlow_twins": 0.5, "mae": 0.95}[name]
    assert losses[-1] < share * losses[0], (losses[0], losses[-1])


@pytest.mark.parametrize(("name", "encoder"), ALL)
def test_loss_is_float32_under_autocast(name, encoder):
    method = small_method(name, encoder).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = method(*small_batch(method))
    assert output.loss.dtype == torch.float32 and torch.isfinite(output.loss)


@pytest.mark.parametrize("name", ["moco_v3", "barlow_twins"])
def test_encoding_in_chunks_is_exact_for_a_vit(name):
    """Loss and gradients in float64 against the whole batch at once, at the size at which timm interpolates nothing."""
    results = []
    for chunk in (None, 3):
        method = small_method(name, VIT).double().train()
        method.encoder_chunk = chunk
        output = method(*(x.double() for x in small_batch(method, size=160)))
        output.loss.backward()
        results.append((output.loss, {key: p.grad for key, p in method.named_parameters() if p.requires_grad}))
    (whole, gradients), (chunked, others) = results
    torch.testing.assert_close(chunked, whole, rtol=0, atol=1e-12)
    bound = 1e-12 * max(float(gradient.abs().max()) for gradient in gradients.values())
    for key, gradient in gradients.items():
        torch.testing.assert_close(others[key], gradient, rtol=0, atol=bound, msg=key)


def test_chunks_hold_the_activations_of_one_chunk():
    """What autograd keeps for the encoder shrinks with the chunk."""

    def kept(chunk: int | None) -> int:
        encoder, sizes = build_encoder(VIT).train(), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            encode(encoder, torch.randn(8, 3, 64, 64), chunk=chunk)
        return sum(sizes)

    assert kept(2) < 0.2 * kept(None)


@pytest.mark.parametrize("method", [MoCoV3, BarlowTwins])
def test_chunks_are_refused_with_batchnorm(method):
    options = {"temperature": 0.2} if method is MoCoV3 else {}
    with pytest.raises(UsageError, match="encoder_chunk would change the encoder's BatchNorm statistics"):
        method(build_encoder(CNN), **options, encoder_chunk=4)


def test_unsuitable_encoders_are_refused():
    with pytest.raises(UsageError, match="timm knows no encoder 'resnet51'"):
        build_encoder("resnet51")
    with pytest.raises(UsageError, match="a plain ViT"):
        MAE(build_encoder(CNN))
    with pytest.raises(UsageError, match="100 is no multiple of the patch size 16"):
        MAE(build_encoder(VIT), image_size=100)


def test_residual_gains_start_at_zero_as_in_the_published_recipes():
    encoder = build_encoder("resnet50")
    assert float(encoder.layer1[0].bn3.weight.abs().max()) == 0 and float(encoder.layer1[0].bn2.weight.min()) == 1
