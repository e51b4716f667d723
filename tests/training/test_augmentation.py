"""The augmentation does what the reference's does: torchvision is the oracle, the recipe gives the distributions.

Tolerances stand beside what was observed with torchvision 0.29, OpenCV 5.0 and Pillow 13.
"""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import functional as tensors
from torchvision.transforms.v2 import functional as oracle

from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.recipe import load_recipe
from polypseg.training import augmentation
from polypseg.training.augmentation import Affine, Normalization, PairedAugmentation

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
PLAIN = {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
NO_COLOR = [
    f"augmentation.{key}" for key in ("brightness=0.0", "contrast=0.0", "saturation=0.0", "hue=0.0", "blur_kernel=0")
]
NO_FLIP = ["augmentation.horizontal_flip=0.0", "augmentation.vertical_flip=0.0"]
NO_WARP = [f"augmentation.{key}" for key in ("rotation=0", "translation=0.0", "scale=[1.0,1.0]", "shear=0.0")]


def noise(side: int = 224, *, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)


IMAGES = {
    "noise": noise(),
    "frame": synthesize_frame(CAMERAS["a"], seed=0, index=3, size=(224, 224))[0],
    "gray": np.repeat(noise()[..., :1], 3, axis=2),
}


def paired(*overrides: str, statistics: dict[str, list[float]] = IMAGENET) -> PairedAugmentation:
    return PairedAugmentation(load_recipe("finetune", overrides=overrides).augmentation, **statistics)


def difference(name: str, image: np.ndarray, value: float) -> np.ndarray:
    """Absolute difference in gray levels between our operation and torchvision's on the PIL image."""
    before = image.copy()
    ours = getattr(augmentation, name)(image, value)
    theirs = np.asarray(getattr(oracle, name)(Image.fromarray(image), value))
    assert ours.dtype == np.uint8 and ours.shape == theirs.shape
    np.testing.assert_array_equal(image, before, err_msg="the input is shared with the cache and must not change")
    return np.abs(ours.astype(int) - theirs)


# -- color ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize(
    ("name", "factor"),
    [
        *(("adjust_brightness", f) for f in (0.6, 0.75, 0.9, 1.0, 1.1, 1.4)),
        *(("adjust_contrast", f) for f in (0.5, 0.8, 1.0, 1.2, 1.5)),
        *(("adjust_saturation", f) for f in (0.75, 0.9, 1.0, 1.1, 1.25)),
    ],
)
def test_adjust_equals_torchvision_within_a_gray_level(name, factor, image):
    # Observed: max 1; mean up to 0.50 (brightness), 0.06 (contrast), 0.49 (saturation): Pillow cuts, OpenCV rounds.
    off = difference(name, IMAGES[image], factor)
    assert off.max() <= (0 if factor == 1 else 1)
    assert off.mean() < (0.1 if name == "adjust_contrast" else 0.6)


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("shift", [-0.5, -0.2, -0.01, -0.005, 0.0, 0.005, 0.01, 0.02, 0.2, 0.5])
def test_adjust_hue_equals_torchvision_within_the_hsv_round_trip(shift, image):
    # Observed: mean 1.11 and max 13 on noise, mean 0.51 and max 4 on a frame, 0 on gray; without a shift 0.6 and 7.
    off = difference("adjust_hue", IMAGES[image], shift)
    assert off.mean() < {"noise": 1.5, "frame": 0.8, "gray": 1e-9}[image]
    assert off.max() <= {"noise": 16, "frame": 6, "gray": 0}[image]


def test_adjust_hue_turns_the_wheel_in_the_sign_of_the_shift():
    red = np.full((8, 8, 3), (200, 20, 20), dtype=np.uint8)
    toward_yellow, toward_magenta = (
        augmentation.adjust_hue(red, 0.05)[0, 0],
        augmentation.adjust_hue(red, -0.05)[0, 0],
    )
    assert toward_yellow[1] > toward_yellow[2] + 20 and toward_magenta[2] > toward_magenta[1] + 20


