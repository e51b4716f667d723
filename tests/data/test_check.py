"""What ``data check`` promises: every defect is named, every repeated frame is found, and nothing else is."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from polypseg.data.check import CheckReport, check_dataset
from polypseg.data.splits import reference_split
from polypseg.errors import UsageError

WIDTH, HEIGHT = 96, 80


def draw_frame(seed: int) -> NDArray[np.uint8]:
    """A smooth random frame, unlike that of any other seed."""
    coarse = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC))


def draw_mask(side: int = 20) -> NDArray[np.uint8]:
    """A square polyp of ``side`` pixels; none for 0."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask[10 : 10 + side, 10 : 10 + side] = 255
    return mask


class Folder:
    """A dataset folder to which pairs are added."""

    def __init__(self, path: Path):
        self.path = path
        for part in ("images", "masks"):
            (path / part).mkdir(parents=True)

    def image(self, name: str) -> Path:
        return self.path / "images" / name

    def mask(self, name: str) -> Path:
        return self.path / "masks" / name

    def add(self, stem: str, seed: int, *, side: int = 20) -> None:
        Image.fromarray(draw_frame(seed)).save(self.image(f"{stem}.png"))
        Image.fromarray(draw_mask(side)).save(self.mask(f"{stem}.png"))

    def check(self, name: str = "folder") -> CheckReport:
        return check_dataset(name, self.path)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Five good pairs, all different."""
    made = Folder(tmp_path / "mine")
    for seed in range(5):
        made.add(f"frame{seed}", seed)
    return made


def test_check_dataset_finds_a_good_folder_usable(folder):
    report = folder.check()
    assert report.ok and report.problems == []
    assert report.images == 5 and report.sizes == {f"{WIDTH}x{HEIGHT}": 5}
    assert report.near_duplicates == report.exact_duplicates == report.empty_masks == []
    assert report.polyp_share == pytest.approx(dict.fromkeys(("least", "mean", "greatest"), 400 / (WIDTH * HEIGHT)))


def test_check_dataset_lists_a_reencoded_frame_as_near_duplicate(folder):
    Image.fromarray(draw_frame(2)).save(folder.image("again.jpg"), quality=85)
    Image.fromarray(draw_mask()).save(folder.mask("again.png"))
    report = folder.check()
    assert report.near_duplicates == [("again", "frame2")]
    assert report.exact_duplicates == []
    assert report.ok  # a duplicate is to know, not a defect


def test_check_dataset_lists_an_exact_duplicate_in_both_lists(folder):
    folder.add("again", 2)
    report = folder.check()
    assert report.near_duplicates == report.exact_duplicates == [("again", "frame2")]


def test_check_dataset_lists_every_pair_of_three_equal_frames(folder):
    folder.add("again", 2)
    folder.add("again2", 2)
    assert {frozenset(pair) for pair in folder.check().exact_duplicates} == {
        frozenset(pair) for pair in (("again", "again2"), ("again", "frame2"), ("again2", "frame2"))
    }


def test_check_dataset_does_not_take_a_brighter_frame_for_a_duplicate(folder):
    brighter = np.clip(draw_frame(2).astype(int) + 12, 0, 255).astype(np.uint8)  # equal hash, other thumbnail
    Image.fromarray(brighter).save(folder.image("other.png"))
    Image.fromarray(draw_mask()).save(folder.mask("other.png"))
    assert folder.check().near_duplicates == []


def test_check_dataset_lists_empty_masks_without_refusing_them(folder):
    folder.add("healthy", 10, side=0)
    report = folder.check()
    assert report.empty_masks == ["healthy"] and report.ok
    assert report.polyp_share["least"] == 0


def test_check_dataset_names_a_truncated_frame_and_goes_on(folder):
    Image.fromarray(draw_frame(11)).save(folder.image("cut.jpg"))
    folder.image("cut.jpg").write_bytes(folder.image("cut.jpg").read_bytes()[:-200])
    Image.fromarray(draw_mask()).save(folder.mask("cut.png"))
    folder.add("wide", 12)
    Image.fromarray(draw_mask()[:, :50]).save(folder.mask("wide.png"))
    report = folder.check()
    assert not report.ok and len(report.problems) == 2
    assert "cut.jpg is truncated" in report.problems[0]
    assert "wide.png is 50x80" in report.problems[1] and "96x80" in report.problems[1]


def test_check_dataset_names_links_to_nothing_and_goes_on(folder, tmp_path):
    for file in (folder.image("gone.png"), folder.mask("gone.png")):
        file.symlink_to(tmp_path / "nowhere.png")
    report = folder.check()
    assert report.images == 6 and report.sizes == {f"{WIDTH}x{HEIGHT}": 5}
    assert [problem.split(": it is a link")[0] for problem in report.problems] == [
        f"cannot read {folder.image('gone.png')}"
    ]


def test_check_dataset_names_a_color_coded_mask(folder):
    colored = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    colored[:40, :, 0] = 255
    Image.fromarray(colored).save(folder.mask("frame3.png"))
    (problem,) = folder.check().problems
    assert "frame3.png is a color-coded mask" in problem


def test_check_dataset_names_a_mask_coded_with_small_numbers(folder):
    Image.fromarray(draw_mask() // 255).save(folder.mask("frame3.png"))
    (problem,) = folder.check().problems
    assert "frame3.png" in problem and "[0, 1]" in problem


@pytest.mark.parametrize(("part", "found"), [("masks", "have no mask"), ("images", "have no image")])
def test_check_dataset_names_a_file_without_partner(folder, part, found):
    (folder.path / part / "frame3.png").unlink()
    report = folder.check()
    assert not report.ok
    (problem,) = report.problems
    assert found in problem and "frame3.png" in problem


def test_check_dataset_finds_an_incomplete_set(folder):
    report = folder.check("kvasir_seg")
    assert report.problems[0].startswith("5 images instead of 1000")
    assert report.expected_images == 1000 and not report.ok


def test_check_dataset_of_a_folder_without_images_is_a_problem(tmp_path):
    (tmp_path / "bare").mkdir()
    report = check_dataset("folder", tmp_path / "bare")
    assert not report.ok and "no images in" in report.problems[0]


@pytest.mark.parametrize(("name", "found"), [("kvasir-seg", "Did you mean 'kvasir_seg'"), ("folder", "does not exist")])
def test_check_dataset_refuses_unknown_name_and_missing_path(tmp_path, name, found):
    with pytest.raises(UsageError, match=found):
        check_dataset(name, tmp_path / "nowhere")


def test_check_dataset_reports_duplicates_that_a_split_separates(tmp_path):
    folder = Folder(tmp_path / "mine")
    ids = [f"{index:02d}" for index in range(30)]
    parts = reference_split(ids)
    same, apart = parts["train"][:2], (parts["train"][2], parts["test"][0])
    twins = {same[1]: same[0], apart[1]: apart[0]}
    for frame_id in ids:
        folder.add(frame_id, int(twins.get(frame_id, frame_id)))
    report = folder.check()
    assert {frozenset(pair) for pair in report.near_duplicates} == {frozenset(same), frozenset(apart)}
    (crossing,) = report.across_splits["reference"]
    assert {crossing["a"], crossing["b"]} == set(apart)
    assert set(crossing["parts"].split("/")) == {"train", "test"}
    assert "sequence_disjoint" not in report.across_splits and "official" not in report.across_splits


def test_write_leaves_both_forms_with_the_pairs(folder, tmp_path):
    folder.add("again", 2)
    Image.fromarray(draw_mask()[:, :50]).save(folder.mask("frame4.png"))
    report = folder.check()
    markdown = report.write(tmp_path / "out")
    text = markdown.read_text(encoding="utf-8")
    assert "again ~ frame2" in text and "NOT usable" in text and "frame4.png is 50x80" in text
    content = json.loads((tmp_path / "out" / "folder.check.json").read_text(encoding="utf-8"))
    assert content["near_duplicates"] == [["again", "frame2"]]
    assert content["problems"] == report.problems and content["content_id"] == report.content_id
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "folder.check.json",
        "folder.check.md",
    ]


@pytest.mark.real_data
def test_check_dataset_finds_kvasir_segs_three_known_pairs(real_data):
    report = check_dataset("kvasir_seg", real_data / "Kvasir-SEG")
    assert report.ok, report.problems
    assert {frozenset(pair) for pair in report.near_duplicates} == {
        frozenset(("cju30bmab08bi0835mvlr6e0r", "cju77k828z46w0871r0avuoo9")),
        frozenset(("cju76lsehyia10987u54vn8rb", "cju772304yw5t0818vbw8kkjf")),
        frozenset(("cju886ryxnsl50801r93jai7q", "cju8amfdtqi4x09871tygrgqe")),
    }
    assert len(report.near_duplicates) == 3 and report.empty_masks == []
    assert {split: len(pairs) for split, pairs in report.across_splits.items()} == {
        "reference": 2,
        "official": 0,
    }
    assert report.polyp_share == pytest.approx({"least": 0.0047, "mean": 0.154, "greatest": 0.812}, abs=5e-4)


@pytest.mark.real_data
def test_check_dataset_finds_clinicdbs_pairs_inside_clips_only(real_data):
    report = check_dataset("cvc_clinicdb", real_data / "CVC-ClinicDB")
    assert report.ok, report.problems
    lines = (real_data / "CVC-ClinicDB" / "metadata.csv").read_text(encoding="utf-8").splitlines()[1:]
    clip = dict(line.split(",")[:2] for line in lines)
    assert len(report.near_duplicates) == 16
    assert all(clip[a] == clip[b] for a, b in report.near_duplicates)
    assert report.across_splits["sequence_disjoint"] == []
    assert report.across_splits["reference"]  # which is why the sequence-disjoint split exists


def test_check_dataset_takes_mask_values_and_says_when_they_match_nothing(folder):
    for seed in range(5):
        Image.fromarray(draw_mask() // 255).save(folder.mask(f"frame{seed}.png"))
    assert check_dataset("folder", folder.path, mask_values="1").ok
    (problem,) = check_dataset("folder", folder.path, mask_values="7").problems
    assert "no mask holds a pixel of the values 7" in problem


def test_check_dataset_tells_how_files_are_coded(folder):
    assert folder.check().forms == {"PNG, RGB": 5, "PNG, gray": 5}
    assert "- files: 5 PNG, RGB; 5 PNG, gray" in folder.check().to_markdown()
