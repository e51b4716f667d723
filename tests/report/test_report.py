import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from polypseg import zoo
from polypseg.errors import PolypSegError, UsageError
from polypseg.evaluation.receipt import save_receipt
from polypseg.report import write_report
from polypseg.report.analysis import analyse, score_set_of
from polypseg.report.author_text import render_reading
from polypseg.report.figures import inline_svg
from polypseg.report.gallery import build_galleries, outline, permission, telling_images
from polypseg.report.other_results import read_document
from polypseg.report.receipts import parse_test, part_words, read_material
from polypseg.report.wording import number, p_value, percent, rank_change_verdict
from polypseg.statistics import analyze_rank_change, mean_intervals, score_set
from receipt_factory import (
    INSIDE,
    OUTSIDE,
    SKILLS,
    DrawnDataset,
    DrawnNegatives,
    render,
    rendered_report,
    write_receipt,
    write_study,
)

ROWS = {entry.short_name: entry for entry in SKILLS}
LABELS = {"RN-IN-MC": "resnet10t-IN-MC", "RN-NA-NA": "resnet10t-NA-NA", "VT-IN-MA": "vit_tiny-IN-MA"}
"""What the page calls the small encoders that stand in for these rows."""


@pytest.fixture(scope="module")
def page() -> str:
    return rendered_report().read_text(encoding="utf-8")


@pytest.fixture
def receipts(tmp_path) -> Path:
    """A copy of one row's receipts that a test may spoil."""
    for folder in (rendered_report().parent / "receipts").glob("*.random-seed?"):
        shutil.copytree(folder, tmp_path / "receipts" / folder.name)
    return tmp_path / "receipts"


def read(folder: Path):
    return read_material(folder, inside=parse_test(INSIDE), outside=parse_test(OUTSIDE))


def row_cells(page: str, table: str, name: str) -> list[str]:
    """The texts of a table's row, markup removed; parts of a cell stand apart by a bar."""
    body = page[page.index(f'<table id="table-{table}"') :]
    row = next(r for r in re.findall(r"<tr[^>]*>.*?</tr>", body, flags=re.DOTALL) if f">{name}</a>" in r)
    cells = re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.DOTALL)
    return [re.sub(r"<[^>]+>", "", cell.replace("<small>", "|")) for cell in cells]


def dice_of(path: Path) -> np.ndarray:
    """From the pixel counts of the rows, not from the stored scores."""
    rows = json.loads(path.read_text())["images"]
    return np.array([2 * r["intersection"] / (r["predicted"] + r["true"]) for r in rows])


# -- numbers ---------------------------------------------------------------------------------------------------


def test_comparison_states_means_intervals_and_seeds_of_the_counts(page):
    folder = rendered_report().parent / "receipts"
    values = {}
    titles = {INSIDE: "Kvasir-SEG, reference test", OUTSIDE: "CVC-ClinicDB, full full"}
    for column, (test, title) in zip((1, 5), titles.items(), strict=True):
        paths = {n: sorted(folder.glob(f"*.{e.tag}-seed?/{test}.receipt.json")) for n, e in ROWS.items()}
        dice = {name: np.stack([dice_of(path) for path in seeds]) for name, seeds in paths.items()}
        clips = [r["clip"] for r in json.loads(paths["RN-NA-NA"][0].read_text())["images"]]
        scores = score_set(dice, title=title, clusters=None if clips[0] is None else clips)
        for name, interval in mean_intervals(scores, resamples=300).items():
            values[name, test] = mean = dice[name].mean()
            low, high = sorted(dice[name].mean(axis=1))
            bounds = f"[{interval.low:.3f}, {interval.high:.3f}]"
            assert row_cells(page, "comparison", LABELS[name])[column] == f"{mean:.3f}|{bounds}|{low:.3f}–{high:.3f}"
            assert row_cells(page, "gaps", LABELS[name])[1 if test == INSIDE else 2] == f"{mean:.3f}|{bounds}"
    for name in ROWS:
        cells = row_cells(page, "comparison", LABELS[name])
        places = [1 + sum(values[other, test] > values[name, test] for other in ROWS) for test in (INSIDE, OUTSIDE)]
        assert [int(cell.split("|")[0]) for cell in cells[9:11]] == places
        assert cells[11].lstrip("▲▼ ").replace("−", "-").lstrip("+") == str(places[0] - places[1])


