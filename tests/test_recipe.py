"""Recipes: the reference's numbers, and errors that name file and key before any work starts."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from polypseg.errors import UsageError
from polypseg.pretraining.recipe import load_pretraining_recipe
from polypseg.recipe import find_recipe, load_recipe, parse_recipe, recipe_folder

BUNDLED = sorted(p.stem for p in recipe_folder().glob("*.yaml") if not p.stem.startswith("pretrain_"))


def content(name: str = "finetune") -> dict[str, Any]:
    return yaml.safe_load(find_recipe(name).read_text(encoding="utf-8"))


def write(folder: Path, values: dict[str, Any] | str | bytes) -> Path:
    path = folder / "mine.yaml"
    text = values if isinstance(values, str | bytes) else yaml.safe_dump(values)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_recipe(path, overrides=overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


# -- the reference's values --------------------------------------------------------------------------------------------


def test_recipe_finetune_holds_exactly_the_references_values():
    recipe = load_recipe("finetune")
    assert recipe.seed == 42
    assert recipe.model.model_dump() == {
        "encoder": None,
        "decoder": None,
        "decoder_channels": None,
        "decoder_dropout": None,
    }
    assert recipe.data.image_size == 224
    assert recipe.augmentation.model_dump() == {
        "brightness": 0.4,
        "contrast": 0.5,
        "saturation": 0.25,
        "hue": 0.01,
        "blur_kernel": 25,
        "blur_sigma": (0.001, 2.0),
        "horizontal_flip": 0.5,
        "vertical_flip": 0.5,
        "rotation": 180,
        "translation": 28 / 224,
        "scale": (0.5, 1.5),
        "shear": 22.5,
        "interpolation": "nearest",
        "fill": -1.0,
    }
    assert recipe.training.model_dump() == {
        "epochs": 200,
        "total_batch_size": 48,
        "learning_rate": 1e-4,
        "weight_decay": 0.01,
        "precision": "fp16",
        "dice_weight": 1.0,
        "bce_weight": 0.0,
        "ema_decay": 0.0,
        "max_steps": None,
        "checkpoint_steps": None,
    }
    assert recipe.schedule.kind == "plateau"
    assert recipe.schedule.factor == 0.5
    assert recipe.schedule.patience == 10
    assert recipe.schedule.min_learning_rate == 1e-6


# -- loading -----------------------------------------------------------------------------------------------------------


def test_recipe_folder_has_the_recipes_of_the_documentation():
    assert {"finetune", "finetune_small", "smoke"} <= set(BUNDLED)


@pytest.mark.parametrize("name", BUNDLED)
def test_load_recipe_loads_each_bundled_recipe_under_its_own_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert load_recipe(find_recipe(name)) == recipe == load_recipe(str(find_recipe(name)))


@pytest.mark.parametrize("name", BUNDLED)
def test_parse_recipe_restores_a_run_s_record(name):
    recipe = load_recipe(name)
    record = json.loads(json.dumps(recipe.model_dump(mode="json")))
    assert parse_recipe(record, source="the run's record") == recipe


def test_load_recipe_reads_a_file_of_the_users(tmp_path):
    values = content()
    values["training"]["epochs"] = 7
    assert load_recipe(write(tmp_path, values)).training.epochs == 7


def test_load_recipe_gives_an_immutable_recipe():
    recipe = load_recipe("finetune")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.training.epochs = 1


def test_load_recipe_prefers_a_file_to_a_bundled_recipe(tmp_path, monkeypatch):
    (tmp_path / "finetune").write_text(yaml.safe_dump(content() | {"seed": 5}))
    monkeypatch.chdir(tmp_path)
    assert load_recipe("finetune").seed == 5


# -- broken recipes ----------------------------------------------------------------------------------------------------


def sections() -> list[str]:
    return [name for name, value in content().items() if isinstance(value, dict)]


@pytest.mark.parametrize("section", [None, *sections()])
def test_load_recipe_names_file_and_unknown_key_in_every_section(section, tmp_path):
    values = content()
    (values if section is None else values[section])["speed"] = 1
    message = refusal(write(tmp_path, values))
    assert "mine.yaml" in message
    assert ("'speed'" if section is None else f"'{section}.speed'") in message


@pytest.mark.parametrize(
    ("section", "key"),
    [(None, "name"), (None, "seed")]
    + [(s, k) for s in (None, *sections()) for k in (content()[s] if s else sections())],
)
def test_load_recipe_names_file_and_missing_key(section, key, tmp_path):
    values = content()
    del (values if section is None else values[section])[key]
    message = refusal(write(tmp_path, values))
    assert "mine.yaml" in message
    assert f"key '{f'{section}.' if section else ''}{key}' is missing" in message


def test_load_recipe_suggests_the_key_that_was_meant(tmp_path):
    values = content()
    values["training"]["learning_rat"] = values["training"].pop("learning_rate")
    message = refusal(write(tmp_path, values))
    assert "training.learning_rat" in message and "Did you mean 'training.learning_rate'?" in message


def test_load_recipe_names_every_problem_at_once(tmp_path):
    values = content()
    del values["seed"]
    values["training"]["epochs"] = "many"
    values["schedule"]["speed"] = 1
    message = refusal(write(tmp_path, values))
    assert all(key in message for key in ("'seed'", "'training.epochs'", "'schedule.speed'"))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed", -1),
        ("seed", "lucky"),
        ("name", 5),
        ("data.image_size", 16),
        ("data.image_size", 224.5),
        ("augmentation.brightness", 1.0),
        ("augmentation.hue", 0.6),
        ("augmentation.blur_sigma", 2.0),
        ("augmentation.blur_sigma", [1, 2, 3]),
        ("augmentation.horizontal_flip", 1.5),
        ("augmentation.shear", 90),
        ("augmentation.interpolation", "bicubic"),
        ("training.epochs", 0),
        ("training.epochs", "many"),
        ("training.epochs", 2.5),
        ("training.epochs", None),
        ("training.total_batch_size", 1),
        ("training.learning_rate", 0),
        ("training.precision", "fp8"),
        ("training.max_steps", 0),
        ("schedule.kind", "cosine"),
        ("schedule.factor", 1.0),
        ("training", 5),
        ("data", [224]),
        ("schedule", None),
    ],
)
def test_load_recipe_names_file_key_and_value_of_a_wrong_type_or_range(key, value, tmp_path):
    values = content()
    *section, name = key.split(".")
    (values[section[0]] if section else values)[name] = value
    message = refusal(write(tmp_path, values))
    assert "mine.yaml" in message and f"'{key}'" in message and f"got {value!r}" in message


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("blur_kernel", 24, "blur_kernel must be odd"),
        ("blur_sigma", [0.0, 2.0], "0 < low <= high"),
        ("blur_sigma", [2.0, 1.0], "0 < low <= high"),
        ("scale", [1.5, 0.5], "0 < low <= high"),
        ("scale", [-1.0, 0.5], "0 < low <= high"),
    ],
)
def test_load_recipe_refuses_an_impossible_augmentation(key, value, reason, tmp_path):
    values = content()
    values["augmentation"][key] = value
    message = refusal(write(tmp_path, values))
    assert "mine.yaml" in message and "'augmentation'" in message and reason in message


@pytest.mark.parametrize(
    ("written", "reason"),
    [
        ("training: [1\nseed: 2", "not valid YAML"),
        (b"\xff\xfe\x00\x01", "not valid YAML"),
        (b"\x89PNG\r\n\x1a\n", "not valid YAML"),
        ("seed: 1\x00", "not valid YAML"),
        ("", "empty or not a mapping"),
        ("# only a comment\n", "empty or not a mapping"),
        ("- training", "empty or not a mapping"),
        ("finetune", "empty or not a mapping"),
    ],
)
def test_load_recipe_refuses_a_file_that_is_no_recipe(written, reason, tmp_path):
    message = refusal(write(tmp_path, written))
    assert "mine.yaml" in message and reason in message


def test_load_recipe_names_the_bundled_recipes_for_an_unknown_name():
    message = refusal("finetun")
    assert "Did you mean 'finetune'?" in message and all(name in message for name in BUNDLED)


def test_load_recipe_names_a_file_that_does_not_exist(tmp_path):
    assert "absent.yaml does not exist" in refusal(tmp_path / "absent.yaml")


def test_parse_recipe_names_its_source():
    values = content()
    del values["seed"]
    with pytest.raises(UsageError, match=r"runs/1/run\.json.*'seed' is missing"):
        parse_recipe(values, source="runs/1/run.json")


# -- overrides ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("training.epochs=2", "training", "epochs", 2),
        ("training.learning_rate=1.0e-3", "training", "learning_rate", 1e-3),
        ("training.learning_rate=1e-3", "training", "learning_rate", 1e-3),
        ("training.max_steps=10", "training", "max_steps", 10),
        ("training.max_steps=null", "training", "max_steps", None),
        ("training.precision=bf16", "training", "precision", "bf16"),
        ("training.precision='no'", "training", "precision", "no"),
        ("model.encoder=resnet18", "model", "encoder", "resnet18"),
        ("augmentation.scale=[0.8, 1.2]", "augmentation", "scale", (0.8, 1.2)),
        ("augmentation.fill=-2.0", "augmentation", "fill", -2.0),
    ],
)
def test_load_recipe_applies_an_override_and_nothing_else(override, section, key, value):
    plain, changed = load_recipe("finetune"), load_recipe("finetune", overrides=[override])
    assert getattr(getattr(changed, section), key) == value
    expected = copy.deepcopy(plain.model_dump())
    expected[section][key] = value
    assert changed.model_dump() == expected


def test_load_recipe_applies_overrides_of_the_top_level_in_order():
    assert load_recipe("finetune", overrides=["seed=1", "name=mine", "seed=2"]).model_dump() == (
        load_recipe("finetune").model_dump() | {"seed": 2, "name": "mine"}
    )


@pytest.mark.parametrize("override", ["training.epochs", "=3", "training.epochs:3", ""])
def test_load_recipe_shows_how_an_override_must_look(override):
    message = refusal("finetune", override)
    assert repr(override) in message and "must look like training.epochs=2" in message


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("training.epoch=3", "Did you mean 'training.epochs'?"),
        ("sede=3", "Did you mean 'seed'?"),
        ("trainin.epochs=3", "no section 'trainin'"),
        ("seed.value=3", "no section 'seed'"),
        ("model.encoder.name=3", "no section 'encoder'"),
        (".epochs=3", "no section ''"),
    ],
)
def test_load_recipe_names_an_override_of_no_key(override, reason):
    message = refusal("finetune", override)
    assert override.partition("=")[0] in message and reason in message


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("training.epochs=many", "training.epochs"),
        ("training.epochs=", "training.epochs"),
        ("training.epochs=0", "training.epochs"),
        ("training.precision=fp8", "training.precision"),
        ("augmentation.scale=1", "augmentation.scale"),
        ("training=5", "training"),
    ],
)
def test_load_recipe_checks_the_type_of_an_override(override, key):
    message = refusal("finetune", override)
    assert f"'{key}'" in message and "finetune.yaml" in message


@pytest.mark.parametrize("override", ["training.epochs=[1", "model.encoder=*x", "name=a: b: c"])
def test_load_recipe_names_an_override_that_is_no_yaml(override):
    assert override in refusal("finetune", override)


# -- faults that were found once ----------------------------------------------------------------------


def test_load_recipe_takes_precision_no_as_training_advises_it():
    assert load_recipe("finetune", overrides=["training.precision=no"]).training.precision == "no"


@pytest.mark.parametrize(
    "override",
    [
        "training.epochs=true",
        "training.learning_rate=yes",
        "training.max_steps=yes",
        "training.precision=yes",
        "training.bce_weight=no",
        "augmentation.scale=[true, 1.5]",
    ],
)
def test_load_recipe_refuses_booleans_for_numbers(override):
    message = refusal("finetune", override)
    assert f"'{override.partition('=')[0]}'" in message and "must not be true or false" in message


def test_pretraining_recipe_keeps_its_real_booleans():
    overrides = ["optimiser.decay_everything=true", "mae.normalise_targets=no", "training.precision=no"]
    recipe = load_pretraining_recipe("pretrain_mae_small", overrides=overrides)
    assert recipe.optimiser.decay_everything is True and recipe.method_options()["normalise_targets"] is False
    assert recipe.training.precision == "no"


@pytest.mark.parametrize(("section", "key"), [(None, "seed"), ("training", "epochs")])
def test_load_recipe_names_a_repeated_key(section, key, tmp_path):
    """YAML's last one wins: an edited copy would silently train with the other value."""
    repeated = f"{key}: 3\n" if section is None else f"{section}:\n  {key}: 3\n  {key}: 4\n"
    message = refusal(write(tmp_path, yaml.safe_dump({k: v for k, v in content().items() if k != section}) + repeated))
    assert "mine.yaml" in message and f"key '{key}' is repeated" in message


def test_load_recipe_names_a_repeated_section(tmp_path):
    assert "key 'training' is repeated" in refusal(write(tmp_path, yaml.safe_dump(content()) + "training: {}\n"))


@pytest.mark.parametrize(
    "override",
    [
        "training.learning_rate=.inf",
        "training.weight_decay=.inf",
        "augmentation.fill=.nan",
        "augmentation.rotation=.inf",
        "augmentation.scale=[0.5, .inf]",
    ],
)
def test_load_recipe_refuses_numbers_that_are_not_finite(override):
    assert override.partition("=")[0] in refusal("finetune", override)
