"""Split passports: what a model saw, image by image, kept beside its weights, so that a test on it is noticed.

An image is kept as its id, a hash of its decoded pixels and a perceptual hash; no picture can be restored from them.
JPEG decoders may differ in single gray levels, which changes the first hash: the second still finds the image.
"""

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from polypseg import zoo
from polypseg.data.catalog import CENTER_COLUMN, CLIP_COLUMN, DATASETS
from polypseg.data.corpus import FrameStore
from polypseg.data.duplicates import HASH_DISTANCE, fingerprint
from polypseg.data.images import decode_frame
from polypseg.data.polyps import PolypDataset
from polypseg.errors import PolypSegError, UsageError, unknown_name
from polypseg.files import cache_folder, file_sha256, read_json, write_text
from polypseg.provenance.local import CONFIG
from polypseg.provenance.origin import UNKNOWN, WEIGHTS_ORIGIN, WeightsOrigin

PASSPORT = "passport.json"
"""File name beside the weights."""
FORMAT = 1
STAGES = PRETRAINING, FINETUNING, VALIDATION = "pretraining", "fine-tuning", "validation"
"""Validation: images by which the weights were chosen."""
SAME_CONTENT, SAME_ID, NEAR_DUPLICATE, SAME_CLIP = KINDS = ("same content", "same id", "near-duplicate", "same clip")
_T = TypeVar("_T")
_DIGITS = 32
"""Hex digits kept of a SHA-256: 128 bits, which no two images share by chance."""


@dataclass(frozen=True, kw_only=True)
class ImagePrint:
    """What is kept of one image."""

    id: str
    pixels: str
    """First 32 hex digits of the SHA-256 of the decoded RGB pixels."""
    hash: str
    """64 hex digits: the 256-bit difference hash of ``polypseg.data.check``."""
    clip: str | None = None
    """Video clip, where the dataset tells."""
    centre: str | None = None
    """Hospital, where the dataset tells."""
    mask: str | None = None
    """First 32 hex digits of the SHA-256 of the mask, a byte a pixel, where a model was adapted to just this mask."""


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """The images of one part of a split."""

    dataset: str
    """Name in the table of datasets."""
    split: str
    part: str
    content_id: str
    images: tuple[ImagePrint, ...]

    @property
    def title(self) -> str:
        """For messages: ``Kvasir-SEG, reference test``."""
        spec = DATASETS.get(self.dataset)
        return f"{spec.title if spec else self.dataset}, {self.split} {self.part}"

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the sorted prints: the same for the same images in any order, whatever the part's name."""
        lines = sorted("\0".join((i.id, i.pixels, i.hash, i.clip or "", *_more(i))) + "\n" for i in self.images)
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    @cached_property
    def packed_hashes(self) -> NDArray[np.uint8]:
        """(N, 32) difference hashes, 8 bits a byte."""
        return np.array([list(bytes.fromhex(image.hash)) for image in self.images], dtype=np.uint8).reshape(-1, 32)

    def restrict(self, ids: Iterable[str], *, split: str, part: str) -> "SplitManifest":
        """The manifest of some of the images, not read again. Raises UsageError for an id that is not here."""
        known = {image.id: image for image in self.images}
        chosen = list(ids)
        absent = [record_id for record_id in chosen if record_id not in known]
        if absent:
            raise UsageError(f"{len(absent)} image(s) are not in {self.title}, first {absent[0]}")
        images = tuple(known[record_id] for record_id in chosen)
        return SplitManifest(dataset=self.dataset, split=split, part=part, content_id=self.content_id, images=images)

    def content(self) -> dict[str, Any]:
        """Columns rather than rows, for JSON: 130 bytes an image."""
        return {
            "dataset": self.dataset,
            "split": self.split,
            "part": self.part,
            "content_id": self.content_id,
            "digest": self.digest,
            "ids": [image.id for image in self.images],
            "pixels": [image.pixels for image in self.images],
            "hashes": [image.hash for image in self.images],
            "clips": [image.clip for image in self.images] if any(i.clip is not None for i in self.images) else None,
            **({"centres": [i.centre for i in self.images]} if any(i.centre for i in self.images) else {}),
            **({"masks": [i.mask for i in self.images]} if any(i.mask for i in self.images) else {}),
        }

    def save(self, path: Path) -> Path:
        """Write the manifest as JSON and return the path."""
        return _write(path, {"format": FORMAT, "manifest": self.content()})

    @classmethod
    def load(cls, path: Path) -> "SplitManifest":
        """Read a manifest. Raises PolypSegError when it is missing, damaged or of another format."""
        return _understand(path, lambda content: cls.from_content(content["manifest"]))

    @classmethod
    def from_content(cls, content: Mapping[str, Any]) -> "SplitManifest":
        """The manifest of ``content``. Raises ValueError when its columns are not of the images of its digest."""
        clips = content["clips"] or [None] * len(content["ids"])
        centers, masks = (content.get(key) or [None] * len(content["ids"]) for key in ("centres", "masks"))
        columns = zip(content["ids"], content["pixels"], content["hashes"], clips, centers, masks, strict=True)
        images = tuple(ImagePrint(id=i, pixels=p, hash=h, clip=c, centre=of, mask=m) for i, p, h, c, of, m in columns)
        names = ("dataset", "split", "part", "content_id")
        manifest = cls(**{name: content[name] for name in names}, images=images)
        if manifest.digest != content["digest"] or len(manifest.packed_hashes) != len(images):
            raise ValueError("its images are not those of its digest")
        return manifest


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a model saw at one stage."""

    stage: str
    """One of ``STAGES``."""
    description: str
    """What the images are, for messages."""
    manifest: SplitManifest | None = None
    """None where the images are not listed, such as ImageNet: nothing can be checked against them."""


@dataclass(frozen=True, kw_only=True)
class Passport:
    """All that a model saw."""

    model_id: str
    seen: tuple[Seen, ...]

    def content(self) -> dict[str, Any]:
        """For JSON."""
        stages = [
            vars(seen) | {"manifest": None if seen.manifest is None else seen.manifest.content()} for seen in self.seen
        ]
        return {"format": FORMAT, "model_id": self.model_id, "seen": stages}

    def save(self, folder: Path) -> Path:
        """Write ``passport.json`` into a model's folder and return its path."""
        return _write(folder / PASSPORT, self.content())

    @classmethod
    def load(cls, folder: Path) -> "Passport":
        """The passport of a model's folder. Raises PolypSegError when it is missing, damaged or of another format."""
        return _understand(folder / PASSPORT, _passport)


