"""Keeps secrets and private paths out of what is published.

Secrets are recognised in two ways: by their form (tokens of the usual services, private keys), and
by their value, where an environment variable whose name says so, or the hub's saved token, holds
it. A finding names file, line and kind, and never shows the secret.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from src.proteins import STANDARD_RESIDUES

SHORTEST_SECRET = 8
"""Values of variables shorter than this occur in any text by chance."""
HIDDEN_PATH = "(private path)"
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
        rf"\b(?:AKIA|ASIA)(?![{STANDARD_RESIDUES}]{{16}}\b)[A-Z2-7]{{16}}\b",
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
# sets words apart; not after a letter or a colon, so that a/b, 3/4 and https://x/y are none.
_START = r"(?:file://)?(?:~[\w.-]*/|\.\./|/(?=[^\s/])|[A-Za-z]:[\\/]|\\\\)"
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
        # In JSON a quote or a backslash of the value is escaped.
        for written in {value, json.dumps(value)[1:-1]}:
            start = text.find(written)
            if start >= 0:
                found.append((start, kind))
    lines = {(text.count("\n", 0, start) + 1, kind) for start, kind in found}
    return [f"{name}, line {line}: {kind}" for line, kind in sorted(lines)]


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

    def clean(item: Any) -> Any:
        if isinstance(item, str):
            # What begins as a path is one to its end, because a directory's name may hold blanks.
            whole = _WHOLE.fullmatch(item)
            if whole:
                return (whole[1] or "") + _shortened(whole[2], tops)
            return _INSIDE.sub(lambda match: _shortened(match.group(), tops), item)
        if isinstance(item, Mapping):
            return {clean(key): clean(each) for key, each in item.items()}
        if isinstance(item, list | tuple):
            return [clean(each) for each in item]
        return item

    return clean(value)


def _shortened(path: str, tops: Iterable[str]) -> str:
    """Return what may be published of one path."""
    path = path.removeprefix("file://").replace("\\", "/")
    if path.startswith("~"):
        path = os.path.expanduser(path)
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
