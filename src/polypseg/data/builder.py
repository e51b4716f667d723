"""A dataset as an HF ``DatasetDict``: prepared once, cached by content."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from polypseg.data import images
from polypseg.data.polyps import PolypDataset
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import cache_folder, explain_write_errors


def build_splits(opened: PolypDataset, *, split: str, streaming: bool) -> Any:
    """The parts of a split as ``PolypDataset.load`` gives them. Raises PolypSegError for a broken file."""
    with explain_write_errors(cache_folder() / "datasets"):
        builder = PolypSegBuilder(
            cache_dir=str(cache_folder() / "datasets"),
            config_name=f"{opened.spec.name}-{split}",
            content=opened.content_id,
            hash=hashlib.sha256(f"{opened.content_id} {split} {sorted(opened.ids)}".encode()).hexdigest()[:16],
            opened=_Unhashed(opened),
            split_name=split,
        )
        if streaming:
            return builder.as_streaming_dataset()
        try:
            builder.download_and_prepare()
        except datasets.exceptions.DatasetGenerationError as error:
            if isinstance(error.__cause__, PolypSegError | OSError):
                raise error.__cause__ from None
            raise
        return builder.as_dataset()


class _Unhashed:
    """Carries the opened dataset into a builder without taking part in the cache's identity."""

    def __init__(self, opened: PolypDataset):
        self.opened = opened

    def __repr__(self) -> str:
        return "opened"


@dataclass
class PolypSegBuilderConfig(datasets.BuilderConfig):  # type: ignore[misc]
    """What identifies a prepared dataset: the content, not the path."""

    content: str = ""
    split_name: str = "reference"
    opened: _Unhashed | None = None

    def create_config_id(self, config_kwargs: dict[str, Any], custom_features: Any = None) -> str:
        return super().create_config_id(  # type: ignore[no-any-return]
            {k: v for k, v in config_kwargs.items() if k != "opened"}, custom_features
        )


class PolypSegBuilder(datasets.GeneratorBasedBuilder):  # type: ignore[misc]
    """The HF ``datasets`` builder behind every dataset of this package."""

    VERSION = datasets.Version("1.0.0")
    BUILDER_CONFIG_CLASS = PolypSegBuilderConfig

    @property
    def _dataset(self) -> PolypDataset:
        carrier: _Unhashed = self.config.opened
        return carrier.opened

    def _info(self) -> datasets.DatasetInfo:
        spec, records = self._dataset.spec, self._dataset.records
        columns: dict[str, Any] = {"id": datasets.Value("string"), "image": datasets.Image(mode="RGB")}
        if spec.mask_folder is not None:
            columns["mask"] = datasets.Image(mode="L")
        columns |= {name: datasets.Value("string") for name in (records[0].groups if records else {})}
        return datasets.DatasetInfo(
            features=datasets.Features(columns),
            description=f"{spec.title} (content {self._dataset.content_id})",
            license=spec.license,
            citation=spec.citation,
            homepage=spec.homepage,
        )

    def _split_generators(self, dl_manager: Any) -> list[datasets.SplitGenerator]:
        parts = self._dataset.split(self.config.split_name)
        empty = [part for part, ids in parts.items() if not ids]
        if empty:
            raise UsageError(
                f"split {self.config.split_name!r} of these {len(self._dataset.records)} images leaves {empty[0]!r} "
                "empty: use the split 'full'"
            )
        return [datasets.SplitGenerator(name=part, gen_kwargs={"ids": ids}) for part, ids in parts.items()]

    def _generate_examples(self, ids: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        opened = self._dataset
        for record_id in ids:
            record = opened.by_id[record_id]
            data = opened.source.read(record.image)
            example: dict[str, Any] = {"id": record.id, **record.groups}
            if record.mask is None:
                frame = opened.frame(record)  # decoded here, so that a broken file is found now and named
            else:
                frame, mask = opened.pair(record)
                example["mask"] = {"bytes": images.encode_png(mask), "path": None}
            if images.is_tiff(data) or not images.stored_upright(data):
                data = images.encode_png(frame)
            example["image"] = {"bytes": data, "path": Path(record.image).name}
            yield record.id, example
