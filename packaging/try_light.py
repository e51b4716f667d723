"""Build both distributions, install the light one into an empty environment, and segment a frame there.

python packaging/try_light.py --model FOLDER --frame FILE

With --dist FOLDER the wheels that lie there are tried, and none is built. Needs a package index (for hatchling and the
dependencies). Prints what is installed, its size, wall time and peak memory of a first mask; then installs and removes
``polypseg`` without its dependencies beside it.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FIRST_MASK = """
import sys, time
start = time.perf_counter()
import polypseg_command
sys.argv = ["polypseg", "segment", sys.argv[1], "--model", sys.argv[2]]
polypseg_command.main()
seconds = time.perf_counter() - start
import json, resource
heavy = [name for name in ("torch", "transformers", "datasets", "cv2", "scipy", "pydantic") if name in sys.modules]
print(json.dumps({"seconds": seconds, "peak_kb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, "heavy": heavy}))
"""


def run(*command: object, cwd: Path | None = None, check: bool = True) -> str:
    """What a command prints; its errors go to the terminal."""
    done = subprocess.run([str(word) for word in command], cwd=cwd, stdout=subprocess.PIPE, text=True, check=check)
    return done.stdout


def build(folder: Path) -> None:
    """Build the wheels of both distributions."""
    for source in (ROOT, ROOT / "packaging" / "polypseg"):
        run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, source)


def checked_wheels(folder: Path) -> dict[str, Path]:
    """The wheels of both distributions in a folder, which share no file: name -> file."""
    wheels = {path.name.split("-")[0]: path for path in folder.glob("*.whl")}
    assert set(wheels) == {"polypseg", "polypseg_light"}, wheels
    files = {name: {f for f in zipfile.ZipFile(p).namelist() if ".dist-info/" not in f} for name, p in wheels.items()}
    assert not files["polypseg"], f"polypseg holds files of its own: {sorted(files['polypseg'])[:3]}"
    assert "polypseg/py.typed" in files["polypseg_light"]
    print(f"wheels: {', '.join(f'{path.name} {path.stat().st_size / 1e6:.2f} MB' for path in wheels.values())}")
    return wheels


def main() -> None:
    """Try it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--frame", type=Path, required=True, help="a picture")
    parser.add_argument(
        "--model", default="starter", help="model folder with onnx/model.onnx; default: the shipped one"
    )
    parser.add_argument("--dist", type=Path, help="folder with the wheels of both distributions; default: build them")
    options = parser.parse_args()
    frame = options.frame.resolve()
    model = options.model if options.model == "starter" else Path(options.model).resolve()
    with tempfile.TemporaryDirectory(prefix="polypseg-light-") as place:
        work = Path(place)
        if options.dist is None:
            build(work / "wheels")
        wheels = checked_wheels(options.dist or work / "wheels")
        venv.create(work / "venv", with_pip=True)
        python = work / "venv" / "bin" / "python"
        pip = (python, "-m", "pip", "--disable-pip-version-check")
        before = folder_size(work / "venv")
        run(*pip, "install", "--quiet", "-c", ROOT / "constraints.txt", wheels["polypseg_light"])
        print(f"installed: {(folder_size(work / 'venv') - before) / 1e6:.0f} MB")
        print(run(*pip, "list", "--format=freeze"))
        for attempt in ("first", "again"):
            (work / attempt).mkdir()
            *_, measured = run(python, "-c", FIRST_MASK, frame, model, cwd=work / attempt).splitlines()
            found = json.loads(measured)
            assert not found["heavy"], found
            peak = found["peak_kb"] * 1024 / 1e6
            print(f"{attempt} mask: {found['seconds']:.2f} s after the interpreter's start, peak {peak:.0f} MB")
        script = work / "venv" / "bin" / "polypseg"
        said = subprocess.run([script, "evaluate", "--model", "starter"], capture_output=True, text=True)
        print(f"a command that needs more, exit {said.returncode}: {said.stderr.strip()}")
        assert said.returncode == 2 and "pip install polypseg" in said.stderr and "Traceback" not in said.stderr
        run(*pip, "install", "--quiet", "--no-deps", wheels["polypseg"])
        run(*pip, "uninstall", "--quiet", "--yes", "polypseg")
        run(python, "-c", FIRST_MASK, frame, model, cwd=work / "again")
        print("polypseg came and went; the light one still segments")


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


if __name__ == "__main__":
    main()