def make_manifest(
    dataset: PolypDataset, *, split: str = "reference", part: str = "train", limit: int | None = None
) -> SplitManifest:
    """Read the images of a part and note what identifies them; ``full``/``full`` stands for the whole set.

    ``limit`` takes only the first images, which the part's name then says. Raises UsageError for an unknown split or
    part, PolypSegError for an image that cannot be decoded.
    """
    parts = dataset.split(split)
    if part not in parts:
        raise unknown_name(f"part of split {split!r}", part, parts)
    ids, label = (tuple(parts[part]), part) if limit is None else dataset.part(split, part, limit=limit)
    prints = []
    for record_id in tqdm(ids, desc=f"noting {dataset.spec.title}", unit="image", leave=False, disable=None):
        record = dataset.by_id[record_id]
        found = image_print(record_id, dataset.frame(record), clip=record.groups.get(CLIP_COLUMN))
        prints.append(replace(found, centre=record.groups.get(CENTER_COLUMN)))
    return SplitManifest(
        dataset=dataset.spec.name, split=split, part=label, content_id=dataset.content_id, images=tuple(prints)
    )


def _more(image: ImagePrint) -> list[str]:
    """What most images lack, so that the digests of lists without it stay."""
    return [*([image.centre] if image.centre else []), *([f"mask {image.mask}"] if image.mask else [])]


def image_print(
    name: str, frame: Image.Image, *, clip: str | None = None, mask: NDArray[np.bool_] | None = None
) -> ImagePrint:
    """What is kept of an RGB frame, and of its mask (H, W) where the model learns from just this one."""
    found = fingerprint(frame)
    return ImagePrint(
        id=name,
        pixels=found.digest[:_DIGITS],
        hash=np.packbits(found.bits).tobytes().hex(),
        clip=clip,
        mask=None if mask is None else hashlib.sha256(mask.astype(np.uint8).tobytes()).hexdigest()[:_DIGITS],
    )


def kept_manifest(
    dataset: PolypDataset, *, split: str = "reference", part: str = "train", limit: int | None = None
) -> SplitManifest:
    """As ``make_manifest``; the images of the same content are read once and their prints kept in the cache folder."""
    ids, label = dataset.part(split, part, limit=limit)
    told = [CENTER_COLUMN] if CENTER_COLUMN in dataset.spec.groups else []
    key = hashlib.sha256("\0".join((dataset.content_id, split, label, *told, *ids)).encode()).hexdigest()[:16]
    path = cache_folder() / "manifests" / f"{dataset.spec.name}-{key}.json"
    with contextlib.suppress(PolypSegError):  # missing, or damaged: it is made again
        return SplitManifest.load(path)
    manifest = make_manifest(dataset, split=split, part=part, limit=limit)
    manifest.save(path)
    return manifest


