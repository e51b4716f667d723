"""Every source of predictions gives what evaluation sees, and files that do not fit are refused by name."""

import csv
import json
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import nn

from plain_protocol import evaluate_plainly
from polypseg import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.data import SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.evaluate import score_predictions
from polypseg.inference.model import build_image_processor, predicted_mask
from polypseg.inference.onnx_predictions import OnnxPredictions
from polypseg.inference.open_model import open_model
from polypseg.inference.prediction_files import FilePredictions, read_map, save_predictions
from polypseg.inference.predictors import ModelPredictions, SmpPredictions, probability_map
from polypseg.statistics.scores import METRICS


@pytest.fixture(scope="module")
def data():
    return open_dataset("synthetic_b", synthetic_options=SyntheticOptions(count=9, size=(72, 100)))


@pytest.fixture(scope="module")
def model():
    """A random model whose threshold lies in the middle of its own logits, so that masks are neither empty nor full."""
    torch.manual_seed(0)
    config = PolypSegConfig(encoder="resnet18", decoder_channels=16, image_size=64)
    model = PolypSegForSemanticSegmentation(config).eval()
    frames = open_dataset("synthetic_b", synthetic_options=SyntheticOptions(count=2, size=(72, 100)))
    inputs = build_image_processor(config)(images=[frames.frame(r) for r in frames.records], return_tensors="pt")
    with torch.no_grad():
        bias = model.decoder.head.bias
        bias -= model(**inputs).logits[:, 1].median()
        model.decoder.head.weight *= 5 / model(**inputs).logits[:, 1].std()
    return model


@pytest.fixture(scope="module")
def source(model):
    return ModelPredictions(name="m", model=model, processor=build_image_processor(model.config))


@pytest.fixture(scope="module")
def maps(source, data):
    return dict(source.predict(data, data.ids))


