"""Removes secrets and private paths from what is published.

Secrets are recognised by their form (tokens of the usual services, private keys) and by their value
(variables with names like ``…_TOKEN``, the hub's saved token). Findings name file, line and kind,
never the secret. Everything that is published passes :func:`publishable`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

SHORTEST_SECRET = 8
"""Shorter values of variables may occur in a text by chance."""
HIDDEN_PATH = "(private path)"
HIDDEN_SECRET = "(secret)"
SECRET_NAME = re.compile(
    r"(?:^|_)(?:\w*TOKEN|\w*SECRET|\w*PASSWORD|PASSWD|PASSPHRASE|PASS|PAT|CREDENTIALS?|"
    r"\w*APIKEY|(?:API|ACCESS|SECRET|PRIVATE|AUTH|ACCOUNT|SIGNING|ENCRYPTION)_KEY)(?:_|$)",
    re.IGNORECASE,
)
# The 16 base-32 characters of an AWS access key may be a piece of protein: residues alone are not
# taken for a key (1 key in 1,800 is missed).
_FORMS = (
    ("a Hugging Face token", r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b"),
    ("a GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_[A-Za-z0-9_]{40,}\b"),
    ("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    (
        "an AWS access key",
        r"\b(?:AKIA|ASIA)(?![ACDEFGHIKLMNPQRSTVWY]{16}\b)[A-Z2-7]{16}\b",
    ),
    ("an AWS secret key", r"(?i)aws.{0,40}secret.{0,40}?[^A-Za-z0-9/+][A-Za-z0-9/+]{40}\b"),
    # Older W&B keys are 40 hexadecimal digits, like commits: only beside their name.
    (
        "a W&B key",
        r"(?i)\bwandb_v\d_\w{30,}|\b(?:wandb|api[_-]?key)\b.{0,60}?\b[0-9a-f]{40}\b"
        r"|(?i:wandb_api_key).{0,10}?[0-9a-f]{40}\b",
    ),
    ("an API key", r"\bsk-[A-Za-z0-9_-]{20,}|\bAIza[0-9A-Za-z_-]{35}\b"),
    ("a Slack token", r"\bxox[abeoprs]-[0-9A-Za-z-]{10,}"),
    ("a private key", r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----"),
    ("a password in an address", r"\b[a-z][a-z0-9+.-]*://[^\s/:@\"']+:[^\s/@\"']+@"),
)
SECRET_FORMS = tuple((kind, re.compile(form)) for kind, form in _FORMS)

# A path may begin at the start of the text, after white space or after a separator; not after a
# letter or a colon, so that a/b, 3/4 and https://x/y are not paths. ``a/../`` begins a path that
# leaves the directory again (a/../../b).
_START = r"(?:file://)?(?:~[\w.-]*/|(?:[\w.-]+/)*\.\./|/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\)"
_WHOLE = re.compile(rf"(--?[\w-]+=)?({_START}.*)", re.DOTALL)
_INSIDE = re.compile(
    # Between quotes or brackets a path may contain blanks; in running text a blank ends it.
    rf"(?<=\"){_START}[^\"\n]*(?=\")|(?<='){_START}[^'\n]*(?=')|(?<=\(){_START}[^()\n]*(?=\))"
    rf"|(?<=[\s=\"'`(\[{{,;|<>]){_START}[^\s\"'`,;|<>)\]}}]*"
)


def known_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the secrets of this machine as ``{value: "the value of WANDB_API_KEY"}``.

    They are in the variables of the ``environment``; None: those of this process, and the hub's
    saved token. Paths of existing files and values shorter than eight characters are not secrets.
    """
    secrets = {}
    for name, value in (os.environ if environment is None else environment).items():
        value = value.strip()
        if len(value) < SHORTEST_SECRET or not SECRET_NAME.search(name) or _exists(value):
            continue
        secrets[value] = f"the value of {name}"
    if environment is None:
        from huggingface_hub import get_token

        token = get_token()
        if token:
            secrets.setdefault(token, "the hub's token")
    return secrets


def _written(secret: str) -> set[str]:
    """Return the forms of a secret in a text: as it is, and as JSON writes it."""
    return {secret, json.dumps(secret)[1:-1]}


