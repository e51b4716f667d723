"""Publishing model folders: plan, check everything, upload in one commit a model, tag, collect, and prove the upload.

A commit is atomic on the Hub, so a killed push leaves the old state or the new one; the same push again continues.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
from tenacity import retry, retry_if_exception, stop_after_attempt, wait_exponential
from tqdm import tqdm

from polypseg import __version__, zoo
from polypseg.errors import PolypSegError, UsageError
from polypseg.files import file_sha256, read_json
from polypseg.hub.card_checks import lint_card, load_card
from polypseg.provenance.checksums import MANIFEST, NOT_LISTED, describe_problems, find_problems, read_manifest
from polypseg.provenance.fetch import hub_api, hub_errors
from polypseg.provenance.license import ModelLicense, license_contradictions, model_license
from polypseg.provenance.origin import WeightsOrigin

COLLECTION = "Polyp segmentation: twelve pretrained backbones"
COLLECTION_TEXT = "ResNet50 + DeepLabV3+ and ViT-B + DPT, pretrained in six ways. Research only, not a medical device."
ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True)
class PublishPlan:
    """What pushing one model folder would do. Nothing has been sent when it exists."""

    folder: Path
    repo_id: str
    origin: WeightsOrigin
    license: str
    tag: str
    private: bool
    exists: bool
    parent: str | None
    """Commit that the upload builds on; None for a repository that does not exist yet."""
    digests: dict[str, str]
    """Every file of the folder, the manifest included -> SHA-256."""
    uploads: tuple[str, ...]
    """Files that the repository lacks or has with other content."""
    deletions: tuple[str, ...]
    """Files of the repository that the folder does not have."""

    @property
    def upload_bytes(self) -> int:
        """How much the upload would send."""
        return sum((self.folder / name).stat().st_size for name in self.uploads)

    @property
    def changes_anything(self) -> bool:
        """Whether a commit is needed."""
        return bool(self.uploads or self.deletions)


@dataclass(frozen=True, kw_only=True)
class Published:
    """Where a model is now."""

    repo_id: str
    commit: str
    tag: str
    new_commit: bool
    verified_files: int
    verified_bytes: int


def exported_folders(folders: Sequence[Path], *, everything_in: Path | None = None) -> list[Path]:
    """The given model folders, and with ``everything_in`` all those directly in it. Raises UsageError for none."""
    found = list(folders)
    if everything_in is not None:
        found += sorted(path.parent for path in everything_in.glob(f"*/{MANIFEST}"))
    found = list({folder.resolve(): folder for folder in found}.values())
    if not found:
        place = f" in {everything_in}" if everything_in else ""
        raise UsageError(f"no exported model folder{place}: write one with `polypseg export`")
    return found


def plan_push(
    folder: Path,
    *,
    organization: str | None = None,
    private: bool = False,
    tag: str | None = None,
    token: str | None = None,
) -> PublishPlan:
    """Check a folder and compare it with the Hub; nothing is sent.

    Raises UsageError for a folder that is damaged or not exported, a card that does not pass, a tag that is taken by
    other content; PolypSegError when the Hub cannot be reached.
    """
    origin, terms, digests = _check_folder(folder)
    api = hub_api(token=token)
    with hub_errors(organization or "your account"):
        owner = organization or api.whoami()["name"]
    repo_id = f"{owner}/{origin.repo_name}"
    tag = tag or f"v{__version__}"
    with hub_errors(repo_id):
        state = _remote_state(api, repo_id)
        tagged = None if state is None else _tagged_commit(api, repo_id, tag)
    if private and state is not None and not state.private:
        raise UsageError(f"{repo_id} is public: make it private on its page first, or push without --private")
    uploads, deletions = _differences(digests, state)
    plan = PublishPlan(
        folder=folder,
        repo_id=repo_id,
        origin=origin,
        license=terms.identifier,
        tag=tag,
        private=private,
        exists=state is not None,
        parent=None if state is None else state.commit,
        digests=digests,
        uploads=uploads,
        deletions=deletions,
    )
    if tagged is not None and (plan.changes_anything or tagged != plan.parent):
        raise UsageError(f"{repo_id} already has a tag {tag} for other content: give another --tag")
    return plan


@dataclass(frozen=True, kw_only=True)
class CheckedFolder:
    """A model folder that may be published as far as this machine can tell."""

    folder: Path
    repo_name: str
    license: str
    shortcomings: tuple[str, ...]
    files: int
    size: int
    """Bytes."""


def check_folders(folders: Sequence[Path]) -> list[CheckedFolder]:
    """Everything that is checked before a push and needs no Hub. Raises UsageError as ``plan_pushes``."""
    checked: dict[str, CheckedFolder] = {}
    for folder in folders:
        origin, terms, digests = _check_folder(folder)
        if origin.repo_name in checked:
            raise _one_name_twice(checked[origin.repo_name].folder, folder, origin.repo_name)
        checked[origin.repo_name] = CheckedFolder(
            folder=folder,
            repo_name=origin.repo_name,
            license=terms.identifier,
            shortcomings=tuple(origin.shortcomings),
            files=len(digests),
            size=sum((folder / name).stat().st_size for name in digests),
        )
    return list(checked.values())


def plan_pushes(
    folders: Sequence[Path],
    *,
    organization: str | None = None,
    private: bool = False,
    tag: str | None = None,
    token: str | None = None,
) -> list[PublishPlan]:
    """One plan a folder, as ``plan_push``. Raises UsageError too for two folders that claim one repository."""
    plans: dict[str, PublishPlan] = {}
    for folder in folders:
        plan = plan_push(folder, organization=organization, private=private, tag=tag, token=token)
        if plan.repo_id in plans:
            raise _one_name_twice(plans[plan.repo_id].folder, folder, plan.repo_id)
        plans[plan.repo_id] = plan
    return list(plans.values())


def _one_name_twice(one: Path, other: Path, name: str) -> UsageError:
    return UsageError(f"{one} and {other} would both become {name}: push one of them")


def _check_folder(folder: Path) -> tuple[WeightsOrigin, ModelLicense, dict[str, str]]:
    """Everything that can be wrong with a folder is found before a byte is sent; its origin, license and digests."""
    if not (folder / MANIFEST).is_file():
        raise UsageError(f"{folder} has no {MANIFEST}: write the folder with `polypseg export`")
    manifest = read_manifest(folder / MANIFEST)
    problems = find_problems(folder, manifest)
    if problems:
        raise UsageError(f"{folder} was changed after its export: {describe_problems(problems)}. Export it again")
    config = read_json(folder / "config.json")
    origin = WeightsOrigin.within(config, path=folder / "config.json")
    names = {entry.model_id for entry in zoo.ZOO}
    if origin.repo_name in names and not origin.official:
        raise UsageError(f"{folder} may not be published as {origin.repo_name}: {'; '.join(origin.shortcomings)}")
    card = load_card(folder / "README.md")
    findings = [*lint_card(card, folder=folder), *license_contradictions(origin, card, config)]
    if findings:
        raise UsageError(f"the card {folder / 'README.md'} does not pass: {'; '.join(findings)}")
    return origin, model_license(origin), manifest | {MANIFEST: file_sha256(folder / MANIFEST)}


@dataclass(frozen=True)
class _RemoteState:
    commit: str
    private: bool
    digests: dict[str, str]


def _remote_state(api: HfApi, repo_id: str) -> _RemoteState | None:
    """The head of a repository with the digest of each file; regular files are small and fetched to be hashed."""
    try:
        info = api.model_info(repo_id, files_metadata=True)
    except RepositoryNotFoundError:
        return None
    digests: dict[str, str] = {}
    for sibling in info.siblings or []:
        if sibling.lfs is not None:
            digests[sibling.rfilename] = sibling.lfs.sha256
        elif sibling.rfilename not in NOT_LISTED or sibling.rfilename == MANIFEST:
            digests[sibling.rfilename] = _remote_digest(api, repo_id, sibling.rfilename, commit=str(info.sha))
    return _RemoteState(commit=str(info.sha), private=bool(info.private), digests=digests)


def _differences(digests: dict[str, str], state: _RemoteState | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Files to upload, which the repository lacks or has with other content, and files to delete from it."""
    theirs = {} if state is None else state.digests
    uploads = tuple(name for name, digest in digests.items() if theirs.get(name) != digest)
    return uploads, tuple(sorted(set(theirs) - set(digests) - set(NOT_LISTED)))