def name_partial(manifest: SplitManifest, dataset: PolypDataset) -> SplitManifest:
    """The manifest, its part named ``<part>-partial<n>`` where the dataset is not complete."""
    if dataset.spec.count in (None, len(dataset.records)):
        return manifest
    return replace(manifest, part=f"{manifest.part}-partial{len(manifest.images)}")


# -- collisions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Collision:
    """An image of a test that the model saw, or nearly."""

    kind: str
    """One of ``KINDS``."""
    id: str
    seen_id: str
    stage: str
    seen_in: str
    bits: int
    """Bits of 256 in which the two difference hashes differ."""
    frames_apart: int | None = None
    """Distance in frame numbers, for frames of one clip that are numbered."""


@dataclass(frozen=True, kw_only=True)
class Collisions:
    """What a model saw of a test."""

    title: str
    """The test."""
    tested: int
    found: tuple[Collision, ...] = ()
    unchecked: tuple[str, ...] = ()
    """Stages whose images are not listed."""

    def images(self, *kinds: str) -> tuple[str, ...]:
        """Ids of the test's images that collide, by the given kinds (default: by any), each once."""
        return tuple(dict.fromkeys(hit.id for hit in self.found if hit.kind in (kinds or KINDS)))

    @property
    def summary(self) -> str:
        """One line: how many, of which kinds, and the first."""
        unchecked = f" Not checked, as not listed: {'; '.join(self.unchecked)}." if self.unchecked else ""
        if not self.found:
            known = "what the model is known to have seen"
            return f"none of the {self.tested} images of {self.title} is among {known}.{unchecked}"
        counts = ", ".join(f"{kind}: {len(self.images(kind))}" for kind in KINDS if self.images(kind))
        first = self.found[0]
        return (
            f"{len(self.images())} of {self.tested} images of {self.title} collide with what the model saw ({counts}), "
            f"first {first.id}: {first.kind} as {first.seen_id} of {first.seen_in} ({first.stage}).{unchecked}"
        )

    def content(self) -> dict[str, Any]:
        """For JSON: what a receipt says about itself."""
        return {
            "test": self.title,
            "tested": self.tested,
            "colliding": len(self.images()),
            "kinds": {kind: len(self.images(kind)) for kind in KINDS},
            "unchecked": list(self.unchecked),
            "images": [vars(hit) for hit in self.found],
        }


def find_collisions(passport: Passport, manifest: SplitManifest) -> Collisions:
    """Compare a test with everything that a model saw.

    same content: equal decoded pixels, under whatever name. same id: of the same dataset. near-duplicate: other pixels,
    but difference hashes at most 10 of 256 bits apart, as in ``polypseg data check``, which looks at thumbnails too and
    so drops pairs that differ in brightness. same clip: each frame with the nearest seen frame of its clip.
    """
    found: list[Collision] = []
    for seen in passport.seen:
        if seen.manifest is not None and seen.manifest.images:
            found += _compare(seen.stage, seen.manifest, manifest)
    unchecked = tuple(f"{seen.stage} on {seen.description}" for seen in passport.seen if seen.manifest is None)
    return Collisions(title=manifest.title, tested=len(manifest.images), found=tuple(found), unchecked=unchecked)


class SeenError(UsageError):
    """A model was to be tested on images that it saw."""


def refuse_collisions(passport: Passport, manifest: SplitManifest, *, kinds: Sequence[str] = KINDS) -> Collisions:
    """The collisions, where none is of the given kinds. Raises SeenError that counts them and names the first."""
    for kind in kinds:
        if kind not in KINDS:
            raise unknown_name("kind of collision", kind, KINDS)
    collisions = find_collisions(passport, manifest)
    refused = tuple(hit for hit in collisions.found if hit.kind in kinds)
    if refused:
        told = Collisions(title=collisions.title, tested=collisions.tested, found=refused)
        raise SeenError(
            f"{told.summary} Test on images that it has not seen, have them listed in the receipt (--seen report), or "
            "leave them out (--seen exclude)"
        )
    return collisions


# -- the passports of runs ---------------------------------------------------------------------------------------------


