"""The input of pretraining depends on nothing but (seed, epoch, frame), and a damaged frame never stops a long run."""

import io
import multiprocessing
import pickle
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats

from polypseg.data.corpus import FrameStore, open_frames
from polypseg.data.shards import write_shards
from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError
from polypseg.pretraining.decoded import keep_decoded
from polypseg.pretraining.loader import FrameFeed, UnreadableFrames, frame_loader
from polypseg.pretraining.views import ViewSettings, decode_levels, make_views
from polypseg.training.loader import GlobalBatches

FIRST = ViewSettings(
    crop_scale=(0.2, 1.0),
    interpolation="bilinear",
    jitter_probability=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    grayscale_probability=0.2,
    blur_probability=1.0,
    blur_sigma=(0.1, 2.0),
    solarize_probability=0.0,
    flip_probability=0.5,
)
SECOND = replace(FIRST, blur_probability=0.1, solarize_probability=0.2)
SIDE = 32
COUNT = 24


def encode(index: int) -> bytes:
    buffer = io.BytesIO()
    pixels = synthesize_frame(CAMERAS["a"], seed=0, index=index, size=(72, 80))[0]
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> FrameStore:
    folder = tmp_path_factory.mktemp("corpus") / "frames" / "colon"
    folder.mkdir(parents=True)
    for index in range(COUNT):
        (folder / f"{index:02d}.jpg").write_bytes(encode(index))
    return open_frames(folder.parent)


