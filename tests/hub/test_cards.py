"""What a model's card promises: facts with a source, numbers from receipts, examples that run, nothing to hide."""

import ast
import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from transformers import DPTConfig, DPTForSemanticSegmentation

from local_hub.cards import check_card
from polypseg import zoo
from polypseg.data.catalog import DATASETS, POPULATIONS, clinicdb_sequence
from polypseg.data.splits import pinned_split
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.image_metrics import TOLERANCE
from polypseg.evaluation.receipt import Receipt, digest_of
from polypseg.evaluation.receipt_reading import read_results
from polypseg.files import environment_record, write_json
from polypseg.hub.card_checks import lint_card, load_card
from polypseg.hub.card_facts import PICTURES, collect_facts, measured_facts, planned_facts, training_hours
from polypseg.hub.card_pictures import SEED, SIZE, write_card_pictures
from polypseg.hub.dataset_card import load_references
from polypseg.hub.markdown import all_plain, plain
from polypseg.hub.model_card import render_card, render_pages, write_pages
from polypseg.inference.model import build_image_processor, load_model, predict_masks
from polypseg.modeling import PolypSegConfig, PolypSegForSemanticSegmentation
from polypseg.provenance.fetch import ORGANIZATION
from polypseg.provenance.license import DISCLAIMER, model_license
from polypseg.provenance.origin import read_origin
from polypseg.statistics.scores import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = REPOSITORY / "model_cards"
RESULTS = PAGES / "results"


def results_of(page: Path) -> Path:
    """Results are filed under a model's id; a page's name also says what the weights are not."""
    return RESULTS / page.stem.removesuffix("-starter-alarms-averaged")


def results_with_polyps(path):
    """The receipts of a card that state overlaps; of the others see test_full_size."""
    return [result for result in read_results(results_of(path)) if not result.without_polyps]


STARTER = "tf_efficientnet_lite0_deeplabv3plus.supervised_imagenet1k"
CELL = re.compile(r"(\d\.\d{3}) \[(\d\.\d{3}), (\d\.\d{3})\]")

every_row = pytest.mark.parametrize("entry", zoo.rows(), ids=lambda entry: entry.short_name)
every_card = pytest.mark.parametrize(
    "path", sorted(set(PAGES.glob("*.md")) - {PAGES / "README.md"}), ids=lambda p: p.stem
)


def section(card: ModelCard, heading: str) -> str:
    return card.text.split(f"## {heading}\n")[1].split("\n## ")[0]


def metadata(card: ModelCard) -> dict:
    return yaml.safe_load(str(card).split("---", maxsplit=2)[1])


def planned(short_name: str) -> ModelCard:
    return render_card(planned_facts(zoo.get(short_name), organization="someone"))


def measured(name: str = STARTER) -> ModelCard:
    return render_card(measured_facts(RESULTS / name, organization="someone"))


def code_of(card: ModelCard) -> str:
    return "\n".join(re.findall(r"```python\n(.*?)```", card.text, re.DOTALL))


# -- the committed pages ----------------------------------------------------------------------------------------------


def test_committed_pages_are_what_the_table_and_the_results_render():
    rendered = render_pages(RESULTS, organization=ORGANIZATION)
    committed = {path.name: path.read_text(encoding="utf-8") for path in PAGES.glob("*.md")}
    assert sorted(committed) == sorted(rendered), "run training_scripts/render_cards.py"
    changed = [name for name in rendered if rendered[name] != committed[name]]
    assert not changed, "run training_scripts/render_cards.py"
    assert {f"{entry.model_id}.md" for entry in zoo.ZOO} | {f"{STARTER}.md"} <= set(committed)


@every_card
def test_committed_card_passes_the_lint(path):
    card = ModelCard.load(path)
    assert lint_card(card) == [] and check_card(str(card), "model") == ([], [])
    for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card.text):
        assert (path.parent / name).is_file(), name


