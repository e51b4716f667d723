"""Files are written whole or not at all, failures name the remedy, and a run can say how it came to be."""

import csv
import errno
import json
import os
import re
import signal
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from polypseg import files as artifacts
from polypseg.errors import PolypSegError
from polypseg.files import (
    LOCK,
    UNFINISHED,
    atomic_path,
    cache_folder,
    environment_record,
    from_cell,
    read_json,
    remove_leftovers,
    sole_writer,
    to_cell,
    write_csv,
    write_json,
    write_text,
)

REPOSITORY = Path(__file__).resolve().parents[1]


def fail_with(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


# -- atomic_path -------------------------------------------------------------------------------------------------------


def test_atomic_path_writes_a_file_in_a_new_folder(tmp_path):
    path = tmp_path / "new" / "deep" / "report.txt"
    with atomic_path(path) as temporary:
        assert temporary.name == "report.txt", "writers may go by the suffix"
        temporary.write_text("whole")
        assert not path.exists(), "nothing is to be seen before the end"
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_atomic_path_writes_and_replaces_a_folder(tmp_path):
    path = tmp_path / "best"
    for content in ("first", "second"):
        with atomic_path(path) as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["second"], "no file of the former folder stays"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_replaces_a_file(tmp_path):
    path = write_text(tmp_path / "a.txt", "old and longer")
    assert write_text(path, "new") == path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failure", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3), PolypSegError("no")])
@pytest.mark.parametrize("existing", ["nothing", "file", "folder"])
def test_atomic_path_leaves_everything_as_it_was_when_the_block_fails(failure, existing, tmp_path):
    path = tmp_path / "result"
    if existing == "file":
        path.write_text("precious")
    elif existing == "folder":
        path.mkdir()
        (path / "weights").write_text("precious")
    with pytest.raises(type(failure)) as caught, atomic_path(path) as temporary:
        temporary.mkdir()
        (temporary / "half").write_text("written")
        raise failure
    assert caught.value is failure
    if existing == "nothing":
        assert list(tmp_path.iterdir()) == []
    else:
        assert list(tmp_path.iterdir()) == [path]
        assert (path if existing == "file" else path / "weights").read_text() == "precious"


def test_atomic_path_gives_two_writers_of_one_path_places_of_their_own(tmp_path):
    path = tmp_path / "result"
    with atomic_path(path) as one, atomic_path(path) as other:
        one.write_text("one")
        other.write_text("other")
    assert path.read_text() == "one"  # the outer block ends last
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_files_are_readable_as_usual(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    assert write_text(tmp_path / "ours", "").stat().st_mode == plain.stat().st_mode


REMEDIES = {
    errno.ENOSPC: "the disk is full: free some space",
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "read-only: choose another",
    errno.EACCES: "permission denied: choose a folder",
    errno.EPERM: "permission denied: choose a folder",
}


@pytest.mark.parametrize("number", REMEDIES, ids=errno.errorcode.get)
@pytest.mark.parametrize("stage", ["prepare", "write", "rename"])
def test_atomic_path_names_path_and_remedy(stage, number, tmp_path, monkeypatch):
    path = tmp_path / "run" / "report.txt"
    with monkeypatch.context() as patch:
        if stage == "prepare":
            patch.setattr(artifacts.tempfile, "mkdtemp", fail_with(number))
        elif stage == "write":
            patch.setattr(Path, "write_text", fail_with(number))
        else:
            patch.setattr(artifacts.os, "replace", fail_with(number))
        with pytest.raises(PolypSegError) as caught:
            write_text(path, "text")
    assert str(path) in str(caught.value) and REMEDIES[number] in str(caught.value)
    assert caught.value.exit_code == 1
    assert list(path.parent.iterdir()) == []


def test_atomic_path_passes_on_what_the_system_says_of_other_errors(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts.os, "replace", fail_with(errno.EIO))
    with pytest.raises(PolypSegError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "a", "text")


def test_atomic_path_names_a_file_that_stands_where_a_folder_is_needed(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(PolypSegError, match=r"cannot write .*taken"):
        write_text(tmp_path / "taken" / "deep" / "report.txt", "text")
    assert (tmp_path / "taken").read_text() == "a file"


@pytest.mark.parametrize("cause", ["rename fails", "block wrote nothing"])
def test_atomic_path_keeps_the_former_folder_when_it_cannot_put_the_new_one_there(cause, tmp_path, monkeypatch):
    path = tmp_path / "best"
    path.mkdir()
    (path / "weights").write_text("precious")
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        # Whatever brings the former folder back is let through.
        if Path(target) == path and (Path(source) / "new").exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(artifacts.os, "replace", refuse)
    with pytest.raises(PolypSegError), atomic_path(path) as temporary:
        if cause == "rename fails":
            temporary.mkdir()
            (temporary / "new").touch()
    assert (path / "weights").read_text() == "precious"


SYNC = artifacts._sync
"""As it was before the tests went without."""


class Disk:
    """Notes what is brought to the disk and what is renamed, in order; ``survives`` says what a reset would leave."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.synced: list[tuple[int, int]] = []
        self.renamed: list[Path] = []
        self.lost: list[str] = []
        """What a rename made visible before its content was on the disk."""
        replace, fsync = os.replace, os.fsync

        def note_sync(descriptor: int) -> None:
            fsync(descriptor)
            self.synced.append(self._key(os.fstat(descriptor)))

        def note_replace(source: Path, target: Path) -> None:
            here = Path(source)
            for place in (here, *here.rglob("*")):
                if not place.is_symlink() and self._key(place.stat()) not in self.synced:
                    self.lost.append(place.name)
            replace(source, target)
            self.renamed.append(Path(target))
            self.synced = [key for key in self.synced if key != self._key(Path(target).parent.stat())]

        monkeypatch.setattr(artifacts, "_sync", SYNC)
        monkeypatch.setattr(artifacts.os, "fsync", note_sync)
        monkeypatch.setattr(artifacts.os, "replace", note_replace)

    @staticmethod
    def _key(state: os.stat_result) -> tuple[int, int]:
        return state.st_dev, state.st_ino

    def has(self, path: Path) -> bool:
        """Whether the names in a folder were brought to the disk since the last rename in it."""
        return self._key(path.stat()) in self.synced


def test_atomic_path_brings_content_to_the_disk_before_the_name_and_the_name_before_it_ends(tmp_path, monkeypatch):
    disk = Disk(monkeypatch)
    write_text(tmp_path / "a.txt", "text")
    with atomic_path(tmp_path / "folder") as temporary:
        (temporary / "deep").mkdir(parents=True)
        (temporary / "deep" / "weights").write_bytes(b"weights")
        (temporary / "link").symlink_to("nowhere")
    assert disk.renamed == [tmp_path / "a.txt", tmp_path / "folder"]
    assert disk.lost == [] and disk.has(tmp_path)
    with atomic_path(tmp_path / "b.txt", sync_name=False) as temporary:
        temporary.write_text("text")
    assert disk.lost == [] and not disk.has(tmp_path)


@pytest.mark.parametrize(("number", "passes"), [(errno.EINVAL, True), (errno.ENOTSUP, True), (errno.EIO, False)])
def test_atomic_path_asks_for_no_more_than_the_file_system_can(number, passes, tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "_sync", SYNC)
    monkeypatch.setattr(artifacts.os, "fsync", fail_with(number))
    if passes:
        write_text(tmp_path / "a", "text")
        return
    with pytest.raises(PolypSegError, match=os.strerror(number)):
        write_text(tmp_path / "a", "text")
    assert list(tmp_path.iterdir()) == []


def killed_at(call: str, path: Path) -> None:
    """Replace the folder ``path`` in another process that is killed at a call of artifacts, or in the block."""
    program = f"""
import os, signal, sys
from pathlib import Path
from polypseg import files as artifacts
path, call = Path({str(path)!r}), {call!r}
calls, replace = [], os.replace
def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
def count(source, target):
    calls.append(1)
    if call == f"rename {{len(calls)}}":
        die()
    replace(source, target)
artifacts.os.replace = count
if call == "sync":
    artifacts._sync = die
with artifacts.atomic_path(path) as temporary:
    temporary.mkdir()
    (temporary / "new").write_text("new")
    if call == "block":
        die()
artifacts.shutil.rmtree = die
"""
    done = subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": str(REPOSITORY / "src")})
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("call", "left"), [("block", "old"), ("sync", "old"), ("rename 1", "old"), ("rename 2", "new")]
)
def test_what_a_killed_writer_left_is_removed_and_no_folder_is_lost(call, left, tmp_path):
    path = tmp_path / "best"
    path.mkdir()
    (path / "old").write_text("old")
    killed_at(call, path)
    assert len(list(tmp_path.glob(f".best.*{UNFINISHED}"))) == 1
    with sole_writer(tmp_path):
        assert [file.name for file in path.iterdir()] == [left]
        assert sorted(file.name for file in tmp_path.iterdir()) == [LOCK, "best"]


def test_a_living_writers_work_and_the_files_of_others_are_left_alone(tmp_path):
    (tmp_path / ".mine.unfinished.txt").touch()
    (tmp_path / f".just-made{UNFINISHED}").mkdir()
    (tmp_path / f".a-file{UNFINISHED}").touch()
    with atomic_path(tmp_path / "result") as temporary:
        temporary.write_text("whole")
        remove_leftovers(tmp_path)
        assert temporary.read_text() == "whole"
    kept = [".a-file.unfinished", ".just-made.unfinished", ".mine.unfinished.txt", "result"]
    assert sorted(file.name for file in tmp_path.iterdir()) == kept
    os.utime(tmp_path / kept[1], (0, 0))
    remove_leftovers(tmp_path)
    assert not (tmp_path / kept[1]).exists()


def test_the_first_file_written_into_a_folder_removes_what_is_left_there(tmp_path):
    (tmp_path / f".a.x{UNFINISHED}").mkdir()
    (tmp_path / f".a.x{UNFINISHED}" / LOCK).touch()
    write_text(tmp_path / "b", "text")
    assert [file.name for file in tmp_path.iterdir()] == ["b"]


def test_file_systems_without_locks_take_files_and_refuse_runs(tmp_path, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(artifacts.FileLock, "acquire", refuse)
    (tmp_path / f".a.x{UNFINISHED}").mkdir()
    (tmp_path / f".a.x{UNFINISHED}" / LOCK).touch()
    write_text(tmp_path / "b", "text")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f".a.x{UNFINISHED}", "b"]
    with pytest.raises(PolypSegError, match="its file system cannot lock files"), sole_writer(tmp_path):
        pass


# -- JSON --------------------------------------------------------------------------------------------------------------


def test_write_json_gives_back_what_was_written(tmp_path):
    content = {"naïve": [1, 2.5, None, True], "nested": {"path": "Größe"}}
    path = write_json(tmp_path / "a.json", content)
    assert read_json(path) == content
    text = path.read_text(encoding="utf-8")
    assert "Größe" in text and text.endswith("\n") and len(text.splitlines()) > 4, "for people to read"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_nan_and_keeps_the_former_file(value, tmp_path):
    path = write_json(tmp_path / "a.json", {"dice": 0.5})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"dice": value})
    assert read_json(path) == {"dice": 0.5}
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("damaged", [b"", b'{"dice": 0.', b"\x00" * 40, b"not json"])
def test_read_json_of_a_damaged_file_names_it_and_the_remedy(damaged, tmp_path):
    path = tmp_path / "progress.json"
    path.write_bytes(damaged)
    with pytest.raises(PolypSegError, match=r"cannot read .*progress\.json.*Delete it"):
        read_json(path)


def test_read_json_of_a_file_that_is_no_text_names_it_and_the_remedy(tmp_path):
    test_read_json_of_a_damaged_file_names_it_and_the_remedy(b'{"dice": "\xff\xfe"}', tmp_path)


def test_read_json_of_a_missing_file_names_it(tmp_path):
    with pytest.raises(PolypSegError, match=r"cannot read .*absent\.json"):
        read_json(tmp_path / "absent.json")
    with pytest.raises(PolypSegError, match="cannot read"):
        read_json(tmp_path)


# -- record ------------------------------------------------------------------------------------------------------------


def test_environment_record_holds_versions_platform_and_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/local/bin/polypseg", "finetune", "--set", "seed=1"])
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    record = environment_record()
    assert {"polypseg", "torch", "torchvision", "timm", "transformers", "numpy", "pillow"} <= set(record["versions"])
    assert all(re.match(r"\d+\.\d+", version) for version in record["versions"].values())
    assert record["versions"]["numpy"] == __import__("numpy").__version__
    assert record["python"] == ".".join(map(str, sys.version_info[:3]))
    assert record["omp_num_threads"] == "3"
    # absolute paths lose their private part
    assert record["command"] == ["bin/polypseg", "finetune", "--set", "seed=1"]
    age = datetime.now(UTC) - datetime.fromisoformat(record["created"])
    assert timedelta(0) <= age < timedelta(minutes=1), "the time is UTC and says so"
    assert json.loads(json.dumps(record)) == record


@pytest.fixture
def _asked_anew():
    artifacts.git_revision.cache_clear()
    yield
    artifacts.git_revision.cache_clear()


def test_environment_record_names_the_checkouts_commit():
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the tests run outside a checkout")
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", environment_record()["git_revision"])


@pytest.mark.usefixtures("_asked_anew")
def test_environment_record_has_no_commit_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(artifacts, "__file__", str(tmp_path / "artifacts.py"))
    assert environment_record()["git_revision"] is None


@pytest.mark.usefixtures("_asked_anew")
def test_environment_record_has_no_commit_when_the_file_is_in_somebody_elses_repository(tmp_path, monkeypatch):
    if not (REPOSITORY / ".git").exists():
        pytest.skip("the tests run outside a checkout")
    monkeypatch.setattr(artifacts, "__file__", str(REPOSITORY / "site-packages-artifacts.py"))
    assert environment_record()["git_revision"] is None


@pytest.mark.usefixtures("_asked_anew")
def test_environment_record_works_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert environment_record()["git_revision"] is None


def test_environment_record_leaves_out_packages_that_are_not_installed(monkeypatch):
    monkeypatch.setattr(artifacts, "PACKAGES", ("numpy", "no-such-package"))
    assert set(environment_record()["versions"]) == {"polypseg", "numpy"}


def test_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("POLYPSEG_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("POLYPSEG_CACHE")
    assert cache_folder() == tmp_path / "xdg" / "polypseg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    assert cache_folder() == tmp_path / ".cache" / "polypseg"


@pytest.mark.parametrize("text", ["=1+1", "+cmd", "-x", "@SUM(A1)", "\tx", "'=x", "''-x"])
def test_texts_that_spreadsheets_would_run_are_quoted_and_come_back(tmp_path, text):
    path = write_csv(tmp_path / "t.csv", [{"name": text, "value": -0.5}])
    row = next(csv.DictReader(path.open(newline="")))
    assert row["name"] == f"'{text}" and from_cell(row["name"]) == text
    assert row["value"] == "-0.5"


@pytest.mark.parametrize("text", ["-0.5", "+3", "-1e-7", "frame 1", "a=b", "-", "'quoted'", ""])
def test_numbers_and_plain_texts_stay_as_they_are_in_csv(text):
    assert to_cell(text) == text == from_cell(to_cell(text))


def test_names_that_are_no_utf8_and_names_of_255_bytes_can_be_written(tmp_path):
    path = write_json(tmp_path / "names.json", [os.fsdecode(b"p\xe9.png")])
    assert read_json(path) == [os.fsdecode(b"p\xe9.png")]
    write_text(tmp_path / ("n" * 251 + ".txt"), "long")