def test_tables_beside_the_page_hold_the_same_numbers_unrounded(page):
    folder = rendered_report().with_name("report_files")
    rows = list(csv.DictReader((folder / "comparison.csv").open(encoding="utf-8")))
    same = json.loads((folder / "comparison.json").read_text())
    assert [row["model"] for row in rows] == [record["model"] for record in same] == [e.model_id for e in SKILLS]
    for row in rows:
        cells = row_cells(page, "comparison", LABELS[zoo.get(row["model"]).short_name])
        assert cells[1].split("|")[0] == f"{float(row['in_dice']):.3f}" and len(row["in_dice"]) > 10
        assert (row["in_images"], row["out_images"], row["out_clusters"]) == ("10", "60", "3")
    names = {path.name for path in folder.iterdir()}
    assert {f"rank-slopes.{kind}" for kind in ("svg", "pdf")} | {"pairs.csv", "receipts.json"} <= names
    assert all((folder / n).read_bytes().startswith(b"%PDF") for n in names if n.endswith(".pdf"))


def test_verdict_and_its_numbers_are_those_of_the_rank_analysis(page):
    material = read(rendered_report().parent / "receipts")
    sets = [
        score_set_of({m: material.used(m, t) for m in material.models}) for t in (material.inside, material.outside)
    ]
    change = analyze_rank_change(*sets, resamples=300)
    verdict, sentences = rank_change_verdict(change, label=str)
    assert verdict in page and p_value(change.agreement.p_one_order).replace("<", "&lt;") in page
    assert f"{sum(pair['flipped'] for pair in change.pairs)} of 3 pairs stand in opposite orders" in sentences[0]


def test_every_score_leads_to_its_receipt(page):
    anchors = re.findall(r'href="#([^"]+)"', page)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids)) and set(anchors) <= set(ids)
    digest = json.loads((rendered_report().with_name("report_files") / "receipts.json").read_text())[0]
    assert digest["receipt_sha256"][:12] in page and digest["git_revision"][:12] in page
    cells = re.findall(r"<td[^>]*>", page[page.index('id="table-comparison"') : page.index('id="ranking"')])
    assert sum("sha256" in cell for cell in cells) == 3 * 8


# -- what the page says ----------------------------------------------------------------------------------------


def test_page_says_what_stands_in_what_is_missing_and_that_it_is_no_device(page):
    assert "resnet10t for ResNet50, vit_tiny for ViT-B" in page
    assert "drawn-frames (2,000 frames)" in page and "not a medical device" in page
    assert "No receipt of 9 of the table’s 12 rows: RN-HK-MC" in page
    assert "2 training runs (seeds) each, from 12 evaluation receipts" in page
    assert "not checked against what the model saw: these predictions come without a passport" in page


def test_page_escapes_and_asks_for_nothing_outside(page):
    assert "<h1>A &lt;study&gt; &amp; more</h1>" in page
    assert "<script>alert" not in page and "&lt;script&gt;alert(1)" in page
    assert ">tracker</a>" in page and "<img" not in page
    loads = re.findall(r'(?:src|srcset|data|action)="([^"]*)"|<(?:image|use|link)[^>]*href="([^"]*)"', page)
    assert all(a.startswith("data:") or b.startswith(("data:", "#")) for a, b in loads)
    assert "url(http" not in page and "@import" not in page
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', page)
    assert policy is not None and "default-src 'none'" in policy[1].replace("&#39;", "'")


@pytest.mark.slow
def test_same_receipts_give_the_same_bytes(tmp_path):
    first = rendered_report()
    again = render(first.parent, "again.html")
    assert again.read_bytes() == first.read_bytes()
    for path in first.with_name("report_files").iterdir():
        assert path.read_bytes() == (again.with_name("again_files") / path.name).read_bytes(), path.name


