"""What name and license weights have earned: the guard against weights that pass for one of the twelve."""

import json

import pytest

from polypseg.errors import UsageError
from polypseg.provenance.license import model_license
from polypseg.provenance.origin import WeightsOrigin, read_origin
from polypseg.zoo import EXTRA, ZOO

ROW = {entry.short_name: entry for entry in ZOO}


def trained(short_name: str, **changes: object) -> dict[str, object]:
    """The record of a run that earns the row's id, with changes."""
    entry = ROW[short_name]
    start = "random" if entry.method == "none" else "file encoder.safetensors (sha256 0123456789ab)"
    return {
        "model_id": entry.model_id,
        "row": entry.model_id,
        "encoder_initialisation": start,
        "scale": "full",
        "recipe": "finetune",
        "recipe_changes": [],
        "finetuned_on": "kvasir_seg reference/train",
        "n": 800,
        "finished": True,
    } | changes


def converted(short_name: str, finetuned_on: str = "Kvasir-SEG reference split") -> dict[str, object]:
    source = {"format": "SSL4GIE", "file": "x.pth", "sha256": "ab" * 32, "upstream": "SSL4GIE"}
    return {
        "model_id": ROW[short_name].model_id,
        "scale": "full",
        "finetuned_on": finetuned_on,
        "converted_from": source,
    }


@pytest.mark.parametrize("short_name", ROW)
def test_complete_training_and_conversion_earn_the_rows_id(short_name):
    for record in (trained(short_name), converted(short_name)):
        origin = read_origin(record)
        assert origin.official and origin.shortcomings == ()
        assert origin.repo_name == ROW[short_name].model_id and origin.entry is ROW[short_name]


@pytest.mark.parametrize(
    ("changes", "suffix", "words"),
    [
        ({"recipe": "smoke"}, "smoke", "recipe smoke"),
        ({"recipe_changes": ["training.epochs=2"]}, "variant", "training.epochs=2"),
        ({"finished": False}, "unfinished", "did not end"),
        ({"finetuned_on": "synthetic_a reference/train"}, "synthetic_a", "synthetic_a"),
        ({"finetuned_on": "kvasir_seg official/train", "n": 880}, "variant", "official"),
        ({"n": 40}, "part", "40 training images"),
        ({"encoder_initialisation": "random"}, "random", "started at random"),
        ({"encoder_initialisation": "timm:resnet50.a1_in1k"}, "variant", "not the row's"),
        ({"scale": "small"}, "small", "size"),
        ({"changed": True}, "changed", "changed after"),
        (
            {"pretraining": {"recipe": "pretrain_moco_v3_resnet50", "recipe_changes": [], "frames": 2_000_000}},
            "variant",
            "2000000 frames",
        ),
        (
            {"pretraining": {"recipe": "pretrain_moco_v3_small", "recipe_changes": [], "frames": 1_281_167}},
            "variant",
            "unchanged recipe",
        ),
        (
            {"pretraining": {"recipe": "pretrain_moco_v3_resnet50", "recipe_changes": [], "frames": 1000}},
            "variant",
            "1000 frames",
        ),
    ],
)
def test_anything_less_says_so_in_its_name(changes, suffix, words):
    origin = read_origin(trained("RN-IN-MC", **changes))
    assert not origin.official
    assert origin.repo_name == f"{ROW['RN-IN-MC'].model_id}-{suffix}"
    assert words in " ".join(origin.shortcomings)


def test_another_seed_or_precision_is_the_same_study():
    assert read_origin(trained("RN-IN-SL", recipe_changes=["seed=1", 'training.precision="no"'])).official


def test_untrained_weights_never_pass():
    for record in (None, {}, {"model_id": ROW["RN-NA-NA"].model_id, "scale": "full"}):
        origin = read_origin(record)
        assert origin.kind == "untrained" and not origin.official and "untrained" in origin.repo_name


def test_a_vit_that_started_at_random_with_another_rows_position_table_is_not_the_random_row():
    record = trained("VT-NA-NA", row=ROW["VT-IN-MC"].model_id)
    assert not read_origin(record).official
    assert read_origin(trained("RN-NA-NA", row=ROW["RN-IN-MC"].model_id)).official  # the same network


def test_a_small_model_is_named_by_its_own_encoder():
    record = trained("RN-IN-SL", recipe="finetune_small", scale="small")
    record["model_id"] = "tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k"
    origin = read_origin(record)
    assert origin.repo_name == record["model_id"] and not origin.official
    assert origin.entry is ROW["RN-IN-SL"]


