"""Who may do what: users, organizations and tokens that read or write."""

from dataclasses import dataclass, field

from starlette.requests import Request

from .errors import HubError, repo_not_found
from .store import Repo, Store


@dataclass(frozen=True)
class Account:
    """The user behind a token, and whether the token may write ("write") or not ("read")."""

    name: str
    role: str


DEFAULT_TOKENS = {
    "hf_write": Account("alice", "write"),
    "hf_read": Account("alice", "read"),
    "hf_other": Account("bob", "write"),
}


@dataclass(frozen=True)
class Accounts:
    """Tokens, and the members of each organization."""

    tokens: dict[str, Account] = field(default_factory=lambda: dict(DEFAULT_TOKENS))
    organizations: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"polypseg": ("alice",)})

    def of(self, request: Request) -> Account | None:
        """The account that sent a request, None without a token; an unknown token is refused."""
        header = request.headers.get("authorization")
        if header is None:
            return None
        token = header.removeprefix("Bearer ")
        if token not in self.tokens:
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def belongs(self, account: Account | None, owner: str) -> bool:
        """Whether the owner's things are the account's own."""
        return account is not None and (account.name == owner or account.name in self.organizations.get(owner, ()))

    def require_write(self, account: Account | None, owner: str) -> Account:
        """Refuse whoever may not write under this owner."""
        if account is None:
            raise HubError(401, "Invalid username or password.")
        if account.role != "write":
            raise HubError(403, "Forbidden: this token may only read")
        if not self.belongs(account, owner):
            raise HubError(403, f"Forbidden: you don't have the rights to write under the namespace {owner}")
        return account

    def readable_repo(self, store: Store, request: Request, repo_type: str, repo_id: str) -> Repo:
        """The repository, if it is there for this request at all."""
        account = self.of(request)
        repo = store.find(repo_type, repo_id)
        if repo is None or (repo.settings["private"] and not self.belongs(account, repo.owner)):
            raise repo_not_found(anonymous=account is None)
        return repo

    def writable_repo(self, store: Store, request: Request, repo_type: str, repo_id: str) -> tuple[Repo, Account]:
        """The repository, if this request may change it, and the account that changes it."""
        repo = self.readable_repo(store, request, repo_type, repo_id)
        return repo, self.require_write(self.of(request), repo.owner)

    def require_file_access(self, request: Request, repo: Repo) -> None:
        """Refuse the files of a gated repository to whoever was not let in."""
        settings, account = repo.settings, self.of(request)
        if not settings["gated"] or self.belongs(account, repo.owner):
            return
        if account is None:
            raise HubError(401, f"Access to {repo.type} {repo.id} is restricted. Please log in.", "GatedRepo")
        if account.name not in settings["granted"]:
            raise HubError(403, f"Access to {repo.type} {repo.id} is restricted: ask for access.", "GatedRepo")