@pytest.mark.slow
def test_study_with_one_test_and_one_row_is_rendered_and_says_so(tmp_path):
    entry = next(iter(SKILLS))
    write_receipt(
        tmp_path / "r", entry, seed=0, dataset=DrawnDataset("kvasir_seg", 6), split="reference", part="test", skill=1
    )
    path = write_report(tmp_path / "r", tmp_path / "o.html", title="One", inside=INSIDE, outside=OUTSIDE, resamples=50)
    text = path.read_text(encoding="utf-8")
    assert "No receipt on cvc_clinicdb.full.full, the test out of distribution." in text
    assert 'id="ranking"' not in text and row_cells(text, "comparison", "resnet10t-IN-MC")[5] == "–"


@pytest.mark.slow
def test_frames_without_polyps_give_false_alarms_and_no_dice(receipts, tmp_path):
    entry, folder = ROWS["RN-NA-NA"], {}
    for seed, skill in ((0, 3.0), (1, 0.5)):
        folder[seed] = write_receipt(
            receipts,
            entry,
            seed=seed,
            dataset=DrawnNegatives("polypgen", 40),
            split="centre",
            part="without-polyp",
            skill=skill,
        )
    path = write_report(receipts, tmp_path / "o.html", title="A", inside=INSIDE, outside=OUTSIDE, resamples=50)
    text = path.read_text(encoding="utf-8")
    facts = [json.loads(folder[seed].read_text())["false_alarms"] for seed in (0, 1)]
    rates = [fact["per_100_frames"] for fact in facts]
    means = sorted(rate["mean"] for rate in rates)
    low, high = min(r["low"] for r in rates), max(r["high"] for r in rates)
    cells = re.findall(r"<tr><th.*?</tr>", text[text.index('id="table-alarms"') :], flags=re.DOTALL)[1]
    assert 0 < means[0] < means[1]
    for words in (f"{sum(means) / 2:.1f}", f"[{low:.1f}, {high:.1f}]", f"{means[0]:.1f}–{means[1]:.1f}", ">40<"):
        assert words in cells, words
    assert f"{50 * sum(fact['predicted_share']['mean'] for fact in facts):.1f} %" in cells
    assert 'id="table-tests"' not in text and "without-polyp part</" in text[: text.index('id="table-comparison"')]


def test_receipts_without_calibration_give_a_report_without_that_figure(tmp_path):
    write_receipt(
        tmp_path / "r",
        ROWS["RN-NA-NA"],
        seed=0,
        dataset=DrawnDataset("kvasir_seg", 6),
        split="reference",
        part="test",
        skill=1,
        conventions=("paper",),
    )
    path = write_report(tmp_path / "r", tmp_path / "o.html", title="A", inside=INSIDE, outside=OUTSIDE, resamples=50)
    text = path.read_text(encoding="utf-8")
    assert "dice-distributions" in text and "Calibration" not in text


def test_rows_with_more_seeds_are_compared_by_as_many_and_the_rest_is_named(receipts):
    full = rendered_report().parent / "receipts"
    for folder in full.glob("vit_tiny*seed0"):
        shutil.copytree(folder, receipts / folder.name)
    material = read(receipts)
    assert {len(seeds) for seeds in material.compared.values()} == {1}
    assert any("resnet10t-NA-NA seed 1" in sentence for sentence in material.missing())
    analysis = analyse(material, resamples=50)
    assert analysis.inside is not None and analysis.inside.seeds == 1


# -- refusals --------------------------------------------------------------------------------------------------


def change(path: Path, **values) -> None:
    """Rewrite parts of a receipt under a digest that fits."""
    content = json.loads(path.read_text())
    content.pop("digest")
    save_receipt(path, {**content, **values})