@pytest.mark.parametrize("image", ["noise", "frame"])
@pytest.mark.parametrize("sigma", [0.001, 0.09, 0.3, 0.5, 1.0, 1.5, 2.0])
def test_gaussian_blur_equals_torchvision(sigma, image):
    # Observed: max 1 (2 once, on the frame at sigma 2); mean up to 0.26 on noise and 0.03 on the frame.
    ours = augmentation.gaussian_blur(IMAGES[image], kernel=25, sigma=sigma)
    theirs = np.asarray(oracle.gaussian_blur(Image.fromarray(IMAGES[image]), [25, 25], [sigma, sigma]))
    off = np.abs(ours.astype(int) - theirs)
    assert off.max() <= 2
    assert off.mean() < 0.4


def test_gaussian_blur_honors_a_kernel_smaller_than_the_sigma_asks_for():
    ours = augmentation.gaussian_blur(IMAGES["noise"], kernel=3, sigma=2.0)
    theirs = np.asarray(oracle.gaussian_blur(Image.fromarray(IMAGES["noise"]), [3, 3], [2.0, 2.0]))
    assert np.abs(ours.astype(int) - theirs).max() <= 2


def test_normalization_equals_torchvision():
    ours = Normalization(**IMAGENET)(IMAGES["noise"])
    theirs = tensors.normalize(tensors.to_tensor(IMAGES["noise"]), **IMAGENET).permute(1, 2, 0).numpy()
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


# -- geometry ----------------------------------------------------------------------------------------------------------

WARPS = [
    Affine(angle=0, translation=(0, 0), scale=1, shear=0),
    Affine(angle=90, translation=(0, 0), scale=1, shear=0),
    Affine(angle=180, translation=(0, 0), scale=1, shear=0),
    Affine(angle=0, translation=(10, -4), scale=1, shear=0),
    Affine(angle=0, translation=(0, 0), scale=1, shear=15),
    Affine(angle=0, translation=(0, 0), scale=1, shear=-22.5),
    Affine(angle=30, translation=(5, -7), scale=1, shear=0),
    Affine(angle=-13, translation=(3, 0), scale=1.2, shear=10),
    Affine(angle=-57.3, translation=(-28, 28), scale=0.5, shear=22.5),
    Affine(angle=170, translation=(28, 13), scale=1.5, shear=-22.5),
]
RANDOM = np.random.default_rng(1).standard_normal((224, 224, 3)).astype(np.float32)
_Y, _X = np.mgrid[:224, :224] / 224
SMOOTH = np.stack([np.sin(7 * _X + 3 * _Y), np.cos(5 * _Y), _X * _Y], axis=2).astype(np.float32)


def torchvision_warp(affine: Affine, image: np.ndarray, *, interpolation: str, fill: float) -> np.ndarray:
    warped = tensors.affine(
        torch.from_numpy(image).permute(2, 0, 1),
        angle=affine.angle,
        translate=list(affine.translation),
        scale=affine.scale,
        shear=[affine.shear, 0.0],
        interpolation=tensors.InterpolationMode(interpolation),
        fill=[fill],
    )
    return warped.permute(1, 2, 0).numpy()


def equal_share(affine: Affine, *, fill: float) -> float:
    ours = affine.warp(RANDOM, interpolation="nearest", fill=fill)
    theirs = torchvision_warp(affine, RANDOM, interpolation="nearest", fill=fill)
    return float((ours == theirs).all(axis=2).mean())


@pytest.mark.parametrize("fill", [-1.0, 0.0])
@pytest.mark.parametrize("affine", WARPS, ids=str)
def test_affine_nearest_takes_the_pixels_that_torchvision_takes(affine, fill):
    assert equal_share(affine, fill=fill) > 0.999  # observed: at least 0.99998


def test_affine_nearest_takes_torchvisions_pixels_over_the_whole_range_of_the_recipe():
    augment, rng = paired(), np.random.default_rng(2)
    shares = [equal_share(augment._draw_affine(side=224, rng=rng), fill=-1.0) for _ in range(40)]
    assert min(shares) > 0.999  # observed over 300 draws: at least 0.99986


def test_affine_nearest_differs_from_torchvision_only_in_ties():
    # At scale 0.7 whole rows fall midway between two pixels. Observed: 93.4 % equal, and the others one pixel beside.
    affine = Affine(angle=0, translation=(0, 0), scale=0.7, shear=0)
    assert equal_share(affine, fill=-1.0) > 0.92
    ours = affine.warp(SMOOTH, interpolation="nearest", fill=-1.0)
    theirs = torchvision_warp(affine, SMOOTH, interpolation="nearest", fill=-1.0)
    assert np.abs(ours - theirs).max() < 0.06  # observed 0.045: a step of one pixel of the smooth image


