"""Uploads a finished student to a model hub, downloads it again and compares.

Before anything is sent, the model is loaded, its weights are compared with its record, and every
text is searched for secrets. Only files of known names are sent.
"""

from __future__ import annotations

import json
import re
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.cli import listed, quiet_libraries, say
from src.common.files import read_json, sha256_file
from src.common.privacy import SHORTEST_SECRET, find_secrets, known_secrets, without_private_paths
from src.common.runs import FINISHED, RUN_FILE, read_run
from src.evaluation.results import lookup, read_results
from src.publishing.model_card import EXAMPLE_PROTEIN, PROJECT, build_card, chosen_licence
from src.publishing.repository import INDEX_FILE, MAIN, OutgoingFile, Repository

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS_FILE = "model.safetensors"
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

    from src.models.forward import stated_positions
    from src.models.loading import ProteinModel

    model, tokenizer = loaded = ProteinModel.load(folder)
    text = loaded.layout.untagged.text(EXAMPLE_PROTEIN)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    ids = ids[:, : stated_positions(model.config)]  # type: ignore[index]
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
        ValueError: the directory is missing or holds no finished run; the weights are incomplete,
            not in safetensors, not those of the run, or cannot be loaded.
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
    shard_of = lookup(read_json(folder / INDEX_FILE), "weight_map")
    shards = sorted(set(map(str, shard_of.values()))) if isinstance(shard_of, dict) else []
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
) -> Package:
    """Check a finished model and collect what would be sent. Touches no network.

    ``results_file`` is of ``scripts/evaluate.py`` for this very model. Without a license, which is
    spelt as on the hub, the teacher's is taken where known.

    Raises:
        ValueError: the model is not finished or broken, the results are of another model, the
            licence is unknown, or a text holds a secret.
    """
    from src.models.loading import load_tokenizer
    from src.publishing.usage import Usage

    quiet_libraries()
    student = read_student(folder)
    roots = (Path.cwd(), PROJECT)
    record = without_private_paths(student.record, roots)
    results = None
    if results_file:
        results = without_private_paths(results_of(results_file, student), roots)
    try:
        licence = chosen_licence(student.record, license)
        usage = Usage.of(load_tokenizer(folder), student.config)
        card = build_card(repo_id, record, usage, licence, results)
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
    refuse_secrets(files)
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


def refuse_secrets(files: Iterable[OutgoingFile]) -> None:
    """Raise ``ValueError`` naming file, line and kind of each secret in what would be sent."""
    home, known = str(Path.home()), known_secrets()
    if len(home) >= SHORTEST_SECRET:
        known.setdefault(home, "the path of the home directory")
    secrets = [finding for file in files for finding in find_secrets(file.name, file.text(), known)]
    if secrets:
        raise ValueError(
            f"nothing was sent, because it would give away: {listed(secrets, '; ')}. "
            "Remove it (and renew the secret, if it was ever published)"
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
) -> dict[str, Any]:
    """Send a package to the hub and verify what arrived.

    Args:
        package: from :func:`pack`.
        repo_id: ``owner/name``.
        private: whether nobody else may see it.
        create_pr: propose the files by a pull request instead of committing them.
        revision: branch to commit to, or to propose to; it is created where it is missing.

    Returns:
        ``revision``, ``url``, ``pull_request`` (or None) and ``files`` with their SHA-256.

    Raises:
        ValueError: the hub refuses, or what arrived differs from what was sent.
    """
    _quiet_client()
    repository = Repository(repo_id, revision, create_pr)
    repository.prepare(private)
    say(f"to {repository.url} as {repository.user}:")
    name = package.student.record["name"]
    commit, pull_request = repository.send(package.files, f"Student {name}")
    say(f"downloading revision {commit} to compare")
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