def write_png(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def counts(result):
    return [(i.intersection, i.predicted, i.true) for i in result.images]


# -- models ------------------------------------------------------------------------------------------------------------


def test_model_predictions_score_exactly_as_the_plain_protocol(model, source, data):
    wanted = evaluate_plainly(model, source.processor, data)
    found = score_predictions(source, data)
    assert found.ids == wanted.ids and counts(found) == [tuple(row) for row in wanted.counts.tolist()]
    assert 0.05 < wanted.counts[:, 1].mean() / (72 * 100) < 0.95
    summary, expected = found.summary(), wanted.summary()
    for name in METRICS:
        assert summary["paper"][name] == expected[name] | {"n": 9}
    ssl4gie = evaluate_plainly(model, source.processor, data, convention="ssl4gie").summary()
    assert summary["ssl4gie"]["dice"] == ssl4gie["dice"] | {"n": 9}


def test_model_predictions_are_probabilities_of_the_masks_size(maps, data):
    assert list(maps) == data.ids
    for probability in maps.values():
        assert probability.shape == (72, 100) and probability.dtype == np.float32
        assert 0 <= probability.min() < 0.5 < probability.max() <= 1


def test_probability_map_is_above_one_half_exactly_where_evaluation_predicts():
    logits = torch.tensor([[0.0, 1e-9, -1e-9], [1e-7, -1e-7, 30.0], [1e-8, 200.0, -200.0]])
    for size in ((3, 3), (7, 5)):
        assert ((probability_map(logits, size) > 0.5) == predicted_mask(logits, size)).all()


def test_predictions_do_not_leave_inference_mode_on(source, data):
    next(source.predict(data, data.ids))
    assert not torch.is_inference_mode_enabled()


class TinyNet(nn.Module):
    """Shaped like a segmentation_models_pytorch model: (B, 3, h, w) -> (B, channels, h, w)."""

    def __init__(self, channels: int = 1, activation: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(1)
        self.convolution = nn.Conv2d(3, channels, 3, padding=1)
        self.activation = activation or nn.Identity()

    def forward(self, pixels):
        return self.activation(self.convolution(pixels) * 3)


def test_smp_predictions_follow_the_same_protocol(data):
    network = TinyNet()
    found = dict(SmpPredictions(name="u", model=network, image_size=64).predict(data, data.ids[:3]))
    processor = build_image_processor(PolypSegConfig(image_size=64))
    frame = data.frame(data.records[1])
    with torch.no_grad():
        z = network(processor(images=[frame], return_tensors="pt")["pixel_values"])
    z = nn.functional.interpolate(z, size=(72, 100), mode="bilinear", align_corners=False)
    np.testing.assert_allclose(found[data.ids[1]], torch.sigmoid(z)[0, 0], atol=1e-6)


def test_smp_predictions_of_a_real_decoder(data):
    smp = pytest.importorskip("segmentation_models_pytorch")
    torch.manual_seed(0)
    network = smp.Unet("resnet18", encoder_weights=None, classes=1)
    result = score_predictions(SmpPredictions(name="unet", model=network, image_size=64), data, limit=2)
    assert result.part == "full-first2" and result.origin["class"] == "Unet"


def test_smp_predictions_take_two_channels_as_background_and_polyp(data):
    network = TinyNet(channels=2)
    softmax = TinyNet(channels=2, activation=nn.Softmax(dim=1))
    same_size = open_dataset("synthetic_b", synthetic_options=SyntheticOptions(count=2, size=(64, 64)))
    two = dict(SmpPredictions(name="a", model=network, image_size=64).predict(same_size, same_size.ids))
    soft = SmpPredictions(name="b", model=softmax, image_size=64, output="probability")
    for record_id, probability in soft.predict(same_size, same_size.ids):
        np.testing.assert_allclose(probability, two[record_id], atol=1e-6)


def test_outputs_of_the_other_kind_are_refused(data):
    squashed = TinyNet(activation=nn.Sigmoid())
    with pytest.raises(UsageError, match=r"u gives values between 0 and 1.*output='probability'"):
        list(SmpPredictions(name="u", model=squashed, image_size=64).predict(data, data.ids[:1]))
    with pytest.raises(UsageError, match=r"u gives values outside 0 and 1.*output='logits'"):
        list(SmpPredictions(name="u", model=TinyNet(), image_size=64, output="probability").predict(data, data.ids[:1]))
    with pytest.raises(UsageError, match=r"u gives \(1, 3, 64, 64\)"):
        list(SmpPredictions(name="u", model=TinyNet(channels=3), image_size=64).predict(data, data.ids[:1]))


# -- ONNX --------------------------------------------------------------------------------------------------------------


def pretend_runtime(monkeypatch, shape, network):
    """A stand-in for onnxruntime with the few calls that are used, running a PyTorch module."""

    class InferenceSession:
        def __init__(self, path, sess_options, providers):
            if Path(path).read_bytes() != b"network":
                raise RuntimeError("Protobuf parsing failed.\nmore")

        def get_inputs(self):
            return [types.SimpleNamespace(name="pixels", shape=shape)]

        def run(self, outputs, feeds):
            assert outputs is None and list(feeds) == ["pixels"] and feeds["pixels"].dtype == np.float32
            assert not isinstance(shape[0], int) or len(feeds["pixels"]) == shape[0]
            with torch.no_grad():
                return [network(torch.from_numpy(feeds["pixels"])).numpy()]

    module = types.ModuleType("onnxruntime")
    module.InferenceSession = InferenceSession
    module.SessionOptions = lambda: types.SimpleNamespace(add_session_config_entry=lambda key, value: None)
    monkeypatch.setitem(sys.modules, "onnxruntime", module)


@pytest.mark.parametrize("batch", ["batch", 1])
def test_onnx_predictions_equal_the_network_they_hold(monkeypatch, tmp_path, data, batch):
    network = TinyNet()
    pretend_runtime(monkeypatch, [batch, 3, 64, 64], network)
    (tmp_path / "m.onnx").write_bytes(b"network")
    source = OnnxPredictions(name="o", path=tmp_path / "m.onnx")
    wanted = dict(SmpPredictions(name="u", model=network, image_size=64).predict(data, data.ids))
    for record_id, probability in source.predict(data, data.ids):
        np.testing.assert_allclose(probability, wanted[record_id], atol=1e-6)
    assert source.origin["file"] == "m.onnx" and len(source.origin["sha256"]) == 64


@pytest.mark.parametrize(
    ("shape", "content", "match"),
    [
        (["b", 3, "h", "w"], b"network", "leaves its input's size open: give image_size"),
        (["b", 1, 64, 64], b"network", r"\(B, 3, height, width\) is needed"),
        (["b", 3, 64, 96], b"network", "takes 96x64 pixels"),
        ([4, 3, 64, 64], b"network", "batches of exactly 4"),
        (["b", 3, 64, 64], b"damaged", r"cannot load .*m\.onnx as an ONNX model: Protobuf parsing failed\.$"),
    ],
)
def test_onnx_files_that_do_not_fit_are_refused(monkeypatch, tmp_path, data, shape, content, match):
    pretend_runtime(monkeypatch, shape, TinyNet())
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(UsageError, match=match):
        OnnxPredictions(name="o", path=tmp_path / "m.onnx").predict(data, data.ids)


def test_onnx_files_are_prepared_for_as_their_own_folder_says(tmp_path, data):
    """A wrong mean gives wrong numbers in silence: ImageNet's is only for files that lie alone."""
    from light_models import SIZE, write_light_model
    from polypseg.inference.segmenter import load

    folder = write_light_model(tmp_path / "m")
    found = dict(OnnxPredictions(name="o", path=folder / "onnx" / "model.onnx").predict(data, data.ids[:2]))
    frames = [data.frame(data.by_id[record_id]) for record_id in data.ids[:2]]
    for probability, wanted in zip(found.values(), load(folder).predict(frames), strict=True):
        np.testing.assert_allclose(probability, wanted.probability, atol=1e-5)
    other = OnnxPredictions(name="o", path=folder / "onnx" / "model.onnx", image_size=96)
    with pytest.raises(UsageError, match=rf"asked for 96x96 pixels but .* says {SIZE[1]}x{SIZE[0]}"):
        list(other.predict(data, data.ids[:1]))


def test_a_folder_is_scored_by_the_runtime_and_in_the_precision_that_are_asked_for(tmp_path, data):
    from light_models import write_light_model
    from polypseg.inference.runtimes import has_bf16

    folder = write_light_model(tmp_path / "m")
    wanted = dict(open_model(str(folder), runtime="onnxruntime").predict(data, data.ids[:2]))
    for precision in ("fp32", *(["bf16"] if has_bf16() else [])):
        source = open_model(str(folder), runtime="openvino", precision=precision)
        assert source.name == f"m.openvino.{precision}"
        assert (source.origin["source"], source.origin.get("precision", "fp32")) == ("openvino", precision)
        found = dict(source.predict(data, data.ids[:2]))
        differences = [np.abs(found[name] - wanted[name]).max() for name in wanted]
        assert max(differences) < (1e-4 if precision == "fp32" else 0.05)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"precision": "int8"}, "--format onnx --precision int8"),
        ({"runtime": "torch", "precision": "int8"}, "torch computes in fp32 or bf16"),
        ({"runtime": "onnx"}, "unknown runtime 'onnx'"),
    ],
)
def test_a_runtime_or_precision_that_a_folder_has_not_is_refused(tmp_path, options, match):
    from light_models import write_light_model

    with pytest.raises(UsageError, match=match):
        open_model(str(write_light_model(tmp_path / "m")), **options)


