"""What the table of models promises: twelve rows with licenses and caveats, and files that follow it."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import timm

from polypseg import zoo
from polypseg.cli.predict import models as list_models
from polypseg.errors import UsageError
from polypseg.hub.model_configs import render_model_configs, write_model_configs
from polypseg.modeling import PolypSegConfig
from polypseg.study.cells import grid_cells
from polypseg.study.schema import scale_grid
from polypseg.zoo import ZOO, ZooEntry

REPOSITORY = Path(__file__).resolve().parents[1]
COMMITTED = REPOSITORY / "hub_configs" / "models"

SHORT_NAMES = {
    "RN-HK-MC": "resnet50_deeplabv3plus.moco_v3_hyperkvasir",
    "RN-HK-BT": "resnet50_deeplabv3plus.barlow_twins_hyperkvasir",
    "RN-IN-MC": "resnet50_deeplabv3plus.moco_v3_imagenet1k",
    "RN-IN-BT": "resnet50_deeplabv3plus.barlow_twins_imagenet1k",
    "RN-IN-SL": "resnet50_deeplabv3plus.supervised_imagenet1k",
    "RN-NA-NA": "resnet50_deeplabv3plus.random",
    "VT-HK-MC": "vit_base_dpt.moco_v3_hyperkvasir",
    "VT-HK-MA": "vit_base_dpt.mae_hyperkvasir",
    "VT-IN-MC": "vit_base_dpt.moco_v3_imagenet1k",
    "VT-IN-MA": "vit_base_dpt.mae_imagenet1k",
    "VT-IN-SL": "vit_base_dpt.supervised_imagenet1k",
    "VT-NA-NA": "vit_base_dpt.random",
}

every_row = pytest.mark.parametrize("entry", ZOO, ids=lambda entry: entry.short_name)


@pytest.fixture
def thirteenth(monkeypatch: pytest.MonkeyPatch) -> ZooEntry:
    """A row more than the table has."""
    entry = dataclasses.replace(zoo.get("RN-IN-SL"), method="barlow_twins", decoder="dpt", encoder="vit_base")
    monkeypatch.setattr(zoo, "ZOO", (*ZOO, entry))
    return entry


def test_zoo_is_the_papers_twelve_models():
    assert len(ZOO) == 12
    assert {entry.short_name: entry.model_id for entry in ZOO} == SHORT_NAMES


@every_row
def test_model_id_names_architecture_and_pretraining(entry):
    grammar = r"(?P<encoder>resnet50|vit_base)_(?P<decoder>[a-z0-9]+)\.(?P<tag>[a-z0-9_]+)"
    match = re.fullmatch(grammar, entry.model_id)
    assert match and (match["encoder"], match["decoder"]) == (entry.encoder, entry.decoder)
    assert match["tag"] == ("random" if entry.method == "none" else f"{entry.method}_{entry.corpus}")
    assert entry.decoder == {"resnet50": "deeplabv3plus", "vit_base": "dpt"}[entry.encoder]


@every_row
def test_row_states_license_and_where_it_is_stated(entry):
    assert re.fullmatch(r"[a-z0-9.-]+", entry.license)
    assert entry.upstream.license_source
    assert bool(entry.upstream.location) == (entry.method != "none")


@every_row
def test_license_follows_the_upstream_weights(entry):
    upstream = {
        ("moco_v3", "imagenet1k"): "cc-by-nc-4.0",
        ("mae", "imagenet1k"): "cc-by-nc-4.0",
        ("barlow_twins", "imagenet1k"): "mit",
        ("none", "none"): "apache-2.0",
    }
    if entry.corpus == "hyperkvasir":  # the study's README puts all of its weights under non-commercial terms
        assert entry.license == "cc-by-nc-4.0"
    elif entry.method == "supervised":
        assert entry.license in ("bsd-3-clause", "apache-2.0")
    else:
        assert entry.license == upstream[entry.method, entry.corpus]


@every_row
def test_position_embedding_is_that_of_the_pretraining(entry):
    expected = ("learned", True)
    if entry.encoder == "vit_base":
        frozen = {"moco_v3": ("sincos_moco_v3", False), "mae": ("sincos_mae", False)}
        expected = frozen.get(entry.method, expected)
    assert (entry.position_embedding, entry.position_embedding_trainable) == expected


@every_row
def test_config_feeds_imagenet_statistics_at_224(entry):
    config = entry.config()
    assert config.image_mean == [0.485, 0.456, 0.406] and config.image_std == [0.229, 0.224, 0.225]
    assert config.image_size == 224
    assert config.encoder == {"resnet50": "resnet50", "vit_base": "vit_base_patch16_224"}[entry.encoder]
    assert (config.decoder, config.position_embedding) == (entry.decoder, entry.position_embedding)


class TestExtraRows:
    """Rows beside the study's twelve."""

    def test_supervised_vit_that_saw_imagenet_1k_only_is_timms_augreg_in1k(self):
        entry, study = zoo.get("VT-IN1K-SL"), zoo.get("VT-IN-SL")
        facts = timm.get_pretrained_cfg(entry.upstream.timm)
        assert entry.upstream.timm == "vit_base_patch16_224.augreg_in1k"
        assert (facts.architecture, facts.num_classes) == (entry.config().encoder, 1000)
        assert "i1k" in facts.url and "in21k" not in facts.url  # the npz that never saw ImageNet-21k
        assert (entry.license, facts.license) == ("apache-2.0", "apache-2.0")
        assert facts.mean == facts.std == (0.5, 0.5, 0.5) and "mean = std = 0.5" in entry.notes
        assert entry.config_fields() == study.config_fields()  # only the weights differ
        assert "Not one of the study's twelve" in entry.notes

    def test_ids_and_short_names_are_nobody_elses(self):
        names = [name for row in zoo.rows() for name in (row.model_id, row.short_name)]
        assert len(set(names)) == len(names) == 2 * len(ZOO) + 2 * len(zoo.EXTRA)
        assert not [row for row in zoo.EXTRA if row in ZOO]
        assert zoo.get("VT-IN1K-SL").model_id == "vit_base_dpt.supervised_imagenet1k_only"

    def test_small_scales_run_them_too(self):
        grid = scale_grid("smoke", models=["VT-IN1K-SL"])
        (cell,) = grid_cells(grid)
        assert cell.recipe(grid, None).model.encoder == "vit_tiny_patch16_224"

    def test_models_command_lists_them_apart_with_the_reason(self, capsys, tmp_path):
        list_models(results=tmp_path / "none")
        shown = capsys.readouterr().out
        twelve, apart = shown.split("Extra models, not of the study")
        for entry in zoo.EXTRA:
            assert entry.model_id not in twelve and entry.model_id in apart and entry.notes in apart
        assert all(entry.model_id in twelve for entry in ZOO)

    def test_a_study_of_all_models_leaves_them_out_and_one_of_them_starts_from_its_weights(self):
        everything = scale_grid("full", start_from_available=True)
        assert [cell.entry for cell in grid_cells(everything)] == list(ZOO)
        (cell,) = grid_cells(scale_grid("full", models=["VT-IN1K-SL"]))
        assert cell.weights == "timm:vit_base_patch16_224.augreg_in1k" and not cell.lacks_weights


