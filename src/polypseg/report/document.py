"""One HTML document without any reference to another file, from a template of this folder."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from polypseg import __version__
from polypseg.tables import template_environment

TEMPLATES = Path(__file__).parent / "templates"


def render_document(template: str, **values: Any) -> str:
    """A template with the report's style and script in it, strict about names: a missing value is an error."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "report.js"))
    environment = template_environment(TEMPLATES, escape=True)
    page = environment.get_template(template).render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        **values,
    )
    return page.removesuffix("\n")  # as in all pages so far: the same input gives the same bytes
