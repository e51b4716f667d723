"""The corruption kit: same size, same result every time, worse with every severity, nothing moved."""

import numpy as np
import pytest

from polypseg.data.corruptions import CORRUPTIONS, SEVERITIES, corrupt
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import UsageError


@pytest.fixture(scope="module")
def frame():
    return synthesize_frame(CAMERAS["a"], seed=3, index=1, size=(240, 320))[0]


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_each_severity_takes_the_frame_further_from_itself(kind, frame):
    distances = []
    for severity in (0, *SEVERITIES):
        result = corrupt(frame, kind, severity=severity, key="x")
        assert result.shape == frame.shape and result.dtype == np.uint8
        distances.append(float(np.abs(result.astype(int) - frame).mean()))
    assert distances[0] == 0 and distances[1] > 0.1
    assert distances == sorted(distances) and len(set(distances)) == len(distances), distances


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_the_same_key_gives_the_same_bytes_and_leaves_the_frame_alone(kind, frame):
    before = frame.copy()
    first, second = (corrupt(frame, kind, severity=3, key="x") for _ in range(2))
    assert np.array_equal(first, second) and np.array_equal(frame, before)


@pytest.mark.parametrize("kind", ["motion_blur", "specular_glare", "smoke", "bubbles", "stain", "noise"])
def test_another_frame_gets_another_pattern(kind, frame):
    assert not np.array_equal(corrupt(frame, kind, severity=3, key="x"), corrupt(frame, kind, severity=3, key="y"))


@pytest.mark.parametrize("kind", CORRUPTIONS)
def test_a_severity_means_the_same_at_twice_the_size(kind):
    """Mean distances at two resolutions agree within a factor of two."""
    sizes = [(192, 256), (384, 512)]
    small, large = (synthesize_frame(CAMERAS["a"], seed=3, index=1, size=size)[0] for size in sizes)
    distances = [float(np.abs(corrupt(x, kind, severity=4, key="x").astype(int) - x).mean()) for x in (small, large)]
    assert 0.5 < distances[0] / distances[1] < 2, distances


@pytest.mark.parametrize("kind", ["smoke", "bubbles", "stain", "specular_glare"])
def test_what_is_in_the_lumen_does_not_paint_the_black_border(kind, frame):
    dark = np.zeros_like(frame)
    assert corrupt(dark, kind, severity=5, key="x").max() <= 12


def test_exposure_is_linear_light():
    gray = np.full((8, 8, 3), 128, np.uint8)
    brighter = corrupt(gray, "over_exposure", severity=2)  # one stop
    darker = corrupt(brighter, "under_exposure", severity=2)  # a stop and a half
    assert abs(int(brighter[0, 0, 0]) - 128 * 2 ** (1 / 2.2)) <= 1
    assert abs(int(darker[0, 0, 0]) - 128 * 2 ** (-0.5 / 2.2)) <= 2


def test_interlacing_moves_every_second_line_only(frame):
    result = corrupt(frame, "interlacing", severity=3, key="x")
    assert np.array_equal(result[::2], frame[::2]) and not np.array_equal(result[1::2], frame[1::2])


def test_unknown_kinds_and_severities_are_usage_errors(frame):
    with pytest.raises(UsageError, match="Did you mean 'smoke'"):
        corrupt(frame, "smok", severity=1)
    with pytest.raises(UsageError, match="severity"):
        corrupt(frame, "smoke", severity=6)
