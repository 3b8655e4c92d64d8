"""A model repository on the hub: files are sent in one commit, and requests are repeated.

The hub stores weights by their hash, so that an interrupted upload continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from src.common.cli import say, size
from src.common.files import sha256_file

Result = TypeVar("Result")

INDEX_FILE = "model.safetensors.index.json"
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
MAIN = "main"

TRIES = 6
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
ANSWER_SECONDS = 120.0
"""The longest silence of the hub before a request is given up and repeated."""
PASSING_STATUS = (408, 412, 425, 429, 500, 502, 503, 504)
"""Statuses after which the same request may succeed; 412: somebody committed in between."""


@dataclass(frozen=True)
class OutgoingFile:
    """A file to send: a file on the disk, or bytes that replace it."""

    name: str
    source: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of(cls, name: str, source: Path | bytes) -> OutgoingFile:
        """Measure and hash a file or bytes."""
        if isinstance(source, bytes):
            return cls(name, source, len(source), hashlib.sha256(source).hexdigest())
        return cls(name, source, source.stat().st_size, sha256_file(source))

    def read(self) -> bytes:
        """Return the whole content."""
        return self.source if isinstance(self.source, bytes) else self.source.read_bytes()

    def text(self) -> str:
        """Return what is text in the file: all of it, or the header of safetensors."""
        if not self.name.endswith(".safetensors"):
            return self.read().decode("utf-8", errors="replace")
        assert isinstance(self.source, Path)
        with self.source.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            return handle.read(min(length, self.size)).decode("utf-8", errors="replace")


class Repository:
    """A model repository on the hub, as seen with the user's token.

    Every request is repeated where it may succeed later. Messages never hold the token or the
    signed part of an address.
    """

    def __init__(
        self,
        repo_id: str,
        revision: str = MAIN,
        create_pr: bool = False,
    ) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        if constants.is_offline_mode():
            raise ValueError("HF_HUB_OFFLINE is set: unset it to upload, or pass --dry_run")
        self._token = get_token() or ""
        if not self._token:
            raise ValueError(
                "no token: run `hf auth login`, or set HF_TOKEN to one with write permission"
            )
        self.api = HfApi(token=self._token)
        self.user = self._call("asking who the token belongs to", self.api.whoami)["name"]

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"{self.api.endpoint}/{self.repo_id}"

    def prepare(self, private: bool) -> None:
        """Make sure that the repository and the branch exist, with the wanted visibility.

        Raises:
            ValueError: the name is taken by something else, the visibility differs, or the hub
                refuses.
        """
        info = self._info()
        if info is None and self.create_pr:
            raise ValueError(
                f"there is no model {self.repo_id} that this token can see: leave out --create_pr "
                "to create it"
            )
        if info is None:
            for kind in ("dataset", "space"):
                if self._call(f"looking for {self.repo_id}", self._exists, kind):
                    raise ValueError(f"{self.repo_id} is a {kind}: choose another --repo_id")
            self._call(
                f"creating {self.repo_id}",
                self.api.create_repo,
                self.repo_id,
                private=private,
                exist_ok=True,
            )
            info = self._info()
            if info is None:
                raise ValueError(f"{self.repo_id} exists, but this token may not read it")
        if bool(info.private) != private:
            raise ValueError(
                f"{self.repo_id} exists and is public: pass --public to publish there"
                if private
                else f"{self.repo_id} exists and is private: leave out --public, or change its "
                "visibility on its settings page first"
            )
        if not (self.revision == MAIN or self.revision.startswith("refs/") or self.create_pr):
            self._call(
                f"creating the branch {self.revision}",
                self.api.create_branch,
                self.repo_id,
                branch=self.revision,
                exist_ok=True,
            )

    def _exists(self, kind: str) -> bool:
        return self.api.repo_exists(self.repo_id, repo_type=kind)

    def _info(self) -> Any:
        """Return the hub's record of the repository, None where this token sees none."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> Any:
            try:
                return self.api.model_info(self.repo_id, files_metadata=True)
            except RepositoryNotFoundError:
                return None

        return self._call(f"reading {self.repo_id}", ask)

    def send(self, files: list[OutgoingFile], title: str) -> tuple[str, str | None]:
        """Send the files that the hub does not have yet, in one commit.

        Returns:
            The revision that holds all files, and the address of the pull request, or None.

        Raises:
            ValueError: the hub refuses, or the repository holds other weights.
        """
        return self._call(f"sending to {self.repo_id}", self._send_once, files, title)

    def _send_once(self, files: list[OutgoingFile], title: str) -> tuple[str, str | None]:
        """Commit the files that the hub does not have, and count what an earlier attempt did."""
        from huggingface_hub import CommitOperationAdd

        target, url = self.revision, None
        pull_request = self._own_pull_request(title) if self.create_pr else None
        if pull_request is not None:
            target, url = pull_request.git_reference, pull_request.url
        info = self.api.model_info(self.repo_id, revision=target, files_metadata=True)
        remote = {sibling.rfilename: sibling for sibling in info.siblings or []}
        refuse_other_weights(remote, files, self.repo_id)
        missing = [file for file in files if not is_uploaded(file, remote.get(file.name))]
        if not missing:
            say(f"all {len(files)} files are there already")
            return str(info.sha), url
        replaced = [file.name for file in missing if file.name in remote]
        say(
            f"sending {len(missing)} of {len(files)} files, {size(sum(f.size for f in missing))}"
            + (f"; replaced: {', '.join(replaced)}" if replaced else "")
        )
        # Not upload_folder: it splits an upload into commits and cannot open a pull request.
        commit = self.api.create_commit(
            self.repo_id,
            [
                CommitOperationAdd(
                    file.name, file.source if isinstance(file.source, bytes) else str(file.source)
                )
                for file in missing
            ],
            commit_message=title,
            revision=target,
            create_pr=self.create_pr and pull_request is None,
            # If the answer to a commit is lost, the hub refuses a second one (412).
            parent_commit=info.sha,
        )
        return commit.oid, commit.pr_url or url

    def _own_pull_request(self, title: str) -> Any:
        """Return the user's open pull request of that title, None where there is none."""
        discussions = self.api.get_repo_discussions(
            self.repo_id, discussion_type="pull_request", discussion_status="open"
        )
        for discussion in discussions:
            if discussion.title == title and discussion.author == self.user:
                return discussion
        return None

    def download(self, names: Iterable[str], revision: str, folder: Path) -> None:
        """Download files of a revision into a folder."""
        for name in names:
            self._call(
                f"downloading {name}",
                self.api.hf_hub_download,
                self.repo_id,
                name,
                revision=revision,
                local_dir=folder,
                force_download=True,
            )

    def _call(
        self, what: str, function: Callable[..., Result], *arguments: Any, **options: Any
    ) -> Result:
        """Call a function; repeat it with growing pauses if the fault is temporary."""
        from huggingface_hub import get_session

        for attempt in range(1, TRIES + 1):
            # The client waits for ever by itself, and makes a new session after some faults.
            get_session().timeout = ANSWER_SECONDS
            try:
                return function(*arguments, **options)
            except Exception as error:  # the client raises many kinds: all become one line
                reason = self._clean(error)
                if not is_temporary(error):
                    raise ValueError(f"{what}: {self._advice(error) or reason}") from error
                if attempt == TRIES:
                    raise ValueError(
                        f"{what} failed {TRIES} times ({reason}): give the same command again, and "
                        "it goes on where it stopped"
                    ) from error
                seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
                say(f"{what}: {reason}; trying again in {seconds:.0f} s")
                time.sleep(seconds)
        raise AssertionError("unreachable")

    def _advice(self, error: BaseException) -> str | None:
        """Return what the user can do about a refusal; None: show the hub's own message."""
        from huggingface_hub.errors import RevisionNotFoundError

        status = status_of(error)
        if isinstance(error, RevisionNotFoundError):
            return f"{self.repo_id} has no branch {self.revision}"
        if _lacks_xet(error):
            return "the hub has no Xet storage: set HF_HUB_DISABLE_XET=1"
        if status == 401:
            return (
                "the hub does not accept the token: make one with write permission at "
                f"{self.api.endpoint}/settings/tokens and run `hf auth login`, or set HF_TOKEN"
            )
        if status == 403:
            return (
                f"no permission: the token needs write permission to {self.repo_id} (see "
                f"{self.api.endpoint}/settings/tokens); --create_pr proposes the files instead"
            )
        return None

    def _clean(self, error: BaseException) -> str:
        """Return an error in one line without token and without the signed part of addresses."""
        status = status_of(error)
        if status in PASSING_STATUS:
            return f"the hub answers {status}"
        if any(isinstance(cause, json.JSONDecodeError) for cause in causes(error)):
            return "the answer is not the hub's"
        shown = next((e for e in causes(error) if _status(e) or isinstance(e, _transport())), error)
        text = " ".join(str(shown).split()) or type(shown).__name__
        text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]*", r"\1", text)
        text = text.replace(self._token, "(token)")
        return text if len(text) <= 240 else text[:239] + "…"


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and its causes: the client wraps some errors in others."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def status_of(error: BaseException) -> int | None:
    """Return the status that the hub answered with, None where it did not answer."""
    return next((status for status in map(_status, causes(error)) if status), None)


