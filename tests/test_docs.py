"""Every command in the README and in the scripts' docstrings names files and options that exist."""

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
from functools import cache
from pathlib import Path

import pytest

import processes
from polypseg.evaluation.conventions import conventions_markdown
from polypseg.evaluation.receipt import check_receipt
from polypseg.evaluation.receipt_reading import alarm_words, cell_of, read_results, size_of
from polypseg.pretraining.export import render_index
from polypseg.report import write_report
from polypseg.report.wording import between, number

REPOSITORY = Path(__file__).resolve().parents[1]
STUDY = REPOSITORY / "docs" / "study"
SCRIPTS = sorted((REPOSITORY / "training_scripts").glob("*.py"))


PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")), STUDY / "README.md"]
RESULTS_PAGE = REPOSITORY / "docs" / "results.md"


def readme_commands() -> list[str]:
    text = "".join(page.read_text() for page in PAGES if page.name != "full_study.md")  # whose commands have own tests
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.split("  #")[0].split(" # ")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def docstring_commands() -> list[str]:
    commands = []
    for script in SCRIPTS:
        docstring = script.read_text().split('"""')[1].replace("\\\n", " ")
        commands += re.findall(r"^((?:accelerate launch|python) training_scripts/.*)$", docstring, re.MULTILINE)
    return commands


COMMANDS = readme_commands() + docstring_commands()


@cache
def help_text(*command: str) -> str:
    result = processes.run([*command, "--help"], capture_output=True, env=os.environ | {"COLUMNS": "300"})
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_script_says_how_to_run_it():
    assert len(docstring_commands()) >= len(SCRIPTS)


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_real(command):
    words = shlex.split(command)
    if words[0] in ("mkdir", "tar", "openssl"):
        return
    if words[0] == "make":
        assert f"\n{words[1]}:" in (REPOSITORY / "Makefile").read_text()
        return
    if words[0] == "bash":
        assert (REPOSITORY / words[1]).is_file()
        return
    script = next((word for word in words if word.endswith(".py")), None)
    if script is not None:
        assert (REPOSITORY / script).is_file()
        options = words[words.index(script) + 1 :]
        shown = help_text(sys.executable, str(REPOSITORY / script))
        if "COMMAND" in shown:
            shown = help_text(sys.executable, str(REPOSITORY / script), options[0])
    else:
        assert words[0] == "polypseg"
        options = words[1:]
        subcommand = words[1:3] if words[1] in ("data", "shift") else words[1:2]
        shown = help_text(sys.executable, "-m", "polypseg_command", *subcommand)
    for option in (word.split("=")[0] for word in options if word.startswith("--")):
        assert re.search(rf"{option}\b", shown), f"{option} is not an option of {command}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(REPOSITORY).as_posix())
def test_files_named_in_the_readme_exist(page):
    text = page.read_text()
    for path in re.findall(r"(?<![\w/])(?:src|hub_configs|training_scripts|model_cards|tests|docs)/[\w./]*\w", text):
        assert (REPOSITORY / path).exists(), path
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), f"{page} links to {target}"


def test_metric_conventions_page_is_rendered_from_the_table():
    page = (REPOSITORY / "docs" / "metric_conventions.md").read_text()
    assert page == conventions_markdown(), "run `make cards`"


def test_no_machine_paths_or_data_in_the_repository():
    files = subprocess.run(["git", "-C", REPOSITORY, "ls-files"], capture_output=True, text=True).stdout.split("\n")
    assert not [f for f in files if re.search(r"(cju[0-9a-z]{20,}|/Ground Truth/).*\.(jpe?g|png|tiff?)$", f)]


RESULTS = REPOSITORY / "model_cards" / "results"


def test_scores_in_the_readme_are_those_of_the_receipts():
    text = RESULTS_PAGE.read_text()
    receipts = read_results(RESULTS)
    assert len(receipts) >= 2
    for receipt in receipts:
        if receipt.without_polyps:
            assert receipt.false_alarms and f": {alarm_words(receipt.false_alarms)}." in text, receipt.name
            continue
        cells = [cell_of(value) for value in receipt.stated.values()]
        assert f"| {size_of(receipt)} | {' | '.join(cells)} |" in text, receipt.name


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*.receipt.json")), ids=lambda path: f"{path.parent.name}-{path.name}"
)
def test_committed_receipts_are_what_their_images_give(path):
    assert check_receipt(path) == [] and path.stat().st_size < 500_000


def test_table_of_pretraining_runs_is_rendered_from_their_reports():
    folder = REPOSITORY / "docs" / "pretraining"
    assert (folder / "README.md").read_text() == render_index(folder)
    for report in folder.glob("*/representation.json"):
        assert (report.parent / "loss.png").is_file() and (report.parent / "neighbours.png").is_file()


def test_contrasts_in_the_readme_are_those_of_the_small_study():
    text = RESULTS_PAGE.read_text()
    contrasts = json.loads((STUDY / "twelve_small_files" / "contrasts.json").read_text())
    assert len(contrasts) == 4
    for row in contrasts:
        values = [(row[key], row[f"{key}_low"], row[f"{key}_high"]) for key in ("inside", "outside", "gap")]
        cells = [f"{number(m, signed=True)} {between(low, high, signed=True)}" for m, low, high in values]
        assert f"| {' | '.join(cells)} |" in text, row["contrast"]


@pytest.mark.slow
def test_small_study_says_what_its_receipts_give(tmp_path):
    with tarfile.open(STUDY / "twelve_small_receipts.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    kept = STUDY / "twelve_small.html"
    again = write_report(
        tmp_path / "receipts",
        tmp_path / kept.name,
        title=re.findall("<h1>(.*?)</h1>", kept.read_text())[0],
        inside="kvasir_seg.reference.test",
        outside="cvc_clinicdb.full.full",
        shift=sorted((tmp_path / "shift").glob("*.json")),
        reading=STUDY / "twelve_small.reading.md",
    )
    tables = sorted((STUDY / "twelve_small_files").glob("*.json"))
    assert {"comparison.json", "contrasts.json", "tests.json", "alarms.json"} <= {table.name for table in tables}
    for table in tables:
        rows = json.loads((again.with_name("twelve_small_files") / table.name).read_text())
        for row, before in zip(rows, json.loads(table.read_text()), strict=True):
            assert row.keys() == before.keys(), table.name
            for key, value in before.items():
                same = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
                assert row[key] == same, (table.name, key)
    assert words_of(again) == words_of(kept)


def words_of(page: Path) -> str:
    """The page's text without figures, telling cases (whose pictures need the images) and the version in its footer."""
    text = re.sub(
        r'<svg.*?</svg>|<section id="cases">.*?</section>|<footer>.*?</footer>', "", page.read_text(), flags=re.S
    )
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", text))
