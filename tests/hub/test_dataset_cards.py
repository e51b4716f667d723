"""What is promised of copies of datasets: their terms travel first, and what may not be republished stays private."""

import json
import logging
import re
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

import processes
from local_hub.process import running_hub
from polypseg.data.catalog import DATASETS, POPULATIONS, get_spec
from polypseg.errors import UsageError
from polypseg.hub.dataset_card import check_may_upload, license_of, load_references, push_dataset, render_dataset_card
from polypseg.provenance.license import DISCLAIMER

OPEN = ("hyperkvasir_labelled", "hyperkvasir_unlabelled", "polypgen", "synthetic_a", "synthetic_b")
CLOSED = tuple(name for name in DATASETS if name not in OPEN)


def card_of(name: str, **changes: object) -> str:
    facts = {
        "repo_id": "someone/copy",
        "split": "reference",
        "counts": {"train": 800, "validation": 100, "test": 100},
        "features": {"id": "the name", "image": "the frame"},
        "content_id": "0123456789abcdef",
    }
    return str(render_dataset_card(get_spec(name), **(facts | changes)))


def test_sets_that_may_not_be_republished_are_the_ones_that_their_owners_restrict():
    restricted = {"kvasir_seg", "cvc_clinicdb", "etis_larib", "cvc_colondb", "hyperkvasir_segmented", "neopolyp"}
    assert restricted | {"folder"} == set(CLOSED)


@pytest.mark.parametrize("name", CLOSED)
def test_public_copy_of_a_restricted_set_is_refused_with_its_terms(name):
    with pytest.raises(UsageError) as caught:
        check_may_upload(get_spec(name), private=False)
    assert get_spec(name).license in str(caught.value) and "private" in str(caught.value)


@pytest.mark.parametrize("options", [{"private": True}, {"private": False, "override": True}])
def test_private_copy_and_explicit_override_are_allowed_with_a_warning(options, caplog):
    with caplog.at_level(logging.WARNING, logger="polypseg.hub.dataset_card"):
        check_may_upload(get_spec("cvc_clinicdb"), **options)
    assert "CVC-ClinicDB" in caplog.text and "research and education only" in caplog.text
    assert ("override" in caplog.text) == ("override" in options)


@pytest.mark.parametrize("name", OPEN)
def test_open_set_may_be_public_without_a_word(name, caplog):
    check_may_upload(get_spec(name), private=False)
    assert not caplog.records


@pytest.mark.parametrize(
    ("name", "license"),
    [
        ("polypgen", ("cc-by-4.0", None, None)),
        ("hyperkvasir_labelled", ("cc-by-4.0", None, None)),
        ("synthetic_a", ("apache-2.0", None, None)),
        ("kvasir_seg", ("other", "kvasir-seg-terms", "https://datasets.simula.no/kvasir-seg/")),
        ("hyperkvasir_segmented", ("other", "hyperkvasir-segmented-terms", "https://datasets.simula.no/hyper-kvasir/")),
        ("folder", ("unknown", None, None)),
    ],
)
def test_license_of_a_copy_is_never_wider_than_the_sets_terms(name, license):
    assert license_of(get_spec(name)) == license


@pytest.mark.parametrize("name", DATASETS)
def test_card_of_every_set_holds_terms_counts_and_disclaimer(name):
    text = card_of(name)
    metadata = yaml.safe_load(text.split("---", maxsplit=2)[1])
    assert metadata["license"] == license_of(get_spec(name))[0]
    assert metadata["task_categories"] == ["image-segmentation"] and metadata["size_categories"] == ["1K<n<10K"]
    assert get_spec(name).license in text and DISCLAIMER in text and "| validation | 100 |" in text
    assert not re.search(r"\bNone\b|\bnan\b", text)
    assert ("do not allow publishing the images again" in text) == (name in CLOSED)