def _status(error: BaseException) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _transport() -> type[Exception]:
    """Return the base of the HTTP client's errors, whichever client the hub's library has."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__mro__[1]  # type: ignore[return-value]


def _lacks_xet(error: BaseException) -> bool:
    """Return whether the hub has no Xet storage, which the package ``hf_xet`` needs."""
    text = str(error)
    return "xet-write-token" in text and "404" in text


def is_temporary(error: BaseException) -> bool:
    """Return whether the same request may succeed later.

    If the hub answered, its status decides. Faults of the network and answers that are no JSON
    (a proxy's page) are temporary; what the client itself refuses is not.
    """
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUS
    if _lacks_xet(error):
        return False
    passing = (_transport(), OSError, json.JSONDecodeError, RuntimeError)
    return any(isinstance(cause, passing) for cause in causes(error))


def is_uploaded(file: OutgoingFile, remote: Any) -> bool:
    """Return whether the hub holds a file with the same content."""
    if remote is None or remote.size != file.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file.sha256
    content = file.read()
    # The hash by which git knows a file.
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def refuse_other_weights(
    remote: Iterable[str], files: Iterable[OutgoingFile], repo_id: str
) -> None:
    """Raise ``ValueError`` where the repository holds weights that these files do not replace.

    With two models in one repository, which one is loaded depends on the loader.
    """
    names = {file.name for file in files}
    others = [n for n in remote if n.endswith((*WEIGHT_SUFFIXES, INDEX_FILE)) and n not in names]
    if others:
        raise ValueError(
            f"{repo_id} holds other weights ({', '.join(sorted(others)[:3])}): remove them there, "
            "or choose another --repo_id or --revision"
        )
