"""A segmenter's masks are the evaluation's, its lesion list is right on maps made by hand, its overlay shows them."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from scipy import ndimage

from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.data import SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.inference.model import build_image_processor, predict_masks
from polypseg.inference.segmenter import (
    OUTLINE,
    Lesion,
    Prediction,
    Segmenter,
    _soft,
    _thicken,
    draw_overlay,
    find_lesions,
    read_logits,
)


@pytest.fixture(scope="module")
def frames() -> list[Image.Image]:
    """Frames of three sizes."""
    found = []
    for size in ((72, 100), (64, 64), (131, 97)):
        data = open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=3, size=size))
        found += [data.frame(record) for record in data.records]
    return found


@pytest.fixture(scope="module")
def segmenter(frames) -> Segmenter:
    """A random model whose last bias is set so that half of the frames' pixels are polyp."""
    torch.manual_seed(0)
    model = PolypSegForSemanticSegmentation(PolypSegConfig(encoder="resnet18", decoder_channels=16, image_size=64))
    made = Segmenter(model=model, processor=build_image_processor(model.config), name="tiny")
    probability = np.concatenate([prediction.probability.ravel() for prediction in made.predict(frames)])
    last = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)][-1]
    with torch.no_grad():
        last.bias -= float(np.median(np.log(probability / (1 - probability))))
    return made


# -- masks ----------------------------------------------------------------------------------------------


def test_masks_at_one_half_are_those_of_the_evaluation(segmenter, frames):
    ours, theirs = segmenter.predict(frames), predict_masks(segmenter.model, segmenter.processor, frames)
    assert 0.2 < np.mean([mask.mean() for mask in theirs]) < 0.8  # masks of one color would prove nothing
    for prediction, mask in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(prediction.mask, mask)


def test_predictions_have_each_frames_size_and_are_probabilities(segmenter, frames):
    for frame, prediction in zip(frames, segmenter.predict(frames), strict=True):
        assert prediction.probability.shape == prediction.mask.shape == (frame.height, frame.width)
        assert prediction.probability.dtype == np.float32 and prediction.mask.dtype == bool
        assert 0 <= prediction.probability.min() <= prediction.probability.max() <= 1


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_threshold_is_a_probability(threshold):
    logits = torch.linspace(-4, 4, 80).reshape(8, 10)
    prediction = read_logits(logits, threshold=threshold)
    np.testing.assert_array_equal(prediction.mask, prediction.probability > threshold)


def test_smallest_positive_logit_is_polyp_as_in_the_evaluation():
    prediction = read_logits(torch.full((4, 4), 1e-9), min_area=1)
    assert prediction.mask.all() and prediction.probability[0, 0] == 0.5


def test_batches_give_the_same_probabilities_to_rounding(segmenter, frames):
    one, many = (segmenter.predict(frames, batch_size=size) for size in (1, 4))
    assert len(many) == len(frames)
    for a, b in zip(one, many, strict=True):
        np.testing.assert_allclose(a.probability, b.probability, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"threshold": 0.0}, "between 0 and 1"),
        ({"threshold": 1.0}, "between 0 and 1"),
        ({"threshold": float("nan")}, "between 0 and 1"),
        ({"min_area": 0}, "at least 1 pixel"),
        ({"batch_size": 0}, "at least 1"),
    ],
)
def test_predict_refuses_impossible_options(segmenter, frames, options, words):
    with pytest.raises(UsageError, match=words):
        segmenter.predict(frames[:1], **options)


# -- lesions --------------------------------------------------------------------------------------------


@pytest.fixture
def by_hand() -> np.ndarray:
    """A (12, 20) map with a square, a pair of regions that touch by a corner, a ring's inside, and a speck."""
    probability = np.full((12, 20), 0.1, dtype=np.float32)
    probability[1:4, 2:6] = 0.8
    probability[2, 3] = 0.95
    probability[6:8, 10:12] = 0.6
    probability[8:10, 12:14] = 0.7
    probability[11, 19] = 0.99
    return probability


def test_lesions_of_a_map_made_by_hand(by_hand):
    square, pair = find_lesions(by_hand, mask=by_hand > 0.5, min_area=2)
    assert (square.x, square.y, square.width, square.height, square.area) == (2, 1, 4, 3, 12)
    assert square.mean_probability == pytest.approx((11 * 0.8 + 0.95) / 12) and square.max_probability == np.float32(
        0.95
    )
    assert (pair.x, pair.y, pair.width, pair.height, pair.area) == (10, 6, 4, 4, 8)
    assert pair.mean_probability == pytest.approx(0.65) and pair.max_probability == np.float32(0.7)


def test_specks_leave_the_list_but_not_the_mask(by_hand):
    logits = torch.from_numpy(np.log(by_hand / (1 - by_hand)))
    listed, all_of_it = (read_logits(logits, min_area=n) for n in (9, 1))
    assert [lesion.area for lesion in all_of_it.lesions] == [12, 8, 1]
    assert [lesion.area for lesion in listed.lesions] == [12]
    assert listed.area == 21 and listed.share == pytest.approx(21 / 240)
    assert listed.mask[11, 19]


def test_regions_inside_one_anothers_box_keep_their_own_values():
    probability = np.zeros((9, 9), dtype=np.float32)
    probability[0, :] = probability[-1, :] = probability[:, 0] = probability[:, -1] = 0.6
    probability[4, 4] = 0.9
    ring, dot = find_lesions(probability, mask=probability > 0.5, min_area=1)
    assert (ring.area, ring.max_probability) == (32, np.float32(0.6))
    assert dot == Lesion(
        x=4, y=4, width=1, height=1, area=1, mean_probability=np.float32(0.9), max_probability=np.float32(0.9)
    )