class Damaged:
    """The corpus with some frames cut off and others gone."""

    def __init__(self, frames: FrameStore, *, cut: Iterable[int] = (), gone: Iterable[int] = ()):
        self.frames, self.cut, self.gone = frames, set(cut), set(gone)
        self.path, self.content_id = frames.path, "0" * 16

    def __len__(self) -> int:
        return len(self.frames)

    def name(self, index: int) -> str:
        return self.frames.name(index)

    def read(self, index: int) -> bytes:
        if index in self.gone:
            raise PolypSegError(f"cannot read {self.name(index)}")
        data = self.frames.read(index)
        return data[: len(data) // 2] if index in self.cut else data


def feed_of(frames: FrameStore, *, seed: int = 3, tokens: int = 0) -> FrameFeed:
    return FrameFeed(frames, [FIRST, SECOND], size=SIDE, seed=seed, tokens=tokens)


def assert_equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


def run(
    feed: FrameFeed, *, workers: int = 0, process: int = 0, processes: int = 1, epoch: int = 1, first_step: int = 0
) -> list[dict[str, torch.Tensor]]:
    """The batches of one epoch."""
    batches = GlobalBatches(len(feed), total_batch_size=8, seed=3, process=process, processes=processes)
    batches.start(epoch=epoch, first_step=first_step)
    return list(frame_loader(feed, batches, workers=workers, pin_memory=False))


# -- examples ----------------------------------------------------------------------------------------------------------


def test_example_holds_views_and_that_the_frame_was_read(corpus):
    example = feed_of(corpus)[0, 5]
    assert set(example) == {"views", "unreadable"}
    assert example["views"].shape == (2, SIDE, SIDE, 3) and example["views"].dtype == torch.uint8
    assert example["unreadable"].shape == () and example["unreadable"].dtype == torch.int64
    assert example["unreadable"] == -1


def test_example_has_one_view_for_mae(corpus):
    example = FrameFeed(corpus, [FIRST], size=SIDE, seed=0, tokens=4)[0, 5]
    assert example["views"].shape == (1, SIDE, SIDE, 3) and example["noise"].shape == (4,)


def test_views_show_the_frame(corpus):
    plain = replace(
        FIRST,
        crop_scale=(1.0, 1.0),
        jitter_probability=0,
        grayscale_probability=0,
        blur_probability=0,
        flip_probability=0,
    )
    feed = FrameFeed(corpus, [plain], size=SIDE, seed=0)
    for index in (0, 7, 23):
        frame = Image.open(io.BytesIO(corpus.read(index)))
        shown = feed[0, index]["views"][0].numpy().astype(int)
        others = [np.asarray(Image.open(io.BytesIO(corpus.read(n))).resize((SIDE, SIDE))) for n in range(COUNT)]
        off = [np.abs(shown - other).mean() for other in others]
        assert int(np.argmin(off)) == index, frame


def test_noise_is_uniform_and_new_for_each_frame_and_epoch(corpus):
    feed = feed_of(corpus, tokens=196)
    noise = torch.stack([feed[epoch, index]["noise"] for epoch in range(3) for index in range(COUNT)])
    assert noise.dtype == torch.float32 and noise.shape == (3 * COUNT, 196)
    assert noise.min() >= 0 and noise.max() < 1
    assert stats.kstest(noise.ravel().numpy(), "uniform").pvalue > 0.001
    assert len(torch.unique(noise, dim=0)) == 3 * COUNT


def test_example_is_a_function_of_seed_epoch_and_frame(corpus):
    feed = feed_of(corpus, tokens=9)
    assert_equal(feed[2, 5], feed_of(corpus, tokens=9)[2, 5])
    assert_equal(feed[2, 5], pickle.loads(pickle.dumps(feed))[2, 5])
    others = [feed[3, 5], feed[2, 6], feed_of(corpus, seed=4, tokens=9)[2, 5]]
    for other in others:
        assert not torch.equal(other["views"], feed[2, 5]["views"])
        assert not torch.equal(other["noise"], feed[2, 5]["noise"])


def test_feed_gives_the_same_from_shards(corpus, tmp_path):
    write_shards(corpus, tmp_path / "shards", images_per_shard=7)
    shards = feed_of(open_frames(tmp_path / "shards"))
    for index in range(COUNT):
        assert_equal(shards[0, index], feed_of(corpus)[0, index])


# -- order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_the_number_of_workers(corpus, workers):
    feed = feed_of(corpus, tokens=9)
    expected, batches = run(feed), run(feed, workers=workers)
    assert len(batches) == len(expected) == 3
    for one, two in zip(batches, expected, strict=True):
        assert_equal(one, two)


@pytest.mark.timeout(60)
def test_workers_start_after_opencv_has_used_its_threads(corpus):
    image = np.zeros((2000, 2000), np.float32)
    before = cv2.getNumThreads()
    cv2.setNumThreads(4)
    try:
        cv2.GaussianBlur(image, (31, 31), 5)
        assert len(run(feed_of(corpus), workers=1)) == 3
        assert cv2.getNumThreads() == 1
    finally:
        cv2.setNumThreads(before)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_each_global_batch_without_duplicates(corpus, processes):
    feed = feed_of(corpus, tokens=9)
    shares = [run(feed, process=process, processes=processes) for process in range(processes)]
    for step, whole in enumerate(run(feed)):
        together = {key: torch.cat([share[step][key] for share in shares]) for key in whole}
        assert_equal(together, whole)
        assert len(torch.unique(together["noise"], dim=0)) == 8


def test_an_epoch_shows_every_frame_once(corpus):
    noise = torch.cat([batch["noise"] for batch in run(feed_of(corpus, tokens=9))])
    expected = torch.stack([feed_of(corpus, tokens=9)[1, index]["noise"] for index in range(COUNT)])
    assert torch.equal(torch.unique(noise, dim=0), torch.unique(expected, dim=0))


def test_a_resumed_epoch_goes_on_with_the_same_batches(corpus):
    feed = feed_of(corpus)
    resumed, whole = run(feed, first_step=1), run(feed)
    assert len(resumed) == 2
    for one, two in zip(resumed, whole[1:], strict=True):
        assert_equal(one, two)


def test_workers_live_on_and_follow_the_epoch(corpus):
    feed = feed_of(corpus)
    batches = GlobalBatches(COUNT, total_batch_size=8, seed=3)
    loader = frame_loader(feed, batches, workers=2, pin_memory=False)
    living = []
    for epoch in range(3):
        batches.start(epoch=epoch)
        for one, two in zip(loader, run(feed, epoch=epoch), strict=True):
            assert_equal(one, two)
        living.append(sorted(child.pid for child in multiprocessing.active_children()))
    assert living[0] == living[1] == living[2] and len(living[0]) == 2


def test_a_loader_leaves_global_generators_alone(corpus):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    run(feed_of(corpus))
    run(feed_of(corpus), workers=1)
    assert torch.equal(torch.get_rng_state(), before)


# -- unreadable frames -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("index", "used"), [(4, 5), (9, 12), (23, 0)])
@pytest.mark.parametrize("kind", ["cut", "gone"])
def test_an_unreadable_frame_is_replaced_by_the_next_readable_one(corpus, kind, index, used):
    feed = feed_of(Damaged(corpus, **{kind: {4, 9, 10, 11, 23}}), tokens=9)
    example = feed[2, index]
    assert example["unreadable"] == index
    rng = np.random.default_rng([3, 2, index])
    np.testing.assert_array_equal(example["noise"], rng.random(9, dtype=np.float32))
    expected = make_views(corpus.read(used), name="", settings=[FIRST, SECOND], size=SIDE, rng=rng)
    np.testing.assert_array_equal(example["views"], expected)
    assert feed[2, used]["unreadable"] == -1
    assert not torch.equal(feed[2, used]["views"], example["views"]), "the replacement is another view"


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_frames_are_listed_by_name(corpus, workers):
    damaged, unreadable = Damaged(corpus, cut={4, 11}, gone={12}), UnreadableFrames()
    for epoch in range(2):
        for batch in run(feed_of(damaged), workers=workers, epoch=epoch):
            unreadable.update(batch["unreadable"])
    assert unreadable.indices == {4, 11, 12}
    assert unreadable.names(damaged) == ["colon/04.jpg", "colon/11.jpg", "colon/12.jpg"]


def test_a_corpus_that_is_gone_is_one_clear_error(corpus):
    feed = feed_of(Damaged(corpus, gone=range(COUNT)))
    with pytest.raises(PolypSegError, match=r"100 frames in a row of .*frames cannot be read, last colon/\d+\.jpg: "):
        feed[0, 3]


def unreadable_of(*indices: int) -> UnreadableFrames:
    unreadable = UnreadableFrames()
    unreadable.update(torch.tensor([-1, *indices, -1]))
    return unreadable


class Names:
    """A corpus of a given size, for messages."""

    path = Path("corpus")

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def name(self, index: int) -> str:
        return f"a/{index}.jpg"


@pytest.mark.parametrize(
    ("count", "seen", "bad", "share", "fails"),
    [
        (10_000, 1000, 10, 0.01, False),  # exactly the share
        (10_000, 1000, 11, 0.01, True),
        (10_000, 99, 49, 0.01, False),  # too early to tell
        (10_000, 99, 50, 0.01, True),  # but more than half
        (10_000, 100, 2, 0.01, True),
        (10_000, 100, 1, 0.01, False),
        (24, 24, 1, 0.01, True),  # all of a small corpus
        (24, 23, 1, 0.01, False),
        (10_000, 8, 8, 0.01, True),
        (10_000, 8, 6, 0.8, False),
        (10_000, 500, 0, 0.0, False),
        (10_000, 500, 1, 0.0, True),
        (10_000, 0, 0, 0.0, False),
    ],
)
def test_check_stops_when_more_than_the_allowed_share_is_unreadable(count, seen, bad, share, fails):
    unreadable = unreadable_of(*range(bad))
    if not fails:
        unreadable.check(seen, Names(count), share)
        return
    with pytest.raises(PolypSegError, match=rf"{bad} of {seen} frames of corpus cannot be read, first a/0\.jpg"):
        unreadable.check(seen, Names(count), share)


def test_check_counts_a_frame_once_however_often_it_is_met():
    unreadable = unreadable_of(5, 5, 5)
    unreadable.update(torch.tensor([5, 5]))
    unreadable.check(100, Names(1000), 0.01)
    unreadable.update(torch.tensor([7]))
    with pytest.raises(PolypSegError, match=r"2 of 100 frames of corpus cannot be read, first a/5\.jpg, a/7\.jpg"):
        unreadable.check(100, Names(1000), 0.01)


# -- slow and real -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spawned_workers_give_the_same(corpus, tmp_path):
    """Systems without fork send the feed to their workers by pickle."""
    write_shards(corpus, tmp_path / "shards", images_per_shard=7)
    feed = feed_of(open_frames(tmp_path / "shards"))
    loader = frame_loader(feed, GlobalBatches(COUNT, total_batch_size=8, seed=3), workers=1, pin_memory=False)
    loader.multiprocessing_context = "spawn"
    for one, two in zip(loader, run(feed, epoch=0), strict=True):
        assert_equal(one, two)


@pytest.mark.real_data
def test_real_frames_are_all_readable(real_data):
    frames = open_frames(real_data / "HyperKvasir-frames", corpus_folder="impacted-stool")
    feed = FrameFeed(frames, [FIRST, SECOND], size=96, seed=0, tokens=36)
    unreadable = UnreadableFrames()
    for batch in run(feed):
        assert batch["views"].shape == (8, 2, 96, 96, 3)
        assert (batch["views"].float().std((2, 3, 4)) > 0).all()
        unreadable.update(batch["unreadable"])
    assert not unreadable.indices


# -- decoded frames ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [4, 12, 200]
)  # of 72x80 pixels, which are reduced by up to 8, by up to 4, and not at all
def test_decoded_frames_give_the_views_of_their_files(corpus, size):
    decoded = keep_decoded(corpus, gigabytes=1)
    feed = FrameFeed(corpus, [FIRST, SECOND], size=size, seed=3, decoded=decoded)
    plain = FrameFeed(corpus, [FIRST, SECOND], size=size, seed=3)
    assert len(decoded) == len(corpus)
    for index in range(len(corpus)):
        assert_equal(feed[2, index], plain[2, index])


def test_decoded_frames_keep_to_their_bound_and_are_made_once(corpus, monkeypatch):
    first = np.asarray(Image.open(io.BytesIO(corpus.read(0))).convert("RGB"))
    whole = sum(pixels.size for pixels in decode_levels(corpus.read(0), name="0").values())
    assert first.size < whole < 1.4 * first.size
    decoded = keep_decoded(corpus, gigabytes=2.5 * whole / 1e9)
    assert len(decoded) == 2 and decoded.frame(2) is None
    np.testing.assert_array_equal(decoded.frame(0)[1], first)
    monkeypatch.setattr("polypseg.pretraining.decoded.decode_levels", None)
    assert len(keep_decoded(corpus, gigabytes=2.5 * whole / 1e9)) == 2


def test_a_damaged_frame_is_left_to_the_feed(corpus):
    damaged = Damaged(corpus, cut=[1])
    feed = FrameFeed(damaged, [FIRST], size=SIDE, seed=3, decoded=keep_decoded(damaged, gigabytes=1))
    assert feed[0, 1]["unreadable"] == 1 and feed[0, 0]["unreadable"] == -1