def test_card_of_cvc_clinicdb_cites_its_authors_and_tells_of_the_clips():
    text = card_of("cvc_clinicdb", counts={"full": 612}, split="full")
    assert load_references()["bernal2015wmdova"] in text and "29 video clips" in text
    assert "**Incomplete:**" not in text and "612 images of the published 612" in text


def test_card_of_a_part_says_that_it_is_incomplete():
    assert "**Incomplete:**" in card_of("kvasir_seg", counts={"train": 40})
    assert "**Incomplete:**" not in card_of("folder", counts={"full": 40})


def test_every_population_names_an_existing_reference():
    assert {population.reference for population in POPULATIONS.values()} <= set(load_references())


# -- pushing ----------------------------------------------------------------------------------------------------------


def write_frames(folder: Path, *, count: int) -> Path:
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 255, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"frame{i}.png")
        mask = np.zeros((24, 32), np.uint8)
        mask[4 : 8 + i, 5:20] = 255
        Image.fromarray(mask).save(folder / "masks" / f"frame{i}.png")
    return folder


def test_push_refuses_before_it_looks_for_the_data_or_the_hub(monkeypatch):
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("it went on")

    monkeypatch.setattr("polypseg.data.polyps.open_dataset", never)
    monkeypatch.setattr("polypseg.provenance.fetch.hub_api", never)
    with pytest.raises(UsageError, match="CVC-ClinicDB is not this package's to give away"):
        push_dataset("cvc_clinicdb", "someone/copy", private=False)


@pytest.mark.slow
def test_pushed_copy_comes_back_with_its_card_and_never_lands_in_a_public_repository(tmp_path):
    frames = write_frames(tmp_path / "frames", count=3)
    push = """
        import sys
        from pathlib import Path
        from polypseg.hub.dataset_card import push_dataset
        from polypseg.errors import UsageError
        try:
            print(push_dataset("folder", sys.argv[1], source=Path(sys.argv[2]), split="full"))
        except UsageError as error:
            print(f"refused: {error}")
    """
    read = """
        import json, sys
        import numpy as np
        from datasets import load_dataset
        from huggingface_hub import DatasetCard, HfApi
        data = load_dataset(sys.argv[1])["full"]
        card = DatasetCard.load(sys.argv[1])
        print(json.dumps({
            "ids": list(data["id"]),
            "masks": [int(np.array(row["mask"]).sum()) for row in data],
            "card": card.text,
            "metadata": card.data.to_dict(),
            "private": HfApi().dataset_info(sys.argv[1]).private,
            "commits": [commit.title for commit in HfApi().list_repo_commits(sys.argv[1], repo_type="dataset")],
        }, default=str))
    """
    public = """
        import sys
        from huggingface_hub import HfApi
        HfApi().create_repo(sys.argv[1], repo_type="dataset", private=False)
    """
    with running_hub(tmp_path / "hub", start=processes.start) as hub:
        environment = hub.environment(tmp_path / "home") | {"POLYPSEG_CACHE": str(tmp_path / "cache")}

        def run(code: str, *words: str) -> str:
            command = [sys.executable, "-c", textwrap.dedent(code), *words]
            done = processes.run(command, env=environment, capture_output=True, timeout=300)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""

        commit = run(push, "polypseg/copy", str(frames))
        assert re.fullmatch(r"[0-9a-f]{40}", commit)
        found = json.loads(run(read, "polypseg/copy"))
        assert found["private"] and found["ids"] == ["frame0", "frame1", "frame2"]
        assert found["masks"] == [15 * (4 + i) for i in range(3)]  # 0 and 1, not 0 and 255
        assert "yours to state" in found["card"] and found["metadata"]["license"] == "unknown"
        assert "dataset_info" in found["metadata"] and found["commits"].index("Add README.md") > 1  # newest first
        run(public, "polypseg/open")
        assert "refused: polypseg/open exists and is public" in run(push, "polypseg/open", str(frames))
