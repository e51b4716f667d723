"""A model as a function of batches: the same predictions as one by one, in workers of their own, faults as rows."""

import io
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image

from light_models import write_light_model
from polypseg import BatchSegmenter, load
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import SAMPLE_FRAMES, read_json, write_json

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_light_model(tmp_path / "model")


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Three frames and one that is cut off."""
    found = []
    for number, path in enumerate(sorted(SAMPLE_FRAMES.glob("*.jpg"))[:3]):
        small = Image.open(path).resize((120, 96))
        found.append(str(tmp_path / f"{number}.jpg"))
        small.save(found[-1])
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(Path(found[0]).read_bytes()[:900])
    return [*found[:2], str(broken), found[2]]


def check(rows: list[dict], files: list[str], folder: Path) -> None:
    for row, file in zip(rows, files, strict=True):
        if "broken" in file:
            assert "truncated" in row["problem"] and row["mask"] == b"" and row["lesions"] == -1
            assert math.isnan(row["polyp_share"])
            continue
        wanted = load(folder).predict(file)
        mask = np.asarray(Image.open(io.BytesIO(row["mask"])))
        assert set(np.unique(mask)) <= {0, 255} and np.array_equal(mask > 0, wanted.mask)
        assert row["problem"] == "" and row["lesions"] == len(wanted.lesions)
        assert row["polyp_share"] == pytest.approx(wanted.share)


def test_two_workers_of_datasets_give_what_one_by_one_gives(folder, files):
    frames = Dataset.from_dict({"image": files}).cast_column("image", ImageFeature(decode=False))
    segmented = frames.map(BatchSegmenter(model=str(folder)), batched=True, batch_size=2, num_proc=2)
    check(list(segmented), files, folder)


@pytest.mark.parametrize("kind", ["bytes", "path", "picture", "array"])
def test_frames_come_in_every_form_that_engines_hand_over(folder, files, kind):
    whole = [file for file in files if "broken" not in file]
    given = {
        "bytes": [Path(file).read_bytes() for file in whole],
        "path": whole,
        "picture": [Image.open(file) for file in whole],
        "array": [np.asarray(Image.open(file)) for file in whole],
    }[kind]
    columns = BatchSegmenter(model=str(folder), column="frame", keep=("path",))({"frame": given, "path": whole})
    assert columns.pop("path") == whole
    check([dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)], whole, folder)


def test_a_worker_gets_no_loaded_model_and_refuses_another_model(folder, files):
    sent = pickle.dumps(BatchSegmenter(model=str(folder)))
    assert len(sent) < 2000
    assert pickle.loads(sent)({"image": files[:1]})["problem"] == [""]
    settings = folder / "preprocessor_config.json"
    write_json(settings, read_json(settings) | {"image_std": [0.5, 0.5, 0.5]})
    with pytest.raises(PolypSegError, match="is another model here"):
        pickle.loads(sent)({"image": files[:1]})


def test_a_file_that_is_not_there_is_a_row(folder, files, tmp_path):
    found = BatchSegmenter(model=str(folder))({"image": [str(tmp_path / "none.jpg"), files[0]]})
    assert "none.jpg" in found["problem"][0] and found["problem"][1] == ""


def test_what_is_wrong_with_all_frames_stops_the_engine(folder):
    with pytest.raises(UsageError, match="no column 'image' but frame"):
        BatchSegmenter(model=str(folder))({"frame": []})
    with pytest.raises(UsageError, match="frame 0 of a batch is int"):
        BatchSegmenter(model=str(folder))({"image": [3]})
    with pytest.raises(UsageError):
        BatchSegmenter(model=str(folder / "none"))


@pytest.mark.slow
def test_the_example_of_the_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "archive" / "a").mkdir(parents=True)
    for path in sorted(SAMPLE_FRAMES.glob("*.jpg"))[:2]:
        (tmp_path / "archive" / "a" / path.name).write_bytes(path.read_bytes())
    text = (DOCS / "inference.md").read_text()
    (block,) = re.findall(r"```python\n(.*?BatchSegmenter.*?)```", text, re.DOTALL)
    exec(compile(block, "inference.md", "exec"), {"__name__": "__main__"})
    kept = Dataset.from_parquet(str(tmp_path / "archive.parquet"))
    assert len(kept) == 2 and kept["problem"][:] == ["", ""]
