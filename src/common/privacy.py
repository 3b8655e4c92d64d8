"""Keeps secrets and private paths out of what is published.

Secrets are recognised in two ways: by their form (tokens of the usual services, private keys), and
by their value, where an environment variable whose name says so, or the hub's saved token, holds
it. A finding names file, line and kind, and never shows the secret. :func:`publishable` is the one
rule for what may be published of a text.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePath, PurePosixPath
from typing import Any

SHORTEST_SECRET = 8
"""Values of variables shorter than this occur in any text by chance."""
HIDDEN_PATH = "(private path)"
HIDDEN_SECRET = "(secret)"
SECRET_NAME = re.compile(
    r"(?:^|_)(?:\w*TOKEN|\w*SECRET|\w*PASSWORD|PASSWD|PASSPHRASE|PASS|PAT|CREDENTIALS?|"
    r"\w*APIKEY|(?:API|ACCESS|SECRET|PRIVATE|AUTH|ACCOUNT|SIGNING|ENCRYPTION)_KEY)(?:_|$)",
    re.IGNORECASE,
)
# An access key of AWS is 16 letters and digits of base 32 after its prefix, and so may be a piece
# of protein: one made of residues alone is no key (1 key in 1,800 would be missed).
_FORMS = (
    ("a Hugging Face token", r"\b(?:hf|api_org)_[A-Za-z0-9]{30,}\b"),
    ("a GitHub token", r"\bgh[pousr]_[A-Za-z0-9]{30,}\b|\bgithub_pat_[A-Za-z0-9_]{40,}\b"),
    ("a GitLab token", r"\bglpat-[A-Za-z0-9_-]{20,}"),
    (
        "an AWS access key",
        r"\b(?:AKIA|ASIA)(?![ACDEFGHIKLMNPQRSTVWY]{16}\b)[A-Z2-7]{16}\b",
    ),
    ("an AWS secret key", r"(?i)aws.{0,40}secret.{0,40}?[^A-Za-z0-9/+][A-Za-z0-9/+]{40}\b"),
    # The older keys of W&B are 40 hexadecimal digits, as is every commit: only beside their name.
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

# Where a path may begin: at the start of the text, after white space, or after a character that
# sets words apart; not after a letter or a colon, so that a/b, 3/4 and https://x/y are none. A path
# that begins in a directory here and leaves it again (a/../../b) begins with ``a/../``.
_START = r"(?:file://)?(?:~[\w.-]*/|(?:[\w.-]+/)*\.\./|/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\)"
_WHOLE = re.compile(rf"(--?[\w-]+=)?({_START}.*)", re.DOTALL)
_INSIDE = re.compile(
    # Between quotes or brackets a path may hold blanks; in running text it ends at one.
    rf"(?<=\"){_START}[^\"\n]*(?=\")|(?<='){_START}[^'\n]*(?=')|(?<=\(){_START}[^()\n]*(?=\))"
    rf"|(?<=[\s=\"'`(\[{{,;|<>]){_START}[^\s\"'`,;|<>)\]}}]*"
)


def known_secrets(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return what must appear nowhere: each value, and where it is known from.

    Args:
        environment: variables; None: those of this process, and the hub's saved token.

    Returns:
        ``{value: "the value of WANDB_API_KEY"}``. Values that are paths of existing files and
        those shorter than eight characters are no secrets.
    """
    found = {}
    for name, value in (os.environ if environment is None else environment).items():
        value = value.strip()
        if len(value) < SHORTEST_SECRET or not SECRET_NAME.search(name) or _exists(value):
            continue
        found[value] = f"the value of {name}"
    if environment is None:
        from huggingface_hub import get_token

        token = get_token()
        if token:
            found.setdefault(token, "the hub's token")
    return found


def _written(secret: str) -> set[str]:
    """Return how a secret stands in a text: as it is, or as in JSON."""
    return {secret, json.dumps(secret)[1:-1]}


