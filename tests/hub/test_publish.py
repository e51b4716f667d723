"""Pushing to and getting from a Hub that runs as a process of its own: whole or not at all, and checked on return.

Clients are processes too, because the Hub's address is read at import. The models are tiny; their folders are as
exported.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import processes
from local_hub.process import HubProcess, running_hub
from polypseg.hub.export import export_model
from polypseg.provenance.checksums import MANIFEST, list_files, read_manifest, write_manifest
from tiny_models import SMOKE_NAME, SMOKE_ORIGIN, write_tiny_model

pytestmark = pytest.mark.slow
REPO = f"polypseg/{SMOKE_NAME}"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A small CNN model as `polypseg export` writes it."""
    folder = tmp_path_factory.mktemp("model")
    write_tiny_model(folder / "best", origin=SMOKE_ORIGIN, decoder_channels=32)
    return export_model(folder / "best", folder / "exported", organization="polypseg").folder


@pytest.fixture(scope="module")
def changed(exported, tmp_path_factory) -> Path:
    """The same model with other weights: every large file differs."""
    import safetensors.torch

    folder = tmp_path_factory.mktemp("changed") / "exported"
    shutil.copytree(exported, folder)
    for name in ("model.safetensors", "model.fp16.safetensors"):
        state = safetensors.torch.load_file(folder / name)
        safetensors.torch.save_file({k: v + 1 for k, v in state.items()}, folder / name, metadata={"format": "pt"})
    write_manifest(folder)
    return folder


@pytest.fixture
def hub(tmp_path):
    with running_hub(tmp_path / "hub", start=processes.start) as process:
        yield process


@pytest.fixture
def home(tmp_path) -> Path:
    return tmp_path / "home"


def client(hub: HubProcess, home: Path, *words: object, token: str | None = "hf_write", **changes: str) -> list[object]:
    """The command and environment of a polypseg process."""
    environment = hub.environment(home, token=token) | {"OMP_NUM_THREADS": "1"} | changes
    return [[sys.executable, "-m", "polypseg_command", *map(str, words)], environment]


def run(hub: HubProcess, home: Path, *words: object, code: int = 0, **changes: str) -> str:
    """Run a command to its end; stdout and stderr together."""
    command, environment = client(hub, home, *words, **changes)
    done = processes.run(command, env=environment, capture_output=True, timeout=120)
    output = done.stdout + done.stderr
    assert done.returncode == code, output
    assert "Traceback" not in output and "hf_write" not in output
    return output


