"""The input pipeline: cached pixels are the reference's, and order and augmentation depend on nothing but the seed."""

import errno
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from polypseg.data.polyps import PolypDataset, SyntheticOptions, open_dataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.recipe import load_recipe
from polypseg.training.augmentation import PairedAugmentation
from polypseg.training.loader import (
    CachedPairs,
    GlobalBatches,
    TrainingFeed,
    ValidationFeed,
    cache_pairs,
    training_loader,
)

SIDE = 48
STATISTICS = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def synthetic(seed: int = 0) -> PolypDataset:
    return open_dataset("synthetic_a", synthetic_options=SyntheticOptions(count=12, size=(64, 80), seed=seed))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own: the folder of the feed."""
    monkeypatch.setenv("POLYPSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "feed"


@pytest.fixture
def pairs() -> CachedPairs:
    dataset = synthetic()
    return cache_pairs(dataset, dataset.ids, image_size=SIDE)


# -- cache -------------------------------------------------------------------------------------------------------------


def test_cache_pairs_holds_pillows_bicubic_resize_to_the_byte():
    dataset = synthetic()
    ids = [dataset.ids[i] for i in (7, 2, 11)]
    pairs = cache_pairs(dataset, ids, image_size=SIDE)
    assert len(pairs) == 3 and pairs.ids == ids
    assert pairs.images.shape == (3, SIDE, SIDE, 3) and pairs.masks.shape == (3, SIDE, SIDE)
    assert pairs.images.dtype == pairs.masks.dtype == np.uint8
    for position, record_id in enumerate(ids):
        record = dataset.by_id[record_id]
        frame = dataset.frame(record).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        mask = Image.fromarray(dataset.gray_mask(record)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(pairs.images[position], np.asarray(frame))
        np.testing.assert_array_equal(pairs.masks[position], np.asarray(mask))


def test_cache_pairs_keeps_masks_soft(pairs):
    assert pairs.masks.max() == 255 and pairs.masks.min() == 0
    assert ((pairs.masks > 0) & (pairs.masks < 255)).any()


def test_cache_pairs_only_maps_on_the_second_call(pairs, cache, monkeypatch):
    def times() -> dict[Path, int]:
        return {file: file.stat().st_mtime_ns for file in cache.rglob("*")}

    before = times()
    assert {file.name for file in before} >= {"images.npy", "masks.npy"}
    monkeypatch.setattr(PolypDataset, "gray_pair", lambda *_: pytest.fail("decoded again"))
    dataset = synthetic()
    again = cache_pairs(dataset, dataset.ids, image_size=SIDE)
    assert times() == before
    np.testing.assert_array_equal(again.images, pairs.images)
    assert isinstance(again.images, np.memmap), "a large split must not be read into memory"


def test_cache_pairs_maps_read_only(pairs):
    with pytest.raises(ValueError, match="read-only"):
        pairs.images[0] = 0


def test_cache_pairs_keeps_content_ids_and_size_apart(pairs, cache):
    dataset, other = synthetic(), synthetic(seed=1)
    assert not np.array_equal(cache_pairs(other, other.ids, image_size=SIDE).images, pairs.images)
    assert len(cache_pairs(dataset, dataset.ids[:5], image_size=SIDE)) == 5
    assert cache_pairs(dataset, dataset.ids, image_size=32).images.shape[1] == 32
    turned = cache_pairs(dataset, dataset.ids[::-1], image_size=SIDE)
    np.testing.assert_array_equal(turned.images[0], pairs.images[-1])
    assert len(list(cache.iterdir())) == 5


def test_cache_pairs_refuses_an_empty_split(cache):
    with pytest.raises(UsageError, match="empty"):
        cache_pairs(synthetic(), [], image_size=SIDE)
    assert not cache.exists()


def test_cache_pairs_leaves_nothing_when_a_file_is_broken_and_works_once_it_is_mended(cache, monkeypatch):
    dataset, intact, calls = synthetic(), PolypDataset.gray_pair, itertools.count(1)

    def broken(self: PolypDataset, record: object) -> object:
        if next(calls) == 5:
            raise PolypSegError("frame 5 is truncated")
        return intact(self, record)

    monkeypatch.setattr(PolypDataset, "gray_pair", broken)
    with pytest.raises(PolypSegError, match="frame 5 is truncated"):
        cache_pairs(dataset, dataset.ids, image_size=SIDE)
    assert list(cache.iterdir()) == []
    monkeypatch.setattr(PolypDataset, "gray_pair", intact)
    pairs = cache_pairs(dataset, dataset.ids, image_size=SIDE)
    assert (pairs.images.reshape(12, -1).std(axis=1) > 0).all(), "no frame is left blank"


def test_cache_pairs_names_the_remedy_for_a_full_disk(cache, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "open_memmap", full)
    dataset = synthetic()
    with pytest.raises(PolypSegError, match=r"disk is full: free some space") as caught:
        cache_pairs(dataset, dataset.ids, image_size=SIDE)
    assert str(cache) in str(caught.value)
    assert list(cache.iterdir()) == []


# -- order -------------------------------------------------------------------------------------------------------------


def batches_of(epoch: int = 0, first_step: int = 0, *, length: int = 100, total: int = 8, **options: int) -> list:
    batches = GlobalBatches(length, total_batch_size=total, **({"seed": 42} | options))
    batches.start(epoch=epoch, first_step=first_step)
    return list(batches)


@given(
    length=st.integers(2, 200),
    share=st.integers(1, 6),
    processes=st.integers(1, 4),
    epoch=st.integers(0, 300),
)
@settings(deadline=None, max_examples=60)
def test_global_batches_are_the_same_for_any_number_of_processes(length, share, processes, epoch):
    total = share * processes
    if total > length:
        return
    whole = batches_of(epoch, length=length, total=total)
    parts = [batches_of(epoch, length=length, total=total, process=p, processes=processes) for p in range(processes)]
    assert all(len(batch) == share for part in parts for batch in part)
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == whole


@given(length=st.integers(2, 200), total=st.integers(1, 200), epoch=st.integers(0, 300))
@settings(deadline=None, max_examples=60)
def test_global_batches_visit_each_position_once_and_drop_the_short_batch(length, total, epoch):
    if total > length:
        return
    whole = batches_of(epoch, length=length, total=total)
    assert len(whole) == length // total
    assert {len(batch) for batch in whole} == {total}
    assert {key[0] for batch in whole for key in batch} == {epoch}
    positions = [position for batch in whole for _, position in batch]
    assert len(set(positions)) == len(positions) and set(positions) <= set(range(length))


def test_global_batches_drop_other_images_in_other_epochs():
    visited = [{p for batch in batches_of(e, length=11, total=5) for _, p in batch} for e in range(40)]
    assert set.union(*visited) == set(range(11)), "every image takes part in training"
    assert len({frozenset(v) for v in visited}) > 1


def test_global_batches_order_changes_with_epoch_and_seed_and_repeats():
    def positions(epoch: int, **options: int) -> list[int]:
        return [position for batch in batches_of(epoch, **options) for _, position in batch]

    assert positions(3) == positions(3)
    assert positions(3) != positions(4)
    assert positions(3) != positions(3, seed=43)
    assert positions(0) != sorted(positions(0))


def test_global_batches_of_an_epoch_do_not_depend_on_the_epochs_before():
    batches = GlobalBatches(100, total_batch_size=8, seed=42)
    for epoch in range(3):
        batches.start(epoch=epoch)
        history = list(batches)
    assert history == batches_of(2)


@pytest.mark.parametrize("first_step", [0, 1, 7, 11, 12])
def test_global_batches_first_step_skips_exactly(first_step):
    assert batches_of(5, first_step) == batches_of(5)[first_step:]


def test_global_batches_refuses_a_batch_that_processes_cannot_share():
    with pytest.raises(UsageError, match="10 cannot be shared by 4"):
        GlobalBatches(100, total_batch_size=10, seed=0, processes=4)


def test_global_batches_refuses_a_batch_larger_than_the_split():
    with pytest.raises(UsageError, match=r"48 .* 47 images.*--set training\.total_batch_size"):
        GlobalBatches(47, total_batch_size=48, seed=0)
    assert len(GlobalBatches(48, total_batch_size=48, seed=0)) == 1


# -- examples ----------------------------------------------------------------------------------------------------------


def training_feed(pairs: CachedPairs, seed: int = 42) -> TrainingFeed:
    return TrainingFeed(pairs, PairedAugmentation(load_recipe("finetune").augmentation, **STATISTICS), seed=seed)


def content(example: dict[str, torch.Tensor]) -> tuple[bytes, bytes]:
    return example["pixel_values"].numpy().tobytes(), example["labels"].numpy().tobytes()


def test_training_feed_gives_tensors_in_the_models_layout(pairs):
    example = training_feed(pairs)[0, 3]
    assert example["pixel_values"].shape == (3, SIDE, SIDE) and example["labels"].shape == (SIDE, SIDE)
    assert example["pixel_values"].dtype == example["labels"].dtype == torch.float32


def test_training_feed_depends_on_seed_epoch_and_index_only(pairs):
    wanted = content(training_feed(pairs)[1, 4])
    feed = training_feed(pairs)
    np.random.seed(5)
    for key in [(0, 4), (1, 3), (2, 4)]:
        assert content(feed[key]) != wanted
    assert content(feed[1, 4]) == wanted, "what was read before must not matter"
    assert content(training_feed(pairs, seed=43)[1, 4]) != wanted


def test_training_feed_augments_positions_differently(pairs):
    pairs.images, pairs.masks = pairs.images[[0] * 12], pairs.masks[[0] * 12]  # twelve times the same frame
    feed = training_feed(pairs)
    assert len({content(feed[epoch, i]) for epoch in range(3) for i in range(12)}) == 36


def test_training_feed_is_the_same_with_and_without_workers(pairs):
    def load(workers: int) -> list[dict[str, torch.Tensor]]:
        batches = GlobalBatches(len(pairs), total_batch_size=4, seed=42)
        batches.start(epoch=2)
        return list(training_loader(training_feed(pairs), batches, workers=workers, pin_memory=False))

    alone, shared = load(0), load(2)
    assert len(alone) == len(shared) == 3
    for one, two in zip(alone, shared, strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_training_loader_resumes_where_it_was(pairs):
    def load(first_step: int) -> list[dict[str, torch.Tensor]]:
        batches = GlobalBatches(len(pairs), total_batch_size=3, seed=42)
        batches.start(epoch=1, first_step=first_step)
        return list(training_loader(training_feed(pairs), batches, workers=0, pin_memory=False))

    resumed, whole = load(2), load(0)
    assert len(resumed) == 2
    for one, two in zip(resumed, whole[2:], strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_training_loader_starts_each_epoch_afresh_with_the_same_loader(pairs):
    batches = GlobalBatches(len(pairs), total_batch_size=6, seed=42)
    loader = training_loader(training_feed(pairs), batches, workers=0, pin_memory=False)
    seen = []
    for epoch in (0, 1, 0):
        batches.start(epoch=epoch)
        seen.append([content(batch) for batch in loader])
    assert seen[0] == seen[2] != seen[1]


def test_validation_feed_gives_plain_normalized_frames(pairs):
    feed = ValidationFeed(pairs, **STATISTICS)
    assert len(feed) == 12
    mean, std = (torch.tensor(STATISTICS[key])[:, None, None] for key in ("mean", "std"))
    example = feed[5]
    expected = (torch.from_numpy(np.array(pairs.images[5])).permute(2, 0, 1) / 255 - mean) / std
    torch.testing.assert_close(example["pixel_values"], expected, rtol=0, atol=1e-5)
    np.testing.assert_array_equal(example["labels"].numpy(), pairs.masks[5].astype(np.float32) / 255)
    assert content(feed[5]) == content(example)


def test_cache_pairs_asks_for_the_remedy_even_when_the_folder_cannot_be_made(cache, monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PolypSegError, match="read-only"):
        cache_pairs(synthetic(), ["00000"], image_size=SIDE)
