"""Draws that are kept for the next scores are those that are made anew."""

import numpy as np
import pytest

from polypseg.statistics import resampling
from polypseg.statistics.resampling import times_drawn


@pytest.mark.parametrize("step", [50, 7])
def test_kept_draws_are_those_made_anew_and_sum_to_the_clusters(monkeypatch, step):
    kept = [block.copy() for block in times_drawn(9, resamples=50, step=step, seed=(3, 1))]
    monkeypatch.setattr(resampling, "_KEPT", 0)
    anew = list(times_drawn(9, resamples=50, step=step, seed=(3, 1)))
    assert [len(block) for block in kept] == [len(block) for block in anew]
    np.testing.assert_array_equal(np.concatenate(kept), np.concatenate(anew))
    assert (np.concatenate(anew).sum(axis=1) == 9).all()


def test_a_kept_draw_cannot_be_changed():
    (block,) = times_drawn(4, resamples=5, step=5, seed=0)
    with pytest.raises(ValueError, match="read-only"):
        block[0, 0] = 1