@every_card
def test_table_of_a_card_holds_the_receipts_numbers_and_no_others(path):
    card = ModelCard.load(path)
    results = results_with_polyps(path)
    rows = [line for line in section(card, "Evaluation").splitlines() if CELL.search(line)]
    assert len(rows) == len(results)
    for result in results:
        scores = result.scores_by_cluster["paper"]
        cells = [tuple(f"{number:.3f}" for number in (s.mean, s.low, s.high)) for s in scores.values()]
        matching = [row for row in rows if CELL.findall(row) == cells]
        assert len(matching) == 1 and result.dataset.title in matching[0]
        size = re.search(r"\| (\d+)(?: in (\d+) clips \(effective n (\d+)\))? \|", matching[0])
        assert int(size[1]) == result.n
        if result.dataset.name == "cvc_clinicdb":
            assert size[2] == "29" and int(size[3]) == round(scores["dice"].effective_size) < result.n
    home = [row for row in rows if "Kvasir-SEG" in row]
    assert all(row.startswith("| in distribution |") for row in home)
    assert all(row.startswith("| out of distribution |") for row in rows if row not in home)


@every_card
def test_model_index_holds_the_receipts_numbers_and_no_others(path):
    index = metadata(ModelCard.load(path)).get("model-index", [])
    said = {
        (
            entry["dataset"]["type"],
            entry["dataset"]["split"],
            metric["type"],
            metric["value"],
            entry["dataset"]["args"]["n"],
        )
        for model in index
        for entry in model["results"]
        for metric in entry["metrics"]
    }
    assert said == {
        (c.dataset.name, c.dataset.part, name, round(value.mean, 4), c.n)
        for c in results_with_polyps(path)
        for name, value in c.scores_by_cluster["paper"].items()
    }


@every_card
def test_worst_images_of_a_card_are_those_of_the_receipts(path):
    text = section(ModelCard.load(path), "Limits and failures")
    for receipt in results_with_polyps(path):
        dice = {image.id: image.scores["paper.dice"] for image in receipt.images}
        line = next(line for line in text.splitlines() if receipt.dataset.title in line)
        named = re.findall(r"`(\w+)` \((\d\.\d{3})\)", line)
        assert len(named) == 5 and all(f"{dice[name]:.3f}" == value for name, value in named)
        assert max(dice[name] for name, _ in named) <= sorted(dice.values())[5]
        assert f"{sum(value < 0.5 for value in dice.values())} have a Dice below 0.5" in line


@every_row
def test_planned_card_says_that_nothing_is_there(entry):
    card = render_card(planned_facts(entry, organization="someone"))
    assert "no weights have been published, and nothing has been evaluated" in card.text
    assert not re.search(r"\d\.\d{3}", section(card, "Evaluation")) and "model-index" not in metadata(card)
    rows = [line for line in section(card, "Evaluation").splitlines() if "distribution |" in line]
    assert len(rows) == 3 and all(row.count("not evaluated") == 5 for row in rows)
    assert "not recorded" in section(card, "Compute") and "Fine-tuned on kvasir_seg" not in card.text


def test_write_pages_removes_the_card_of_a_model_that_is_gone(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "gone.md").write_text("x")
    write_pages(tmp_path, organization="someone")
    assert not (tmp_path / "gone.md").exists() and len(list(tmp_path.glob("*.md"))) == 12 + len(zoo.EXTRA) + 1


# -- facts ------------------------------------------------------------------------------------------------------------


def test_template_knows_no_model_and_no_dataset_by_name():
    text = (REPOSITORY / "src/polypseg/hub/templates/model_card.md.jinja").read_text().lower()
    names = [*zoo.METHODS, *zoo.CORPORA, *zoo.ENCODERS, *DATASETS, "deeplab", "clinicdb", "kvasir", "imagenet", "moco"]
    assert not [name for name in names if name not in ("none", "folder") and re.search(rf"\b{name}", text)]


@every_row
def test_license_of_a_card_is_the_weights_license(entry):
    facts = planned_facts(entry, organization="someone")
    card, license = render_card(facts), model_license(facts.origin)
    assert metadata(card)["license"] == license.identifier
    assert metadata(card).get("license_name") == license.name
    assert all(sentence in section(card, "License") for sentence in license.chain)
    assert ("no commercial use" in section(card, "License")) == (entry.license == "cc-by-nc-4.0")