def ask(hub: HubProcess, home: Path, code: str) -> object:
    """Evaluate Python with an HfApi named api in a client process; the value comes back as JSON."""
    script = f"import json\nfrom huggingface_hub import *\napi = HfApi()\nprint(json.dumps({code}))"
    done = processes.run([sys.executable, "-c", script], env=hub.environment(home), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def commits(hub: HubProcess, home: Path, repo: str = REPO) -> list[str]:
    return ask(hub, home, f"[c.title for c in api.list_repo_commits({repo!r})]")


def head_is(hub: HubProcess, home: Path, repo: str = REPO) -> dict[str, str]:
    """A snapshot of the head, fetched fresh, which must agree with its own manifest; its manifest, {} for none."""
    shutil.rmtree(home / "fresh", ignore_errors=True)
    place = str(home / "fresh")
    if not ask(hub, home, f"api.repo_exists({repo!r}) and snapshot_download({repo!r}, local_dir={place!r})"):
        return {}
    folder = Path(place)
    if not (folder / MANIFEST).is_file():
        assert list_files(folder) == []  # created, nothing committed yet
        return {}
    manifest = read_manifest(folder / MANIFEST)
    assert sorted(manifest) == list_files(folder)
    check = subprocess.run(["sha256sum", "-c", "--quiet", MANIFEST], cwd=folder, capture_output=True, text=True)
    assert check.returncode == 0, check.stdout
    return manifest


def test_push_publishes_tags_and_verifies_and_again_changes_nothing(hub, home, exported):
    first = run(hub, home, "push", exported, "--organisation", "polypseg")
    assert "fetched back and equal" in first and "published" in first
    before = commits(hub, home)
    hub.clear()
    second = run(hub, home, "push", exported, "--organisation", "polypseg")
    assert "already there" in second and commits(hub, home) == before
    assert not hub.requests(r"POST .*(commit|preupload|info/lfs)")
    assert head_is(hub, home) == read_manifest(exported / MANIFEST)
    assert ask(hub, home, f"[t.name for t in api.list_repo_refs({REPO!r}).tags]") == ["v0.1.0"]
    assert "all" in run(hub, home, "verify", REPO, "--revision", "v0.1.0")


def test_dry_run_prints_the_plan_and_sends_nothing(hub, home, exported):
    output = run(hub, home, "push", exported, "--dry-run")
    assert "alice/resnet10t_deeplabv3plus.random-smoke-synthetic_a" in output and "nothing was sent" in output
    assert "no: " in output  # not one of the twelve, and why
    assert not [r for r in hub.requests() if r["method"] not in ("GET", "HEAD")]


def test_dry_run_without_a_network_checks_the_folders(hub, home, exported, tmp_path):
    output = run(hub, home, "push", exported, "--dry-run", HF_HUB_OFFLINE="1")
    assert "resnet10t_deeplabv3plus.random-smoke-synthetic_a" in output
    assert "every folder passes; not compared with the Hub" in output and "nothing was sent" in output
    run(hub, home, "push", exported, HF_HUB_OFFLINE="1", code=1)
    damaged = tmp_path / "damaged"
    shutil.copytree(exported, damaged)
    (damaged / "config.json").write_text("{}")
    assert "was changed after its export" in run(hub, home, "push", damaged, "--dry-run", HF_HUB_OFFLINE="1", code=2)


def test_a_tag_that_stands_for_other_content_is_refused_before_any_upload(hub, home, exported, changed):
    run(hub, home, "push", exported, "--organisation", "polypseg")
    hub.clear()
    assert "another --tag" in run(hub, home, "push", changed, "--organisation", "polypseg", code=2)
    assert not hub.requests(r"POST .*(commit|preupload|info/lfs)")
    run(hub, home, "push", changed, "--organisation", "polypseg", "--tag", "v0.1.1")
    assert head_is(hub, home) == read_manifest(changed / MANIFEST)
    assert "all" in run(hub, home, "verify", REPO, "--revision", "v0.1.0")  # the old version stays


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "handler.py").write_text("x"), "handler.py (damaged)"),
        (lambda folder: (folder / "extra.txt").write_text("x"), "extra.txt (not in the manifest)"),
        (lambda folder: (folder / MANIFEST).unlink(), "polypseg export"),
        (
            lambda folder: (
                (folder / "README.md").write_text(
                    (folder / "README.md").read_text().replace("license: apache-2.0", "license: mit")
                ),
                write_manifest(folder),
            ),
            "origin demands",
        ),
        (
            lambda folder: (
                (folder / "README.md").write_text((folder / "README.md").read_text().replace("license:", "licence:")),
                write_manifest(folder),
            ),
            "does not pass",
        ),
    ],
)
def test_a_folder_that_is_not_as_exported_is_refused_before_a_byte_is_sent(
    hub, home, exported, tmp_path, damage, words
):
    folder = tmp_path / "copy"
    shutil.copytree(exported, folder)
    damage(folder)
    assert words in run(hub, home, "push", folder, "--organisation", "polypseg", code=2)
    assert not [r for r in hub.requests() if r["method"] != "GET"]


def test_private_is_not_promised_where_the_repository_is_public(hub, home, exported):
    run(hub, home, "push", exported, "--organisation", "polypseg")
    assert "is public" in run(hub, home, "push", exported, "--organisation", "polypseg", "--private", code=2)


def test_two_folders_for_one_repository_are_refused(hub, home, exported, changed):
    output = run(hub, home, "push", exported, changed, "--organisation", "polypseg", code=2)
    assert "would both become" in output and not [r for r in hub.requests() if r["method"] not in ("GET", "HEAD")]


