"""The short way of ``polypseg segment`` reads the same options as the full command, and leaves it the rest."""

import inspect

import pytest

from polypseg import use_commands
from polypseg.inference import segment
from polypseg_command import read_plain_segment


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        [],
        ["a.jpg", "--thresh", "0.4"],
        ["a.jpg", "--threshold", "high"],
        ["a.jpg", "--every", "2"],
        ["a.jpg", "--output"],
    ],
)
def test_what_it_does_not_know_goes_to_the_full_command(words, capsys):
    assert read_plain_segment(words) is None
    assert capsys.readouterr() == ("", "")


def test_options_have_the_full_commands_names_and_defaults():
    words = (
        "a.jpg b.jpg --output o --model m --runtime torch --threshold 0.4 --min-area 9 --save-probability --overwrite"
    )
    found = read_plain_segment(words.split())
    full, work = (inspect.signature(function).parameters for function in (use_commands.segment, segment.run_segment))
    assert found is not None and set(found) <= set(full) and set(full) == set(work)
    assert found["save_probability"] and str(found["output"]) == "o"
    assert (found["inputs"], found["threshold"], found["min_area"], found["overwrite"]) == (
        ["a.jpg", "b.jpg"],
        0.4,
        9,
        True,
    )
    for name, parameter in work.items():
        assert parameter.default == full[name].default or name == "inputs", name
    assert read_plain_segment(["a.jpg"]) == {"inputs": ["a.jpg"]}
