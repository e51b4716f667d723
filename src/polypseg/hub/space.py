"""The browser app: written as a folder for a Hugging Face Space, or run on this machine."""

import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import webbrowser
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from string import Template

import yaml
from PIL import Image

from polypseg.data.synthetic import CAMERAS, synthesize_frame
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import atomic_path, explain_write_errors, read_json, write_json, write_text
from polypseg.hub.dataset_card import TEMPLATES
from polypseg.hub.markdown import plain
from polypseg.inference.quality import read_quality
from polypseg.provenance.local import local_folder
from polypseg.tables import Column, Table

GRADIO = "6.31.0"
"""The version that the app was tested with; a Space installs exactly this one."""
TITLE = "Polyp segmentation"
OWN_CODE = ("timm>=1.0.31,<2", "torchvision>=0.25,<1")
"""What models that bring their own code need besides the app's requirements."""
EXAMPLES = (("a", 1), ("a", 2), ("a", 5), ("b", 2), ("b", 3), ("b", 7))
"""Camera and index of the synthetic examples."""
_MODEL_FILES = ("config.json", "model.safetensors", "preprocessor_config.json", "*.py")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# The package registers its model, so that a run's own best/ folder opens as well as a published model.
_PROGRAM = "import runpy, polypseg.modeling; runpy.run_path('app.py', run_name='__main__')"


@dataclass(frozen=True, kw_only=True)
class SpaceModel:
    """A model that the app offers; the fields of an entry of ``models.json``."""

    id: str
    """Hub id, or path of a model folder."""
    title: str
    """What the user chooses; unique."""
    licence: str
    note: str
    """One or two sentences on where the weights come from."""
    revision: str | None = None
    """Tag, branch or commit of a Hub id; models with their own code need the full commit."""
    remote_code: bool = False
    """Whether the model brings its own code, which is then run."""

    @property
    def is_local(self) -> bool:
        """Whether the id is a folder of this machine."""
        return Path(self.id).is_dir()


def describe_model(name_or_path: str, *, revision: str | None = None, title: str | None = None) -> SpaceModel:
    """The entry of a model folder, or of a Hub model at its present commit, from what its config says of its origin.

    Raises UsageError and PolypSegError as ``polypseg.load`` does.
    """
    from polypseg.provenance.fetch import fetch, resolve_id
    from polypseg.provenance.license import model_license
    from polypseg.provenance.origin import UNKNOWN, WeightsOrigin

    here = local_folder(name_or_path)
    folder = here or fetch(name_or_path, revision=revision)
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} is no model folder: it has no config.json")
    config = read_json(folder / "config.json")
    origin = WeightsOrigin.within(config, path=folder / "config.json")
    terms = model_license(origin)
    return SpaceModel(
        id=resolve_id(name_or_path) if here is None else str(folder),
        title=title or (folder.resolve().name if origin.model_id == UNKNOWN else origin.repo_name),
        licence=terms.name or terms.identifier,
        note=f"{origin.summary} Quality: {read_quality(folder).words}.",
        revision=folder.name if here is None else None,
        remote_code="auto_map" in config,
    )


def export_space(
    output: Path, *, models: Sequence[SpaceModel], title: str = TITLE, trust_remote_code: bool = False
) -> Path:
    """Write a Space that needs no polypseg: app, ``models.json``, requirements, README and synthetic examples.

    Model folders are copied into it, so they must be loadable without this package (``polypseg export``). Returns the
    folder. ``trust_remote_code``: whether the Space may run the code that CNN models bring along. Raises UsageError for
    models that the app would refuse, or a folder that holds something else than a Space.
    """
    _check_models(models)
    with_code = [model.title for model in models if model.remote_code]
    if with_code and not trust_remote_code:
        raise UsageError(
            f"{', '.join(with_code)} bring(s) code of its own, which the Space would run: read its .py files, then "
            "allow it (--trust-remote-code)"
        )
    for model in models:
        config = read_json(Path(model.id) / "config.json") if model.is_local else {}
        if config.get("model_type") == "polypseg" and "auto_map" not in config:
            raise UsageError(f"{model.id} cannot be loaded without polypseg: export it first with `polypseg export`")
    if output.exists() and not (output / "models.json").is_file() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists and is no Space of this command: choose another folder")
    if len(title) > 60:
        raise UsageError(f"the title has {len(title)} characters: a Space shows at most 60")
    with tempfile.TemporaryDirectory(prefix="polypseg-space-") as built, explain_write_errors(output):
        _write_app(Path(built), [_copy_into(Path(built), model) for model in models])
        _write_readme(Path(built), models, title=title)
        for name in ("models", "examples"):
            shutil.rmtree(output / name, ignore_errors=True)
        for made in sorted(Path(built).iterdir()):  # one by one: the folder may be a clone of the Space
            with atomic_path(output / made.name) as temporary:
                shutil.move(made, temporary)
    return output


