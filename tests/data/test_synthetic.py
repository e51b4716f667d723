"""The synthetic source promises reproducible bytes, exact non-empty masks, and two cameras that differ."""

import ast
import subprocess
import sys
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from polypseg.data import synthetic
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import UsageError

Frame = tuple[NDArray[np.uint8], NDArray[np.uint8]]
NAMES = sorted(CAMERAS)
SAMPLE = 200


def digest(*frames: Frame) -> str:
    return sha256(b"".join(array.tobytes() for frame in frames for array in frame)).hexdigest()


@pytest.fixture(scope="module")
def frames() -> dict[str, list[Frame]]:
    """200 frames of each camera at 128x128."""
    return {
        name: [synthesize_frame(camera, seed=7, index=index, size=(128, 128)) for index in range(SAMPLE)]
        for name, camera in CAMERAS.items()
    }


FRESH_PROCESS = """
import sys
from hashlib import sha256
import cv2
from polypseg.data.synthetic import CAMERAS, synthesize_frame
cv2.setNumThreads(2)
for name in "ab":
    for size in (None, (96, 128)):
        for array in synthesize_frame(CAMERAS[name], seed=3, index=5, size=size):
            sys.stdout.write(sha256(array.tobytes()).hexdigest() + " ")
"""


def test_a_fresh_process_draws_the_same_bytes() -> None:
    here = [
        sha256(array.tobytes()).hexdigest()
        for name in NAMES
        for size in (None, (96, 128))
        for array in synthesize_frame(CAMERAS[name], seed=3, index=5, size=size)
    ]
    fresh = [sys.executable, "-c", FRESH_PROCESS]
    there = subprocess.run(fresh, capture_output=True, text=True, check=True, timeout=60)
    assert there.stdout.split() == here


DRAWING = {1: "ca0b57f82b0c022b"}
"""Version of the drawing -> digest of its code without comments, docstrings, messages and cameras."""


def test_a_change_of_the_drawing_raises_its_version() -> None:
    """Content ids, by which caches and receipts know synthetic frames, follow the version."""
    tree = ast.parse(Path(synthetic.__file__).read_text(encoding="utf-8"))
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.body = [part for part in node.body if not is_text(part)] or [ast.Pass()]
        if isinstance(node, ast.Raise):
            node.exc = None
    code = sha256(ast.unparse(tree).encode()).hexdigest()[:16]
    assert DRAWING.get(synthetic.VERSION) == code, (
        f"raise VERSION in synthetic.py where pixels changed, and note {code} here"
    )


def is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def test_bytes_do_not_depend_on_the_thread_count() -> None:
    before = cv2.getNumThreads()
    try:
        digests = set()
        for threads in (1, 2, 4):
            cv2.setNumThreads(threads)
            digests.add(digest(*(synthesize_frame(CAMERAS[name], seed=1, index=2) for name in NAMES)))
    finally:
        cv2.setNumThreads(before)
    assert len(digests) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_frame_does_not_depend_on_what_was_drawn_before(name: str) -> None:
    camera = CAMERAS[name]
    forward = [synthesize_frame(camera, seed=5, index=index, size=(64, 80)) for index in range(6)]
    np.random.seed(0)
    backward = [synthesize_frame(camera, seed=5, index=index, size=(64, 80)) for index in reversed(range(6))]
    assert [digest(f) for f in forward] == [digest(f) for f in reversed(backward)]


def test_seed_index_and_camera_each_change_the_frame() -> None:
    a, b = CAMERAS["a"], CAMERAS["b"]
    size = (64, 64)
    drawn = [
        synthesize_frame(a, seed=0, index=0, size=size),
        synthesize_frame(a, seed=1, index=0, size=size),
        synthesize_frame(a, seed=0, index=1, size=size),
        synthesize_frame(b, seed=0, index=0, size=size),
        synthesize_frame(replace(a, name="other"), seed=0, index=0, size=size),
    ]
    assert len({digest(frame) for frame in drawn}) == len(drawn)


def test_changing_a_returned_frame_changes_no_later_one() -> None:
    first = synthesize_frame(CAMERAS["a"], seed=0, index=0, size=(64, 64))
    before = digest(first)
    first[0][:], first[1][:] = 0, 1
    assert digest(synthesize_frame(CAMERAS["a"], seed=0, index=0, size=(64, 64))) == before


@pytest.mark.parametrize("name", NAMES)
def test_every_mask_is_binary_and_holds_a_polyp(name: str, frames: dict[str, list[Frame]]) -> None:
    for image, mask in frames[name]:
        assert image.shape == (128, 128, 3) and image.dtype == np.uint8
        assert mask.shape == (128, 128) and mask.dtype == np.uint8
        assert mask.max() == 1  # uint8 leaves only 0 below it
        assert 0.002 < mask.mean() < 0.6


def test_polyp_areas_follow_each_camera(frames: dict[str, list[Frame]]) -> None:
    areas = {name: np.array([mask.mean() for _, mask in frames[name]]) for name in NAMES}
    assert 0.12 < areas["a"].mean() < 0.19
    assert 0.065 < areas["b"].mean() < 0.12
    assert areas["a"].mean() > 1.3 * areas["b"].mean()
    assert all(np.percentile(area, 90) > 3 * np.percentile(area, 10) for area in areas.values())


