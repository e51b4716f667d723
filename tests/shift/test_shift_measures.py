"""Measures of a frame: known answers, and each injected change moves the measure that is meant to see it."""

import cv2
import numpy as np
import pytest

from polypseg.data.corruptions import corrupt
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.shift.frame_statistics import measure_frame, visible_field


@pytest.fixture(scope="module")
def frame():
    return synthesize_frame(CAMERAS["a"], seed=0, index=1, size=(256, 256))[0]


def test_flat_frame_has_known_measures():
    found = measure_frame(np.full((100, 200, 3), 119, np.uint8), np.eye(100, 200, dtype=np.uint8))
    assert found["lab_l_mean"] == pytest.approx(50.0, abs=0.2)  # sRGB 119 is L* 50
    assert found["lab_a_mean"] == pytest.approx(0, abs=0.1) and found["falloff"] == pytest.approx(0, abs=1e-3)
    assert (found["border_share"], found["native_aspect"], found["polyp_share"]) == (0, 2, 0.005)


def test_visible_field_is_the_drawn_disc():
    frame = np.full((200, 200, 3), 8, np.uint8)
    cv2.circle(frame, (100, 100), 80, (180, 90, 70), -1)
    assert visible_field(frame).mean() == pytest.approx(np.pi * 80**2 / 200**2, rel=0.03)


@pytest.mark.parametrize(
    ("kind", "measure", "sign"),
    [("defocus", "sharpness", -1), ("jpeg", "blockiness", 1), ("over_exposure", "lab_l_mean", 1)],
)
def test_injected_change_moves_its_measure(frame, kind, measure, sign):
    low, high = (measure_frame(corrupt(frame, kind, severity=s))[measure] for s in (1, 4))
    assert sign * (low - measure_frame(frame)[measure]) > 0 and sign * (high - low) > 0
