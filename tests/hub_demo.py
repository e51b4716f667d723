"""A Hub on this machine with the demo's models in it, to try publishing and loading without an account.

python tests/hub_demo.py --runs runs/demo/runs --root runs/hub

Exports and pushes every finished run, prints what to set in another shell, and serves until Ctrl-C.
"""

import subprocess
import sys
from pathlib import Path
from typing import Annotated

from typer import Option

from local_hub.process import HubProcess, running_hub
from polypseg.cli.console import run_script
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import read_json
from polypseg.provenance.origin import read_origin


def command(hub: HubProcess, home: Path, *words: object) -> None:
    """Run one polypseg command against the Hub, its output shown. Raises PolypSegError when it fails."""
    line = [sys.executable, "-m", "polypseg_command", *map(str, words)]
    if subprocess.run(line, env=hub.environment(home)).returncode:
        raise PolypSegError(f"`polypseg {' '.join(map(str, words))}` failed")


def published_name(folder: Path) -> str:
    """The repository's name that an exported model's origin earns."""
    return read_origin(read_json(folder / "config.json").get("weights_origin")).repo_name


def main(
    runs: Annotated[Path, Option(help="Folder of finished runs.")] = Path("runs/demo/runs"),
    root: Annotated[Path, Option(help="Folder of the Hub's data, kept between runs.")] = Path("runs/hub"),
    port: Annotated[int, Option(help="Port; 0 chooses a free one.")] = 8800,
    stay: Annotated[bool, Option(help="Serve until Ctrl-C after publishing.")] = True,
) -> None:
    """Start the Hub, export and push every run, and serve."""
    models = sorted(path.parent for path in runs.glob("*/best"))
    if not models:
        raise UsageError(f"no finished runs in {runs}: run `make demo` first")
    exported, home = root / "exported", root / "client"
    with running_hub(root / "data", port=port) as hub:
        for folder in models:
            options = ("--results", runs.parent / "results", "--organisation", "polypseg")
            command(hub, home, "export", folder / "best", "--output", exported / folder.name, *options)
        # Rows that start at random for want of weights are one and the same model at smoke scale.
        by_name = {published_name(exported / folder.name): exported / folder.name for folder in reversed(models)}
        command(hub, home, "push", *by_name.values(), "--organisation", "polypseg")
        settings = " ".join(f"{key}={hub.environment(home.resolve())[key]}" for key in ("HF_ENDPOINT", "HF_HOME"))
        print(f"\nIn another shell:\n  export {settings} HF_TOKEN=hf_write HF_HUB_DISABLE_XET=1 HF_HUB_OFFLINE=0")
        print("Then polypseg.load, polypseg verify and transformers' from_pretrained talk to this Hub.")
        if stay:
            print("Serving; stop with Ctrl-C.", flush=True)
            hub.process.wait()


if __name__ == "__main__":
    run_script(main)
