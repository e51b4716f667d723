"""The rules that the layout expresses, read from every import: see CONTRIBUTING.md."""

import ast
from collections import defaultdict
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "polypseg"
FLOORS = (
    ("modeling",),
    ("errors", "files", "zoo", "recipe", "plotting", "tables", "auto_classes"),
    ("data", "statistics"),
    ("provenance",),
    ("inference",),
    ("weights", "evaluation"),
    ("training",),
    ("pretraining",),
    ("shift", "report", "hub", "expectation"),
    ("study",),
    ("cli",),
)
"""From the ground up: a file imports from its own room, its own floor's and lower ones."""
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}
DOORS = ("__init__", "auto_classes")
"""Files at the root that hand out names of all floors, lazily."""
MODELING_IMPORTS = {"torch", "timm", "transformers"}


@cache
def imported(file):
    """Dotted names of the modules that a file imports, anywhere in it."""
    return tuple(_imported(file))


def _imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level:
            yield "." * node.level + (node.module or "")
        elif isinstance(node, ast.ImportFrom) and node.module == "polypseg":
            yield from (f"polypseg.{alias.name}" for alias in node.names if not alias.name.startswith("__"))
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)


def room_of(file):
    return file.relative_to(SOURCE).with_suffix("").parts[0]


FILES = sorted(path for path in SOURCE.rglob("*.py") if "templates" not in path.parts)


def test_every_room_has_its_floor():
    assert {room_of(file) for file in FILES} - set(FLOOR) == {"__init__"}
    assert len([file for file in FILES if file.parent == SOURCE]) <= 8


def test_modeling_is_closed():
    for file in (SOURCE / "modeling").glob("*.py"):
        for name in imported(file):
            first = name.split(".")[0]
            own = name.startswith((".", "polypseg.modeling"))
            standard = first in {"collections", "typing", "dataclasses", "math", "functools"}
            assert own or standard or first in MODELING_IMPORTS, f"{file.name} imports {name}"


def test_arrows_point_down():
    upward = [
        f"{file.relative_to(SOURCE)} -> {name}"
        for file in FILES
        if room_of(file) not in DOORS
        for name in imported(file)
        if name.startswith("polypseg.") and FLOOR[name.split(".")[1]] > FLOOR[room_of(file)]
    ]
    assert upward == []


def test_rooms_stand_in_no_circle():
    arrows = defaultdict(set)
    for file in FILES:
        if room_of(file) not in DOORS:
            arrows[room_of(file)] |= {name.split(".")[1] for name in imported(file) if name.startswith("polypseg.")}
    left = {room: set(below) - {room} for room, below in arrows.items()}
    while free := [room for room, below in left.items() if not below & left.keys()]:
        for room in free:
            del left[room]
    assert left == {}


def test_only_the_door_knows_the_hubs_names():
    """Below the command line a model is a folder or a predictor; ``fetch`` is called where a name comes in."""
    callers = {
        file.relative_to(SOURCE).as_posix()
        for file in FILES
        if room_of(file) != "cli" and "polypseg.provenance.fetch" in set(imported(file))
    }
    assert callers <= HUB_CALLERS, callers - HUB_CALLERS


HUB_CALLERS = {
    "hub/card_facts.py",  # the owner's name
    "hub/dataset_card.py",  # pushes datasets
    "hub/push.py",
    "hub/space.py",  # models that an exported Space names
    "inference/model_folder.py",  # named_folder: the door of `evaluate` and `shift`
    "inference/segmenter.py",  # polypseg.load: the library's door
    "provenance/license.py",  # `polypseg license NAME`
    "weights/loading.py",  # timm weights without a network
}


def test_only_their_owner_knows_the_keys_of_a_receipt():
    keys = ("scores_by_cluster", "clips_known", "collisions", "repeats_merged", "false_alarms")
    assert strangers(SOURCE / "evaluation" / "receipt.py", keys, ('["{}"]',)) == []


def test_only_their_owner_knows_the_keys_of_a_record_of_weights():
    keys = (
        "encoder_initialisation",
        "finetuned_on",
        "recipe_changes",
        "continued_from",
        "converted_from",
        "negatives_n",
    )
    assert strangers(SOURCE / "provenance" / "origin.py", keys, ('["{}"]', '.get("{}"', '"{}":')) == []


def strangers(owner, keys, forms):
    """Files beside the owner that read or write one of the keys."""
    return [
        f"{file.relative_to(SOURCE)}: {key}"
        for file in FILES
        if file != owner
        for key in keys
        if any(form.format(key) in file.read_text(encoding="utf-8") for form in forms)
    ]