@pytest.mark.parametrize("fill", [-1.0, 0.0])
@pytest.mark.parametrize("affine", WARPS, ids=str)
def test_affine_bilinear_equals_torchvision_on_a_smooth_image(affine, fill):
    ours = affine.warp(SMOOTH, interpolation="bilinear", fill=fill)
    theirs = torchvision_warp(affine, SMOOTH, interpolation="bilinear", fill=fill)
    assert np.abs(ours - theirs).mean() < 0.002  # observed: up to 0.0007, from the rim


def test_affine_moves_right_down_and_clockwise():
    image = np.zeros((9, 9), dtype=np.float32)
    image[4, 6] = 1  # right of the center

    def place(**changes: object) -> tuple[int, ...]:
        identity = {"angle": 0.0, "translation": (0, 0), "scale": 1.0, "shear": 0.0}
        warped = Affine(**(identity | changes)).warp(image, interpolation="nearest", fill=0.0)
        return tuple(int(i) for i in np.unravel_index(warped.argmax(), warped.shape))

    assert place(translation=(1, 2)) == (6, 7)
    assert place(angle=90.0) == (6, 4)
    assert place(scale=2.0)[1] > 6


# -- the pair ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("interpolation", "fill"), [("nearest", -1.0), ("bilinear", 0.0)])
def test_paired_augmentation_moves_image_and_mask_alike(interpolation, fill):
    augment = paired(
        *NO_COLOR,
        f"augmentation.interpolation={interpolation}",
        f"augmentation.fill={fill}",
        statistics=PLAIN,
    )
    mask = np.random.default_rng(3).integers(1, 256, (64, 64), dtype=np.uint8)
    image, rng = np.repeat(mask[..., None], 3, axis=2), np.random.default_rng(4)
    for _ in range(50):
        pixels, target = augment(image, mask, rng)
        inside = pixels != fill
        np.testing.assert_allclose(pixels[inside], np.repeat(target[..., None], 3, axis=2)[inside], atol=1e-6)
        assert (target[~inside.all(axis=2)] == 0).all()
        assert 0.05 < inside.mean() <= 1


def test_paired_augmentation_fills_the_image_with_minus_one_and_the_mask_with_zero():
    augment = paired("augmentation.brightness=0.0", "augmentation.contrast=0.0")
    white, full = np.full((64, 64, 3), 255, dtype=np.uint8), np.full((64, 64), 255, dtype=np.uint8)
    rng, outside_seen = np.random.default_rng(5), 0
    for _ in range(20):
        pixels, target = augment(white, full, rng)
        outside = target == 0
        assert (pixels[outside] == -1.0).all()
        assert (target[~outside] == 1.0).all() and (pixels[~outside] > 2).all()  # white is about 2.2 to 2.6
        outside_seen += int(outside.sum())
    assert outside_seen > 1000


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_paired_augmentation_keeps_a_soft_mask_between_zero_and_one(interpolation):
    augment, rng = paired(f"augmentation.interpolation={interpolation}"), np.random.default_rng(6)
    mask = rng.integers(0, 256, (64, 64), dtype=np.uint8)
    for _ in range(50):
        pixels, target = augment(noise(64), mask, rng)
        assert pixels.dtype == target.dtype == np.float32
        assert pixels.shape == (64, 64, 3) and target.shape == (64, 64)
        assert target.min() >= 0 and target.max() <= 1
        assert np.isfinite(pixels).all()
        assert ((target > 0) & (target < 1)).any(), "a soft mask must stay soft"


def test_paired_augmentation_repeats_with_the_seed_and_leaves_its_input_alone():
    augment, image, mask = paired(), noise(64), noise(64)[..., 0]
    copies = image.copy(), mask.copy()
    first, again, other = (augment(image, mask, np.random.default_rng(seed)) for seed in (7, 7, 8))
    assert [a.tobytes() for a in first] == [a.tobytes() for a in again]
    assert first[0].tobytes() != other[0].tobytes() and first[1].tobytes() != other[1].tobytes()
    np.testing.assert_array_equal(image, copies[0])
    np.testing.assert_array_equal(mask, copies[1])