def test_empty_mask_has_no_lesions():
    assert find_lesions(np.zeros((5, 5), np.float32), mask=np.zeros((5, 5), bool), min_area=1) == ()


# -- fingerprint, overlay -------------------------------------------------------------------------------


def test_fingerprint_follows_weights_and_preparation_not_the_name(segmenter):
    other = Segmenter(model=segmenter.model, processor=segmenter.processor, name="another")
    assert other.fingerprint() == segmenter.fingerprint()
    larger = build_image_processor(PolypSegConfig(encoder="resnet18", image_size=96))
    assert Segmenter(model=segmenter.model, processor=larger, name="tiny").fingerprint() != segmenter.fingerprint()
    weight = next(segmenter.model.parameters())
    before = segmenter.fingerprint()
    with torch.no_grad():
        weight.view(-1)[0] += 1
    changed = segmenter.fingerprint()
    with torch.no_grad():
        weight.view(-1)[0] -= 1
    assert changed != before


def test_from_pretrained_predicts_as_the_saved_model(segmenter, frames, tmp_path):
    segmenter.model.save_pretrained(tmp_path)
    segmenter.processor.save_pretrained(tmp_path)
    loaded = Segmenter.from_pretrained(tmp_path)
    assert loaded.fingerprint() == segmenter.fingerprint()
    (ours,), (theirs,) = loaded.predict(frames[:1]), segmenter.predict(frames[:1])
    np.testing.assert_array_equal(ours.mask, theirs.mask)


def test_overlay_outlines_the_mask_and_leaves_the_rest_alone():
    frame = Image.new("RGB", (200, 100), (180, 90, 70))
    mask = np.zeros((100, 200), dtype=bool)
    mask[30:70, 60:120] = True
    prediction = Prediction(probability=mask.astype(np.float32), mask=mask, lesions=())
    drawn = draw_overlay(frame, prediction)
    pixels = np.asarray(drawn).astype(int)
    assert drawn.size == frame.size and drawn.mode == "RGB"
    np.testing.assert_allclose(pixels[50, 60], OUTLINE, atol=30)
    assert tuple(pixels[10, 10]) == (180, 90, 70) and tuple(pixels[50, 190]) == (180, 90, 70)
    inside = pixels[50, 90]
    assert inside[2] > 70 and np.abs(inside - (180, 90, 70)).max() < 60  # tinted, and the mucosa still shows
    assert tuple(np.asarray(frame)[50, 90]) == (180, 90, 70)  # the argument is untouched


def test_overlay_of_an_empty_mask_is_the_frame():
    frame = Image.new("RGB", (20, 10), (180, 90, 70))
    empty = np.zeros((10, 20), dtype=bool)
    drawn = draw_overlay(frame, Prediction(probability=empty.astype(np.float32), mask=empty, lesions=()))
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(frame))


def test_predict_takes_one_frame_or_many_as_image_array_or_path(segmenter, frames, tmp_path):
    array, path = np.asarray(frames[0]), tmp_path / "frame.png"
    frames[0].save(path)
    (wanted,) = segmenter.predict(frames[:1])
    for given in (frames[0], array, path, str(path)):
        one, (of_many,) = segmenter.predict(given), segmenter.predict([given])
        for found in (one, of_many):
            np.testing.assert_array_equal(found.probability, wanted.probability)
    assert "lesion(s)" in repr(wanted) and len(repr(wanted)) < 80 and len(repr(segmenter)) < 200


def test_a_prediction_draws_and_saves_itself(segmenter, frames, tmp_path):
    prediction = segmenter.predict(frames[0])
    np.testing.assert_array_equal(np.asarray(prediction.overlay()), np.asarray(draw_overlay(frames[0], prediction)))
    mask, overlay = prediction.save(tmp_path / "out", name="a")
    np.testing.assert_array_equal(np.asarray(Image.open(mask)) > 0, prediction.mask)
    assert Image.open(overlay).size == frames[0].size and prediction._repr_png_().startswith(b"\x89PNG")


def test_predict_refuses_what_is_no_frame_and_deep_images(segmenter, frames):
    array = np.asarray(frames[0])
    for wrong in ([array[..., 0]], [array.astype(float)], [None], b"frame", 3):
        with pytest.raises(UsageError, match="give"):
            segmenter.predict(wrong)
    with pytest.raises(UsageError, match="cannot read"):
        segmenter.predict("no-such-frame.png")
    deep = Image.fromarray(array[..., 0].astype(np.uint16) * 257)
    with pytest.raises(PolypSegError, match="more than 8 bits per channel"):
        segmenter.predict([deep])


def test_lines_fade_as_by_pillows_kernel():
    rng = np.random.default_rng(0)
    for share in (0.001, 0.05, 0.5):
        line = np.zeros((60, 70), dtype=bool)
        line[2:-2, 2:-2] = rng.random((56, 66)) < share
        hard = Image.fromarray(line.astype(np.uint8) * 255)
        expected = hard.filter(ImageFilter.Kernel((3, 3), [7, 28, 7, 28, 112, 28, 7, 28, 7]))
        expected.paste(255, (0, 0), hard)
        np.testing.assert_array_equal(np.asarray(_soft(line)), np.asarray(expected))


@pytest.mark.parametrize("reach", [1, 2.5, 5.5])
def test_a_thick_line_holds_all_pixels_within_its_reach(reach):
    edge = np.random.default_rng(1).random((40, 50)) < 0.01
    near = ndimage.distance_transform_edt(~edge) <= reach
    np.testing.assert_array_equal(_thicken(edge, reach), near)
