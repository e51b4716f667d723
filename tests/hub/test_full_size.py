"""Rows at full size: what the pages say of those that are trained to their end, and never of those that are not."""

import json
import re
import shutil
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from polypseg import zoo
from polypseg.errors import PolypSegError
from polypseg.evaluation.receipt import digest_of, find_receipts
from polypseg.hub.card_facts import read_epochs
from polypseg.hub.full_size_tables import ATTRIBUTION, CURVE, ROBUSTNESS, finished_text, in_training_text
from polypseg.hub.model_card import render_pages
from polypseg.recipe import load_recipe

REPOSITORY = Path(__file__).resolve().parents[2]
DOCS = REPOSITORY / "docs"
KEPT = DOCS / "full_size"
GAPS = DOCS / "study" / "twelve_small_files" / "gaps.json"
ROW = zoo.get("RN-NA-NA")


def write_row(root: Path, *, finished: bool) -> tuple[Path, Path]:
    """Folders as in the repository, with the receipts of an interim model as if its run had ended there, or not."""
    kept, results = root / "full_size", root / "results"
    (kept / ROW.short_name).mkdir(parents=True)
    shutil.copy(DOCS / "starter" / "robustness.json", kept / ROW.short_name / ROBUSTNESS)
    shutil.copy(DOCS / "starter" / "attribution.json", kept / ROW.short_name / ATTRIBUTION)
    own = results / ROW.model_id
    own.mkdir(parents=True)
    shutil.copy(KEPT / "RN-NA-NA.50" / "epochs.csv", own)
    for receipt in find_receipts(KEPT / "RN-NA-NA.50").values():
        content = {key: value for key, value in receipt.content.items() if key != "digest"}
        content["name"] = ROW.model_id
        content["model"]["weights_origin"]["finished"] = finished
        (own / receipt.path.name).write_text(json.dumps(content | {"digest": digest_of(content)}))
    return kept, results


def test_a_finished_row_has_its_receipts_its_course_and_a_contrast_with_the_small_study(tmp_path):
    kept, results = write_row(tmp_path, finished=True)
    text = finished_text(kept, results=results, small=GAPS)
    assert "### RN-NA-NA" in text and "50 epochs by the recipe `finetune`" in text and "![" not in text
    for receipt in find_receipts(results).values():
        dice = receipt.stated["dice"]
        assert f"{dice.mean:.3f} [{dice.low:.3f}, {dice.high:.3f}]" in text
    small = {row["model"]: row for row in json.loads(GAPS.read_text())}
    own = small[ROW.model_id]
    rank = sorted((row["inside"] for row in small.values()), reverse=True).index(own["inside"]) + 1
    (line,) = [line for line in text.splitlines() if line.startswith("| RN-NA-NA | small study")]
    assert f"| {own['inside']:.3f} [" in line and f"| {rank} in, " in line
    (kept / ROW.short_name / CURVE).write_bytes(b"")
    shown = f"![Loss and validation Dice of RN-NA-NA by epoch](full_size/RN-NA-NA/{CURVE})"
    assert shown in finished_text(kept, results=results, small=GAPS)


def test_pages_of_models_show_a_finished_row_under_its_id(tmp_path):
    _, results = write_row(tmp_path, finished=True)
    pages = render_pages(results, organization="someone")
    receipt = next(r for r in find_receipts(results).values() if r.dataset.name == "kvasir_seg")
    said = f"{receipt.stated['dice'].mean:.3f}"
    (line,) = [line for line in pages["README.md"].splitlines() if line.startswith(f"| [{ROW.model_id}]")]
    assert said in line and "not evaluated" not in line.split("|")[5]
    card = pages[f"{ROW.model_id}.md"]
    assert "Planned" not in card and "The weights are not published" in card and said in card
    assert "Not one of the twelve" not in card


def test_the_card_of_a_row_states_false_alarms_where_frames_show_no_polyp():
    results = REPOSITORY / "model_cards" / "results"
    receipts = find_receipts(results / ROW.model_id).values()
    (alarms,) = [receipt.false_alarms for receipt in receipts if receipt.without_polyps]
    card = render_pages(results, organization="someone")[f"{ROW.model_id}.md"]
    rate = alarms.per_100_frames
    said = f"False alarms on {alarms.frames} frames without polyps: {rate.mean:.1f} per 100 frames [{rate.low:.1f}, "
    assert said in card and "in inflammatory bowel disease, or for frames without polyps" not in card
    assert "| frames without polyps" not in card and "type: negatives" not in card  # no Dice of them, nor in metadata
    assert "- frames without polyps, all images: of " not in card  # nor as failures
    assert "- frames without polyps, all images: 0 of " in card  # of what the model saw


