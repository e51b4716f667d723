"""What the ``polypseg`` command promises: names to copy, a quick start, and one line for every mistake."""

import dataclasses
import hashlib
import json
import os
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from PIL import Image

from polypseg import __version__, zoo
from polypseg.cli.app import COMMANDS, app
from polypseg.cli.console import print_table, run_app, run_script
from polypseg.data.catalog import DATASETS
from polypseg.errors import PolypSegError
from polypseg.inference.quality import read_quality
from polypseg.provenance.local import STARTER_FOLDER, vouched_results
from polypseg.tables import Column, Table
from polypseg.zoo import ZOO

BODY = np.random.default_rng(0).bytes(100_000)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str

    def assert_one_error_line(self, code: int, *contents: str) -> None:
        """The error is one line with these contents, and there is no traceback."""
        assert self.code == code, self.err
        assert "Traceback" not in self.err + self.out
        errors = [line for line in self.err.splitlines() if line]
        assert len(errors) == 1 and errors[0].startswith("error: "), self.err
        for content in contents:
            assert content in errors[0]


@pytest.fixture
def polypseg(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """Run the command inside this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["polypseg", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            run_app(app)
        out, err = capfd.readouterr()
        return Outcome(int(caught.value.code or 0), out, err)

    return call


def run_process(*command: str) -> subprocess.CompletedProcess[str]:
    """A fresh process without a terminal, as behind a pipe."""
    environment = {k: v for k, v in os.environ.items() if k != "COLUMNS"}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=environment, timeout=120)


def installed_command() -> str:
    """The command beside this interpreter."""
    command = Path(sys.executable).parent / "polypseg"
    if not command.is_file():
        pytest.skip(f"the polypseg command is not installed beside {sys.executable}: pip install -e .")
    return str(command)


def write_pair(folder: Path, name: str, *, mask_size: tuple[int, int] = (48, 40)) -> None:
    """A frame of 48x40 pixels with a mask that has a polyp."""
    frame = np.random.default_rng(len(name)).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    mask = np.zeros(mask_size[::-1], dtype=np.uint8)
    mask[10:20, 10:20] = 255
    for part, pixels in (("images", frame), ("masks", mask)):
        (folder / part).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / part / f"{name}.png")


# -- what it prints -------------------------------------------------------------------------------------


def test_help_names_every_command():
    shown = run_process(installed_command(), "--help")
    assert shown.returncode == 0 and shown.stderr == ""
    assert all(command in shown.stdout for command in ("models", "data", "study"))
    assert "Not a medical device" in " ".join(shown.stdout.replace("│", " ").split())


def test_models_prints_every_id_whole_behind_a_pipe():
    shown = run_process(installed_command(), "models")
    assert shown.returncode == 0
    for entry in ZOO:
        for cell in (entry.short_name, entry.license, entry.upstream.location, entry.upstream.license_source):
            assert cell in shown.stdout
    missing = [entry.model_id for entry in ZOO if entry.model_id not in shown.stdout]
    assert not missing, f"cut off or absent:\n{shown.stdout}"


def test_models_states_the_packages_results_from_any_folder(polypseg, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    shown = " ".join(polypseg("models").out.split())
    assert read_quality(STARTER_FOLDER).words in shown and "license apache-2.0-and-kvasir-seg-terms" in shown
    assert all(folder.name in shown for folder in vouched_results().iterdir())
    assert polypseg("models", "--results", "nothing").out.endswith("name a folder of them with --results\n")


def test_data_list_prints_every_name_whole_behind_a_pipe():
    shown = run_process(installed_command(), "data", "list")
    assert shown.returncode == 0
    missing = [name for name in DATASETS if name not in shown.stdout]
    assert not missing, f"cut off or absent: {missing}\n{shown.stdout}"


def test_tables_print_every_name_in_a_wide_terminal(polypseg, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    names = polypseg("data", "list").out
    assert all(name in names and spec.title in names for name, spec in DATASETS.items())
    assert DATASETS["kvasir_seg"].url in names
    ids = polypseg("models").out
    assert all(entry.model_id in ids for entry in ZOO)


@pytest.mark.parametrize("arguments", [["--help"], ["models"], ["data", "list"], ["data", "get", "cvc_clinicdb"]])
def test_command_starts_without_torch(arguments):
    program = (
        "import sys, polypseg_command\n"
        f"sys.argv = ['polypseg', *{arguments!r}]\n"
        "try:\n    polypseg_command.main()\n"
        "except SystemExit as stop:\n    assert stop.code in (0, 2), stop.code\n"
        "heavy = {'torch', 'timm', 'transformers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    finished = run_process(sys.executable, "-c", program)
    assert finished.returncode == 0, finished.stderr


def test_no_argument_shows_help(polypseg):
    assert "Usage" in "".join(dataclasses.astuple(polypseg())[1:])


# -- mistakes -------------------------------------------------------------------------------------------

STUDY = ("study", "--output", "never")


@pytest.mark.parametrize(
    ("arguments", "contents"),
    [
        (
            ("data", "check", "kvasir-seg", "."),
            ("unknown dataset 'kvasir-seg'", "Did you mean 'kvasir_seg'?"),
        ),
        (("data", "get", "cvc_clinic"), ("unknown dataset 'cvc_clinic'", "Did you mean 'cvc_clinicdb'?")),
        (("data", "get", "cvc_clinicdb"), ("CVC-ClinicDB", "Register at https://polyp.grand-challenge.org")),
        (("data", "get", "folder"), ("needs no download",)),
        (("data", "check", "folder", "nowhere"), ("nowhere does not exist",)),
        (
            (*STUDY, "--model", "vit_base_dpt.mae_imagenet"),
            ("unknown model", "Did you mean 'vit_base_dpt.mae_imagenet1k'?"),
        ),
        ((*STUDY, "--scale", "smal"), ("unknown scale 'smal'", "Did you mean 'small'?")),
        ((*STUDY, "--set", "training.epoch=2"), ("training.epoch'", "Did you mean 'training.epochs'?")),
        ((*STUDY, "--set", "epochs"), ("--set 'epochs' must look like",)),
        ((*STUDY, "--set", "trainin.epochs=2"), ("no section 'trainin'",)),
        ((*STUDY, "--set", "training.epochs=two"), ("'training.epochs'", "'two'")),
        ((*STUDY, "--set", "training.epochs=["), ("training.epochs=[",)),
        ((*STUDY, "--in-distribution", "kvasir_sg"), ("Did you mean 'kvasir_seg'?",)),
        ((*STUDY, "--encoder-weights", "x.pth"), ("must look like MODEL=WEIGHTS",)),
        ((*STUDY, "--plan"), ("--plan does not apply: it is of a grid",)),
        ((*STUDY, "--grid", "twelve_small", "--scale", "small"), ("--scale does not apply",)),
        ((*STUDY, "--grid", "smoke", "--plan"), ("--plan does not apply", "smoke has one")),
        ((*STUDY, "--grid", "full", "--in-distribution", "kvasir_seg"), ("--in-distribution does not apply",)),
        ((*STUDY, "--grid", "full"), ("no pretraining weights", "--start-from-available")),
        ((*STUDY, "--in-distribution", "synthetic_b"), ("against itself",)),
        ((*STUDY, "--source", "somewhere"), ("say of which dataset", "synthetic_a=somewhere")),
        ((*STUDY, "--source", "kvasir_seg=somewhere"), ("this command uses synthetic_a, synthetic_b",)),
        ((*STUDY, "--in-distribution", "kvasir_seg", "--source", "kvasir_seg=nowhere"), ("nowhere does not exist",)),
        ((*STUDY, "--encoder-weights", "RN-IN-MC"), ("must look like MODEL=WEIGHTS",)),
        ((*STUDY, "--scale", "full"), ("no pretraining weights", "--start-from-available")),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) and value[0] in ("data", "study") else "",
)
def test_mistake_is_one_line_and_exit_code_2(polypseg, tmp_path, arguments, contents):
    polypseg(*arguments).assert_one_error_line(2, *contents)
    assert list(tmp_path.iterdir()) == []


def test_study_names_an_unknown_split_before_it_writes(polypseg, tmp_path):
    outcome = polypseg(*STUDY, "--split", "sequence_disjoint")
    outcome.assert_one_error_line(2, "no split 'sequence_disjoint'", "reference")
    assert list(tmp_path.iterdir()) == []


def test_study_accepts_a_part_of_a_dataset_only_when_told(polypseg, tmp_path):
    write_pair(tmp_path / "part", "a")
    arguments = (*STUDY, "--in-distribution", "kvasir_seg", "--source", "kvasir_seg=part")
    polypseg(*arguments).assert_one_error_line(2, "part holds 1 images", "--allow-partial")
    polypseg(*arguments, "--allow-partial", "--source", "synthetic_b=x").assert_one_error_line(
        2, "leave out the source x"
    )


SCRIPTS = Path(__file__).resolve().parents[2] / "training_scripts"
FINETUNE, EVALUATE = ("finetune", "--output", "never"), ("evaluate", "--model", "x", "--dataset", "folder")


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capfd: Any, tmp_path: Path) -> Callable[..., Outcome]:
    """Run a training script inside this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(name: str, *arguments: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        out, err = capfd.readouterr()
        return Outcome(int(caught.value.code or 0), out, err)

    return call


def test_finetune_starts_a_pretrained_row_at_random_only_when_told(script, tmp_path):
    outcome = script(*FINETUNE, "--model", "RN-IN-MC")
    outcome.assert_one_error_line(2, "give its weights, or say --encoder-weights random")
    told = script(*FINETUNE, "--model", "RN-IN-MC", "--encoder-weights", "random", "--source", "nowhere")
    told.assert_one_error_line(2, "nowhere does not exist")
    script(*FINETUNE, "--model", "RN-NA-NA", "--source", "nowhere").assert_one_error_line(2, "nowhere does not exist")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (*FINETUNE, "--model", "RN-NA-NA", "--workers", "-1"),
        (*EVALUATE, "--limit", "0"),
        (*EVALUATE, "--batch-size", "0"),
    ],
    ids=lambda value: value[-2],
)
def test_scripts_refuse_impossible_counts(script, arguments):
    outcome = script(*arguments)
    assert outcome.code == 2 and "Invalid value" in outcome.err and "Traceback" not in outcome.err


