"""Recipes, overrides and records that expand, nest or count without end: one line, at once."""

import time
import typing
from pathlib import Path
from typing import Any

import pytest
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from polypseg.errors import PolypSegError, UsageError
from polypseg.files import read_bounded, read_json
from polypseg.pretraining.recipe import RECIPES, load_pretraining_recipe
from polypseg.provenance.checksums import read_manifest
from polypseg.recipe import LARGEST_YAML, Recipe, find_recipe, load_recipe, read_yaml
from polypseg.study.schema import Grid, load_grid

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join([f'*{chr(97 + n)}'] * 9)}]\n" for n in range(12)
)
HOSTILE = {
    "anchors that expand": BOMB,
    "an anchor": "a: &x 1\nb: *x\n",
    "a merged anchor": "a: &x {b: 1}\nc:\n  <<: *x\n",
    "an anchor of itself": "a: &x [*x]\n",
    "nesting in flow": "a: " + "[" * 3000 + "]" * 3000,
    "nesting in blocks": "".join(" " * n + "a:\n" for n in range(900)),
    "a number of 5000 digits": "seed: " + "9" * 5000,
    "a number of 5000 digits in base 60": "seed: " + ":".join(["59"] * 2500),
    "a float of 5000 digits": "seed: 0." + "9" * 5000,
    "a date that is none": "seed: 2024-13-45",
    "a key that is a list": "? [a, b]\n: 1\n",
    "a tag": "a: !!python/object/apply:os.system [ls]\n",
    "a word for a truth value": "a: !!bool zzz\n",
    "a word for a date": "a: !!timestamp zzz\n",
    "nothing for a number": "a: !!int ''\n",
    "nothing for a float": "? !!float ''\n: 1\n",
    "a character of 32 bits": 'a: "\\U99999999"\n',
    "bytes": "a: \x00\n",
    "nothing": "",
    "many keys": "".join(f"k{n}: 1\n" for n in range(2_000)) + "k0: 2\n",
    "a large file": "# " + "x" * LARGEST_YAML,
}


LONG = {
    "flat list": "x: [" + "1," * (LARGEST_YAML // 2 - 10) + "]",
    "sides": "data:\n  batch_sizes: [" + "1," * (LARGEST_YAML // 2 - 20) + "]",
    "many keys": "".join(f"k{n}: 1\n" for n in range(LARGEST_YAML // 12)),
    "long key": "x" * 1000 + ": 1\n",
}


@pytest.mark.parametrize("name", LONG)
@pytest.mark.slow
def test_the_largest_yaml_file_takes_seconds_and_one_line(name, tmp_path):
    """A flat list of 0.8 MB took 45 s, and the error was as long as the file."""
    path = tmp_path / "mine.yaml"
    path.write_text(LONG[name])
    for load in (load_recipe, load_grid):
        began = time.process_time()
        with pytest.raises(UsageError) as caught:
            load(path)
        assert time.process_time() - began < 10
        assert len(str(caught.value)) < 10_000 and "\n" not in str(caught.value)


def one_line(error: BaseException) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 1000, text[:2000]
    return text


@pytest.mark.parametrize("name", HOSTILE)
def test_a_yaml_file_is_refused_in_one_line(name, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(HOSTILE[name])
    for load in (load_recipe, load_pretraining_recipe, load_grid):
        with pytest.raises(UsageError) as caught:
            load(path)
        assert "mine.yaml" in one_line(caught.value)


@pytest.mark.parametrize(
    "value", ["9" * 5000, "[" * 3000, "&a [*a]", "2024-13-45", "x" * 2**21, "1" * 300, "1e400", ".inf"]
)
def test_an_override_is_refused_in_one_line(value):
    for key in ("training.epochs", "data.image_size", "training.learning_rate", "seed"):
        with pytest.raises(UsageError) as caught:
            load_recipe("finetune", overrides=[f"{key}={value}"])
        one_line(caught.value)


@pytest.mark.parametrize("change", ["data.image_size=100000000", "training.epochs=" + "9" * 20, "seed=-1", "seed=1e9"])
def test_numbers_have_bounds(change):
    with pytest.raises(UsageError, match=change.split("=")[0]):
        load_recipe("finetune", overrides=[change])


def numbers(schema: type[BaseModel], prefix: str = "") -> typing.Iterator[tuple[str, Any]]:
    """Every number of a schema at any depth with what bounds it."""
    for name, field in schema.model_fields.items():
        yield from _numbers(field.annotation, field.metadata, f"{prefix}{name}")


def _numbers(annotation: Any, metadata: list[Any], name: str) -> typing.Iterator[tuple[str, Any]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from numbers(annotation, f"{name}.")
    elif annotation in (int, float):
        yield name, metadata
    elif hasattr(annotation, "__metadata__"):
        inner = [part for item in annotation.__metadata__ for part in getattr(item, "metadata", [item])]
        yield from _numbers(annotation.__origin__, [*metadata, *inner], name)
    else:
        for part in typing.get_args(annotation):
            yield from _numbers(part, metadata, name)


@pytest.mark.parametrize("schema", [Recipe, Grid, *RECIPES.values()], ids=lambda schema: schema.__name__)
def test_every_number_of_every_schema_has_both_bounds(schema):
    found = dict(numbers(schema))
    assert len(found) > 3
    for name, metadata in found.items():
        assert any(isinstance(part, Ge | Gt) for part in metadata), f"{name} has no lower bound"
        assert any(isinstance(part, Le | Lt) for part in metadata), f"{name} has no upper bound"


def test_what_comes_with_the_package_is_read():
    for path in sorted(find_recipe("finetune").parent.glob("*.yaml")):
        load = load_pretraining_recipe if path.stem.startswith("pretrain") else load_recipe
        load(path)
    load_grid("twelve_small")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", "", "\udcff", '{"a": 1'])
def test_a_json_record_is_refused_in_one_line(text, tmp_path):
    (tmp_path / "run.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(PolypSegError, match=r"cannot read .*run\.json") as caught:
        read_json(tmp_path / "run.json")
    one_line(caught.value)


def test_no_text_file_is_read_without_end(tmp_path: Path):
    for name, read in (
        ("x.json", read_json),
        ("SHA256SUMS", read_manifest),
        ("x.yaml", lambda p: read_yaml(p, kind="x")),
    ):
        with (tmp_path / name).open("wb") as file:
            file.truncate(2**40)  # no block of it is on the disk
        with pytest.raises(PolypSegError, match="more than the"):
            read(tmp_path / name)
    with pytest.raises(ValueError, match="more than the 3 bytes"):
        read_bounded(find_recipe("finetune"), largest=3)