def _remote_digest(api: HfApi, repo_id: str, name: str, *, commit: str) -> str:
    """SHA-256 of a file as the Hub sends it, past every cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = hf_hub_download(repo_id, name, revision=commit, local_dir=folder, token=api.token, tqdm_class=None)
        return file_sha256(Path(path))


def _tagged_commit(api: HfApi, repo_id: str, tag: str) -> str | None:
    tags = api.list_repo_refs(repo_id).tags
    return next((ref.target_commit for ref in tags if ref.name == tag), None)


def push(plan: PublishPlan, *, token: str | None = None) -> Published:
    """Carry out a plan: repository, one commit, tag; then fetch every file and compare it.

    A second push of the same folder makes no commit. Raises PolypSegError when the upload fails after retries or the
    Hub holds something else afterwards.
    """
    api = hub_api(token=token)
    with hub_errors(plan.repo_id):
        if not plan.exists:
            api.create_repo(plan.repo_id, private=plan.private, exist_ok=True)
        commit = _commit(api, plan) if plan.changes_anything else str(plan.parent)
        size = verify_upload(plan, commit=commit, token=token)
        tagged = _tagged_commit(api, plan.repo_id, plan.tag)
        if tagged is None:
            api.create_tag(plan.repo_id, tag=plan.tag, revision=commit)
        elif tagged != commit:
            raise PolypSegError(f"{plan.repo_id}: tag {plan.tag} stands for other content: push with another --tag")
    return Published(
        repo_id=plan.repo_id,
        commit=commit,
        tag=plan.tag,
        new_commit=plan.changes_anything,
        verified_files=len(plan.digests),
        verified_bytes=size,
    )


def _may_pass(error: BaseException) -> bool:
    """Whether trying again can help: the connection failed or the server was busy or broken."""
    if isinstance(error, HfHubHTTPError):
        return error.response is None or error.response.status_code in (429, 500, 502, 503, 504)
    return isinstance(error, httpx2.TransportError | ConnectionError)


@retry(
    retry=retry_if_exception(_may_pass),
    stop=stop_after_attempt(ATTEMPTS),
    wait=wait_exponential(multiplier=0.5, max=8),
    reraise=True,
)
def _commit(api: HfApi, plan: PublishPlan) -> str:
    """One commit with everything that differs; the client neither retries a commit nor notices that one got through.

    Raises PolypSegError when somebody else has committed since the plan.
    """
    state = _remote_state(api, plan.repo_id)
    additions, deletions = _differences(plan.digests, state)
    if not additions and not deletions:
        return str(state.commit if state else plan.parent)  # an earlier attempt's commit got through
    if state is not None and plan.parent is not None and state.commit != plan.parent:
        raise PolypSegError(f"{plan.repo_id} was changed by somebody else since the plan: run the push again")
    operations: list[CommitOperationAdd | CommitOperationDelete] = [
        *(CommitOperationAdd(path_in_repo=name, path_or_fileobj=plan.folder / name) for name in additions),
        *(CommitOperationDelete(path_in_repo=name) for name in deletions),
    ]
    parent = state.commit if state is not None else None
    message = f"Publish {plan.origin.repo_name} {plan.tag}"
    return str(api.create_commit(plan.repo_id, operations, commit_message=message, parent_commit=parent).oid)


def verify_upload(plan: PublishPlan, *, commit: str, token: str | None = None) -> int:
    """Fetch every file of a commit and compare its SHA-256 with the folder's; return the bytes compared.

    Raises PolypSegError that names the files that differ.
    """
    api = hub_api(token=token)
    differing, size = [], 0
    with hub_errors(plan.repo_id, revision=commit):
        for name, digest in tqdm(plan.digests.items(), desc=f"verifying {plan.repo_id}", unit="file", disable=None):
            if _remote_digest(api, plan.repo_id, name, commit=commit) != digest:
                differing.append(name)
            size += (plan.folder / name).stat().st_size
        extra = set(api.list_repo_files(plan.repo_id, revision=commit)) - set(plan.digests) - set(NOT_LISTED)
    differing += sorted(extra)
    if differing:
        raise PolypSegError(
            f"{plan.repo_id} at {commit[:12]} holds other content than {plan.folder}: {', '.join(differing)}. "
            "Push again; if it stays, report it to the Hub"
        )
    return size


def update_collection(repo_ids: Sequence[str], *, owner: str, private: bool = False, token: str | None = None) -> str:
    """Put models into the owner's collection, making it where it does not exist; returns its slug.

    Models that are in it already stay as they are, so a second call changes nothing.
    """
    api = hub_api(token=token)
    with hub_errors(f"collection {COLLECTION!r} of {owner}"):
        known = {item.title: item.slug for item in api.list_collections(owner=owner)}
        if COLLECTION in known:
            slug = known[COLLECTION]
        else:
            slug = api.create_collection(
                COLLECTION, namespace=owner, description=COLLECTION_TEXT, private=private, exists_ok=True
            ).slug
        present = {item.item_id for item in api.get_collection(slug).items}
        for repo_id in repo_ids:
            if repo_id not in present:
                api.add_collection_item(slug, item_id=repo_id, item_type="model", exists_ok=True)
    return slug