def test_paired_augmentation_with_everything_off_is_normalization():
    augment = paired(*NO_COLOR, *NO_FLIP, *NO_WARP)
    mask = noise(64, seed=1)[..., 0]
    pixels, target = augment(noise(64), mask, np.random.default_rng(9))
    np.testing.assert_array_equal(pixels, Normalization(**IMAGENET)(noise(64)))
    np.testing.assert_array_equal(target, mask.astype(np.float32) / 255)


# -- distributions -----------------------------------------------------------------------------------------------------


def assert_uniform(values: list[float], low: float, high: float) -> None:
    assert low <= min(values) and max(values) <= high
    assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 1e-3


def test_draw_affine_has_the_references_distributions():
    augment, rng = paired(), np.random.default_rng(10)
    draws = [augment._draw_affine(side=224, rng=rng) for _ in range(4000)]
    assert_uniform([d.angle for d in draws], -180, 180)
    assert_uniform([d.scale for d in draws], 0.5, 1.5)
    assert_uniform([d.shear for d in draws], -22.5, 22.5)
    shares = np.full(57, 1 / 56)
    shares[[0, -1]] /= 2  # what rounds to an end comes from one side only
    for axis in (0, 1):
        shifts = [d.translation[axis] for d in draws]
        assert set(shifts) == set(range(-28, 29))
        counts = Counter(shifts)
        observed = [counts[pixel] for pixel in range(-28, 29)]
        assert stats.chisquare(observed, shares * len(draws)).pvalue > 1e-3
    drawn = np.array([(d.angle, *d.translation, d.scale, d.shear) for d in draws])
    assert np.abs(np.corrcoef(drawn.T) - np.eye(5)).max() < 0.07, "the five are drawn independently"


def test_draw_affine_shift_follows_the_side():
    augment, rng = paired(), np.random.default_rng(11)
    shifts = [s for _ in range(500) for s in augment._draw_affine(side=96, rng=rng).translation]
    assert max(shifts) == 12 and min(shifts) == -12


def test_paired_augmentation_flips_each_way_in_half_the_cases_independently():
    augment, rng = paired(*NO_COLOR, *NO_WARP), np.random.default_rng(12)
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[0, 0] = 255
    seen = Counter(int(augment(noise(8), mask, rng)[1].argmax()) for _ in range(2000))
    corners = [0, 7, 56, 63]  # neither, horizontal, vertical, both
    assert set(seen) == set(corners)
    assert stats.chisquare([seen[c] for c in corners]).pvalue > 1e-3


def test_paired_augmentation_draws_color_uniformly_and_in_every_order(monkeypatch):
    calls: list[tuple[str, float]] = []
    names = ("adjust_brightness", "adjust_contrast", "adjust_saturation", "adjust_hue")
    for name in names:

        def record(image: np.ndarray, *, name: str = name, **value: float) -> np.ndarray:
            calls.append((name, *value.values()))
            return image

        monkeypatch.setattr(augmentation, name, record)
    sigmas: list[float] = []
    monkeypatch.setattr(augmentation, "gaussian_blur", lambda image, *, kernel, sigma: (sigmas.append(sigma), image)[1])
    augment, rng = paired(), np.random.default_rng(13)
    for _ in range(2400):
        augment(noise(8), noise(8)[..., 0], rng)
    reach = {"adjust_brightness": 0.4, "adjust_contrast": 0.5, "adjust_saturation": 0.25}
    for name, width in reach.items():
        assert_uniform([value for called, value in calls if called == name], 1 - width, 1 + width)
    assert_uniform([value for called, value in calls if called == "adjust_hue"], -0.01, 0.01)
    assert_uniform(sigmas, 0.001, 2.0)
    orders = Counter(tuple(name for name, _ in calls[i : i + 4]) for i in range(0, len(calls), 4))
    assert set(orders) == set(permutations(names))
    assert stats.chisquare(list(orders.values())).pvalue > 1e-3


# -- other hospitals' appearance and sizes -----------------------------------------------------------------------------