def test_notes_tell_that_the_supervised_vit_saw_imagenet_21k():
    assert "ImageNet-21k" in zoo.get("VT-IN-SL").notes


@pytest.mark.parametrize(("short_name", "model_id"), SHORT_NAMES.items())
def test_get_finds_a_row_by_both_names(short_name, model_id):
    assert zoo.get(short_name) is zoo.get(model_id)
    assert zoo.get(model_id).model_id == model_id


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("vit_base_dpt.mae_imagenet", "vit_base_dpt.mae_imagenet1k"),
        ("resnet50_deeplabv3plus.moco_imagenet1k", "resnet50_deeplabv3plus.moco_v3_imagenet1k"),
    ],
)
def test_get_suggests_the_closest_id(typo, meant):
    with pytest.raises(UsageError) as caught:
        zoo.get(typo)
    assert f"unknown model {typo!r}. Did you mean {meant!r}?" in str(caught.value)


def test_get_lists_every_id_for_a_name_that_is_like_none():
    with pytest.raises(UsageError) as caught:
        zoo.get("unet")
    assert all(entry.model_id in str(caught.value) for entry in ZOO)
    assert "Did you mean" not in str(caught.value)


def test_hub_configs_are_what_the_table_renders():
    committed = {file.name: file.read_text(encoding="utf-8") for file in COMMITTED.iterdir()}
    rendered = render_model_configs()
    assert sorted(committed) == sorted(rendered), "run training_scripts/render_hub_configs.py"
    changed = [name for name in rendered if rendered[name] != committed[name]]
    assert not changed, "run training_scripts/render_hub_configs.py"


@every_row
def test_hub_config_loads_as_the_rows_config(entry):
    content = json.loads((COMMITTED / f"{entry.model_id}.json").read_text(encoding="utf-8"))
    config = PolypSegConfig(**content)
    assert {name: getattr(config, name) for name in entry.config_fields()} == entry.config_fields()


def test_render_model_configs_covers_a_row_added_to_the_table(thirteenth):
    rendered = render_model_configs()
    assert len(rendered) == len(list(COMMITTED.iterdir())) + 1
    assert json.loads(rendered[f"{thirteenth.model_id}.json"])["encoder"] == "vit_base_patch16_224"


def test_write_model_configs_removes_the_file_of_a_row_that_is_gone(thirteenth, monkeypatch, tmp_path):
    write_model_configs(tmp_path)
    assert (tmp_path / f"{thirteenth.model_id}.json").is_file()
    monkeypatch.setattr(zoo, "ZOO", ZOO)
    write_model_configs(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {file.name for file in COMMITTED.iterdir()}