def test_a_model_of_the_other_dataset_is_named_by_it():
    origin = read_origin(converted("VT-IN-MA", finetuned_on="CVC-ClinicDB"))
    assert origin.repo_name == f"{ROW['VT-IN-MA'].model_id}-cvc_clinicdb" and not origin.official
    unknown = read_origin(converted("VT-IN-MA", finetuned_on="unknown data (a renamed file)"))
    assert unknown.repo_name == f"{ROW['VT-IN-MA'].model_id}-unknown-data" and not unknown.official


def test_a_trained_record_without_an_id_is_refused():
    with pytest.raises(UsageError, match="model_id"):
        read_origin({"recipe": "finetune"})


@pytest.mark.parametrize("short_name", ROW)
def test_noncommercial_weights_make_noncommercial_models(short_name):
    license = model_license(read_origin(trained(short_name)))
    if "-nc" in ROW[short_name].license:
        assert license.identifier == "cc-by-nc-4.0" and license.name is None
    else:
        assert license.identifier == "other" and license.name == f"{ROW[short_name].license}-and-kvasir-seg-terms"
    assert not license.commercial_use and license.link.startswith("https://")
    assert model_license(read_origin(converted(short_name))).identifier == "cc-by-nc-sa-4.0"


def test_own_pretraining_does_not_inherit_the_published_files_license():
    own = {"recipe": "pretrain_moco_v3_resnet50", "recipe_changes": [], "frames": 99_417, "source": "hyperkvasir"}
    license = model_license(read_origin(trained("RN-HK-MC", pretraining=own)))
    assert license.identifier == "other" and license.name == "apache-2.0-and-kvasir-seg-terms"


def test_a_random_model_of_synthetic_frames_is_free():
    license = model_license(read_origin(trained("RN-NA-NA", finetuned_on="synthetic_a reference/train")))
    assert (license.identifier, license.commercial_use) == ("apache-2.0", True)


def test_a_converted_model_that_was_trained_further_is_neither(tmp_path):
    origin = read_origin(converted("RN-IN-SL") | {"recipe": "smoke"})
    assert not origin.official and origin.repo_name.endswith("-finetuned")
    assert model_license(origin).identifier == "cc-by-nc-sa-4.0"


@pytest.mark.parametrize(
    ("record", "identifier"),
    [
        ({}, "unknown"),
        (trained("RN-IN-MC", scale="small", encoder_initialisation="file vit_small.pth (sha256 0)"), "unknown"),
        (trained("RN-IN-SL", scale="small", encoder_initialisation="timm:resnet18.tv_in1k"), "other"),
        (
            trained("RN-IN-SL", scale="small", encoder_initialisation="timm:convnextv2_tiny.fcmae_ft_in1k"),
            "cc-by-nc-4.0",
        ),
    ],
)
def test_weights_of_unknown_terms_are_not_called_free(record, identifier):
    assert model_license(read_origin(record)).identifier == identifier


@pytest.mark.parametrize(
    ("record", "label"),
    [
        (trained("RN-IN-MC"), "RN-IN-MC"),
        (
            trained("RN-IN-MC", scale="small", model_id="resnet10t_deeplabv3plus.moco_v3_natural_images")
            | {"row": ROW["RN-IN-MC"].model_id, "pretraining": {"corpus": "natural_images"}},
            "resnet10t-NI-MC",
        ),
        (
            trained("VT-HK-MA", scale="small", model_id="vit_tiny_patch16_224_dpt.mae_hyperkvasir")
            | {"row": ROW["VT-HK-MA"].model_id, "pretraining": {"corpus": "hyperkvasir"}},
            "vit_tiny-HK-MA",
        ),
        (
            trained(
                "RN-NA-NA", scale="small", model_id="resnet10t_deeplabv3plus.random", encoder_initialisation="random"
            ),
            "resnet10t-NA-NA",
        ),
        ({"model_id": "somebodys"}, "somebodys"),
    ],
)
def test_label_names_a_small_model_by_what_it_is(record, label):
    assert read_origin(record).label == label


def test_extra_row_keeps_its_id_and_is_none_of_the_twelve():
    (row,) = EXTRA
    origin = read_origin(
        trained("VT-IN-SL", model_id=row.model_id, row=row.model_id, encoder_initialisation=f"timm:{row.upstream.timm}")
    )
    assert origin.entry is row and origin.repo_name == row.model_id
    assert not origin.official and origin.shortcomings == ("it is an extra model beside the study's",)