def frames_manifest(frames: FrameStore, *, left_out: Collection[int] = ()) -> SplitManifest:
    """The manifest of a pretraining corpus; ``left_out``: numbers of frames that could not be read and were replaced.

    Raises PolypSegError for any other frame that cannot be decoded.
    """

    def note(index: int) -> ImagePrint:
        name = frames.name(index)
        return image_print(name, decode_frame(frames.read(index), name=str(frames.path / name)))

    numbers = [index for index in range(len(frames)) if index not in left_out]
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        noted = tqdm(
            pool.map(note, numbers),
            total=len(numbers),
            desc="noting frames",
            unit="frame",
            mininterval=1 if sys.stderr.isatty() else 30,
            leave=False,
        )
        prints = tuple(noted)
    name = frames.path.name
    return SplitManifest(dataset=name, split="full", part="full", content_id=frames.content_id, images=prints)


def seen_by_encoder(encoder_weights: str | None, origin: WeightsOrigin) -> tuple[Seen, ...]:
    """What a model's encoder saw before fine-tuning, from its record and the passport beside its file.

    Published weights and runs without passport are stages whose images are not listed. Raises PolypSegError for a
    passport that is damaged or not the one that the encoder's record names.
    """
    start, pretraining = origin.encoder_initialisation or UNKNOWN, origin.pretraining
    if origin.random_start:
        return ()
    if pretraining:
        found = find_passport(Path(str(encoder_weights)).parent, named=pretraining.passport)
        if found is not None:
            return found[0].seen
        start = pretraining.frames_in_words
    elif origin.stated_row and start not in zoo.STARTERS.values():
        start = f"{zoo.CORPORA[origin.stated_row.corpus]}, as {start}"
    return (Seen(stage=PRETRAINING, description=start),)


def finetuning_passport(
    dataset: PolypDataset,
    *,
    split: str,
    model_id: str,
    encoder_seen: Sequence[Seen] = (),
    negatives: tuple[PolypDataset, str] | None = None,
) -> Passport:
    """What a fine-tuned model saw: its encoder's frames, the training part, and the validation part that chose it.

    ``negatives``: polyp-free frames and the pinned list whose parts were used in the same way.
    """
    stages = {"train": FINETUNING, "validation": VALIDATION}
    used = [(dataset, split), *([negatives] if negatives else [])]
    manifests = [(stages[part], kept_manifest(d, split=s, part=part)) for d, s in used for part in stages]
    seen = [Seen(stage=stage, description=manifest.title, manifest=manifest) for stage, manifest in manifests]
    known = {(stage, manifest.digest) for stage, manifest in manifests}  # a model trained further on the same images
    earlier = [old for old in encoder_seen if old.manifest is None or (old.stage, old.manifest.digest) not in known]
    return Passport(model_id=model_id, seen=(*earlier, *seen))


def attach_passport(folder: Path, passport: Passport) -> Path:
    """Write a passport into a model's folder and its digest into config.json; return the passport's path."""
    path = passport.save(folder)
    config = read_json(folder / CONFIG)
    origin = WeightsOrigin.within(config, path=folder / CONFIG).updated(passport=file_sha256(path))
    config[WEIGHTS_ORIGIN] = origin.content
    write_text(folder / CONFIG, json.dumps(config, indent=2, sort_keys=True) + "\n")  # as transformers writes it
    return path


def find_passport(folder: Path, *, named: str | None) -> tuple[Passport, str] | None:
    """The passport of a folder with its SHA-256; None where there is none. ``named``: the digest in the record.

    Raises PolypSegError where the record names a passport that is missing or another one.
    """
    path = folder / PASSPORT
    digest = file_sha256(path) if path.is_file() else None
    if named not in (None, digest):
        state = "missing" if digest is None else "not the one"
        raise PolypSegError(f"{path} is {state} that the weights' record names: get the folder again")
    return None if digest is None else (Passport.load(folder), digest)


# -- before a test -----------------------------------------------------------------------------------------------------

Rule = Literal["refuse", "report", "exclude"]
"""What becomes of a test of which the model saw images."""


@dataclass(frozen=True, kw_only=True)
class SeenCheck:
    """What was done about the images of a test that the model may have seen."""

    rule: Rule
    passport: str | None = None
    """SHA-256 of the model's passport.json; None where it has none."""
    collisions: Collisions | None = None
    reason: str | None = "these predictions come without a passport"
    """Why nothing was checked; None where it was."""
    excluded: tuple[str, ...] = ()
    """Ids that were left out of the test."""

    def content(self) -> dict[str, Any]:
        """For JSON, without the collisions themselves."""
        return {
            "rule": self.rule,
            "passport": self.passport,
            "reason": self.reason,
            "excluded": list(self.excluded),
        }