def test_an_onnx_file_has_its_own_precision(tmp_path):
    from light_models import write_light_model

    path = write_light_model(tmp_path / "m") / "onnx" / "model.onnx"
    with pytest.raises(UsageError, match="has a precision of its own"):
        open_model(str(path), precision="int8")


def test_onnx_without_its_runtime_says_how_to_get_it(monkeypatch, tmp_path, data):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UsageError, match="python -m pip install onnxruntime"):
        OnnxPredictions(name="o", path=tmp_path / "m.onnx").predict(data, data.ids)


# -- files -------------------------------------------------------------------------------------------------------------


def test_saved_npy_maps_score_exactly_as_the_model(source, data, maps, tmp_path):
    folder = save_predictions(maps.items(), tmp_path / "maps", form="npy")
    for record_id, probability in FilePredictions(folder).predict(data, data.ids):
        assert (probability == maps[record_id]).all()
    model_route, files_route = score_predictions(source, data), score_predictions(FilePredictions(folder), data)
    assert files_route.summary() == model_route.summary() and files_route.rows() == model_route.rows()


def test_saved_png_maps_are_off_by_at_most_half_a_step_and_give_the_same_masks(source, data, maps, tmp_path):
    folder = save_predictions(maps.items(), tmp_path / "maps", form="png")
    for record_id, probability in FilePredictions(folder).predict(data, data.ids):
        assert np.abs(probability - maps[record_id]).max() <= 1 / 510 + 1e-7
    wanted, found = (score_predictions(s, data).summary() for s in (source, FilePredictions(folder)))
    for name in ("paper", "ssl4gie", "pooled", "fg_bg_mean", "surface", "lesions", "size"):
        assert found[name] == wanted[name]
    assert found["structure"]["mae"]["mean"] == pytest.approx(wanted["structure"]["mae"]["mean"], abs=1 / 510)


