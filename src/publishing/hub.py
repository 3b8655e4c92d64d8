"""Uploads a finished student to a model hub, downloads it again and compares.

Before anything is sent, the model is loaded, its weights are compared with its record, and every
text is searched for secrets. Only files of known names are sent, in one commit. The hub stores
weights by their hash, so that an interrupted upload continues where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from src.common.cli import quiet_libraries, say, size
from src.common.files import read_json, sha256_file
from src.common.privacy import SHORTEST_SECRET, find_secrets, known_secrets, without_private_paths
from src.common.runs import FINISHED, RUN_FILE, read_run
from src.evaluation.results import lookup, read_results
from src.publishing.model_card import EXAMPLE_PROTEIN, PROJECT, build_card, chosen_licence

if TYPE_CHECKING:
    from torch import Tensor

Result = TypeVar("Result")

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_NAME = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
CARD_FILE = "README.md"
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf")
MAIN = "main"

TRIES = 6
FIRST_WAIT = 1.0
LONGEST_WAIT = 30.0
ANSWER_SECONDS = 120.0
"""The longest silence of the hub before a request is given up and repeated."""
PASSING_STATUS = (408, 412, 425, 429, 500, 502, 503, 504)
"""Answers after which the same request may succeed; 412: somebody committed in between."""


def check_repo_id(repo_id: str) -> None:
    """Raise ``ValueError`` where a name cannot be that of a model on the hub."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"--repo_id: {error}") from None
    if repo_id.count("/") != 1:
        raise ValueError(f"--repo_id {repo_id}: must be owner/name")


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


@dataclass(frozen=True)
class FinishedModel:
    """A finished model that was loaded and checked against its record.

    Attributes:
        folder: its directory.
        record: of its run.
        config: its configuration.
        tokens: ``(1, T)`` ids of the example protein.
        logits: ``(1, T, V)`` of the example protein.
    """

    folder: Path
    record: dict[str, Any]
    config: Any
    tokens: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Package:
    """The files of an upload, and the names of those that are not sent."""

    student: FinishedModel
    files: list[OutgoingFile]
    left_behind: list[str]
    card: str


def example_logits(folder: Path) -> tuple[Any, Tensor, Tensor]:
    """Load a model and its tokenizer, and run the example protein through them.

    Returns:
        The model, the ids ``(1, T)`` and the logits ``(1, T, V)`` in float32.

    Raises:
        ValueError: either cannot be loaded, they do not belong together, or a logit is not finite.
    """
    import torch

    from src.models.loading import ProteinModel, max_positions

    model, tokenizer = loaded = ProteinModel.load(folder)
    text = loaded.layout.untagged.text(EXAMPLE_PROTEIN)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, : max_positions(model.config)]  # type: ignore[index]
    if int(ids.max()) >= model.config.vocab_size:
        raise ValueError(f"{folder}: the tokenizer has tokens that the model does not know")
    with torch.inference_mode():
        logits = model(ids, attention_mask=torch.ones_like(ids)).logits.float()
    if not torch.isfinite(logits).all():
        raise ValueError(f"{folder}: the model's output for a protein is not finite")
    return model, ids, logits


def read_student(folder: Path) -> FinishedModel:
    """Load a finished model and check it against its record.

    Raises:
        ValueError: the directory is missing, holds no finished run, weights that are incomplete,
            cannot be loaded or are not those of the run, or pickled weights only.
    """
    from src.models.loading import model_fingerprint

    if not folder.is_dir():
        raise ValueError(f"--model_dir {folder}: there is no such directory")
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"{folder}: no finished model of scripts/train.py ({RUN_FILE} is missing)")
    record = read_run(folder)
    if record.get("status") != FINISHED:
        raise ValueError(
            f"{folder}: the run is not finished (status {record.get('status')!r:.40}): let "
            "scripts/train.py --resume finish it first"
        )
    weight_files(folder)
    model, tokens, logits = example_logits(folder)
    if model_fingerprint(model) != lookup(record, "student.fingerprint"):
        raise ValueError(f"{folder}: the weights are not those that {RUN_FILE} records")
    return FinishedModel(folder, record, model.config, tokens, logits)


def weight_files(folder: Path) -> list[str]:
    """Return the names of a model's weight files: one, or an index and its shards.

    Raises:
        ValueError: there are none in safetensors, or a shard is missing.
    """
    if (folder / WEIGHTS_FILE).is_file():
        return [WEIGHTS_FILE]
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"{folder}: no weights in safetensors ({WEIGHTS_FILE} is missing)")
    placed = lookup(read_json(folder / INDEX_FILE), "weight_map")
    shards = sorted({str(shard) for shard in placed.values()} if isinstance(placed, dict) else ())
    if not shards:
        raise ValueError(f"{folder / INDEX_FILE}: names no weights")
    for shard in shards:
        if not SHARD_NAME.fullmatch(shard) or not (folder / shard).is_file():
            raise ValueError(f"{folder}: {INDEX_FILE} names {shard!r:.80}, which is no shard here")
    return [INDEX_FILE, *shards]


