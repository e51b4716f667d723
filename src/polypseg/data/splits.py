"""Named splits: the function that derives each, and the id lists that pin what it gave on the complete sets."""

import json
from collections.abc import Mapping, Sequence
from importlib import resources

import numpy as np

from polypseg.errors import UsageError

SPLIT_SEED = 42

DESCRIPTIONS = {
    "full": "every image, in one part named 'full'",
    "reference": "the study's 80/10/10 by frame, seed 42, on names sorted as strings",
    "official": "Kvasir-SEG's published 880/120 (upstream calls the 120 'val')",
    "sequence_disjoint": "CVC-ClinicDB by video clip: no clip lies in two parts",
    "hyperkvasir": "1000 polyp-free frames of HyperKvasir: frames that look alike stay in one part",
}

Split = dict[str, list[str]]


def reference_split(ids: Sequence[str]) -> Split:
    """The reference's split of ids that are sorted by file name: scikit-learn's train_test_split, twice, seed 42.

    The first tenth (rounded) of a seeded permutation is the test part; the same on the rest gives the validation part.
    """
    size = round(0.1 * len(ids))
    rest, test = _cut(list(ids), size)
    train, validation = _cut(rest, size)
    return {"train": train, "validation": validation, "test": test}


def _cut(ids: list[str], size: int) -> tuple[list[str], list[str]]:
    order = np.random.RandomState(SPLIT_SEED).permutation(len(ids))
    return [ids[i] for i in order[size:]], [ids[i] for i in order[:size]]


def sequence_disjoint_split(groups: Mapping[str, str]) -> Split:
    """Split ids by their group (id -> sequence): whole sequences, in seeded order, until each part has a tenth."""
    sequences = sorted(set(groups.values()), key=lambda name: (len(name), name))
    order = [sequences[i] for i in np.random.RandomState(SPLIT_SEED).permutation(len(sequences))]
    members = {name: [i for i, group in groups.items() if group == name] for name in order}
    parts: Split = {"test": [], "validation": [], "train": []}
    for name in order:
        part = next((p for p in ("test", "validation") if len(parts[p]) < 0.1 * len(groups)), "train")
        parts[part] += members[name]
    return {part: sorted(parts[part]) for part in ("train", "validation", "test")}


def alike_disjoint_split(classes: Mapping[str, str], groups: Mapping[str, int]) -> Split:
    """Split ids by groups that look alike (id -> class, id -> group): of each class, groups in seeded order until the
    training part has a fifth and the validation part a tenth; the rest is the test part.

    A group goes with the class of its first member, so that no group lies in two parts.
    """
    class_of = {group: classes[member] for member, group in sorted(groups.items(), reverse=True)}
    parts: Split = {"train": [], "validation": [], "test": []}
    for name in sorted(set(class_of.values())):
        own = sorted(group for group, label in class_of.items() if label == name)
        members = {group: sorted(i for i, other in groups.items() if other == group) for group in own}
        total, counts = sum(map(len, members.values())), {"train": 0, "validation": 0}
        for position in np.random.RandomState(SPLIT_SEED).permutation(len(own)):
            wanted = (("train", 0.2), ("validation", 0.1))
            part = next((p for p, fraction in wanted if counts[p] < fraction * total), "test")
            parts[part] += members[own[position]]
            if part in counts:
                counts[part] += len(members[own[position]])
    return {part: sorted(ids) for part, ids in parts.items()}


def pinned_split(dataset: str, name: str) -> Split | None:
    """The committed id lists of a split, or None where none are pinned."""
    file = resources.files("polypseg.data") / "split_lists" / f"{dataset}.{name}.json"
    if not file.is_file():
        return None
    content: Split = json.loads(file.read_text(encoding="utf-8"))
    return content


def make_split(dataset: str, name: str, *, ids: Sequence[str], sequences: Mapping[str, str] | None = None) -> Split:
    """The parts of split ``name`` over ``ids`` (sorted by file name); parts keep only ids that are present.

    Raises UsageError when the dataset has no such split.
    """
    if name == "full":
        return {"full": list(ids)}
    pinned = pinned_split(dataset, name)
    if pinned is not None:
        present, listed = set(ids), {i for members in pinned.values() for i in members}
        strangers = sorted(present - listed)
        if strangers:
            raise UsageError(
                f"{len(strangers)} image(s) are in no part of split {name!r} of {dataset}, first {strangers[0]}: "
                "restore the published file names, or use the split 'full'"
            )
        return {part: [i for i in members if i in present] for part, members in pinned.items()}
    if name == "reference":
        return reference_split(ids)
    if name == "sequence_disjoint" and sequences:
        return sequence_disjoint_split(sequences)
    pinned_names = {other for other in DESCRIPTIONS if pinned_split(dataset, other)}
    known = sorted({"full", "reference", *pinned_names, *(["sequence_disjoint"] if sequences else [])})
    raise UsageError(f"dataset {dataset!r} has no split {name!r}; choose from {', '.join(known)}")