def test_save_predictions_keeps_one_half_unpredicted_and_leaves_nothing_half_written(tmp_path):
    half = np.array([[0.5, np.nextafter(np.float32(0.5), np.float32(1))]], np.float32)
    folder = save_predictions([("x", half)], tmp_path / "maps")
    assert (read_map((folder / "x.png").read_bytes(), name="x.png") / 255 > 0.5).tolist() == [[False, True]]

    def failing():
        yield "y", half
        raise PolypSegError("broken")

    with pytest.raises(PolypSegError, match="broken"):
        save_predictions(failing(), tmp_path / "other")
    assert [p.name for p in tmp_path.iterdir()] == ["maps"]


@pytest.mark.parametrize("coding", [1, 255])
@pytest.mark.parametrize("suffix", ["png", "tif", "npy", "_mask.png", "_pred.bmp"])
def test_masks_of_0_and_1_and_of_0_and_255_are_the_same(data, tmp_path, suffix, coding):
    for record in data.records:
        pixels = data.mask(record) * np.uint8(coding)
        name = tmp_path / (record.id + (suffix if suffix.startswith("_") else f".{suffix}"))
        np.save(name, pixels) if suffix == "npy" else write_png(name, pixels)
    result = score_predictions(FilePredictions(tmp_path), data)
    assert result.summary()["paper"]["dice"]["mean"] == 1


def test_a_faint_map_among_probability_maps_is_not_read_as_a_mask(data, tmp_path):
    for k, record in enumerate(data.records):
        faint = data.mask(record)  # 1 / 255 where the polyp is
        write_png(tmp_path / f"{record.id}.png", faint if k == 0 else faint * np.uint8(200))
    found = dict(FilePredictions(tmp_path).predict(data, data.ids))
    assert found[data.ids[0]].max() == pytest.approx(1 / 255)
    assert found[data.ids[1]].max() == pytest.approx(200 / 255)


def test_sixteen_bit_bilevel_and_float_files_are_read(tmp_path):
    wanted = np.array([[0, 0.25], [0.5, 1]], np.float32)
    deep = np.round(wanted * 65535).astype(np.uint16)
    write_png(tmp_path / "a.png", deep)
    tifffile.imwrite(tmp_path / "b.tif", deep)
    tifffile.imwrite(tmp_path / "c.tif", wanted)
    np.save(tmp_path / "d.npy", wanted[None].astype(np.float64))
    np.save(tmp_path / "e.npy", wanted > 0.3)
    Image.fromarray(wanted > 0.3).convert("1").save(tmp_path / "f.png")
    write_png(tmp_path / "g.png", np.repeat((wanted > 0.3)[:, :, None] * np.uint8(255), 3, axis=2))
    read = {path.name: read_map(path.read_bytes(), name=path.name) for path in sorted(tmp_path.iterdir())}
    for name in ("a.png", "b.tif"):
        assert read[name].dtype == np.uint16 and (read[name] == deep).all()
    for name in ("c.tif", "d.npy"):
        np.testing.assert_array_equal(read[name], wanted)
    for name in ("e.npy", "f.png", "g.png"):
        np.testing.assert_array_equal(read[name], (wanted > 0.3) * 255)


