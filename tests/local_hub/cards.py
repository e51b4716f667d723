"""The check of a card's metadata: stricter than none, milder than the real Hub's, which is not public."""

import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData

# The identifiers of hub-docs, repositories-licenses.
LICENSES = frozenset(Path(__file__).with_name("licenses.txt").read_text().split())


def split_card(text: str) -> tuple[dict[str, Any] | None, str | None]:
    """The metadata of a README and what is wrong with their YAML; (None, None) when there are none."""
    found = re.match(r"\s*---\r?\n(.*?)\r?\n---(\r?\n|$)", text, re.DOTALL)
    if found is None:
        return None, None
    try:
        metadata = yaml.safe_load(found.group(1))
    except yaml.YAMLError as error:
        return None, f"YAML Metadata Error: {' '.join(str(error).split())}"
    if not isinstance(metadata, dict):
        return None, "YAML Metadata Error: not a mapping"
    return metadata, None


def check_card(text: str, repo_type: str) -> tuple[list[str], list[str]]:
    """What is wrong with a README (the commit is refused) and what is merely missing."""
    metadata, problem = split_card(text)
    if problem is not None:
        return [problem], []
    if metadata is None:
        return [], ["empty or missing yaml metadata in repo card"]
    errors = [*_license_errors(metadata), *_shape_errors(metadata)]
    if repo_type == "model" and "model-index" in metadata:
        errors += _model_index_errors(metadata)
    return errors, [] if "license" in metadata else ['"license" is missing']


def _license_errors(metadata: dict[str, Any]) -> list[str]:
    names = metadata.get("license", [])
    unknown = [name for name in ([names] if isinstance(names, str) else names) if name not in LICENSES]
    errors = [f'"license" must be one of {", ".join(sorted(LICENSES))}; got {unknown}'] if unknown else []
    if "license_name" in metadata and not re.fullmatch(r"[a-z0-9.+-]+", str(metadata["license_name"])):
        errors.append('"license_name" may only hold lower-case letters, digits, ".", "+" and "-"')
    return errors


def _shape_errors(metadata: dict[str, Any]) -> list[str]:
    errors = []
    for key in ("tags", "datasets", "metrics", "base_model", "language"):
        value = metadata.get(key, [])
        if not isinstance(value, str) and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
            errors.append(f'"{key}" must be a string or a list of strings')
    for key in ("pipeline_tag", "library_name", "license_link"):
        if not isinstance(metadata.get(key, ""), str):
            errors.append(f'"{key}" must be a string')
    for name in [metadata.get("base_model", [])] if isinstance(metadata.get("base_model"), str) else []:
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
            errors.append(f'"base_model" is not a model id: {name}')
    return errors


def _model_index_errors(metadata: dict[str, Any]) -> list[str]:
    try:
        ModelCardData(**metadata, ignore_metadata_errors=False)
    except Exception as error:  # the library raises whatever the malformed entry led to
        return [f'"model-index" is not valid: {error}']
    return []
