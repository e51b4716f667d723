"""Shift between sets: each injected factor comes out on top, zero strength changes nothing, halves look alike."""

import json
from functools import cache

import numpy as np
import pytest
import typer
from scipy import stats
from typer.testing import CliRunner

from marks import first_fast
from polypseg.cli.shift import shift_app
from polypseg.data.synthetic import CAMERAS
from polypseg.errors import UsageError
from polypseg.shift import FACTORS, attribute_shift, compare_sets, measure_set, typical_look
from polypseg.shift.attribution import ALL, ShiftSet, render_dataset
from polypseg.shift.comparison import HALVES, _floor, kernel_distance
from synthetic_pairs import INJECTED, STYLES, KnownSensitivity, draw, pixel_classifier
from tiny_models import write_tiny_model

OWN = {factor.name: factor.measures for factor in FACTORS}


@pytest.fixture(autouse=True)
def cameras(monkeypatch):
    """The injected styles are cameras for a test's time: others count the package's own."""
    for name, style in STYLES.items():
        monkeypatch.setitem(CAMERAS, name, style)


@cache
def opened(camera: str, seed: int = 2) -> ShiftSet:
    data = draw(camera, seed=seed)
    ids = tuple(data.ids)
    measured = measure_set(data, ids, title=f"{data.spec.title}")
    return ShiftSet(dataset=data, ids=ids, measured=measured, look=typical_look(data, ids, measured))


def injected(factor: str, source):
    """The plain camera's frames toward the same scenes under one injected factor."""
    return attribute_shift(source, opened("plain"), opened(factor), resamples=200)


@pytest.mark.parametrize("factor", INJECTED)
def test_measurement_puts_the_injected_factor_on_top(factor):
    found = compare_sets(opened("plain").measured, opened(factor).measured, resamples=200)
    assert found.measures[0]["measure"] in OWN[factor]
    low, high = (found.measures[0][f"difference_{side}"] for side in ("low", "high"))
    assert low * high > 0 and found.measures_auc.estimate > 0.7


@pytest.mark.parametrize("factor", first_fast(INJECTED))
def test_attribution_puts_the_injected_factor_on_top(factor):
    """A segmenter that every factor misleads alike: what is on top is what was injected."""
    found = injected(factor, KnownSensitivity(opened("plain").measured))
    first, second, *_ = found.rows()
    assert first["factor"] == factor and first["cost"] > max(second["cost"], 0.05)
    assert first["cost_low"] > 0 and first["p_holm"] < 0.05
    assert first["covered"] == pytest.approx(1, abs=0.3)
    assert found.rows()[-1]["factor"] == ALL


@pytest.mark.slow
@pytest.mark.parametrize("factor", ["sharpness", "scale", "compression"])
def test_attribution_of_a_trained_segmenter_finds_what_was_injected(factor):
    first, second, *_ = injected(factor, pixel_classifier()).rows()
    assert first["factor"] == factor and first["cost"] > 1.5 * max(second["cost"], 0.01)
    assert 0.3 < first["share_of_drop"] < 3


@pytest.mark.slow
def test_zero_strength_changes_no_byte():
    plain, other = opened("plain"), opened("colour")
    for factor in FACTORS:
        rendered = render_dataset(plain.dataset, [factor.render(plain.look, other.look)], strength=0)
        for record in plain.dataset.records[:3]:
            (frame, mask), (same, kept) = plain.dataset.pair(record), rendered.pair(record)
            assert np.array_equal(np.asarray(frame), np.asarray(same)) and np.array_equal(mask, kept), factor.name


@pytest.mark.slow
def test_strength_moves_a_factor_monotonically_and_all_the_way():
    plain, other = opened("plain"), opened("sharpness")
    sharpness = next(factor for factor in FACTORS if factor.name == "sharpness").render(plain.look, other.look)
    means = []
    for strength in (0.0, 0.4, 0.7, 1.0):
        rendered = render_dataset(plain.dataset, [sharpness], strength=strength)
        means.append(measure_set(rendered, plain.ids, title="t").values["sharpness"].mean())
    assert all(np.diff(means) < 0)
    assert means[-1] == pytest.approx(other.look.means["sharpness"], abs=0.1)
    with pytest.raises(ValueError, match="strength"):
        sharpness(np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32), np.uint8), 1.5, "x")


def test_scale_moves_frame_and_mask_together():
    plain, other = opened("plain"), opened("scale")
    scale = next(factor for factor in FACTORS if factor.name == "scale").render(plain.look, other.look)
    frame = np.zeros((96, 96, 3), np.uint8)
    frame[30:60, 40:70] = 200
    mask = (frame[..., 0] > 0).astype(np.uint8)
    small, cut = scale(frame, mask, 1.0, "x")
    assert cut.sum() < 0.5 * mask.sum()
    assert ((small[..., 0] > 100) != (cut > 0)).mean() < 0.01


@pytest.mark.slow
def test_two_halves_of_one_set_are_not_told_apart():
    data = draw("plain", seed=5, count=60)
    halves = [measure_set(data, data.ids[start::2], title=f"half {start}") for start in (0, 1)]
    found = compare_sets(*halves, resamples=300)
    assert found.measures_auc.low < 0.5 < found.measures_auc.high + 0.1
    assert not [row for row in found.measures if abs(row["effect"]) > 1]


