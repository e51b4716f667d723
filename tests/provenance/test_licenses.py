"""The license of a model: by hand for every row, propagated from images, told step by step, and not to be edited."""

import dataclasses
import json

import pytest
from huggingface_hub import ModelCard
from typer import Typer
from typer.testing import CliRunner

from polypseg import zoo
from polypseg.cli.predict import license_
from polypseg.data.catalog import DATASETS
from polypseg.errors import UsageError
from polypseg.hub.card_facts import planned_facts
from polypseg.hub.model_card import render_card
from polypseg.hub.push import plan_push
from polypseg.provenance.checksums import write_manifest
from polypseg.provenance.license import license_contradictions, model_license, report_license
from polypseg.provenance.origin import read_origin
from tiny_models import SMOKE_ORIGIN, write_tiny_model

NC, OTHER = ("cc-by-nc-4.0", None), "other"
BY_HAND = {  # MoCo v3 and MAE: NC; SSL4GIE's own pretrained weights: NC; the rest: the weights' and Kvasir-SEG's terms
    "RN-HK-MC": NC,
    "RN-HK-BT": NC,
    "RN-IN-MC": NC,
    "RN-IN-BT": (OTHER, "mit-and-kvasir-seg-terms"),
    "RN-IN-SL": (OTHER, "bsd-3-clause-and-kvasir-seg-terms"),
    "RN-NA-NA": (OTHER, "apache-2.0-and-kvasir-seg-terms"),
    "VT-HK-MC": NC,
    "VT-HK-MA": NC,
    "VT-IN-MC": NC,
    "VT-IN-MA": NC,
    "VT-IN-SL": (OTHER, "apache-2.0-and-kvasir-seg-terms"),
    "VT-NA-NA": (OTHER, "apache-2.0-and-kvasir-seg-terms"),
    "VT-IN1K-SL": (OTHER, "apache-2.0-and-kvasir-seg-terms"),
}


def record(short_name: str, **changes: object) -> dict[str, object]:
    """What a full-size run of a row by the study's recipe records, with changes."""
    return {**planned_facts(zoo.get(short_name), organization="x").origin.content, **changes}


def own(source: str) -> dict[str, object]:
    return {"method": "moco_v3", "recipe": "pretrain_moco_v3_resnet50", "frames": 10, "source": source}


def test_every_row_is_judged_by_hand():
    assert set(BY_HAND) == {row.short_name for row in zoo.rows()}


@pytest.mark.parametrize(("short_name", "expected"), BY_HAND.items())
def test_report_of_a_row_is_the_license_by_hand_and_forbids_commerce(short_name, expected):
    report = report_license(short_name)
    assert report.planned and report.model == zoo.get(short_name).model_id
    assert (report.terms.identifier, report.terms.name) == expected and not report.terms.commercial_use
    assert report == report_license(zoo.get(short_name).model_id)
    told = "\n".join(report.lines())
    assert "commercial use needs the owners' written permission" in told and "Jha et al." in told
    assert ("You may not use them primarily for commercial advantage" in told) == (expected == NC)
    assert "https://datasets.simula.no/kvasir-seg/" in report.terms.links and "not legal advice" in told


@pytest.mark.parametrize("short_name", [row.short_name for row in zoo.ZOO])
def test_converted_weights_keep_the_authors_share_alike(short_name):
    converted = {"model_id": zoo.get(short_name).model_id, "scale": "full", "converted_from": {"file": "x.pth"}}
    terms = model_license(read_origin(converted | {"finetuned_on": "Kvasir-SEG reference split"}))
    assert (terms.identifier, terms.commercial_use) == ("cc-by-nc-sa-4.0", False)
    assert "share what you make of them under the same license" in terms.must


@pytest.mark.parametrize(
    ("source", "data", "expected", "commercial"),
    [
        ("CVC-ClinicDB.zip", "synthetic_a reference/train", "apache-2.0-and-cvc-clinicdb-terms", False),
        ("Kvasir-SEG", "kvasir_seg reference/train", "apache-2.0-and-kvasir-seg-terms", False),
        ("cvc_clinicdb", "kvasir_seg reference/train", "apache-2.0-and-kvasir-seg-and-cvc-clinicdb-terms", False),
        ("unlabeled-images", "synthetic_a reference/train", None, True),
        ("hyper-kvasir-segmented-images", "synthetic_a x/train", "apache-2.0-and-hyperkvasir-segmented-terms", False),
        ("my frames", "synthetic_a reference/train", None, True),
    ],
)
def test_own_pretraining_passes_on_the_terms_of_a_known_corpus(source, data, expected, commercial):
    terms = model_license(
        read_origin(
            record(
                "RN-HK-MC",
                pretraining=own(source),
                encoder_initialisation="file e.safetensors (sha256 0)",
                finetuned_on=data,
            )
        )
    )
    assert (terms.name, terms.commercial_use) == (expected, commercial)
    assert terms.identifier == ("other" if expected else "apache-2.0")
    assert any("Pretraining images:" in sentence for sentence in terms.chain) == (source != "my frames")
    cites_hyperkvasir = any("Borgli et al." in phrase for phrase in terms.must)
    assert cites_hyperkvasir == (source in ("unlabeled-images", "hyper-kvasir-segmented-images"))