def pack(
    folder: Path,
    repo_id: str,
    results_file: Path | None = None,
    license: str | None = None,
    known: Mapping[str, str] | None = None,
) -> Package:
    """Check a finished model and collect what would be sent. Touches no network.

    Args:
        folder: what ``src.training.stages.train`` left.
        repo_id: where it shall stand, for the card.
        results_file: of ``scripts/evaluate.py`` for this very model.
        license: as the hub spells it; None: the teacher's, where known.
        known: secrets by value; None: those of :func:`src.common.privacy.known_secrets`.

    Raises:
        ValueError: the model is not finished or broken, the results are of another model, the
            licence is unknown, or a text holds a secret.
    """
    quiet_libraries()
    student = read_student(folder)
    roots = (Path.cwd(), PROJECT)
    record = without_private_paths(student.record, roots)
    results = None
    if results_file:
        results = without_private_paths(results_of(results_file, student), roots)
    try:
        licence = chosen_licence(student.record, license)
        card = build_card(repo_id, record, student.config, licence, results)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{folder / RUN_FILE}: not the record of a finished run of scripts/train.py ({error})"
        ) from error
    files = [
        OutgoingFile.of(CARD_FILE, card.encode()),
        OutgoingFile.of(RUN_FILE, _json_bytes(record)),
    ]
    for name in (*weight_files(folder), *CONFIG_FILES, *TOKENIZER_FILES):
        source: Path | bytes = folder / name
        if not (folder / name).is_file():
            continue
        if name in CONFIG_FILES:
            content = read_json(folder / name)
            cleaned = without_private_paths(content, roots)
            source = folder / name if cleaned == content else _json_bytes(cleaned)
        files.append(OutgoingFile.of(name, source))
    refuse_secrets(files, known_secrets() if known is None else known)
    names = {file.name for file in files} - {CARD_FILE}  # the card is generated, never copied
    left = [
        path.name + ("/" if path.is_dir() else "")
        for path in sorted(folder.iterdir())
        if path.name not in names
    ]
    return Package(student, files, left, card)


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, allow_nan=False) + "\n").encode()


def results_of(path: Path, student: FinishedModel) -> dict[str, Any]:
    """Read a results file and make sure that it was measured on this model.

    Raises:
        ValueError: it is not a results file, or one of other weights.
    """
    results = read_results(path)
    measured = lookup(results, "run.student.fingerprint")
    if measured != student.record["student"]["fingerprint"]:
        whose = "names no weights" if measured is None else "was measured on other weights"
        raise ValueError(
            f"--results {path} {whose}: evaluate {student.folder} with scripts/evaluate.py"
        )
    return results


