"""Ctrl-C while a command or script is still loading its modules: one line and exit code 130, no traceback."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
INTERRUPTED = """
import sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
sys.argv = {words!r}
import runpy
runpy.run_path({path!r}, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("src/polypseg_command.py", "polypseg.cli.app"),
        ("training_scripts/finetune.py", "polypseg.cli.train"),
        ("training_scripts/pretrain.py", "polypseg.cli.train"),
        ("training_scripts/evaluate.py", "polypseg.cli.evaluate"),
    ],
)
def test_interrupt_during_imports_is_one_line(path, module):
    words = [path, "models"]
    program = INTERRUPTED.format(module=module, words=words, path=str(REPOSITORY / path))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr.strip()) == (130, "interrupted")
