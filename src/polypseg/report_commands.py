"""The command that renders a study's report from its receipts."""

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from polypseg.arguments import NamedMaskValues


def report(
    receipts: Annotated[Path, Argument(help="Folder of receipts, as `polypseg evaluate --suite` writes them.")],
    output: Annotated[Path, Option(help="The page; figures and tables go beside it.")] = Path("report.html"),
    title: Annotated[str, Option(help="Heading of the page.")] = "Polyp segmentation on another hospital’s data",
    in_distribution: Annotated[
        str, Option(help="Test in distribution, DATASET.SPLIT.PART.")
    ] = "kvasir_seg.reference.test",
    out_of_distribution: Annotated[str, Option(help="Test out of distribution.")] = "cvc_clinicdb.full.full",
    masks: Annotated[
        Path | None, Option(help="Folder of predicted masks, as `evaluate --save-masks` writes them.")
    ] = None,
    source: Annotated[
        list[str] | None, Option(help="DATASET=PATH for pictures, where the set's terms allow; repeat for several.")
    ] = None,
    mask_values: NamedMaskValues = None,
    shift: Annotated[list[Path] | None, Option(help="JSON file of a shift measurement; repeat for several.")] = None,
    robustness: Annotated[list[Path] | None, Option(help="JSON file of `polypseg robustness`; may repeat.")] = None,
    reading: Annotated[
        Path | None, Option(help="Markdown with your interpretation; its numbers may come from the receipts.")
    ] = None,
) -> None:
    """Render one self-contained HTML page about a study from its receipts."""
    from polypseg.arguments import named_mask_values, named_places
    from polypseg.report import write_report

    sources = named_places(source, option="--source", form="DATASET=PATH")
    written = write_report(
        receipts,
        output,
        title=title,
        inside=in_distribution,
        outside=out_of_distribution,
        masks=masks,
        sources=sources,
        mask_values=named_mask_values(mask_values, names=sources),
        shift=shift or (),
        robustness=robustness or (),
        reading=reading,
    )
    print(f"report: {written}; figures and tables: {written.with_name(written.stem + '_files')}")