def refuse_secrets(files: Iterable[OutgoingFile], known: Mapping[str, str]) -> None:
    """Raise ``ValueError`` naming file, line and kind of each secret in what would be sent."""
    home = str(Path.home())
    known = dict(known)
    if len(home) >= SHORTEST_SECRET:
        known.setdefault(home, "the path of the home directory")
    secrets = [finding for file in files for finding in find_secrets(file.name, file.text(), known)]
    if secrets:
        more = f" and {len(secrets) - 5} more" if len(secrets) > 5 else ""
        raise ValueError(
            f"nothing was sent, because it would give away: {'; '.join(secrets[:5])}{more}. "
            "Remove it (and renew the secret, if it was ever published)"
        )


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
        announce: Callable[[str], None] = say,
    ) -> None:
        from huggingface_hub import HfApi, constants, get_token

        self.repo_id = repo_id
        self.revision = revision
        self.create_pr = create_pr
        self.announce = announce
        if constants.is_offline_mode():
            raise ValueError("HF_HUB_OFFLINE is set: unset it to upload, or pass --dry_run")
        self._token = get_token()
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

    def _info(self, revision: str | None = None) -> Any:
        """Return what the hub says of the repository, None where there is none to be seen."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def ask() -> Any:
            try:
                return self.api.model_info(self.repo_id, revision=revision, files_metadata=True)
            except RepositoryNotFoundError:
                return None

        return self._call(f"reading {self.repo_id}", ask)

    def send(self, files: list[OutgoingFile], title: str) -> tuple[str, str | None]:
        """Send what the hub does not have yet, in one commit.

        Args:
            files: all that shall stand there.
            title: of the commit, and of the pull request.

        Returns:
            The revision that holds all files, and the address of the pull request, or None.

        Raises:
            ValueError: the hub refuses, or other weights stand there.
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
        there = {sibling.rfilename: sibling for sibling in info.siblings or []}
        refuse_other_weights(there, files, self.repo_id)
        missing = [file for file in files if not is_there(file, there.get(file.name))]
        if not missing:
            self.announce(f"all {len(files)} files are there already")
            return str(info.sha), url
        replaced = [file.name for file in missing if file.name in there]
        self.announce(
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
                if not may_pass(error):
                    raise ValueError(f"{what}: {self._advice(error) or reason}") from error
                if attempt == TRIES:
                    raise ValueError(
                        f"{what} failed {TRIES} times ({reason}): give the same command again, and "
                        "it goes on where it stopped"
                    ) from error
                seconds = min(LONGEST_WAIT, FIRST_WAIT * 2 ** (attempt - 1))
                self.announce(f"{what}: {reason}; trying again in {seconds:.0f} s")
                time.sleep(seconds)
        raise AssertionError("unreachable")

    def _advice(self, error: BaseException) -> str | None:
        """Return what the user can do about a refusal, None where the hub's own words serve."""
        from huggingface_hub.errors import RevisionNotFoundError

        status = status_of(error)
        if isinstance(error, RevisionNotFoundError):
            return f"{self.repo_id} has no branch {self.revision}"
        if _asked_for_xet_in_vain(error):
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
        if self._token:
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


def _asked_for_xet_in_vain(error: BaseException) -> bool:
    """Return whether the hub has no storage of the kind that ``hf_xet`` speaks to."""
    text = str(error)
    return "xet-write-token" in text and "404" in text


def may_pass(error: BaseException) -> bool:
    """Return whether the same request may succeed later.

    An answer of the hub decides by its status; otherwise a fault of the network may pass, as may
    an answer that is no JSON (a proxy's page), and what the client itself objects to may not.
    """
    status = status_of(error)
    if status is not None:
        return status in PASSING_STATUS
    if _asked_for_xet_in_vain(error):
        return False
    passing = (_transport(), OSError, json.JSONDecodeError, RuntimeError)
    return any(isinstance(cause, passing) for cause in causes(error))


def is_there(file: OutgoingFile, remote: Any) -> bool:
    """Return whether the hub holds a file with the same content."""
    if remote is None or remote.size != file.size:
        return False
    if remote.lfs is not None:
        return remote.lfs.sha256 == file.sha256
    content = file.read()
    # The hash by which git knows a file.
    return remote.blob_id == hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def refuse_other_weights(there: Iterable[str], files: Iterable[OutgoingFile], repo_id: str) -> None:
    """Raise ``ValueError`` where weights stand that these would not replace.

    With two models in one place, which one is loaded depends on the loader.
    """
    names = {file.name for file in files}
    others = [n for n in there if n.endswith((*WEIGHT_SUFFIXES, INDEX_FILE)) and n not in names]
    if others:
        raise ValueError(
            f"{repo_id} holds other weights ({', '.join(sorted(others)[:3])}): remove them there, "
            "or choose another --repo_id or --revision"
        )


def verify(repository: Repository, package: Package, revision: str) -> None:
    """Download what was pushed and compare: bytes, and logits of the example protein.

    Raises:
        ValueError: a file differs, the model cannot be loaded, or a logit differs.
    """
    import torch

    with tempfile.TemporaryDirectory(prefix="verify-") as folder:
        place = Path(folder)
        repository.download([file.name for file in package.files], revision, place)
        for file in package.files:
            if sha256_file(place / file.name) != file.sha256:
                raise ValueError(
                    f"{repository.repo_id} at {revision}: {file.name} came back with other bytes "
                    "than were sent"
                )
        _, tokens, logits = example_logits(place)
        if not torch.equal(tokens, package.student.tokens):
            raise ValueError(f"{repository.repo_id}: the downloaded tokenizer gives other tokens")
        if not torch.equal(logits, package.student.logits):
            raise ValueError(f"{repository.repo_id}: the downloaded model gives other logits")


def upload(
    package: Package,
    repo_id: str,
    private: bool = True,
    create_pr: bool = False,
    revision: str = MAIN,
    announce: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Send a package to the hub and verify what arrived.

    Args:
        package: from :func:`pack`.
        repo_id: ``owner/name``.
        private: whether nobody else may see it.
        create_pr: propose the files by a pull request instead of committing them.
        revision: branch to commit to, or to propose to; it is created where it is missing.
        announce: called with each line for a person.

    Returns:
        ``revision``, ``url``, ``pull_request`` (or None) and ``files`` with their SHA-256.

    Raises:
        ValueError: whatever the user can mend.
    """
    _quiet_client()
    repository = Repository(repo_id, revision, create_pr, announce)
    repository.prepare(private)
    announce(f"to {repository.url} as {repository.user}:")
    name = package.student.record["name"]
    commit, pull_request = repository.send(package.files, f"Student {name}")
    announce(f"downloading revision {commit} to compare")
    verify(repository, package, commit)
    return {
        "revision": commit,
        "url": repository.url,
        "pull_request": pull_request,
        "files": {file.name: file.sha256 for file in package.files},
    }


def _quiet_client() -> None:
    """Silence the client's warnings, because they show signed addresses."""
    from huggingface_hub.utils import disable_progress_bars
    from huggingface_hub.utils import logging as hub_logging

    hub_logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()