def test_receipt_whose_mean_does_not_follow_from_its_rows_is_refused(receipts):
    path = sorted(receipts.rglob("*.receipt.json"))[0]
    scores = json.loads(path.read_text())["scores"]
    scores["paper"]["dice"]["mean"] += 0.01
    change(path, scores=scores)
    with pytest.raises(PolypSegError, match=rf"{re.escape(str(path))} is refused: scores\.paper\.dice\.mean"):
        read(receipts)


def test_receipts_of_different_images_are_refused_by_both_names(receipts):
    entry = ROWS["RN-NA-NA"]
    other = write_receipt(
        receipts, entry, seed=1, dataset=DrawnDataset("kvasir_seg", 7), split="reference", part="test", skill=1
    )
    with pytest.raises(UsageError) as refused:
        read(receipts)
    assert str(other) in str(refused.value) and str(refused.value).count(".receipt.json") == 2
    assert "differ in the dataset’s content" in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("words", "edit"),
    [
        ("same row, seed and test", {"seed": 0, "sha256": None}),
        ("same weights under two rows or seeds", {"sha256": "that of seed 0"}),
        ("differ in scale", {"weights_origin": {"scale": "full"}}),
        ("differ in the model", {"weights_origin": {"model_id": "resnet18_deeplabv3plus.random"}}),
    ],
)
def test_receipts_that_mix_models_are_refused(receipts, words, edit):
    one, two = (next(receipts.glob(f"*random-seed{seed}/kvasir*.json")) for seed in (0, 1))
    model, other = (json.loads(path.read_text())["model"] for path in (two, one))
    if "weights_origin" in edit:
        edit = {"weights_origin": model["weights_origin"] | edit["weights_origin"]}
    if edit.get("sha256"):
        edit = {"sha256": other["sha256"], "weights_origin": model["weights_origin"] | {"sha256": other["sha256"]}}
    change(two, model={**model, **edit})
    with pytest.raises(UsageError, match=words):
        read(receipts)


def test_folder_without_receipts_and_odd_names_are_refused(tmp_path):
    with pytest.raises(UsageError, match="holds no receipts"):
        read(tmp_path)
    with pytest.raises(UsageError, match=r"DATASET\.SPLIT\.PART"):
        parse_test("kvasir_seg")


# -- pictures --------------------------------------------------------------------------------------------------


def test_gallery_shows_only_what_may_be_shown(page):
    cases = page[page.index('id="cases"') : page.index('id="models"')]
    assert cases.count("data:image/jpeg;base64,") >= 6 and "CC BY 4.0" in cases
    assert "the terms of CVC-ClinicDB do not allow publishing its images" in cases
    assert (
        permission("polypgen") is not None and permission("etis_larib") is None and permission("cvc_clinicdb") is None
    )


@pytest.mark.parametrize("name", ["folder", "kvasir_seg"])
def test_two_folders_of_ones_own_are_two_sets_but_a_dataset_is_one(tmp_path, name):
    """As of ``polypseg study --in-distribution folder --out-of-distribution folder``, with a source each."""
    tests = ((6, "reference", "test"), (9, "full", "full"))
    for count, split, part in tests:
        dataset = DrawnDataset(name, count)
        write_receipt(tmp_path, zoo.get("RN-NA-NA"), seed=0, dataset=dataset, split=split, part=part, skill=1.0)
    inside, outside = ((name, split, part) for _, split, part in tests)
    if name == "kvasir_seg":
        with pytest.raises(UsageError, match="differ in the dataset’s content"):
            read_material(tmp_path, inside=inside, outside=outside)
        return
    material = read_material(tmp_path, inside=inside, outside=outside)
    first, second = build_galleries(material, masks=None, sources={})
    ids = [{case.id for case in gallery.cases} for gallery in (first, second)]
    assert first.title != second.title and ids[0] <= {f"{k:03d}" for k in range(1, 7)} and ids[1] - ids[0]
    other = DrawnDataset(name, 8)  # a third set in the place of the second
    write_receipt(tmp_path, zoo.get("VT-NA-NA"), seed=0, dataset=other, split="full", part="full", skill=1.0)
    with pytest.raises(UsageError, match="differ in the dataset’s content"):
        read_material(tmp_path, inside=inside, outside=outside)


