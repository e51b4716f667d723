"""What a user may rely on when data is split: the study's parts, by name, on every machine, without leaks."""

import csv
import itertools
from pathlib import PurePosixPath

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import train_test_split

from polypseg.data.catalog import clinicdb_sequence
from polypseg.data.images import decode_frame, decode_mask
from polypseg.data.polyps import open_dataset
from polypseg.data.splits import (
    DESCRIPTIONS,
    alike_disjoint_split,
    make_split,
    pinned_split,
    reference_split,
    sequence_disjoint_split,
)
from polypseg.errors import UsageError
from polypseg.pretraining.probes.labeled import load_labeled

CLINICDB_IDS = sorted((str(frame) for frame in range(1, 613)), key=lambda frame: f"{frame}.png")
CLIPS = {frame: clinicdb_sequence(frame, "") for frame in CLINICDB_IDS}
PINNED = [
    ("kvasir_seg", "reference", {"train": 800, "validation": 100, "test": 100}),
    ("kvasir_seg", "official", {"train": 880, "test": 120}),
    ("cvc_clinicdb", "reference", {"train": 490, "validation": 61, "test": 61}),
    ("cvc_clinicdb", "sequence_disjoint", {"train": 462, "validation": 84, "test": 66}),
]


def all_ids(split):
    return list(itertools.chain.from_iterable(split.values()))


def scikit_learn_split(ids):
    """The reference's own code: train_test_split, twice, the same number of images both times."""
    size = round(0.1 * len(ids))
    rest, test = train_test_split(ids, test_size=size, random_state=42)
    train, validation = train_test_split(rest, test_size=size, random_state=42)
    return {"train": train, "validation": validation, "test": test}


# The functions


@pytest.mark.parametrize("count", [1000, 612, 37, 6])
def test_reference_split_equals_scikit_learn_applied_twice(count):
    ids = [f"frame{i}" for i in range(count)]
    assert reference_split(ids) == scikit_learn_split(ids)


@settings(deadline=None)
@given(st.integers(min_value=6, max_value=1500))
def test_reference_split_equals_scikit_learn_for_any_count(count):
    ids = [str(i) for i in range(count)]
    assert reference_split(ids) == scikit_learn_split(ids)


@settings(deadline=None, max_examples=50)
@given(st.sets(st.text(min_size=1, max_size=6), max_size=80))
def test_reference_split_uses_every_id_once(ids):
    split = reference_split(sorted(ids))
    assert sorted(all_ids(split)) == sorted(ids)
    assert len(split["test"]) == len(split["validation"]) == round(0.1 * len(ids))


@settings(deadline=None, max_examples=50)
@given(st.dictionaries(st.text(min_size=1, max_size=4), st.integers(1, 12).map(str), max_size=60))
def test_sequence_disjoint_split_never_cuts_a_sequence(groups):
    split = sequence_disjoint_split(groups)
    assert sorted(all_ids(split)) == sorted(groups)
    for one, other in itertools.combinations(split.values(), 2):
        assert not {groups[i] for i in one} & {groups[i] for i in other}


@settings(deadline=None, max_examples=20)
@given(st.randoms(use_true_random=False))
def test_sequence_disjoint_split_does_not_depend_on_the_order_of_files(random):
    items = list(CLIPS.items())
    random.shuffle(items)
    assert sequence_disjoint_split(dict(items)) == sequence_disjoint_split(CLIPS)


# The pinned lists


@pytest.mark.parametrize(("dataset", "name", "sizes"), PINNED)
def test_pinned_split_has_the_published_sizes(dataset, name, sizes):
    split = pinned_split(dataset, name)
    assert {part: len(ids) for part, ids in split.items()} == sizes


@pytest.mark.parametrize(("dataset", "name", "sizes"), PINNED)
def test_pinned_split_is_disjoint_and_complete(dataset, name, sizes):
    ids = all_ids(pinned_split(dataset, name))
    assert len(set(ids)) == len(ids) == sum(sizes.values())
    assert set(ids) == set(all_ids(pinned_split(dataset, "reference")))


def test_pinned_clinicdb_ids_are_the_frames_1_to_612():
    assert set(all_ids(pinned_split("cvc_clinicdb", "reference"))) == set(CLINICDB_IDS)