def _exists(text: str) -> bool:
    try:
        return os.path.isabs(text) and os.path.exists(text)
    except ValueError:
        return False


def find_secrets(name: str, text: str, known: Mapping[str, str]) -> list[str]:
    """Return what is secret in a text, as ``name, line 3: a GitHub token``.

    Args:
        name: what the text is called.
        text: what would be published.
        known: from :func:`known_secrets`.
    """
    found: list[tuple[int, str]] = []
    for kind, form in SECRET_FORMS:
        found += [(match.start(), kind) for match in form.finditer(text)]
    for value, kind in known.items():
        for written in _written(value):
            start = text.find(written)
            if start >= 0:
                found.append((start, kind))
    lines = {(text.count("\n", 0, start) + 1, kind) for start, kind in found}
    return [f"{name}, line {line}: {kind}" for line, kind in sorted(lines)]


def without_secrets(value: Any, known: Mapping[str, str]) -> Any:
    """Return a JSON value in which ``(secret)`` stands for every secret.

    Args:
        value: anything that JSON holds; keys of objects are treated like values.
        known: from :func:`known_secrets`. Of one that has several lines each is a secret, because
            output is seen line by line.
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
    """Return what may be published of a JSON value, by people who share this machine with others.

    Secrets are masked. A path in the working directory becomes relative to it; of one outside of it
    the last name is left, if it can be nobody's own. Such a path cannot be opened again: for
    records that are read back there is :func:`src.common.runs.relative_paths`.
    """
    return without_private_paths(without_secrets(value, known_secrets()), [Path.cwd()])


def _with_texts(value: Any, change: Callable[[str], str]) -> Any:
    """Return a JSON value with each of its texts changed, keys of objects among them."""
    if isinstance(value, Mapping):
        return {_with_texts(k, change): _with_texts(each, change) for k, each in value.items()}
    if isinstance(value, list | tuple):
        return [_with_texts(each, change) for each in value]
    if isinstance(value, PurePath):
        value = str(value)
    return change(value) if isinstance(value, str) else value


def without_private_paths(value: Any, roots: Iterable[str | Path]) -> Any:
    """Return a JSON value in which no string leads into this machine's directories.

    Args:
        value: anything that JSON holds; keys of objects are treated like values.
        roots: directories; a path under one of them is written relative to it.

    Returns:
        The value with every absolute path, ``~`` path and path that leaves by ``..`` made relative
        to a root, else cut to its last component, else replaced by ``(private path)`` where that
        component may be somebody's name. In running text a path ends at the first blank.
    """
    tops = sorted({os.path.abspath(root) for root in roots}, key=len, reverse=True)

    def clean(text: str) -> str:
        # What begins as a path is one to its end, because a directory's name may hold blanks.
        whole = _WHOLE.fullmatch(text)
        if whole:
            return (whole[1] or "") + _shortened(whole[2], tops)
        return _INSIDE.sub(lambda match: _shortened(match.group(), tops), text)

    return _with_texts(value, clean)


def _shortened(path: str, tops: Iterable[str]) -> str:
    """Return what may be published of one path."""
    path = path.removeprefix("file://").replace("\\", "/")
    if path.startswith("~"):
        path = os.path.expanduser(path)
    elif not path.startswith("/"):
        path = os.path.normpath(path)
        if not path.startswith("..") and ":" not in path[:3]:
            return path  # it did not leave
    if path.startswith("/"):
        normal = os.path.normpath(path)
        for top in tops:
            if top != "/" and (normal == top or normal.startswith(top + "/")):
                return os.path.relpath(normal, top)
    parts = [p for p in PurePosixPath(path).parts if p not in ("/", "..", "//")]
    # A home or scratch directory, on any system: the last part may be a person.
    if len(parts) <= 2 + (":" in path[:3]) and "." not in (parts[-1] if parts else ""):
        return HIDDEN_PATH
    return parts[-1]