def test_files_are_divided_by_their_types_maximum(data, tmp_path):
    for record in data.records[:2]:
        tifffile.imwrite(tmp_path / f"{record.id}.tif", data.mask(record).astype(np.uint16) * np.uint16(52428))
    found = dict(FilePredictions(tmp_path).predict(data, data.ids[:2]))
    assert found[data.ids[0]].max() == pytest.approx(0.8, abs=1e-5)


def test_maps_of_another_size_are_resized_bilinearly_to_the_masks(data, tmp_path):
    small = np.random.default_rng(0).integers(0, 256, size=(36, 50), dtype=np.uint8)
    for record_id in data.ids:
        write_png(tmp_path / f"{record_id}.png", small)
    (_, probability), *_ = FilePredictions(tmp_path).predict(data, data.ids)
    wanted = nn.functional.interpolate(torch.from_numpy(small / 255.0)[None, None], size=(72, 100), mode="bilinear")
    np.testing.assert_allclose(probability, wanted[0, 0], atol=1e-6)


def test_missing_files_are_listed_and_count_as_empty_only_when_asked(data, tmp_path):
    for record in data.records[2:]:
        write_png(tmp_path / f"{record.id}.png", data.mask(record) * np.uint8(255))
    with pytest.raises(UsageError, match=r"2 of 9 images have no prediction: 00000, 00001\. .*allow_missing"):
        FilePredictions(tmp_path).predict(data, data.ids)
    result = score_predictions(FilePredictions(tmp_path, allow_missing=True), data)
    assert [row["predicted"] for row in result.rows()][:2] == [0, 0]
    assert result.summary()["paper"]["dice"]["mean"] == pytest.approx(7 / 9)
    assert result.origin["missing_count_as_empty"] is True
    assert score_predictions(FilePredictions(tmp_path), data.__class__(data.spec, data.source, data.records[2:]))


def test_strangers_and_doubles_are_listed_but_other_parts_of_the_dataset_are_welcome(data, tmp_path):
    for record in data.records:
        write_png(tmp_path / f"{record.id}.png", data.mask(record) * np.uint8(255))
    assert len(list(FilePredictions(tmp_path).predict(data, data.ids[:3]))) == 3
    (tmp_path / ".hidden.png").write_bytes(b"")
    (tmp_path / "notes.txt").write_text("no map")
    for k in range(7):
        write_png(tmp_path / f"x{k}.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(UsageError, match=r"7 file\(s\) belong to no image of .*: x0\.png, x1\.png.* and 2 more"):
        FilePredictions(tmp_path).predict(data, data.ids)
    for k in range(7):
        (tmp_path / f"x{k}.png").unlink()
    write_png(tmp_path / "deep" / "00003_mask.png", np.zeros((2, 2), np.uint8))
    with pytest.raises(UsageError, match=r"00003\.png and deep/00003_mask\.png are of one image"):
        FilePredictions(tmp_path).predict(data, data.ids)


def test_an_archive_of_maps_is_read_like_a_folder(data, maps, tmp_path):
    folder = save_predictions(maps.items(), tmp_path / "maps", form="npy")
    with zipfile.ZipFile(tmp_path / "maps.zip", "w") as archive:
        for path in sorted(folder.iterdir()):
            archive.write(path, f"test/{path.name}")
    zipped, plain = (dict(FilePredictions(p).predict(data, data.ids)) for p in (tmp_path / "maps.zip", folder))
    assert all((zipped[k] == plain[k]).all() for k in data.ids)


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (np.array([[0.0, 3.5]]), r"float64 values from 0\.0 to 3\.5: save probabilities.*sigmoid"),
        (np.array([[np.nan, 0.5]]), "float64 values from nan"),
        (np.array([[0, 7]]), "int64 values from 0 to 7"),
        (np.zeros((2, 3, 4)), r"has the shape \(2, 3, 4\): a map is gray"),
        (np.zeros((2, 3, 4), np.uint8), "is transparent in places"),
        (np.zeros((0, 3)), r"has the shape \(0, 3\)"),
        (np.array([[{}]]), "cannot be read as a map"),
    ],
)
def test_arrays_that_are_no_probability_maps_are_refused(tmp_path, pixels, match):
    np.save(tmp_path / "x.npy", pixels, allow_pickle=True)
    with pytest.raises(PolypSegError, match=rf"x\.npy.*{match}"):
        read_map((tmp_path / "x.npy").read_bytes(), name="x.npy")


