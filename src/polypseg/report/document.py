"""One HTML document without any reference to another file, from a template of this folder."""

import base64
import hashlib
from pathlib import Path
from typing import Any

import jinja2

from polypseg import __version__

TEMPLATES = Path(__file__).parent / "templates"


def render_document(template: str, **values: Any) -> str:
    """A template with the report's style and script in it, strict about names: a missing value is an error."""
    style, script = ((TEMPLATES / name).read_text(encoding="utf-8") for name in ("style.css", "report.js"))
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        undefined=jinja2.StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(template).render(
        style=style,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        version=__version__,
        **values,
    )