def test_the_card_of_a_row_states_the_recipe_with_its_changes():
    card = render_pages(REPOSITORY / "model_cards" / "results", organization="someone")[f"{ROW.model_id}.md"]
    assert 'training.precision="bf16"' in card and "| precision asked for | bf16 |" in card


def test_a_row_in_training_does_not_bear_its_id(tmp_path):
    kept, results = write_row(tmp_path, finished=False)
    with pytest.raises(PolypSegError, match="is not of a row trained to its end"):
        finished_text(kept, results=results, small=GAPS)
    with pytest.raises(PolypSegError, match="bears the id of a row but holds results of another model"):
        render_pages(results, organization="someone")


def test_a_finished_row_is_not_shown_as_one_in_training(tmp_path):
    _, results = write_row(tmp_path, finished=True)
    kept = tmp_path / "training" / "RN-NA-NA.50"
    shutil.copytree(results / ROW.model_id, kept)
    with pytest.raises(PolypSegError, match="is not of a row in training"):
        in_training_text(kept.parent)


def test_a_row_in_training_says_how_fast_and_on_what_where_its_record_is_kept(tmp_path):
    kept = tmp_path / "RN-NA-NA.50"
    shutil.copytree(KEPT / kept.name, kept)
    assert "images/s" not in in_training_text(tmp_path)
    recipe = load_recipe("finetune").model_dump(mode="json")
    (kept / "run.json").write_text(json.dumps({"recipe": recipe, "environment": {"hardware": "some CPU"}}))
    rates = [rate for row in read_epochs(kept / "epochs.csv") if (rate := float(row["images_per_second"]))]
    said = f"{statistics.median(rates):.1f} images/s in the median of the epochs; 150 remain, at this speed "
    (line,) = [line for line in in_training_text(tmp_path).splitlines() if said in line]
    assert line.startswith("RN-NA-NA on some CPU: 50 epochs in ")
    spent, left = (float(hours) for hours in re.findall(r"([\d.]+) hours", line))
    assert left == pytest.approx(3 * spent, abs=0.7)  # both are rounded


def test_where_no_row_is_finished_the_page_says_so(tmp_path):
    assert finished_text(tmp_path, results=tmp_path, small=GAPS) == "None yet."


def test_each_stop_of_a_row_in_training_is_shown():
    text = in_training_text(KEPT)
    for kept in KEPT.glob("*.*"):
        for receipt in find_receipts(kept).values():
            dice = receipt.stated["dice"]
            (line,) = [
                line for line in text.splitlines() if f"{dice.mean:.3f} [{dice.low:.3f}, {dice.high:.3f}]" in line
            ]
            assert f"{kept.stem} after {kept.suffix[1:]} of 200 epochs" in line


def test_a_learning_curve_is_drawn_beside_its_epochs(tmp_path):
    script = REPOSITORY / "training_scripts" / "plot_results.py"
    epochs = tmp_path / "RN-NA-NA.50" / "epochs.csv"
    epochs.parent.mkdir()
    shutil.copy(KEPT / "RN-NA-NA.50" / "epochs.csv", epochs)
    run = partial(subprocess.run, capture_output=True, text=True, check=False)
    done = run([sys.executable, script, "--epochs", epochs])
    assert done.returncode == 0, done.stderr
    with Image.open(epochs.parent / CURVE) as picture:
        assert picture.width > 600 and len(picture.convert("L").getcolors()) > 20
    elsewhere = tmp_path / "RN-NA-NA"
    elsewhere.mkdir()
    assert run([sys.executable, script, "--epochs", epochs, "--curve-folder", elsewhere]).returncode == 0
    assert (elsewhere / CURVE).is_file()
    missing = run([sys.executable, script, "--epochs", tmp_path / "none.csv"])
    assert missing.returncode == 2 and "none.csv holds no epochs" in missing.stderr
    assert run([sys.executable, script]).returncode == 2