def test_kernel_distance_is_zero_for_one_population_and_known_for_a_shift():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(2, 300, 4))
    groups = [np.arange(300)] * 2
    same = kernel_distance([x, y], groups)
    assert same.low < 0 < same.high
    # E k(x, y) with k = (x y / D + 1)^3: for independent standard normals E = 1 + 3 / D; a shift m of both adds
    # 3 |m|^2 / D + 3 |m|^4 / D^2 + |m|^6 / D^3 + (6 + 3 |m|^2) |m|^2 ... so the oracle is the plain double mean.
    shifted = kernel_distance([x, y + 0.5], groups)
    kernel = [(a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y + 0.5, y + 0.5), (x, y + 0.5))]
    off = ~np.eye(300, dtype=bool)
    assert shifted.estimate == pytest.approx(kernel[0][off].mean() + kernel[1][off].mean() - 2 * kernel[2].mean())
    assert shifted.low > 0


def distance_of(x, y, gx, gy, *, left_out=()):
    """The distance by its definition: means of the kernel over pairs of different clusters; one cluster left out."""
    side, cluster = left_out or (None, None)
    if side is not None:
        kept = (gx, gy)[side] != cluster
        x, gx = (x[kept], gx[kept]) if side == 0 else (x, gx)
        y, gy = (y[kept], gy[kept]) if side == 1 else (y, gy)

    def between(a, b, ga, gb):
        kernel, apart = (a @ b.T / a.shape[1] + 1) ** 3, ga[:, None] != gb[None, :]
        return kernel[apart].mean()

    everything = (x @ y.T / x.shape[1] + 1) ** 3
    return between(x, x, gx, gx) + between(y, y, gy, gy) - 2 * everything.mean()


@pytest.mark.parametrize("seed", range(6))
def test_kernel_distance_leaves_out_each_cluster_in_turn(seed):
    """Equal to the jackknife cluster by cluster to 1e-9, and the floor to the distance of each half from the other."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(40, 6)), 0.3 + rng.normal(size=(31, 6))
    groups = [np.unique(rng.integers(0, k, len(v)), return_inverse=True)[1] for k, v in ((9, x), (31, y))]
    found = kernel_distance([x, y], groups)
    variance = 0.0
    for side in (0, 1):
        clusters = range(groups[side].max() + 1)
        left = np.array([distance_of(x, y, *groups, left_out=(side, cluster)) for cluster in clusters])
        variance += (len(left) - 1) / len(left) * ((left - left.mean()) ** 2).sum()
    reach = stats.t.ppf(0.975, min(group.max() for group in groups)) * np.sqrt(variance)
    estimate = distance_of(x, y, *groups)
    expected = (estimate, estimate - reach, estimate + reach)
    assert (found.estimate, found.low, found.high) == pytest.approx(expected, rel=1e-9, abs=1e-9)

    draws, halves = np.random.default_rng(seed), []
    for z, group in ((x, groups[0]), (y, groups[1])):
        count = group.max() + 1
        for _ in range(HALVES // 2):
            half = np.isin(group, draws.permutation(count)[: count // 2])
            halves.append(distance_of(z[half], z[~half], group[half], group[~half]))
    assert _floor([x, y], groups, seed=seed) == pytest.approx(tuple(np.quantile(halves, [0.025, 0.975])), rel=1e-9)


@pytest.mark.slow
def test_commands_write_both_directions(tmp_path):
    model = write_tiny_model(tmp_path / "model")
    app = typer.Typer()
    app.add_typer(shift_app, name="shift")
    common = ["--a", "synthetic_a", "--b", "synthetic_b", "--limit", "5", "--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["shift", "measure", *common, "--encoder", "none"])
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(app, ["shift", "attribute", "--model", str(model), *common])
    assert done.exit_code == 0, done.output
    written = sorted(path.name for path in (tmp_path / "out").rglob("*.json"))
    assert written == [
        "synthetic_a.synthetic_b.attribution.json",
        "synthetic_a.synthetic_b.measures.json",
        "synthetic_b.synthetic_a.attribution.json",
    ]
    content = json.loads(next((tmp_path / "out").rglob("synthetic_b.*.attribution.json")).read_text())
    assert content["n"] == [5, 5] and len(content["images"]["as it is"]) == 5
    assert {row["factor"] for row in content["factors"]} == {*OWN, ALL}


@pytest.mark.slow
def test_attribute_takes_a_network_of_another_library(tmp_path):
    smp = pytest.importorskip("segmentation_models_pytorch")
    smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8)).save_pretrained(
        str(tmp_path / "unet")
    )
    app = typer.Typer()
    app.add_typer(shift_app, name="shift")
    call = ["shift", "attribute", "--a", "synthetic_a", "--b", "synthetic_b", "--limit", "3", "--one-way"]
    call += ["--output", str(tmp_path / "out")]
    done = CliRunner().invoke(app, [*call, "--model", str(tmp_path / "unet"), "--image-size", "64"])
    assert done.exit_code == 0, done.output
    (written,) = (tmp_path / "out" / "unet").glob("*.attribution.json")
    assert json.loads(written.read_text())["n"] == [3, 3]
    with pytest.raises(UsageError, match=r"absent\.onnx does not exist"):
        CliRunner().invoke(app, [*call, "--model", "absent.onnx"], catch_exceptions=False)