@every_row
def test_metadata_names_hub_ids_only_where_the_hub_has_them(entry):
    content = metadata(render_card(planned_facts(entry, organization="someone")))
    assert content.get("base_model") == (f"timm/{entry.upstream.timm}" if entry.upstream.timm else None)
    corpora = {key: ["ILSVRC/imagenet-1k"] for key in ("imagenet1k", "imagenet1k_only")}
    corpora |= {"hyperkvasir": ["SimulaMet-HOST/HyperKvasir"], "none": None}
    assert content.get("datasets") == corpora[entry.corpus]
    assert (content["library_name"], content["pipeline_tag"]) == ("transformers", "image-segmentation")
    assert "kvasir-seg" in content["tags"] and "cvc-clinicdb" not in content["tags"]  # tested on nothing yet


@every_row
def test_notes_of_a_row_reach_its_card(entry):
    text = section(render_card(planned_facts(entry, organization="someone")), "Where the weights come from")
    assert entry.notes in text and entry.upstream.location in text
    assert ("started from random weights" in text) == (entry.method == "none")


def test_card_of_the_supervised_vit_says_imagenet_21k():
    assert "ImageNet-21k" in planned("VT-IN-SL").text and "2106.10270" in planned("VT-IN-SL").text


def test_card_counts_how_the_splits_collide():
    official = set(pinned_split("kvasir_seg", "official")["train"])
    both = [name for name in pinned_split("kvasir_seg", "reference")["test"] if name in official]
    assert len(both) == 88
    text = section(planned("RN-IN-SL"), "Training data")
    assert "Of the 100 images of the study's test part, 88 are in Kvasir-SEG's official training list" in text


def test_clips_of_the_caveat_are_those_of_the_catalog():
    clips = {clinicdb_sequence(str(frame), "") for frame in range(1, 613)}
    caveat = POPULATIONS["cvc_clinicdb"].caveats[0]
    assert DATASETS["cvc_clinicdb"].count == 612 and "unknown" not in clips
    assert f"The 612 frames are {len(clips)} video clips" in caveat and caveat in planned("VT-IN-MA").text


@pytest.mark.parametrize(
    ("short_name", "papers"),
    [
        ("RN-IN-MC", ["2405.15524", "2104.02057", "1512.03385", "1802.02611"]),
        ("RN-HK-BT", ["2405.15524", "2103.03230", "HyperKvasir", "10.1109/ACCESS.2024.3381517"]),
        ("VT-IN-MA", ["2405.15524", "2111.06377", "2010.11929", "2103.13413"]),
    ],
)
def test_citation_names_study_method_and_architecture(short_name, papers):
    text = section(planned(short_name), "Citation")
    assert all(paper in text for paper in [*papers, "Kvasir-SEG", "WM-DOVA"])
    assert "2103.03230" in text or "Barlow" not in text


def test_references_are_whole():
    for key, entry in load_references().items():
        assert entry.count("{") == entry.count("}") and entry.endswith("}"), key
        assert all(field in entry for field in ("title = ", "author = ", "year = ")), key


def record(short_name: str, **changes: object) -> dict:
    return {**planned_facts(zoo.get(short_name), organization="x").origin.content, **changes}


def test_random_start_of_a_pretrained_row_claims_no_pretraining():
    facts = dataclasses.replace(
        planned_facts(zoo.get("VT-IN-MA"), organization="x"),
        origin=read_origin(record("VT-IN-MA", encoder_initialisation="random")),
        stage="published",
    )
    card = render_card(facts)
    assert facts.origin.pretrained_entry is None
    assert (
        "base_model" not in metadata(card) and "datasets" not in metadata(card) and "mae" not in metadata(card)["tags"]
    )
    assert "started at random, not from MAE" in card.text and card.text.startswith(
        "\n# vit_base_dpt.mae_imagenet1k-random"
    )


def test_converted_weights_are_credited_to_their_authors():
    source = {"format": "SSL4GIE", "file": "x.pth", "sha256": "ab" * 32, "upstream": "SSL4GIE"}
    converted = {
        "model_id": zoo.get("VT-IN-MA").model_id,
        "scale": "full",
        "finetuned_on": "Kvasir-SEG reference split",
        "converted_from": source,
    }
    facts = dataclasses.replace(
        planned_facts(zoo.get("VT-IN-MA"), organization="x"),
        origin=read_origin(converted),
        stage="published",
        recipe=None,
    )
    card = render_card(facts)
    assert metadata(card)["license"] == "cc-by-nc-sa-4.0" and lint_card(card) == []
    assert "Done by the authors of SSL4GIE" in section(card, "Fine-tuning")
    assert metadata(card)["base_model"] == "timm/vit_base_patch16_224.mae"
    assert "in distribution | Kvasir-SEG, reference split, test" in section(card, "Evaluation")


