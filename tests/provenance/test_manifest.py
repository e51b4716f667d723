"""SHA256SUMS: the only thing that notices a flipped byte after a download."""

import shutil
import subprocess

import pytest

from polypseg.errors import PolypSegError
from polypseg.provenance.checksums import MANIFEST, find_mismatches, list_files, read_manifest, write_manifest


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "results").mkdir()
    (tmp_path / "model.safetensors").write_bytes(bytes(range(256)) * 40)
    (tmp_path / "results" / "kvasir seg.json").write_text("{}")
    (tmp_path / ".gitattributes").write_text("the Hub's own")
    (tmp_path / ".cache" / "huggingface").mkdir(parents=True)
    (tmp_path / ".cache" / "huggingface" / "x.lock").touch()
    write_manifest(tmp_path)
    return tmp_path


def test_manifest_lists_every_file_but_itself_and_the_hubs(folder):
    assert list(read_manifest(folder / MANIFEST)) == ["model.safetensors", "results/kvasir seg.json"]
    assert find_mismatches(folder, read_manifest(folder / MANIFEST)) == {}


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="needs coreutils")
def test_manifest_is_what_sha256sum_checks(folder):
    check = ["sha256sum", "--check", "--strict", MANIFEST]
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 0
    (folder / "model.safetensors").write_bytes(b"x")
    assert subprocess.run(check, cwd=folder, capture_output=True).returncode == 1


def test_one_flipped_bit_and_a_missing_file_are_found(folder):
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[5000] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "results" / "kvasir seg.json").unlink()
    manifest = read_manifest(folder / MANIFEST)
    assert find_mismatches(folder, manifest) == {
        "model.safetensors": "damaged",
        "results/kvasir seg.json": "missing",
    }
    assert find_mismatches(folder, manifest, only={"results/kvasir seg.json"}) == {"results/kvasir seg.json": "missing"}


def test_names_that_leave_the_folder_are_refused(folder):
    outside = folder.parent / "outside"
    outside.write_text("x")
    digest = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"  # of "x"
    assert find_mismatches(folder, {"../outside": digest, str(outside): digest}) == {
        "../outside": "outside the folder",
        str(outside): "outside the folder",
    }


@pytest.mark.parametrize("text", ["", "not a checksum\n", "00ff  short\n"])
def test_a_damaged_manifest_is_an_error_that_names_it(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(PolypSegError, match=MANIFEST):
        read_manifest(folder / MANIFEST)


def test_hidden_cache_files_are_not_listed(folder):
    assert all(".cache" not in name for name in list_files(folder))