@pytest.mark.parametrize("name", NAMES)
def test_masks_stay_inside_the_visible_field(name: str) -> None:
    # No noise and no compression, so that the border keeps exactly its own color.
    plain = replace(
        CAMERAS[name],
        noise=0.0,
        jpeg_quality=None,
        interlace_share=0.0,
        text_share=0.0,
        box_share=0.0,
        blur=(0, 0),
    )
    for index in range(40):
        image, mask = synthesize_frame(plain, seed=2, index=index, size=(96, 96))
        border = (image == plain.border_color).all(axis=-1)
        assert border.any()
        assert not mask[border].any()


def test_the_position_box_is_cut_from_the_mask() -> None:
    always = replace(CAMERAS["a"], box_share=1.0)
    for index in range(40):
        image, mask = synthesize_frame(always, seed=4, index=index, size=(100, 100))
        assert mask.any()
        assert not mask[68:, :32].any()
        # Its fill is flat, unlike tissue.
        assert len(np.unique(image[70:72, 0:3].reshape(-1, 3), axis=0)) <= 2


def test_empty_frames_come_at_the_share_asked_for() -> None:
    sometimes = replace(CAMERAS["b"], empty_share=0.3)
    empty = [not synthesize_frame(sometimes, seed=0, index=i, size=(32, 32))[1].any() for i in range(200)]
    assert 0.2 < np.mean(empty) < 0.4
    never = replace(CAMERAS["b"], empty_share=1.0)
    assert not any(synthesize_frame(never, seed=0, index=i, size=(32, 32))[1].any() for i in range(20))


def test_cameras_differ_in_color_and_sharpness(frames: dict[str, list[Frame]]) -> None:
    def statistics(name: str) -> tuple[NDArray[np.float64], float]:
        images = [image for image, _ in frames[name]]
        color = np.mean([image[image.max(axis=2) > 40].mean(axis=0) for image in images], axis=0)
        detail = np.mean([cv2.Laplacian(image[32:96, 32:96, 1], cv2.CV_32F).std() for image in images])
        return color, float(detail)

    (color_a, detail_a), (color_b, detail_b) = statistics("a"), statistics("b")
    assert color_a[0] - color_b[0] > 10  # A is brighter in red
    assert color_b[1] / color_b[0] > color_a[1] / color_a[0] + 0.03  # B is paler
    assert detail_a > 1.5 * detail_b
    for color in (color_a, color_b):
        assert color[0] > color[1] > color[2]


@pytest.mark.parametrize("name", NAMES)
def test_no_color_threshold_finds_the_polyps(name: str, frames: dict[str, list[Frame]]) -> None:
    """Best global threshold on any channel of RGB, HSV and Lab, either side, dark border left out."""
    images = np.stack([image for image, _ in frames[name][:60]])
    masks = np.stack([mask for _, mask in frames[name][:60]]).astype(bool)
    lit = images.max(axis=3) > 25
    spaces = [cv2.COLOR_RGB2HSV, cv2.COLOR_RGB2Lab]
    channels = np.concatenate([images, *(np.stack([cv2.cvtColor(i, s) for i in images]) for s in spaces)], axis=3)
    best = 0.0
    for channel in np.moveaxis(channels, 3, 0):
        for level in np.percentile(channel[lit], np.arange(10, 100, 10)):
            for chosen in ((channel > level) & lit, (channel < level) & lit):
                overlap = (chosen & masks).sum(axis=(1, 2))
                dice = 2 * overlap / (chosen.sum(axis=(1, 2)) + masks.sum(axis=(1, 2)))
                best = max(best, float(dice.mean()))
    assert best < 0.45  # measured: about 0.3


@pytest.mark.parametrize("size", [(32, 32), (33, 57), (200, 64), (32, 400)])
@pytest.mark.parametrize("name", NAMES)
def test_small_and_oblong_sizes_work(name: str, size: tuple[int, int]) -> None:
    for index in range(25):
        image, mask = synthesize_frame(CAMERAS[name], seed=1, index=index, size=size)
        assert image.shape == (*size, 3) and mask.shape == size
        assert image.flags.c_contiguous and mask.flags.c_contiguous
        assert mask.any()


def test_native_resolutions() -> None:
    shapes_a = {synthesize_frame(CAMERAS["a"], seed=0, index=index)[1].shape for index in range(6)}
    assert len(shapes_a) > 1
    assert all(500 <= side <= 625 for shape in shapes_a for side in shape)
    assert {synthesize_frame(CAMERAS["b"], seed=0, index=index)[1].shape for index in range(3)} == {(288, 384)}


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (0, 0), (-256, 256)])
def test_impossible_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="at least 32"):
        synthesize_frame(CAMERAS["a"], seed=0, index=0, size=size)


@pytest.mark.parametrize(("seed", "index"), [(-1, 0), (0, -1)])
def test_negative_seeds_are_refused(seed: int, index: int) -> None:
    with pytest.raises(UsageError, match="count from 0"):
        synthesize_frame(CAMERAS["a"], seed=seed, index=index)