def _exists(text: str) -> bool:
    try:
        return os.path.isabs(text) and os.path.exists(text)
    except ValueError:
        return False


def find_secrets(name: str, text: str, known: Mapping[str, str]) -> list[str]:
    """Return the secrets in a text, as ``name, line 3: a GitHub token``."""
    matches: list[tuple[int, str]] = []
    for kind, form in SECRET_FORMS:
        matches += [(match.start(), kind) for match in form.finditer(text)]
    for value, kind in known.items():
        for written in _written(value):
            start = text.find(written)
            if start >= 0:
                matches.append((start, kind))
    lines = {(text.count("\n", 0, start) + 1, kind) for start, kind in matches}
    return [f"{name}, line {line}: {kind}" for line, kind in sorted(lines)]


def without_secrets(value: Any, known: Mapping[str, str]) -> Any:
    """Return a JSON value with every secret replaced by ``(secret)``.

    Args:
        value: any JSON value; keys of objects are treated like values.
        known: from :func:`known_secrets`. Each line of a secret is a secret too, because output is
            checked line by line.
    """
    hidden = {form for secret in known for form in _written(secret)}
    hidden |= {line for secret in known for line in secret.splitlines()}
    # The longest first: one secret may be a part of another.
    ordered = sorted((h for h in hidden if len(h) >= SHORTEST_SECRET), key=len, reverse=True)

    def clean(text: str) -> str:
        for secret in ordered:
            text = text.replace(secret, HIDDEN_SECRET)
        for _, form in SECRET_FORMS:
            text = form.sub(HIDDEN_SECRET, text)
        return text

    return _with_texts(value, clean)


def publishable(value: Any) -> Any:
    """Return a JSON value with secrets masked and private paths shortened, for publication.

    Paths in the working directory become relative to it; other paths are cut to their last name.
    These cannot be opened again: records that are read back use
    :func:`src.common.runs.relative_paths`.
    """
    return without_private_paths(without_secrets(value, known_secrets()), [Path.cwd()])


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with every text in it changed, keys of objects included."""
    if isinstance(value, Mapping):
        return {_with_texts(k, change): _with_texts(item, change) for k, item in value.items()}
    if isinstance(value, list | tuple):
        return [_with_texts(item, change) for item in value]
    if isinstance(value, PurePath):
        value = str(value)
    return change(value) if isinstance(value, str) else value


def without_private_paths(value: Any, roots: Iterable[str | Path]) -> Any:
    """Return a JSON value without paths into this machine's directories.

    Absolute paths, ``~`` paths and paths that leave by ``..`` are made relative to a root, else cut
    to their last component, else replaced by ``(private path)`` if that component may be a person's
    name. In running text a path ends at the first blank. Keys of objects are treated like values.
    """
    tops = sorted({os.path.abspath(root) for root in roots}, key=len, reverse=True)

    def clean(text: str) -> str:
        # A text that begins as a path is a path to its end: names may contain blanks.
        whole = _WHOLE.fullmatch(text)
        if whole:
            return (whole[1] or "") + _shortened(whole[2], tops)
        return _INSIDE.sub(lambda match: _shortened(match.group(), tops), text)

    return _with_texts(value, clean)


def _shortened(path: str, tops: Iterable[str]) -> str:
    """Return the publishable form of one path."""
    path = path.removeprefix("file://").replace("\\", "/")
    if path.startswith("~"):
        path = os.path.expanduser(path)
    elif not path.startswith("/"):
        path = os.path.normpath(path)
        if not path.startswith("..") and ":" not in path[:3]:
            return path  # it does not leave the directory
    if path.startswith("/"):
        normal = os.path.normpath(path)
        for top in tops:
            if top != "/" and (normal == top or normal.startswith(top + "/")):
                return os.path.relpath(normal, top)
    parts = [p for p in PurePosixPath(path).parts if p not in ("/", "..", "//")]
    # A home or scratch directory on any system: its last part may be a person's name.
    if len(parts) <= 2 + (":" in path[:3]) and "." not in (parts[-1] if parts else ""):
        return HIDDEN_PATH
    return parts[-1]