def with_results(*contents: dict) -> ModelCard:
    facts = planned_facts(zoo.get("RN-IN-SL"), organization="x")
    results = tuple(Receipt.of(content, path=Path("x.receipt.json")) for content in contents)
    return render_card(dataclasses.replace(facts, stage="published", results=results))


def result(name: str, split: str, part: str, ids: list[str], *, synthetic: bool = False) -> dict:
    value = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": len(ids), "clusters": len(ids), "effective_size": 1.5}
    dataset = {"name": name, "title": DATASETS[name].title, "split": split, "part": part}
    image = {"paper.dice": 0.5, "intersection": 1, "predicted": 2, "true": 2}
    content = {
        "receipt": 1,
        "name": "m",
        "model": {"sha256": None, "weights_origin": {}},
        "dataset": dataset | {"content_id": "c", "manifest": "d", "synthetic": synthetic, "clips_known": False},
        "n": len(ids),
        "seen": {"rule": "report", "passport": None, "reason": "not asked", "excluded": []},
        "collisions": None,
        "bootstrap": {"by_cluster": "95 %"},
        "clusters": {"by": "image", "images": len(ids), "repeats_merged": 0, "clusters": len(ids)},
        "scores": {},
        "scores_by_cluster": {"paper": dict.fromkeys(METRICS, value)},
        "false_alarms": None,
        "definitions": {},
        "images": [{"id": i, **image} for i in ids],
        "manifest": {"pixels": ids},
        "tables": {},
        "surface_tolerance_pixels": TOLERANCE,
        "environment": environment_record(),
    }
    return content | {"digest": digest_of(content)}


def test_card_says_how_many_test_images_were_training_images():
    ids = next(ids for part, ids in pinned_split("kvasir_seg", "official").items() if part != "train")
    seen = len(set(ids) & set(pinned_split("kvasir_seg", "reference")["train"]))
    assert seen == 92
    text = section(with_results(result("kvasir_seg", "official", "test", ids)), "Evaluation")
    assert "**92 of the 120 images of Kvasir-SEG, official split, test, were training images of this model.**" in text
    clean = result("kvasir_seg", "reference", "test", pinned_split("kvasir_seg", "reference")["test"])
    assert "were training images" not in with_results(clean).text


@pytest.mark.parametrize(
    ("name", "part", "synthetic"),
    [
        ("synthetic_b", "full", True),
        ("kvasir_seg", "train", False),
        ("cvc_clinicdb", "full-first10", False),
        ("cvc_clinicdb", "full-partial12", False),
        ("kvasir_seg", "test-unseen98", False),
    ],
)
def test_model_index_leaves_out_what_must_not_be_quoted(name, part, synthetic):
    card = with_results(result(name, "full", part, ["1", "2"], synthetic=synthetic))
    assert "model-index" not in metadata(card) and "0.500 [0.400, 0.600]" in section(card, "Evaluation")


# -- a model's folder -------------------------------------------------------------------------------------------------


