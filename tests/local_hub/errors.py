"""The refusals of the Hub, in the headers that its clients turn into exceptions."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response


class HubError(Exception):
    """An answer other than success: HTTP status, message and, where clients look for them, error code and commit."""

    def __init__(self, status: int, message: str, code: str | None = None, *, commit: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.headers = {"X-Error-Message": message.encode("ascii", "replace").decode().replace("\n", " ")}
        if code is not None:
            self.headers["X-Error-Code"] = code
        if commit is not None:
            self.headers["X-Repo-Commit"] = commit


def render_error(_request: Request, error: Exception) -> Response:
    """The refusal as JSON."""
    assert isinstance(error, HubError)
    return JSONResponse({"error": error.message}, error.status, error.headers)


def repo_not_found(*, anonymous: bool) -> HubError:
    """A repository that is missing or hidden: the two must look the same."""
    return HubError(401 if anonymous else 404, "Repository not found", "RepoNotFound")


def revision_not_found(revision: str) -> HubError:
    """A branch, tag or commit that the repository does not have."""
    return HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")


def entry_not_found(path: str, *, commit: str) -> HubError:
    """A file that `commit` does not hold; clients remember its absence under that commit."""
    return HubError(404, f"Entry not found: {path}", "EntryNotFound", commit=commit)