def test_colors_class_numbers_and_damage_are_refused_by_name(data, tmp_path):
    colors = np.zeros((72, 100, 3), np.uint8)
    colors[:20, :, 0] = 255
    write_png(tmp_path / "00000.png", colors)
    with pytest.raises(PolypSegError, match=r"00000\.png is in colors: save the polyp's probability as gray"):
        list(FilePredictions(tmp_path).predict(data, data.ids[:1]))
    write_png(tmp_path / "00000.png", data.mask(data.records[0]) * np.uint8(2))
    with pytest.raises(UsageError, match="coded with class numbers up to 2"):
        list(FilePredictions(tmp_path).predict(data, data.ids[:1]))
    (tmp_path / "00000.png").write_bytes((tmp_path / "00000.png").read_bytes()[:40])
    with pytest.raises(PolypSegError, match=r"00000\.png cannot be read as a map"):
        list(FilePredictions(tmp_path).predict(data, data.ids[:1]))
    (tmp_path / "00000.png").unlink()
    with pytest.raises(UsageError, match="no predictions in"):
        FilePredictions(tmp_path).predict(data, data.ids)
    with pytest.raises(UsageError, match="does not exist"):
        FilePredictions(tmp_path / "nowhere").predict(data, data.ids)


# -- the suite's files -------------------------------------------------------------------------------------------------


def test_suite_files_hold_every_convention_and_agree_with_each_other(source, data, tmp_path):
    result = score_predictions(source, data, limit=5, tolerance=3.0)
    path = result.write(tmp_path)
    assert path == tmp_path / "m" / "synthetic_b.full.full-first5.receipt.json"
    content = json.loads(path.read_text())
    assert content["n"] == 5 and content["dataset"]["synthetic"] and content["surface_tolerance_pixels"] == 3
    assert set(content["scores"]) == set(content["definitions"])
    assert content["predictions"]["source"] == "model"
    rows = list(csv.DictReader(path.with_suffix(".csv").open()))
    for key in ("paper.dice", "ssl4gie.precision", "fg_bg_mean.iou", "surface.hd95_relative"):
        convention, output = key.split(".")
        mean = np.mean([row[key] for row in content["images"]])
        assert content["scores"][convention][output]["mean"] == pytest.approx(mean)
        assert np.mean([float(row[key]) for row in rows]) == pytest.approx(mean)
    sums = {name: sum(int(row[name]) for row in rows) for name in ("intersection", "predicted", "true")}
    pooled = 2 * sums["intersection"] / (sums["predicted"] + sums["true"])
    assert content["scores"]["pooled"]["dice"]["mean"] == pytest.approx(pooled)


def test_suite_gives_only_the_conventions_asked_for(source, data):
    result = score_predictions(source, data, limit=2, conventions=("pooled", "paper"))
    assert list(result.summary()) == ["pooled", "paper"]
    assert "paper.dice" in result.rows()[0] and "ssl4gie.dice" not in result.rows()[0]


def test_wrong_requests_fail_before_the_work(source, data):
    with pytest.raises(UsageError, match="unknown metric convention 'papr'"):
        score_predictions(source, data, conventions=("papr",))
    with pytest.raises(UsageError, match="has the parts full, not 'test'"):
        score_predictions(source, data, part="test")


