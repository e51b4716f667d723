"""`polypseg report`: one self-contained HTML file about a study, rendered from its receipts and nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from polypseg.data.polyps import PolypDataset
from polypseg.errors import UsageError
from polypseg.files import atomic_path, sole_writer, write_json, write_text
from polypseg.report.analysis import analyse
from polypseg.report.author_text import render_reading
from polypseg.report.figures import Picture, draw_all
from polypseg.report.gallery import build_galleries
from polypseg.report.other_results import read_document
from polypseg.report.page import render_page
from polypseg.report.receipts import parse_test, read_material
from polypseg.report.tables import (
    alarm_table,
    calibration_table,
    comparison_table,
    contrast_table,
    gap_table,
    pair_table,
    receipt_table,
    tests_table,
)
from polypseg.statistics import RESAMPLES
from polypseg.tables import Table

__all__ = ["LARGEST", "write_report"]

LARGEST = 6_000_000
"""Bytes of the page."""


def write_report(
    receipts: Path,
    output: Path,
    *,
    title: str,
    inside: str,
    outside: str,
    masks: Path | None = None,
    sources: Mapping[str, Path] | None = None,
    mask_values: Mapping[str, str] | None = None,
    datasets: Mapping[str, PolypDataset] | None = None,
    shift: Sequence[Path] = (),
    robustness: Sequence[Path] = (),
    reading: Path | None = None,
    resamples: int = RESAMPLES,
) -> Path:
    """Write the report of a folder of receipts to ``output`` (HTML) and return the path.

    Beside it, ``<stem>_files`` holds each figure as SVG and PDF and each table as CSV and JSON. ``inside`` and
    ``outside`` name the two tests as DATASET.SPLIT.PART. For pictures: ``masks``, folder of predicted masks;
    ``sources``, dataset -> folder or archive, with ``mask_values`` as ``open_dataset`` takes them; ``datasets``,
    dataset -> opened. The same input gives the same bytes. Raises UsageError for receipts that do not fit together and
    when another process writes the files, PolypSegError for a receipt whose aggregates do not follow from its rows.
    """
    files = output.with_name(f"{output.stem}_files")
    with sole_writer(files):
        material = read_material(receipts, inside=parse_test(inside), outside=parse_test(outside))
        galleries = build_galleries(
            material, masks=masks, sources=sources or {}, mask_values=mask_values or {}, datasets=datasets
        )
        documents = {"Shift": [read_document(p) for p in shift], "Robustness": [read_document(p) for p in robustness]}
        analysis = analyse(material, resamples=resamples)
        others = [test for test in material.polyp_tests if test not in (material.inside, material.outside)]
        made = (
            comparison_table(analysis),
            gap_table(analysis),
            contrast_table(analysis),
            pair_table(analysis),
            calibration_table(analysis),
            tests_table(analysis, others),
            alarm_table(material),
            receipt_table(material),
        )
        tables, pictures = {table.name: table for table in made if table.records}, draw_all(analysis)
        page = render_page(
            analysis,
            title=title,
            tables=tables,
            pictures=pictures,
            galleries=galleries,
            reading=render_reading(reading, analysis) if reading else "",
            documents=documents,
        )
        size = len(page.encode())
        if size > LARGEST:
            raise UsageError(
                f"{output} would have {size / 1e6:.1f} MB, more than {LARGEST / 1e6:.0f}: give fewer files"
            )
        _write_files(files, tables, pictures)
        return write_text(output, page)


def _write_files(folder: Path, tables: Mapping[str, Table], pictures: Mapping[str, Picture]) -> None:
    for table in tables.values():
        write_text(folder / f"{table.name}.csv", table.csv())
        write_json(folder / f"{table.name}.json", table.plain_records())
    for picture in pictures.values():
        write_text(folder / f"{picture.name}.svg", picture.svg)
        with atomic_path(folder / f"{picture.name}.pdf") as temporary:
            temporary.write_bytes(picture.pdf)