def write_folder(folder: Path, *, decoder: str) -> Path:
    """A tiny untrained model as it is published, with a record that says so."""
    torch.manual_seed(0)
    encoder = {"deeplabv3plus": "resnet10t", "dpt": "vit_tiny_patch16_224"}[decoder]
    origin = {"model_id": f"{encoder}_{decoder}.random", "encoder_initialisation": "random", "scale": "small"}
    config = PolypSegConfig(
        encoder=encoder,
        decoder=decoder,
        decoder_channels=16,
        image_size=64,
        weights_origin=origin | {"sha256": "0" * 64},
    )
    if decoder == "dpt":
        model = DPTForSemanticSegmentation(
            DPTConfig(
                hidden_size=24, num_hidden_layers=4, num_attention_heads=3, intermediate_size=48, image_size=64,
                readout_type="ignore", backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 8, 8, 8],
                fusion_hidden_size=8, use_batch_norm_in_fusion_residual=True, use_auxiliary_head=False,
                id2label={0: "background", 1: "polyp"}, label2id={"background": 0, "polyp": 1},
                weights_origin=config.weights_origin,
            )
        )  # fmt: skip
    else:
        model = PolypSegForSemanticSegmentation(config)
    model.save_pretrained(folder)
    build_image_processor(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A published folder with pictures and a card."""
    path = write_folder(tmp_path_factory.mktemp("model"), decoder="deeplabv3plus")
    write_card_pictures(*load_model(str(path)), path, name="tiny")
    render_card(collect_facts(path, organization="someone")).save(path / "README.md")
    return path


def test_card_of_a_folder_shows_its_pictures_and_passes(folder):
    card = ModelCard.load(folder / "README.md")
    assert lint_card(card, folder=folder) == []
    widget = metadata(card)["widget"]
    assert [example["src"] for example in widget] == list(PICTURES)
    assert "pictures/examples.png" in card.text and "Its masks mean nothing" in card.text
    assert "not-one-of-the-twelve" in metadata(card)["tags"] and "v0.1.0" in code_of(card)


def test_pictures_are_synthetic_frames_and_the_models_own_masks(folder):
    model, processor = load_model(str(folder))
    for camera, (source, (mask, _)) in zip(CAMERAS.values(), PICTURES.items(), strict=True):
        frame = Image.open(folder / source)
        assert np.array_equal(np.array(frame), synthesize_frame(camera, seed=SEED, index=0, size=SIZE)[0])
        shown = np.array(Image.open(folder / mask))
        assert np.array_equal(shown == 255, predict_masks(model, processor, [frame])[0]) and set(np.unique(shown)) <= {
            0,
            255,
        }


@pytest.mark.parametrize("decoder", ["deeplabv3plus", "dpt"])
def test_usage_of_a_card_runs_as_printed(decoder, tmp_path, monkeypatch):
    path = write_folder(tmp_path / "model", decoder=decoder)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 90, 3), dtype=np.uint8)).save(tmp_path / "frame.png")
    card = render_card(collect_facts(path, organization="someone"))
    code = code_of(card).replace('repo, revision = "someone/', f'repo, revision = "{path}", None  # ')
    assert ("trust_remote_code" in code) == (decoder == "deeplabv3plus")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(compile(code, "card", "exec"), names)
    assert {mask.size for mask in names["masks"].values()} == {(90, 70)}
    assert names["mask"].shape == (70, 90) and names["probability"].shape == (64, 64)
    assert np.array_equal(names["mask"].numpy().astype(bool), names["prediction"].mask)


@every_card
def test_usage_of_a_committed_card_is_python_and_pins_the_revision(path):
    code = code_of(ModelCard.load(path))
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    loading = [
        c
        for c in calls
        if getattr(c.func, "attr", getattr(c.func, "id", "")) in ("from_pretrained", "pipeline", "load")
    ]
    assert len(loading) == 4 and all("revision" in {k.arg for k in call.keywords} for call in loading)
    assert ("trust_remote_code" in code) == ("_dpt." not in path.stem)


def test_collect_facts_refuses_results_of_other_weights(folder, tmp_path):
    path = write_folder(tmp_path / "model", decoder="deeplabv3plus")
    (path / "results").mkdir()
    other = result("kvasir_seg", "reference", "test", ["a"]) | {"model": {"sha256": "1" * 64, "weights_origin": {}}}
    (path / "results" / "x.receipt.json").write_text(json.dumps(other))
    with pytest.raises(UsageError, match="results of other weights"):
        collect_facts(path, organization="someone")


def test_compute_of_a_run_is_what_its_record_says(tmp_path):
    starter = measured_facts(RESULTS / STARTER, organization="x")
    run = tmp_path / "run"
    write_folder(run / "best", decoder="deeplabv3plus")
    recipe = starter.recipe.model_dump(mode="json")
    environment = {"platform": "Linux-x", "precision": "bf16", "versions": {}}
    (run / "run.json").write_text(json.dumps({"recipe": recipe, "environment": environment}))
    (run / "epochs.csv").write_text("epoch,step,images_per_second\n1,225,1.0\n2,450,0.5\n")  # 3600 s + 7200 s
    config = json.loads((run / "best" / "config.json").read_text())
    config["weights_origin"] |= {"recipe": "finetune_small", "finetuned_on": "kvasir_seg reference/train", "n": 800}
    (run / "best" / "config.json").write_text(json.dumps(config))
    text = section(render_card(collect_facts(run / "best", organization="x", run_dir=run)), "Compute")
    assert "3.0 h" in text and "Linux-x" in text and "computed in: bf16" in text and "carbon: not recorded" in text


def test_an_interrupted_epoch_counts_at_the_median_speed():
    recipe = measured_facts(RESULTS / STARTER, organization="x").recipe
    speeds, images = [2.0, 0.0, 4.0, 6.0, 0.9], 10 * recipe.training.total_batch_size  # median of those measured: 3
    epochs = [{"step": str(10 * n), "images_per_second": str(rate)} for n, rate in enumerate(speeds, start=1)]
    assert training_hours(epochs, recipe) == pytest.approx(images * (1 / 2 + 1 / 3 + 1 / 4 + 1 / 6 + 1 / 0.9) / 3600)
    epochs[-1]["images_per_second"] = "0.7"
    assert training_hours(epochs, recipe) == pytest.approx(images * (1 / 2 + 1 / 3 + 1 / 4 + 1 / 6 + 1 / 3) / 3600)
    assert training_hours(epochs[1:2], recipe) is None and training_hours([], recipe) is None


# -- the lint ---------------------------------------------------------------------------------------------------------

BROKEN = [
    (lambda t: t.replace("## Compute", "## Costs"), "lacks the section(s) Compute"),
    (lambda t: t.replace(DISCLAIMER, ""), "no medical device"),
    (lambda t: t.replace("license: other", "license: open"), "'open' is not one of"),
    (lambda t: re.sub(r"license_link: .*\n", "", t), "needs license_name and license_link"),
    (lambda t: re.sub(r"license: .*\n", "", t), "lacks license"),
    (lambda t: t.replace("library_name: transformers\n", ""), "lacks library_name"),
    (lambda t: t.replace("pipeline_tag: image-segmentation", "pipeline_tag: image-classification"), "pipeline_tag is"),
    (lambda t: t + "\nhf_" + "A1b2C3d4" * 4 + "\n", "access token"),
    (lambda t: t + "\nSee /home/someone/run.\n", "path of the machine"),
    (lambda t: t + "\nSee C:\\data\\run.\n", "path of the machine"),
    (lambda t: t + "\nmDice: None\n", "an empty value"),
    (lambda t: t + "\nmDice: nan\n", "an empty value"),
    (lambda t: t + "\nTODO: write\n", "unfinished"),
    (lambda t: t + "\n[More Information Needed]\n", "unfinished"),
    (lambda t: t + "\n![x](pictures/none.png)\n", "pictures/none.png does not exist"),
    (lambda t: t + "\n![x](../secret.png)\n", "outside the model's folder"),
    (lambda t: re.sub(r"value: 0\.\d+", "value: 0.9999", t, count=1), "dice 0.9999 on cvc_clinicdb, which no receipt"),
]


def test_lint_takes_the_heading_of_folders_exported_before():
    before = str(measured()).replace("## License", "## Licence")
    assert "## Licence" in before and lint_card(ModelCard(before)) == []


@pytest.mark.parametrize(("change", "finding"), BROKEN, ids=[finding[:30] for _, finding in BROKEN])
def test_lint_finds(change, finding, tmp_path):
    card = measured()
    (tmp_path / "results").mkdir()
    for path in (RESULTS / STARTER).glob("*"):
        (tmp_path / "results" / path.name).write_bytes(path.read_bytes())
    shown = tmp_path / "results" / STARTER
    shown.mkdir()
    (shown / "dice_distributions.png").write_bytes(b"")
    assert lint_card(card, folder=tmp_path) == []
    changed = change(str(card))
    assert changed != str(card)
    findings = lint_card(ModelCard(changed), folder=tmp_path)
    assert len(findings) == 1 and finding in findings[0], findings


def test_lint_finds_a_receipt_that_was_changed(tmp_path):
    (tmp_path / "results").mkdir()
    content = result("kvasir_seg", "reference", "test", ["a", "b"])
    (tmp_path / "results" / "x.receipt.json").write_text(json.dumps(content))
    card = with_results(content)
    assert lint_card(card, folder=tmp_path) == []
    content["images"][0]["paper.dice"] = 0.9
    (tmp_path / "results" / "x.receipt.json").write_text(json.dumps(content))
    assert lint_card(card, folder=tmp_path) == [
        "its receipt of kvasir_seg reference test was changed after it was written"
    ]


def test_card_states_clips_repeats_and_what_the_model_saw():
    content = result("cvc_clinicdb", "full", "full", ["1", "2", "3"])
    content["dataset"]["clips_known"], content["clusters"]["repeats_merged"] = True, 1
    kinds = {"same content": 0, "near-duplicate": 2}
    content["collisions"] = {"colliding": 2, "tested": 3, "kinds": kinds, "unchecked": ["pretraining on P"]}
    text = section(with_results(content), "Evaluation")
    assert "| CVC-ClinicDB, all images | 3 in 3 clips (effective n 2) | 0.500 [0.400, 0.600] |" in text
    assert "1 of the images repeat another pixel by pixel and count once" in text
    said = "2 of 3 images collide with what the model saw (near-duplicate: 2)"
    assert f"- CVC-ClinicDB, all images: {said}; not checked, as not listed: pretraining on P." in text


def test_a_folder_of_result_files_of_another_format_is_a_clear_error(tmp_path):
    folder = tmp_path / "resnet10t_deeplabv3plus.random"
    folder.mkdir()
    (folder / "kvasir_seg.reference.test.json").write_text(json.dumps({"metrics": {}, "images": []}))
    with pytest.raises(UsageError, match=r"no receipts .*resnet10t_deeplabv3plus\.random.*not read: run"):
        measured_facts(folder, organization="x")


HOSTILE = 'x" + str(1) + "\n# Heading\n<img src=x onerror=alert(1)> ![p](http://h/x.png) [go](javascript:x) `a` | b'


def test_what_a_config_says_of_itself_stays_plain_text():
    facts = planned_facts(zoo.get("RN-IN-MC"), organization="someone")
    record = facts.origin.content | {
        "model_id": HOSTILE,
        "recipe": HOSTILE,
        "recipe_changes": [HOSTILE],
        "finetuned_on": f"kvasir_seg {HOSTILE}",
        "encoder_initialisation": HOSTILE,
        "sha256": HOSTILE,
    }
    hostile = dataclasses.replace(
        facts, origin=read_origin(record), encoder=HOSTILE, revision=HOSTILE, organization=HOSTILE, recipe=None
    )
    card = render_card(hostile)
    text = re.sub(r"`[^`\n]*`", "", card.text)
    assert "<img" not in card.text and "](javascript" not in text and "![p](" not in text
    headings = re.findall(r"^#+ .*$", card.text, flags=re.MULTILINE)
    assert not [line for line in headings if line.startswith("# Heading")] and len(headings) > 10
    blocks = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    names = next(node for node in ast.walk(ast.parse(blocks[0])) if isinstance(node, ast.Tuple))
    assert all(isinstance(part, ast.Name | ast.Constant) for part in names.elts)
    values = next(node.value for node in ast.parse(blocks[0]).body if isinstance(node, ast.Assign))
    assert isinstance(values, ast.Tuple) and all(isinstance(part, ast.Constant) for part in values.elts)
    assert isinstance(metadata(card)["tags"], list)


def test_input_facts_that_are_no_numbers_are_refused(tmp_path):
    write_json(tmp_path / "config.json", {"decoder": "dpt", "encoder": "x"})
    sizes = {"size": {"height": "<b>"}, "image_mean": [0.5], "image_std": [0.5]}
    write_json(tmp_path / "preprocessor_config.json", sizes)
    with pytest.raises(PolypSegError, match="something else than numbers"):
        collect_facts(tmp_path)


def test_plain_text_leaves_names_and_numbers_alone():
    for text in ('model.encoder="resnet10t"', "augmentation.scale=[0.5, 2.0]", "kvasir_seg reference/train", "−0.5 %"):
        assert plain(text) == text
    assert plain("a\r\n\u2028# b\u202e") == "a # b " and plain("# **b**") == "&#35; &#42;&#42;b&#42;&#42;"
    assert all_plain({"<a>": [("`", 1)]}) == {"&lt;a&gt;": [("'", 1)]}


@pytest.mark.parametrize("text", ["---\nlicense: [mit\n---\n", "---\n- mit\n---\n"])
def test_load_card_names_a_card_that_cannot_be_read(text, tmp_path):
    (tmp_path / "README.md").write_text(text)
    for path in (tmp_path / "README.md", tmp_path / "missing.md"):
        with pytest.raises(UsageError, match=re.escape(str(path))):
            load_card(path)