def test_a_source_that_changes_the_order_is_caught(data, maps):
    class Shuffled:
        name, origin = "s", {}

        def predict(self, dataset, ids):
            return ((record_id, maps[record_id]) for record_id in reversed(ids))

    with pytest.raises(ValueError, match="s predicts 00008 where 00000 was asked for"):
        score_predictions(Shuffled(), data)


@pytest.mark.real_data
def test_published_masks_scored_as_predictions_are_perfect(real_data):
    kvasir = open_dataset("kvasir_seg", source=real_data / "Kvasir-SEG", allow_partial=True)
    result = score_predictions(FilePredictions(real_data / "Kvasir-SEG" / "masks"), kvasir, limit=8)
    scores = result.summary()
    assert scores["paper"]["dice"] == {"mean": 1.0, "low": 1.0, "high": 1.0, "n": 8}
    assert scores["surface"]["hd95"]["mean"] == 0 and scores["lesions"]["sensitivity_iou"]["mean"] == 1


@pytest.mark.parametrize("top", [1, 255, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_masks_in_16_bits_score_as_in_8(data, tmp_path, suffix, top):
    """0 and 1 in 16 bits were read as probabilities of 1 / 65535: a Dice of 0 for perfect masks."""
    for record in data.records:
        write_png(tmp_path / f"{record.id}.{suffix}", data.mask(record).astype(np.uint16) * np.uint16(top))
    assert score_predictions(FilePredictions(tmp_path), data).summary()["paper"]["dice"]["mean"] == 1


def test_class_numbers_in_16_bits_are_refused(data, tmp_path):
    for record in data.records:
        write_png(tmp_path / f"{record.id}.png", data.mask(record).astype(np.uint16) * np.uint16(7))
    with pytest.raises(UsageError, match="coded with class numbers up to 7 in 16 bits"):
        list(FilePredictions(tmp_path).predict(data, data.ids))


def test_predictions_in_tiffs_with_white_as_zero_are_read_as_shown(data, tmp_path):
    for record in data.records:
        pixels = (1 - data.mask(record)) * np.uint8(255)
        tifffile.imwrite(tmp_path / f"{record.id}.tif", pixels, photometric="miniswhite")
    assert score_predictions(FilePredictions(tmp_path), data).summary()["paper"]["dice"]["mean"] == 1


@pytest.mark.parametrize("scale", [1, 2])
def test_transposed_predictions_are_refused_not_stretched(data, tmp_path, scale):
    for record in data.records:
        mask = data.mask(record).T * np.uint8(255)
        write_png(tmp_path / f"{record.id}.png", mask.repeat(scale, 0).repeat(scale, 1))
    with pytest.raises(
        PolypSegError, match=r"00000\.png is \d+x\d+ but its image is 100x72: it seems to be transposed"
    ):
        list(FilePredictions(tmp_path).predict(data, data.ids))


def test_square_predictions_of_oblong_frames_are_resized(data, tmp_path):
    for record_id in data.ids:
        write_png(tmp_path / f"{record_id}.png", np.full((64, 64), 200, np.uint8))
    assert len(list(FilePredictions(tmp_path).predict(data, data.ids))) == len(data.ids)


def coded(data, tmp_path, suffix, code):
    """Write each mask of 0 and 1 as ``code`` changes it."""
    for record in data.records:
        pixels, name = code(data.mask(record)), tmp_path / f"{record.id}.{suffix}"
        if suffix == "npy":
            np.save(name, pixels)
        elif suffix == "tif":
            tifffile.imwrite(name, pixels)
        else:
            write_png(name, pixels)
    return FilePredictions(tmp_path)


def with_void_border(mask: np.ndarray) -> np.ndarray:
    """Class 1 with a border of 255 around it, as VOC's masks have."""
    return np.where(np.pad(mask, 1)[2:, 1:-1] != mask, 255, mask).astype(np.uint8)


@pytest.mark.parametrize(
    ("suffix", "code", "match"),
    [
        ("png", lambda m: m * np.uint8(100), r"nowhere above one half although it is not black: .* 0, 100 \("),
        ("png", lambda m: m * np.uint8(38), r"values are 0, 38 \(00000\.png\): save masks as 0 and 255"),
        ("png", lambda m: (m + (m * np.arange(100, dtype=np.uint8) > 50)) * np.uint8(38), r"values are 0, 38, 76 \("),
        ("jpg", lambda m: m * np.uint8(38), "values are up to"),
        ("png", lambda m: m * np.uint16(4095), r"values are 0, 4095 \(00000\.png\): save masks as 0 and 65535"),
        ("npy", lambda m: m.astype(np.float32) / 255, r"values are 0, 0\.0039216 .*save masks as 0 and 1 "),
        ("tif", lambda m: m.astype(np.float32) / 255, r"values are 0, 0\.0039216 .*save masks as 0 and 1 "),
        ("png", with_void_border, r"holds only the values 0, 1, 255, neither masks nor probabilities"),
        ("png", lambda m: np.maximum(with_void_border(m), m * np.uint8(100)), "holds only the values 0, 100, 255"),
    ],
    ids=["percent", "class 38", "classes", "jpeg", "12 bits", "npy", "tif", "void", "percent and void"],
)
def test_masks_on_another_scale_are_refused_not_scored_as_empty(data, tmp_path, suffix, code, match):
    with pytest.raises(UsageError, match=match):
        score_predictions(coded(data, tmp_path, suffix, code), data)


def test_soft_maps_in_percent_are_refused(data, tmp_path):
    def code(mask):
        return np.rint(100 * gaussian_filter(mask.astype(float), 1)).astype(np.uint8)

    with pytest.raises(UsageError, match="nowhere above one half although it is not black: its values are up to"):
        score_predictions(coded(data, tmp_path, "png", code), data)


@pytest.mark.parametrize("peak", [0.02, 0.06, 0.2, 0.45])
@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("form", ["png", "npy", "deep.png"])
def test_soft_maps_that_predict_nothing_are_scored_as_they_are(data, tmp_path, peak, count, form):
    """What a model gives on frames without polyp: low everywhere, but with many values and none of them apart."""
    grid = np.hypot(*np.meshgrid(np.arange(100) - 40, np.arange(72) - 30))
    for k, record_id in enumerate(data.ids[:count]):
        bump = (peak * (1 - 0.07 * k) * np.exp(-((grid / 15) ** 2))).astype(np.float32)
        if form == "npy":
            np.save(tmp_path / f"{record_id}.npy", bump)
        else:
            deep = form != "png"
            pixels = np.rint(bump * (65535 if deep else 255)).astype(np.uint16 if deep else np.uint8)
            write_png(tmp_path / f"{record_id}.png", pixels)
    found = score_predictions(FilePredictions(tmp_path), data, limit=count)
    assert [image.predicted for image in found.images] == [0] * count


def test_flat_and_noisy_maps_below_one_half_are_soft(data, tmp_path):
    noise = np.random.default_rng(0)
    for record_id in data.ids:
        np.save(tmp_path / f"{record_id}.npy", noise.normal(0.3, 0.02, (72, 100)).clip(0, 0.45).astype(np.float32))
    assert all(image.predicted == 0 for image in score_predictions(FilePredictions(tmp_path), data).images)


@pytest.mark.parametrize("parts", [2, 3, 5, 7])
def test_averages_of_a_few_masks_are_probabilities(data, tmp_path, parts):
    def code(mask):
        part = (np.arange(100) * parts // 100 + 1) / parts
        return np.rint(mask * part * 255).astype(np.uint8)

    assert score_predictions(coded(data, tmp_path, "png", code), data).images[0].predicted > 0


def test_a_file_of_few_values_in_a_set_of_soft_maps_is_one_of_them(data, maps, tmp_path):
    save_predictions(maps.items(), tmp_path / "maps")
    write_png(tmp_path / "maps" / f"{data.ids[0]}.png", with_void_border(data.mask(data.records[0])))
    write_png(tmp_path / "maps" / f"{data.ids[1]}.png", data.mask(data.records[1]) * np.uint8(100))
    found = dict(FilePredictions(tmp_path / "maps").predict(data, data.ids))
    assert found[data.ids[1]].max() == pytest.approx(100 / 255)