@pytest.mark.parametrize("stage", ["POST /api/repos/create", "POST .*preupload", "PUT ", "POST .*/commit/"])
def test_a_push_killed_at_any_stage_leaves_the_old_state_and_the_next_completes(hub, home, exported, stage):
    hub.control(stage, "delay", seconds=20)
    command, environment = client(hub, home, "push", exported, "--organisation", "polypseg")
    process = processes.start(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    hub.wait_for(stage, seconds=60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.clear()
    assert head_is(hub, home) == {}
    run(hub, home, "push", exported, "--organisation", "polypseg")
    assert head_is(hub, home) == read_manifest(exported / MANIFEST)


def test_pushes_killed_at_random_moments_never_leave_a_mixture(hub, home, exported, changed):
    run(hub, home, "push", exported, "--organisation", "polypseg")
    states = [read_manifest(exported / MANIFEST), read_manifest(changed / MANIFEST)]
    moments = random.Random(0)
    for _ in range(4):
        command, environment = client(hub, home, "push", changed, "--organisation", "polypseg", "--tag", "v2")
        process = processes.start(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(moments.uniform(0.8, 4.0))
        process.kill()
        process.wait()
        assert head_is(hub, home) in states
    run(hub, home, "push", changed, "--organisation", "polypseg", "--tag", "v2")
    assert head_is(hub, home) == states[1]


@pytest.mark.parametrize("step", ["manifest", "branch", "answer"])
def test_a_server_that_dies_inside_the_commit_leaves_a_valid_repository(hub, home, exported, step):
    hub.control(step, "crash")
    run(hub, home, "push", exported, "--organisation", "polypseg", code=1)
    hub.restart()
    assert head_is(hub, home) in ({}, read_manifest(exported / MANIFEST))
    run(hub, home, "push", exported, "--organisation", "polypseg")
    assert head_is(hub, home) == read_manifest(exported / MANIFEST)


def test_a_busy_server_is_asked_again(hub, home, exported):
    hub.control("POST .*/commit/", "status", status=503, times=2)
    assert "fetched back and equal" in run(hub, home, "push", exported, "--organisation", "polypseg")
    assert len(commits(hub, home)) == 2  # the repository's first commit and ours


def test_an_upload_that_arrives_damaged_is_an_error(hub, home, exported):
    hub.control(r"GET .*model\.safetensors|GET .*/_?cdn.*|GET /blobs?/", "flip", after=2000, times=-1)
    output = run(hub, home, "push", exported, "--organisation", "polypseg", code=1)
    assert "holds other content" in output and "safetensors" in output


@pytest.fixture(scope="module")
def hub_data(exported, tmp_path_factory) -> Path:
    """What a Hub keeps on disk once the model has been pushed to it."""
    folder = tmp_path_factory.mktemp("published")
    with running_hub(folder / "hub", start=processes.start) as process:
        run(process, folder / "home", "push", exported, "--organisation", "polypseg")
    return folder / "hub"


@pytest.fixture
def published(hub_data, tmp_path) -> Iterator[HubProcess]:
    """A Hub of its own with the model in it."""
    shutil.copytree(hub_data, tmp_path / "published")
    with running_hub(tmp_path / "published", start=processes.start) as process:
        yield process


def get(hub: HubProcess, home: Path, name: str = REPO, code: int = 0, options: str = "", **changes: str) -> str:
    """What polypseg.load downloads and checks, in a process of its own; its output. Imports no torch."""
    return _in_process(
        hub, home, f"folder = fetch({name!r}{options})\n    print('loaded', folder.name)", code, **changes
    )


def load(hub: HubProcess, home: Path, **changes: str) -> str:
    """polypseg.load itself, in a process of its own; its output."""
    return _in_process(
        hub, home, f"import polypseg\n    print('loaded', polypseg.load({REPO!r}).revision)", 0, **changes
    )


def _in_process(hub: HubProcess, home: Path, statement: str, code: int, **changes: str) -> str:
    script = (
        "import sys\n"
        "from polypseg.errors import PolypSegError\n"
        "from polypseg.provenance.fetch import fetch\n"
        "try:\n"
        f"    {statement}\n"
        "except PolypSegError as error:\n"
        "    sys.exit(f'error: {error}')\n"
    )
    token = changes.pop("token", "hf_write")
    environment = hub.environment(home, token=token or None) | {"OMP_NUM_THREADS": "1"} | changes
    done = processes.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def cached_weights(home: Path) -> Path:
    (weights,) = (home / "hub").glob("models--*/snapshots/*/model.safetensors")
    return weights


def flip_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.resolve().write_bytes(content)


def test_a_flipped_byte_on_the_way_is_found_and_fetched_again(published, exported, tmp_path):
    weights = read_manifest(exported / MANIFEST)["model.safetensors"]
    published.control(f"GET /cdn/{weights}", "flip", after=100_000, times=1)
    output = get(published, tmp_path / "new")
    assert "fetching again" in output and "loaded" in output


def test_a_flipped_byte_on_the_server_is_an_error_every_time(published, tmp_path):
    published.control(r"GET .*", "flip", after=100_000, times=-1)
    output = get(published, tmp_path / "new", code=1)
    assert "model.safetensors (damaged)" in output and "publisher" in output


def test_a_damaged_cache_is_repaired_online_and_named_offline(published, tmp_path):
    new = tmp_path / "new"
    assert "loaded" in get(published, new)
    flip_byte(cached_weights(new))
    output = get(published, new, code=1, HF_HUB_OFFLINE="1")
    assert "model.safetensors" in output and "damaged in the cache" in output
    assert "fetching again" in get(published, new)
    assert "fetching again" not in get(published, new)


def test_the_cache_serves_offline_and_when_the_server_is_gone(published, tmp_path):
    new = tmp_path / "new"
    get(published, new)
    assert "loaded" in load(published, new, HF_HUB_OFFLINE="1")
    published.kill()
    started = time.monotonic()
    assert "loaded" in get(published, new)
    output = get(published, tmp_path / "empty", code=1)
    assert "cannot be reached" in output
    assert time.monotonic() - started < 60  # both together; the client alone would wait 24 s a file


def test_missing_private_and_gated_models_and_revisions_say_what_to_do(published, tmp_path, home):
    new = tmp_path / "new"
    assert "does not exist" in get(published, new, "polypseg/nothing", code=1)
    assert "no revision 'v9'" in get(published, new, code=1, options=", revision='v9'")
    assert "Did you mean" in get(published, new, "RN-IN-MX", code=1)
    ask(published, home, f"api.update_repo_settings({REPO!r}, gated='auto') and None")
    assert "gated" in get(published, new, code=1, token="hf_other")
    ask(published, home, f"api.update_repo_settings({REPO!r}, private=True, gated=False) and None")
    assert "does not exist, or is private" in get(published, new, code=1, token="hf_other")


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv")
def test_a_read_only_cache_serves_another_user(published, tmp_path):
    new = tmp_path / "new"
    get(published, new)
    subprocess.run(["chmod", "-R", "a+rX,a-w", new], check=True)
    for folder in [*new.parents][:-1]:
        folder.chmod(folder.stat().st_mode | 0o055) if folder.stat().st_uid == os.geteuid() else None
    script = f"from polypseg.provenance.fetch import fetch; print('loaded', fetch({REPO!r}).name)"
    nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", sys.executable, "-c", script]
    environment = published.environment(new) | {"HOME": "/nonexistent"}
    done = subprocess.run(nobody, env=environment, capture_output=True, text=True, timeout=120)
    assert "loaded" in done.stdout, done.stderr


def test_no_token_reaches_an_address_or_the_cdn(published, tmp_path):
    get(published, tmp_path / "new")
    records = published.requests()
    assert any(r["host"].startswith("localhost") for r in records)
    assert all("hf_write" not in r["path"] for r in records)
    assert not any(r["authorized"] for r in records if r["host"].startswith("localhost"))


def test_with_xet_on_a_model_goes_there_and_back(tmp_path, home, exported):
    with running_hub(tmp_path / "hub", xet=True, start=processes.start) as hub:
        assert "fetched back and equal" in run(hub, home, "push", exported, "--organisation", "polypseg")
        assert hub.requests("xet-write-token")
        assert head_is(hub, home) == read_manifest(exported / MANIFEST)
        assert "loaded" in load(hub, tmp_path / "new")


def test_the_collection_holds_each_of_the_twelve_once(hub, home):
    script = (
        "from huggingface_hub import HfApi\n"
        "from polypseg import zoo\n"
        "from polypseg.hub.push import update_collection\n"
        "api, ids = HfApi(), [f'polypseg/{entry.model_id}' for entry in zoo.ZOO]\n"
        "[api.create_repo(name) for name in ids]\n"
        "slugs = {update_collection(ids[:5], owner='polypseg'), update_collection(ids, owner='polypseg')}\n"
        "(slug,) = slugs\n"
        "assert [item.item_id for item in api.get_collection(slug).items] == ids\n"
        "assert len(list(api.list_collections(owner='polypseg'))) == 1\n"
        "print('collected')\n"
    )
    environment = hub.environment(home)
    done = processes.run([sys.executable, "-c", script], env=environment, capture_output=True, timeout=120)
    assert "collected" in done.stdout, done.stderr