def _check_models(models: Sequence[SpaceModel]) -> None:
    """Raise UsageError for no model, equal titles, a missing folder, or foreign code that is not pinned."""
    if not models:
        raise UsageError("the app needs at least one model")
    titles = [model.title for model in models]
    repeated = next((title for title in titles if titles.count(title) > 1), None)
    if repeated:
        raise UsageError(f"two models are called {repeated!r}: give each a title of its own")
    for model in models:
        if not model.is_local and not re.fullmatch(r"[\w.-]+/[\w.-]+", model.id):
            raise UsageError(f"{model.id} is neither a model folder nor a Hub id (owner/name)")
        if model.remote_code and not model.is_local and not _COMMIT.fullmatch(model.revision or ""):
            raise UsageError(
                f"{model.id} brings its own code, which the app runs only at a full commit (40 hex digits), not at "
                f"{model.revision!r}: give its revision"
            )


def _copy_into(folder: Path, model: SpaceModel) -> SpaceModel:
    """Copy a local model's files into ``folder/models``; the entry of the copy."""
    if not model.is_local:
        return model
    name = re.sub(r"[^\w.-]+", "-", model.title)
    place = folder / "models" / name
    place.mkdir(parents=True)
    for pattern in _MODEL_FILES:
        for file in Path(model.id).glob(pattern):
            if file.name != "handler.py":
                shutil.copyfile(file, place / file.name)
    return SpaceModel(**(asdict(model) | {"id": f"models/{name}"}))


def _write_app(folder: Path, models: Sequence[SpaceModel]) -> None:
    """The files that run: app, style, models, requirements, examples."""
    source = TEMPLATES / "space"
    for name in ("app.py", "style.css"):
        shutil.copyfile(source / name, folder / name)
    write_json(folder / "models.json", [asdict(model) for model in models])
    needed = (source / "requirements.txt").read_text(encoding="utf-8").splitlines()
    if any(model.remote_code for model in models):
        needed = sorted([*needed, *OWN_CODE])
    write_text(folder / "requirements.txt", "\n".join(needed) + "\n")
    (folder / "examples").mkdir()
    for camera, index in EXAMPLES:
        frame, _ = synthesize_frame(CAMERAS[camera], seed=0, index=index)
        Image.fromarray(frame).save(folder / "examples" / f"synthetic_camera_{camera}_{index:02d}.png")


def _write_readme(folder: Path, models: Sequence[SpaceModel], *, title: str) -> None:
    header = {
        "title": title,
        "emoji": "🔬",
        "colorFrom": "green",
        "colorTo": "blue",
        "sdk": "gradio",
        "sdk_version": GRADIO,
        "app_file": "app.py",
        "license": "apache-2.0",
        "models": [model.id for model in models if not model.is_local],
        "pinned": False,
        "short_description": "Polyp segmentation for research; no medical device",
    }
    columns = [
        Column("model", "title", plain),
        Column("license", "licence", plain),
        Column("origin", "note", plain),
    ]
    table = Table(columns=columns, records=models).markdown()
    text = Template((TEMPLATES / "space" / "README.md").read_text(encoding="utf-8"))
    head = yaml.safe_dump(header, sort_keys=False, allow_unicode=True)
    write_text(folder / "README.md", f"---\n{head}---\n\n{text.substitute(title=plain(title), table=table)}")


# On this machine ---------------------------------------------------------------------------------------


def run_demo_app(
    models: Sequence[SpaceModel], *, host: str = "127.0.0.1", port: int = 7860, open_browser: bool = True
) -> None:
    """Run the app on this machine until it is interrupted; model folders are used where they are.

    No code that a model brings along is run: this package's own models load with this package's code.

    Raises UsageError without gradio, for models that the app would refuse or a port that is taken; PolypSegError when
    the app ends by itself.
    """
    if importlib.util.find_spec("gradio") is None:
        raise UsageError("the app needs gradio: pip install 'polypseg[app]'")
    _check_models(models)
    _check_port(host, port)
    absolute = [
        replace(model, remote_code=False, id=str(Path(model.id).resolve()) if model.is_local else model.id)
        for model in models
    ]
    with _terminable(), tempfile.TemporaryDirectory(prefix="polypseg-app-") as folder:
        _write_app(Path(folder), absolute)
        environment = os.environ | {
            "GRADIO_SERVER_NAME": host,
            "GRADIO_SERVER_PORT": str(port),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": str(Path(folder) / "uploads"),
        }
        process = subprocess.Popen([sys.executable, "-c", _PROGRAM], cwd=folder, env=environment)
        try:
            address = f"http://{'localhost' if host == '0.0.0.0' else host}:{port}"
            if _wait_for(process, host, port):
                print(f"the app is at {address} until Ctrl-C", flush=True)
                if open_browser:
                    webbrowser.open(address)
            code = process.wait()
        except KeyboardInterrupt:
            code = 0
        finally:
            _end(process)
    if code:
        raise PolypSegError(f"the app ended with exit code {code}; what it printed above says why")


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does: the app and its folder must not stay behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _check_port(host: str, port: int) -> None:
    try:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise UsageError(f"cannot serve at {host}:{port} ({error.strerror}): choose another host or port") from error


def _wait_for(process: subprocess.Popen[bytes], host: str, port: int) -> bool:
    """Wait until the app answers; False when it ends before."""
    while process.poll() is None:
        try:
            with socket.create_connection((host, port), timeout=1):
                return True
        except OSError:
            time.sleep(0.2)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let the app stop, for ten seconds; then make it."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