def test_study_refuses_an_impossible_limit(polypseg):
    outcome = polypseg(*STUDY, "--limit", "0")
    assert outcome.code == 2 and "Invalid value" in outcome.err


@pytest.mark.parametrize("arguments", [("--bogus",), ("data", "list", "--bogus"), ("nonsense",), ("data", "get")])
def test_unknown_option_is_exit_code_2(polypseg, arguments):
    outcome = polypseg(*arguments)
    assert outcome.code == 2 and "Traceback" not in outcome.err
    assert "Usage" in outcome.err


def test_installed_command_reports_a_mistake_in_one_line():
    finished = run_process(installed_command(), "data", "check", "kvasir-seg", ".")
    outcome = Outcome(finished.returncode, finished.stdout, finished.stderr)
    outcome.assert_one_error_line(2, "Did you mean 'kvasir_seg'?")


def test_run_app_ends_an_interrupt_with_130(monkeypatch, capfd):
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["script"])
    with pytest.raises(SystemExit) as caught:
        run_script(interrupted)
    assert caught.value.code == 130
    assert "Traceback" not in capfd.readouterr().err


def test_run_script_reports_a_failure_with_1(monkeypatch, capfd):
    def failing(number: int = 1) -> None:
        raise PolypSegError(f"file {number} is broken")

    monkeypatch.setattr(sys, "argv", ["script", "--number", "7"])
    with pytest.raises(SystemExit) as caught:
        run_script(failing)
    assert caught.value.code == 1
    assert capfd.readouterr().err == "error: file 7 is broken\n"


