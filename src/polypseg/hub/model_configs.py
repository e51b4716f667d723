"""``hub_configs/models/*.json``: what each model's config.json says, rendered from the table."""

import json
from pathlib import Path

from polypseg import zoo
from polypseg.files import write_text


def render_model_configs() -> dict[str, str]:
    """File name -> text, one a row of the table."""
    return {f"{entry.model_id}.json": _render(entry) for entry in zoo.rows()}


def _render(entry: zoo.ZooEntry) -> str:
    content = entry.config().to_dict()
    content.pop("transformers_version", None)  # says who rendered it, not what the model is
    return json.dumps(content, indent=2, sort_keys=True) + "\n"


def write_model_configs(folder: Path) -> list[Path]:
    """Write every rendered file and remove those of rows that no longer exist."""
    rendered = render_model_configs()
    for stale in folder.glob("*.json"):
        if stale.name not in rendered:
            stale.unlink()
    return [write_text(folder / name, text) for name, text in rendered.items()]