@pytest.mark.parametrize(
    ("model_id", "row", "scale", "label"),
    [
        # Not VT-IN-MC's, whose decoder and pretraining they have; and no label is that of the study's pair.
        ("resnet50_dpt.moco_v3_imagenet1k", "RN-IN-MC", "full", "resnet50_dpt-IN-MC"),
        ("resnet10t_dpt.moco_v3_imagenet1k", "RN-IN-MC", "small", "resnet10t_dpt-IN-MC"),
        ("vit_tiny_deeplabv3plus.random", "VT-NA-NA", "small", "vit_tiny_deeplabv3plus-NA-NA"),
    ],
)
def test_pair_that_the_study_does_not_have_descends_from_the_row_of_its_encoder(model_id, row, scale, label):
    origin = read_origin(trained(row, model_id=model_id, scale=scale, recipe_changes=["model.decoder=x"]))
    assert origin.entry is ROW[row] and origin.label == label and not origin.official


def test_a_record_is_written_as_it_was_read():
    record = {"scale": "full", "of_a_later_version": {"a": [1, None]}, "recipe_changes": None, "pretraining": {}}
    record |= {"content": 1, "kind": "converted", "model_id": "somebodys", "sha256": "ab" * 32}
    origin = WeightsOrigin.of(record)
    assert json.dumps(origin.content) == json.dumps(record)
    assert origin.kind == "untrained" and origin.recipe_changes == () and origin.pretraining is None
    changed = origin.updated(sha256="cd" * 32, changed=True).without("scale")
    assert changed.changed and changed.sha256 == "cd" * 32 and changed.scale is None
    assert json.dumps(changed.content) == json.dumps(
        {key: value for key, value in record.items() if key != "scale"} | {"sha256": "cd" * 32, "changed": True}
    )
    assert json.dumps(origin.content) == json.dumps(record), "the first stays as it was"


@pytest.mark.parametrize(
    ("record", "field"),
    [
        ({"model_id": 5}, "model_id"),
        ({"row": ["a"]}, "row"),
        ({"n": "8" * 5000}, "n"),
        ({"n": True}, "n"),
        ({"finished": "yes"}, "finished"),
        ({"recipe_changes": "seed=1"}, "recipe_changes"),
        ({"recipe_changes": ["seed=1", 2]}, "recipe_changes.1"),
        ({"pretraining": "hyperkvasir\n" * 1000}, "pretraining"),
        ({"pretraining": {"frames": "many"}}, "pretraining.frames"),
        ({"converted_from": {"file": 3}}, "converted_from.file"),
        ({"adapted": {"frames": 3}}, "adapted.method"),
        ("the internet" * 1000, ""),
        (["a"], ""),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_damaged_record_is_refused_in_one_line(record, field, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"weights_origin": record}))
    with pytest.raises(UsageError) as refused:
        WeightsOrigin.of_folder(tmp_path)
    message = str(refused.value)
    assert message.startswith(f"{tmp_path / 'config.json'} has a damaged weights_origin ({field}")
    assert "\n" not in message and len(message) < 300 + len(str(tmp_path))


def test_adaptation_drops_the_digests_of_the_weights_before():
    before = read_origin(trained("RN-NA-NA", sha256="ab" * 32, passport="cd" * 32))
    after = before.adapted_to(
        method="threshold", labeled=False, frames=20, groups=5, gain=0.01, bound=0.002, source="ab" * 32
    )
    assert after.sha256 is None and after.passport is None and after.suffix == "adapted"
    assert after.content["adapted"]["from"] == "ab" * 32 and "20 frames of 5 clips, without masks" in after.adaptation


@pytest.mark.parametrize(
    ("recipe", "suffix"),
    [("starter_finish", "starter-finish"), ("starter", "starter-continued"), ("own", "own-continued")],
)
def test_a_model_that_went_on_from_another_says_so_unless_its_recipe_is_made_for_that(recipe, suffix):
    """Recipes say so themselves, by ``further_stage``."""
    before = {"sha256": "ab" * 32, "recipe": "starter", "finetuned_on": "kvasir_seg reference/train"}
    origin = read_origin(trained("RN-IN-SL", recipe=recipe, continued_from=before))
    assert origin.suffix == suffix and "went on from another fine-tuned model" in " ".join(origin.shortcomings)