# -- data check -----------------------------------------------------------------------------------------


def test_data_check_of_a_good_folder_succeeds_and_names_the_report(polypseg, tmp_path):
    for name in ("a", "bb", "ccc"):
        write_pair(tmp_path / "mine", name)
    outcome = polypseg("data", "check", "folder", "mine", "--output", "out")
    assert outcome.code == 0, outcome.err
    assert "# folder: usable" in outcome.out and "images: 3" in outcome.out
    assert "out/folder.check.md" in outcome.out
    written = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert written == ["folder.check.json", "folder.check.md"]


def test_data_check_of_a_broken_folder_is_exit_code_1_with_a_report(polypseg, tmp_path):
    write_pair(tmp_path / "mine", "a")
    write_pair(tmp_path / "mine", "wrong", mask_size=(24, 20))
    outcome = polypseg("data", "check", "folder", "mine", "--output", "out")
    outcome.assert_one_error_line(1, "mine has 1 problem", "wrong.png is 24x20")
    assert "NOT usable" in (tmp_path / "out" / "folder.check.md").read_text(encoding="utf-8")


def test_data_check_that_cannot_write_its_report_says_where(polypseg, tmp_path):
    write_pair(tmp_path / "mine", "a")
    (tmp_path / "out").write_text("a file, no folder")
    outcome = polypseg("data", "check", "folder", "mine", "--output", "out")
    outcome.assert_one_error_line(1, "cannot write out")