@pytest.mark.parametrize(
    ("short_name", "start", "identifier"),
    [
        ("RN-IN-SL", "timm:resnet50.fb_swsl_ig1b_ft_in1k", "cc-by-nc-4.0"),  # a permissive row, other weights
        ("RN-IN-SL", "timm:resnet50.tv_in1k", "other"),
        ("VT-IN-SL", "timm:vit_base_patch16_224.mae", "cc-by-nc-4.0"),
        ("VT-IN-SL", "timm:vit_base_patch16_224.of_nobody", "unknown"),
    ],
)
def test_a_start_from_other_weights_than_the_rows_has_their_license(short_name, start, identifier):
    assert model_license(read_origin(record(short_name, encoder_initialisation=start))).identifier == identifier
    laundered = record(short_name, encoder_initialisation=start, pretraining=own("my frames"))
    assert model_license(read_origin(laundered)).identifier == identifier


def test_unknown_terms_allow_nothing():
    terms = model_license(read_origin({}))
    assert terms.identifier == "unknown" and terms.may == () and not terms.commercial_use
    assert terms.may_not == ("use, change or share the weights: nobody has said that you may",)


def test_open_images_leave_what_the_weights_allow():
    terms = model_license(read_origin(SMOKE_ORIGIN))
    assert terms.commercial_use and terms.may == ("use, change and share the weights for any purpose",)
    assert terms.images == (DATASETS["synthetic_a"],) and not any("cite" in phrase for phrase in terms.must)


@pytest.fixture(scope="module")
def command() -> Typer:
    app = Typer()
    app.command("license")(license_)
    return app


def test_license_command_reads_a_folder_and_prints_json(command, tmp_path):
    folder = write_tiny_model(tmp_path / "best", origin=SMOKE_ORIGIN | {"finetuned_on": "kvasir_seg reference/train"})
    shown = CliRunner().invoke(command, [str(folder)])
    assert shown.exit_code == 0 and "License: other (apache-2.0-and-kvasir-seg-terms)" in shown.output
    assert [line[:2] for line in shown.output.splitlines()[1:4]] == ["1.", "2.", "3."]
    told = json.loads(CliRunner().invoke(command, [str(folder), "--json"]).output)
    assert told["model"].startswith("resnet10t_deeplabv3plus.random") and not told["planned"]
    assert told["images"][0]["link"] == "https://datasets.simula.no/kvasir-seg/" and told["weights"] == "apache-2.0"
    assert told["may"] and told["must"] and told["may_not"] and told["chain"][0].startswith("Code:")


def test_report_refuses_a_folder_without_a_model_and_an_unknown_name(tmp_path):
    with pytest.raises(UsageError, match=r"has no config\.json"):
        report_license(str(tmp_path))
    with pytest.raises(UsageError, match="unknown model 'RN-IN-XX'"):
        report_license("RN-IN-XX")


def published_card(short_name: str) -> ModelCard:
    return render_card(dataclasses.replace(planned_facts(zoo.get(short_name), organization="x"), stage="published"))


@pytest.mark.parametrize("short_name", BY_HAND)
def test_a_rendered_card_contradicts_nothing(short_name):
    assert license_contradictions(read_origin(record(short_name)), published_card(short_name), {}) == []


@pytest.mark.parametrize(
    ("edit", "config", "finding"),
    [
        (lambda text: text.replace("license: cc-by-nc-4.0", "license: mit"), {}, "states the license ('mit'"),
        (lambda text: text.replace("license: cc-by-nc-4.0", "license: apache-2.0"), {}, "states the license"),
        (lambda text: text.replace("by-nc/4.0/", "by/4.0/", 1), {}, "states the license"),
        (lambda text: text.replace("Result: cc-by-nc-4.0, no commercial use.", "Result: MIT."), {}, "does not say"),
        (lambda text: text, {"license": "mit"}, "config.json states the license 'mit'"),
    ],
)
def test_an_edited_license_is_found(edit, config, finding):
    card = ModelCard(edit(str(published_card("RN-IN-MC"))))
    found = license_contradictions(read_origin(record("RN-IN-MC")), card, config)
    assert len(found) == 1 and finding in found[0]


def test_an_edited_record_is_found():
    card = published_card("RN-NA-NA")
    claims_random = read_origin(record("RN-IN-MC", encoder_initialisation="random"))
    assert (
        "claims pretrained weights and its record a random start" in license_contradictions(claims_random, card, {})[0]
    )
    unknown = read_origin(record("RN-IN-MC", scale="small", encoder_initialisation="file x.pth (sha256 0)"))
    assert "its license is not known" in license_contradictions(unknown, card, {})[0]


@pytest.mark.parametrize(
    ("license", "finding"),
    [
        ("other", "needs license_name and license_link|demands"),
        ("mit", "but the weights' origin demands ('cc-by-nc-4.0'"),
        ("unknown", "but the weights' origin demands ('cc-by-nc-4.0'"),
        ("gpl-3.0", "license 'gpl-3.0' is not one of"),
    ],
)
def test_push_refuses_a_folder_whose_license_was_edited(tmp_path, license, finding):
    """Even with checksums made anew: the files agree with each other and not with the weights' origin."""
    (tmp_path / "config.json").write_text(json.dumps({"weights_origin": record("RN-IN-MC")}))
    text = str(published_card("RN-IN-MC")).replace("license: cc-by-nc-4.0", f"license: {license}")
    (tmp_path / "README.md").write_text(text)
    write_manifest(tmp_path)
    with pytest.raises(UsageError) as refused:
        plan_push(tmp_path)
    assert any(words in str(refused.value) for words in finding.split("|"))