def check_seen(
    folder: Path | None, manifest: SplitManifest, *, rule: Rule = "refuse"
) -> tuple[SplitManifest, SeenCheck]:
    """The images to test on, and what is known of whether the model in ``folder`` saw them.

    refuse: raise SeenError for any collision, frames of a seen clip included. report: test all and list them. exclude:
    test the others, under a part's name that says so; SeenError when none is left. A model without passport is tested,
    and the check says so. Raises PolypSegError for a damaged passport.
    """
    if folder is None:
        return manifest, SeenCheck(rule=rule)
    carried = find_passport(folder, named=WeightsOrigin.of_folder(folder).passport)
    if carried is None:
        return manifest, SeenCheck(rule=rule, reason=f"the model has no {PASSPORT}: what it saw is not known")
    passport, digest = carried
    if rule == "refuse":
        found = refuse_collisions(passport, manifest)
        return manifest, SeenCheck(rule=rule, passport=digest, collisions=found, reason=None)
    found = find_collisions(passport, manifest)
    excluded = found.images() if rule == "exclude" else ()
    if excluded:
        manifest = _without(manifest, set(excluded))
    return manifest, SeenCheck(rule=rule, passport=digest, collisions=found, reason=None, excluded=excluded)


def _without(manifest: SplitManifest, excluded: set[str]) -> SplitManifest:
    left = [image.id for image in manifest.images if image.id not in excluded]
    if not left:
        raise SeenError(f"the model saw every image of {manifest.title}: choose another test, or --seen report")
    return manifest.restrict(left, split=manifest.split, part=f"{manifest.part}-unseen{len(left)}")


def _compare(stage: str, seen: SplitManifest, tested: SplitManifest) -> list[Collision]:
    """Collisions with the images of one stage, one tested image after the other."""
    same_dataset = _same_dataset(seen, tested)
    by_pixels, by_id = (_positions(getattr(image, key) for image in seen.images) for key in ("pixels", "id"))
    by_clip = _positions(image.clip for image in seen.images)
    found: list[Collision] = []
    for image, packed in zip(tested.images, tested.packed_hashes, strict=True):
        bits = np.bitwise_count(seen.packed_hashes ^ packed).sum(axis=1)
        hit = partial(_hit, stage=stage, seen=seen, image=image, bits=bits)
        equal = by_pixels.get(image.pixels, [])
        found += [hit(SAME_CONTENT, k) for k in equal]
        found += [hit(NEAR_DUPLICATE, int(k)) for k in np.flatnonzero(bits <= HASH_DISTANCE) if k not in equal]
        if same_dataset:
            found += [hit(SAME_ID, k) for k in by_id.get(image.id, [])]
            mates = [] if image.clip is None else [hit(SAME_CLIP, k) for k in by_clip.get(image.clip, [])]
            found += sorted(mates, key=lambda mate: (mate.frames_apart or 0, mate.bits))[:1]
    return found


def _hit(kind: str, k: int, *, stage: str, seen: SplitManifest, image: ImagePrint, bits: NDArray[Any]) -> Collision:
    other = seen.images[k].id
    apart = abs(int(image.id) - int(other)) if kind == SAME_CLIP and (image.id + other).isdecimal() else None
    return Collision(
        kind=kind, id=image.id, seen_id=other, stage=stage, seen_in=seen.title, bits=int(bits[k]), frames_apart=apart
    )


def _positions(keys: Iterable[str | None]) -> dict[str | None, list[int]]:
    positions: dict[str | None, list[int]] = {}
    for position, key in enumerate(keys):
        positions.setdefault(key, []).append(position)
    return positions


def _same_dataset(a: SplitManifest, b: SplitManifest) -> bool:
    """Whether equal ids mean the same image: of a published set always, of one's own folder if its content is equal."""
    spec = DATASETS.get(a.dataset)
    published = spec is not None and spec.count is not None
    return a.dataset == b.dataset and (published or a.content_id == b.content_id)


# -- files -------------------------------------------------------------------------------------------------------------


def _write(path: Path, content: dict[str, Any]) -> Path:
    return write_text(path, json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n")


def _understand(path: Path, read: Callable[[Any], _T]) -> _T:
    content = read_json(path)
    if isinstance(content, dict) and content.get("format") not in (None, FORMAT):
        raise PolypSegError(f"{path} has format {content['format']}, not {FORMAT}: read it with a newer polypseg")
    try:
        return read(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise PolypSegError(f"{path} is damaged ({error}): get it again from where the model is published") from error


def _passport(content: dict[str, Any]) -> Passport:
    stages = [
        Seen(
            **stage | {"manifest": None if stage["manifest"] is None else SplitManifest.from_content(stage["manifest"])}
        )
        for stage in content["seen"]
    ]
    return Passport(model_id=content["model_id"], seen=tuple(stages))