# -- data get -------------------------------------------------------------------------------------------


class Archive(BaseHTTPRequestHandler):
    """Serves BODY at every address."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def published(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Moves Kvasir-SEG's archive to a server of this test; options are fields of its row."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with ThreadingHTTPServer(("127.0.0.1", 0), Archive) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()

        def move(**fields: Any) -> None:
            url = f"http://127.0.0.1:{server.server_port}/kvasir-seg.zip"
            digest = hashlib.sha256(BODY).hexdigest()
            values = {"url": url, "archive_size": len(BODY), "archive_sha256": digest} | fields
            monkeypatch.setitem(DATASETS, "kvasir_seg", dataclasses.replace(DATASETS["kvasir_seg"], **values))

        yield move
        server.shutdown()
        thread.join()


def test_data_get_stores_the_archive_and_says_the_terms(polypseg, published, tmp_path):
    published()
    outcome = polypseg("data", "get", "kvasir_seg", "--output", "store")
    assert outcome.code == 0, outcome.err
    assert (tmp_path / "store" / "kvasir-seg.zip").read_bytes() == BODY
    assert "research and education only" in outcome.out and "Jha et al." in outcome.out
    assert "polypseg data check kvasir_seg store/kvasir-seg.zip" in outcome.out
    assert [file.name for file in (tmp_path / "store").iterdir()] == ["kvasir-seg.zip"]


def test_data_get_refuses_other_bytes_than_the_published(polypseg, published, tmp_path):
    published(archive_sha256="0" * 64)
    polypseg("data", "get", "kvasir_seg", "--output", "store").assert_one_error_line(1, "kvasir-seg.zip")
    assert not (tmp_path / "store" / "kvasir-seg.zip").exists()


def test_data_get_says_when_no_checksum_is_known(polypseg, published):
    published(archive_sha256=None)
    outcome = polypseg("data", "get", "kvasir_seg")
    assert outcome.code == 0 and "No checksum" in outcome.out


@pytest.mark.parametrize(("panel", "name", "function", "examples"), COMMANDS, ids=[row[1] for row in COMMANDS])
def test_every_command_shows_two_examples_whose_options_it_has(panel, name, function, examples):
    assert len(examples) == 2 and panel
    options = {option for p in command_of(name).params for option in p.opts}
    for example in examples:
        words = shlex.split(example)
        assert words[:2] == ["polypseg", name]
        assert {word for word in words if word.startswith("--")} <= options, example


def command_of(name):
    return typer.main.get_command(app).commands[name]


def test_version_and_short_help(polypseg):
    assert polypseg("--version").out == f"polypseg {__version__}\n"
    assert "Examples:" in polypseg("diagnose", "-h").out


def test_json_is_all_that_is_printed(polypseg):
    rows = json.loads(polypseg("models", "--json").out)
    assert len(rows) == len(zoo.rows()) and rows[0]["model_id"] == zoo.rows()[0].model_id
    assert {row["name"] for row in json.loads(polypseg("data", "list", "--json").out)} == set(DATASETS)
    assert json.loads(polypseg("diagnose", "0.8", "0.7", "--json").out)["possible"]
    assert json.loads(polypseg("verify", "starter", "--json").out)["problems"] == {}


def test_a_narrow_terminal_drops_optional_columns_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("FORCE_COLOR", "1")
    columns = [Column("name", "name"), *(Column(key, key, optional=True) for key in ("what it is", "where"))]
    row = {"name": "a", "what it is": "x" * 20, "where": "https://example.org/a/long/address"}
    print_table(Table(columns=columns, records=[row]), wide=False)
    shown = capsys.readouterr().out
    assert "example.org" not in shown and "xxxx" in shown and "left out on this narrow screen: where" in shown
    print_table(Table(columns=[columns[0], columns[2]], records=[]), wide=True)
