"""The ``polypseg web`` command: segmentation inside the browser."""

from pathlib import Path
from typing import Annotated

from typer import Option

PORT = 7861


def web(
    model: Annotated[
        Path | None, Option("--model", help="Model folder with its ONNX files. Default: the model that is shipped.")
    ] = None,
    precision: Annotated[str, Option(help="Which of the model's ONNX files: fp32, fp16 or int8.")] = "fp32",
    threshold: Annotated[float, Option(help="Where the slider of the probability stands at first.")] = 0.5,
    min_area: Annotated[int, Option(help="Pixels that a counted lesion has at least.")] = 64,
    port: Annotated[int | None, Option(help=f"Port to serve at. Default: {PORT}.")] = None,
    open_browser: Annotated[bool | None, Option(help="Open the page in the browser. Default: yes.")] = None,
    export: Annotated[Path | None, Option(help="Write the page to this folder, as a static Space, and stop.")] = None,
    title: Annotated[str | None, Option(help="With --export: the Space's title, at most 60 characters.")] = None,
) -> None:
    """Segment in the browser of this machine: a frame, a folder or the camera. No picture leaves it. Ctrl-C ends it."""
    from polypseg.errors import UsageError
    from polypseg.hub.web_page import assemble_page, export_page, page_weight, serve_page
    from polypseg.provenance.local import starter_folder

    if export is not None and (port is not None or open_browser is not None):
        raise UsageError("--export serves nothing: leave out --port and --open-browser")
    if export is None and title is not None:
        raise UsageError("--title is of the exported Space: give --export FOLDER with it")
    content = assemble_page(model or starter_folder(), precision=precision, threshold=threshold, min_area=min_area)
    if export is None:
        serve_page(content, port=PORT if port is None else port, open_browser=open_browser is not False)
        return
    folder = export_page(content, export, **({} if title is None else {"title": title}))
    print(f"{folder}: {page_weight(content)}; upload it with `hf upload OWNER/NAME {folder} --repo-type space`")