@pytest.mark.parametrize(("dataset", "suffix"), [("kvasir_seg", ".jpg"), ("cvc_clinicdb", ".png")])
def test_pinned_reference_equals_the_function_on_names_sorted_as_strings(dataset, suffix):
    """The list is no more than the function's output, so it can be derived again from the file names."""
    pinned = pinned_split(dataset, "reference")
    names = sorted(f"{i}{suffix}" for i in all_ids(pinned))
    ids = [name.removesuffix(suffix) for name in names]
    assert reference_split(ids) == pinned
    assert scikit_learn_split(ids) == pinned


def test_pinned_clinicdb_reference_needs_the_order_of_strings():
    """'1', '10', '100' ...: in numeric order the same code would give other parts."""
    numeric = reference_split([str(frame) for frame in range(1, 613)])
    assert set(numeric["test"]) != set(pinned_split("cvc_clinicdb", "reference")["test"])


def test_pinned_sequence_disjoint_has_no_clip_in_two_parts():
    split = pinned_split("cvc_clinicdb", "sequence_disjoint")
    clips = {part: {CLIPS[frame] for frame in ids} for part, ids in split.items()}
    assert all(clips.values())
    assert sum(len(part) for part in clips.values()) == len(set().union(*clips.values())) == 29


def test_pinned_sequence_disjoint_equals_the_function():
    assert pinned_split("cvc_clinicdb", "sequence_disjoint") == sequence_disjoint_split(CLIPS)


def test_pinned_clinicdb_reference_leaks_clips():
    """Why the sequence-disjoint split exists: split by frame, every part shares clips with train."""
    split = pinned_split("cvc_clinicdb", "reference")
    assert {CLIPS[i] for i in split["test"]} & {CLIPS[i] for i in split["train"]}


def test_clinicdb_sequence_covers_29_clips_in_order():
    clips = [int(clinicdb_sequence(str(frame), "")) for frame in range(1, 613)]
    assert clips == sorted(clips)
    assert set(clips) == set(range(1, 30))
    assert clinicdb_sequence("613", "") == "unknown"


# By name


@pytest.mark.parametrize(("dataset", "name", "sizes"), PINNED)
def test_make_split_gives_the_pinned_list_on_the_complete_set(dataset, name, sizes):
    pinned = pinned_split(dataset, name)
    assert make_split(dataset, name, ids=sorted(all_ids(pinned))) == pinned


def test_make_split_keeps_present_ids_in_their_part_for_a_partial_set():
    """Some frames of a set must not turn test frames into training frames."""
    pinned = pinned_split("kvasir_seg", "reference")
    kept = {part: ids[:3] for part, ids in pinned.items()}
    assert make_split("kvasir_seg", "reference", ids=sorted(all_ids(kept))) == kept


def test_make_split_full_is_one_part_in_the_given_order():
    assert make_split("folder", "full", ids=["1", "10", "2"]) == {"full": ["1", "10", "2"]}