def test_masks_of_another_evaluation_are_refused(receipts, tmp_path):
    folder = rendered_report().parent
    for mask in receipts.glob("*seed0/masks/kvasir_seg/*.png"):
        shutil.copy(folder / "frames" / "masks" / "001.png", mask)
    shutil.copytree(folder / "frames", tmp_path / "frames")
    shutil.copy(folder / "reading.md", tmp_path)
    with pytest.raises(UsageError, match=r"is not the mask that .* scored"):
        render(tmp_path, "o.html")


def test_telling_images_are_the_extremes():
    dice = np.array([[0.9, 0.1, 0.5, 0.9, 0.55, 0.45], [0.9, 0.1, 0.5, 0.1, 0.55, 0.45]])
    found = {place: why for why, place in telling_images(dice)}
    assert found[0].startswith("best") and found[1].startswith("worst") and "most disputed" in found[3]
    alone = [why for why, _ in telling_images(np.array([np.arange(12) / 12]))]
    assert alone == ["best"] * 2 + ["median"] * 2 + ["worst"] * 4


def test_outline_of_a_square_is_its_corners():
    mask = np.zeros((10, 10), dtype=np.uint8)
    mask[2:6, 3:8] = 1
    numbers = [float(word) for word in re.findall(r"[\d.]+", outline(mask, 2.0))]
    assert (min(numbers[::2]), max(numbers[::2]), min(numbers[1::2]), max(numbers[1::2])) == (7.0, 15.0, 5.0, 11.0)