def starter(*overrides: str) -> PairedAugmentation:
    return PairedAugmentation(load_recipe("starter", overrides=overrides).augmentation, **PLAIN)


def frame_and_mask(side: int = 160) -> tuple[np.ndarray, np.ndarray]:
    frame, mask = synthesize_frame(CAMERAS["a"], seed=0, index=3, size=(side, side))
    return frame, mask * np.uint8(255)


def test_a_recipe_without_new_settings_records_what_it_did_before():
    """Runs that are under way go on: their record holds only settings that are used."""
    recorded = load_recipe("finetune").model_dump(mode="json")
    assert "appearance" not in recorded["augmentation"] and set(recorded["data"]) == {"image_size"}
    assert not {"keep", "frozen_stages"} & set(recorded["training"])
    used = load_recipe("starter").model_dump(mode="json")
    assert used["data"]["negatives"] == "hyperkvasir" and used["training"]["keep"] == "last"


def test_the_same_warp_at_another_side_shows_the_same_picture():
    """A training batch of another size is the same view, reduced: not another crop, not another place."""
    changes = [f"augmentation.{key}" for key in ("appearance=null", "scale=[0.9,1.1]")]
    frame, mask = frame_and_mask(192)
    large, small = (starter(*changes)(frame, mask, np.random.default_rng(5), side=side) for side in (192, 96))
    assert small[0].shape == (96, 96, 3) and small[1].shape == (96, 96)
    halved = torch.nn.functional.avg_pool2d(torch.from_numpy(large[1])[None, None], 2)[0, 0].numpy()
    assert np.abs(halved - small[1]).mean() < 0.01 < halved.mean()


def test_a_strong_reduction_does_not_alias():
    """A fine checkerboard turns gray when it is reduced fourfold; a bare bilinear warp would keep black and white."""
    board = np.indices((128, 128)).sum(axis=0) % 2 * 255
    frame = np.repeat(board[..., None], 3, axis=2).astype(np.uint8)
    still = ["appearance=null", "scale=[0.5,0.5]", "brightness=0", "contrast=0", "saturation=0", "hue=0"]
    still += ["rotation=0", "translation=0", "shear=0", "horizontal_flip=0", "vertical_flip=0"]
    augment = starter(*(f"augmentation.{key}" for key in still))
    pixels, _ = augment(frame, np.zeros((128, 128), np.uint8), np.random.default_rng(0), side=64)
    inside = pixels[20:44, 20:44, 0]
    assert inside.min() > 0.4 and inside.max() < 0.6


def test_color_exchange_moves_the_statistics_to_the_other_frame():
    frame, other = frame_and_mask()[0], IMAGES["frame"][:160, :160] // 2 + 40
    moved = augmentation.exchange_colors(frame, other, amount=1.0)
    before, after = (abs(x.mean(axis=(0, 1)) - other.mean(axis=(0, 1))).max() for x in (frame.astype(float), moved))
    assert after < before / 2
    np.testing.assert_array_equal(augmentation.exchange_colors(frame, other, amount=0.0).shape, frame.shape)


def test_amplitude_exchange_of_nothing_changes_nothing():
    frame, other = frame_and_mask()[0], IMAGES["noise"][:160, :160]
    np.testing.assert_array_equal(augmentation.exchange_amplitudes(frame, other, reach=0.02, amount=0.0), frame)
    assert (augmentation.exchange_amplitudes(frame, other, reach=0.02, amount=1.0) != frame).mean() > 0.5


def test_appearance_never_moves_the_mask_and_is_repeatable():
    frame, mask = frame_and_mask()
    everything = [
        f"augmentation.appearance.{key}=1.0" for key in ("corruption", "color_exchange", "amplitude_exchange")
    ]
    still = ["rotation=0", "translation=0", "shear=0", "horizontal_flip=0", "vertical_flip=0", "scale=[1.0,1.0]"]
    augment = starter(*everything, *(f"augmentation.{key}" for key in still))
    results = [
        augment(frame, mask, np.random.default_rng(seed), partner=lambda rng: IMAGES["frame"][:160, :160])
        for seed in (1, 1, 2)
    ]
    assert all(np.array_equal(target, mask / np.float32(255)) for _, target in results)
    assert np.array_equal(results[0][0], results[1][0]) and not np.array_equal(results[0][0], results[2][0])