def test_make_split_falls_back_to_the_functions_without_a_pinned_list():
    ids = [str(i) for i in range(40)]
    clips = {i: str(int(i) // 4) for i in ids}
    assert make_split("folder", "reference", ids=ids) == reference_split(ids)
    split = make_split("folder", "sequence_disjoint", ids=ids, sequences=clips)
    assert split == sequence_disjoint_split(clips)


@pytest.mark.parametrize(
    ("dataset", "sequences", "choices"),
    [("folder", None, ["full", "reference"]), ("cvc_clinicdb", CLIPS, ["full", "reference", "sequence_disjoint"])],
)
def test_make_split_lists_the_choices_for_an_unknown_name(dataset, sequences, choices):
    with pytest.raises(UsageError) as raised:
        make_split(dataset, "by_moon", ids=CLINICDB_IDS, sequences=sequences)
    assert f"dataset '{dataset}' has no split 'by_moon'" in str(raised.value)
    assert str(raised.value).endswith("choose from " + ", ".join(choices))


def test_make_split_refuses_sequence_disjoint_without_sequences():
    with pytest.raises(UsageError, match=r"no split 'sequence_disjoint'; choose from full, reference"):
        make_split("folder", "sequence_disjoint", ids=["a"])


def test_descriptions_name_every_pinned_split():
    assert {name for _, name, _ in PINNED} | {"full", "hyperkvasir"} == set(DESCRIPTIONS)


def test_make_split_offers_the_official_split_of_kvasir_seg():
    with pytest.raises(UsageError, match="official"):
        make_split("kvasir_seg", "by_moon", ids=["a"])


# The real files


@pytest.mark.real_data
@pytest.mark.parametrize("dataset", ["kvasir_seg", "cvc_clinicdb"])
def test_pinned_reference_equals_the_function_on_the_real_folder(real_data, dataset):
    opened = open_dataset(dataset, data_dir=real_data)
    assert opened.split("reference") == reference_split(opened.ids) == pinned_split(dataset, "reference")


@pytest.mark.real_data
def test_pinned_sequence_disjoint_equals_the_function_on_the_real_folder(real_data):
    opened = open_dataset("cvc_clinicdb", data_dir=real_data)
    sequences = {record.id: record.groups["sequence_id"] for record in opened.records}
    expected = sequence_disjoint_split(sequences)
    assert opened.split("sequence_disjoint") == expected == pinned_split("cvc_clinicdb", "sequence_disjoint")


@pytest.mark.real_data
def test_clinicdb_sequence_equals_the_published_metadata(real_data):
    with (real_data / "CVC-ClinicDB" / "metadata.csv").open(newline="") as file:
        published = {row["frame_id"]: row["sequence_id"] for row in csv.DictReader(file)}
    assert len(published) == 612
    assert published == CLIPS


@pytest.mark.real_data
def test_clinicdb_png_and_tif_forms_have_equal_pixels(real_data):
    tif, png = real_data / "samples" / "CVC-ClinicDB-TIF", real_data / "CVC-ClinicDB"
    names = sorted(file.stem for file in (tif / "Original").iterdir())
    assert len(names) == 12
    for name in names:
        for folder, decode in (("Original", decode_frame), ("Ground Truth", decode_mask)):
            one = decode((tif / folder / f"{name}.tif").read_bytes(), name=f"{name}.tif")
            other = decode((png / folder / f"{name}.png").read_bytes(), name=f"{name}.png")
            assert np.array_equal(np.asarray(one), np.asarray(other)), f"{folder}/{name}"


@pytest.mark.real_data
@pytest.mark.parametrize(("part", "file"), [("train", "train.txt"), ("test", "val.txt")])
def test_pinned_official_equals_the_published_lists(real_data, part, file):
    published = (real_data / "Kvasir-SEG" / "official-split" / file).read_text().split()
    assert pinned_split("kvasir_seg", "official")[part] == published


# Polyp-free frames


@settings(deadline=None, max_examples=50)
@given(
    st.dictionaries(st.text(min_size=1, max_size=4), st.tuples(st.integers(0, 9), st.sampled_from("ab")), max_size=80)
)
def test_alike_disjoint_split_never_cuts_a_group(frames):
    groups = {name: group for name, (group, _) in frames.items()}
    classes = {name: label for name, (_, label) in frames.items()}
    split = alike_disjoint_split(classes, groups)
    assert sorted(all_ids(split)) == sorted(frames)
    for one, other in itertools.combinations(split.values(), 2):
        assert not {groups[i] for i in one} & {groups[i] for i in other}


def test_pinned_negatives_leave_most_frames_unseen():
    split = pinned_split("negatives", "hyperkvasir")
    assert {part: len(ids) for part, ids in split.items()} == {"train": 219, "validation": 110, "test": 671}
    assert len(set(all_ids(split))) == 1000


@pytest.mark.slow
@pytest.mark.real_data
def test_pinned_negatives_equal_the_function(real_data):
    frames = load_labeled(real_data / "HyperKvasir-frames", image_size=32)
    names = [PurePosixPath(name).stem for name in frames.names]
    classes = {name: frames.classes[label] for name, label in zip(names, frames.labels, strict=True)}
    groups = {name: int(group) for name, group in zip(names, frames.groups, strict=True)}
    assert alike_disjoint_split(classes, groups) == pinned_split("negatives", "hyperkvasir")