def test_inline_figure_has_its_own_ids_and_the_pages_colors(page):
    svg = '<?xml?><svg width="10pt" height="5pt"><path id="p1" style="fill: #1c2024"/><use xlink:href="#p1"/></svg>'
    inline = inline_svg(svg, name="a", title="A")
    assert inline.count("a-p1") == 2 and 'href="#a-p1"' in inline and "var(--ink)" in inline and "<?xml" not in inline
    figures = "".join(re.findall(r"<figure.*?</figure>", page, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", figures)) == set()


# -- words -----------------------------------------------------------------------------------------------------


def study_of(inside, outside, *, n=200, noise=0.02):
    rng = np.random.default_rng(0)
    images = [rng.normal(0, 0.05, n), rng.normal(0, 0.05, n)]
    return [
        score_set(
            {f"m{k}": mean + images[s] + rng.normal(0, noise, n) for k, mean in enumerate(means)}, title=f"set {s}"
        )
        for s, means in enumerate((inside, outside))
    ]


@pytest.mark.parametrize(
    ("inside", "outside", "noise", "answer", "words"),
    [
        ([0.9, 0.8, 0.7], [0.8, 0.7, 0.6], 0.02, "There is none", "not rejected"),
        ([0.9, 0.8, 0.7], [0.6, 0.7, 0.8], 0.02, "Yes: the order changes", "Shown to change places"),
        ([0.801, 0.8], [0.7, 0.701], 0.2, "Not shown", "No pair is shown to change places"),
    ],
)
def test_verdict_fits_what_is_true(inside, outside, noise, answer, words):
    verdict, sentences = rank_change_verdict(
        analyze_rank_change(*study_of(inside, outside, noise=noise), resamples=300), label=str
    )
    assert verdict.startswith(answer) and words in " ".join(sentences)


def test_verdict_tells_the_order_from_its_pairs():
    found = analyze_rank_change(*study_of([0.9, 0.8, 0.7], [0.6, 0.7, 0.8]), resamples=100)
    unsure = dataclasses.replace(found, pairs=tuple(pair | {"p_flip_holm": 0.4} for pair in found.pairs))
    assert rank_change_verdict(unsure, label=str)[0].startswith("Yes for the order as a whole; no single pair")
    kept = dataclasses.replace(found, agreement=dataclasses.replace(found.agreement, p_one_order=0.3))
    assert rank_change_verdict(kept, label=str)[0].startswith("For single pairs yes")


def test_parts_that_were_tested_in_part_say_so():
    assert part_words(("etis_larib", "full", "full-partial2")) == "all images, only the 2 at hand"
    assert part_words(("polypgen", "centre", "without-polyp")) == "centre without-polyp part"
    assert part_words(("kvasir_seg", "official", "test-unseen12")) == "official test part, only the 12 not seen"
    assert part_words(("cvc_clinicdb", "full", "full")) == "all images"


def test_numbers_are_written_without_false_zeros():
    assert (number(-0.0001), number(-0.5, signed=True), number(None)) == ("0.000", "−0.500", "–")
    assert (percent(0.0004), percent(0.9996), percent(0.5)) == ("< 1 %", "> 99 %", "50 %")
    assert (p_value(0.0002), p_value(0.04)) == ("p < 0.001", "p = 0.040")


def test_reading_refuses_a_number_that_is_not_there(tmp_path):
    analysis = analyse(read(rendered_report().parent / "receipts"), resamples=20)
    text = tmp_path / "r.md"
    for wrong, words in (
        ("{{ mean('RN-HK-MC', 'in') }}", "unknown row"),
        ("{{ mean('RN-IN-MC', 'etis_larib.full.full') }}", "no receipt of RN-IN-MC"),
        ("{{ nothing }}", "'nothing' is undefined"),
        ("{{ mean.__globals__ }}", "cannot be used as the reading"),
    ):
        text.write_text(wrong)
        with pytest.raises(UsageError, match=words) as refused:
            render_reading(text, analysis)
        assert str(text) in str(refused.value)


def test_robustness_file_becomes_a_table_of_severities(tmp_path):
    rows = [
        {"corruption": kind, "severity": s, "dice_mean": 0.9 - 0.1 * s, "dice_low": 0.1, "dice_high": 0.95}
        for kind in ("motion_blur", "smoke")
        for s in (1, 2)
    ]
    path = tmp_path / "r.json"
    path.write_text(json.dumps({"model_id": "m", "mean_relative_drop": 0.25, "rows": rows, "images": [{"id": "x"}]}))
    document = read_document(path)
    (table,) = document.tables
    assert ("mean relative drop", "0.250") in document.facts and [c.title for c in table.columns[1:]] == ["1", "2"]
    assert [cell.text for cell in table.rows[1].cells] == ["smoke", "0.800", "0.700"]
    path.write_text("[1]")
    with pytest.raises(UsageError, match="not a JSON object"):
        read_document(path)


def test_shift_file_becomes_intervals_in_one_cell_each(tmp_path):
    factor = {"factor": "scale", "cost": 0.06, "cost_low": 0.04, "cost_high": 0.09, "p_holm": 0.0004, "covered": None}
    content = {
        "model": "m",
        "titles": ["A, test", "B, full"],
        "n": [100, 612],
        "drop": {"estimate": 0.12, "low": 0.04, "high": 0.2},
        "factors": [factor],
        "cross_talk": {"scale": {"lab_l_mean": 1.7}},
    }
    path = tmp_path / "s.json"
    path.write_text(json.dumps(content))
    document = read_document(path)
    assert document.title == "m: A, test toward B, full"
    assert document.facts == [("model", "m"), ("n", "100, 612"), ("drop", "0.120 [0.040, 0.200]")]
    (table,) = document.tables
    assert [column.title for column in table.columns] == ["factor", "cost", "p holm", "covered"]
    assert [(cell.text, cell.note) for cell in table.rows[0].cells] == [
        ("scale", ""),
        ("0.060", "[0.040, 0.090]"),
        ("< 0.001", ""),
        ("–", ""),
    ]


def test_small_study_writes_receipts_that_fit_their_rows(tmp_path):
    write_study(tmp_path, {ROWS["RN-NA-NA"]: (1.0, 1.0)}, seeds=1)
    assert len(read(tmp_path).receipts) == 2
