"""Says why a model hub did not give a model or a data set, from the errors of its clients."""

from __future__ import annotations

import os

GATED, MISSING, CODE, OFFLINE, OTHER = "gated", "missing", "code", "offline", "other"
_MARKS = {
    GATED: ("GatedRepoError", "gated repo", "gated dataset"),
    CODE: ("trust_remote_code", "Dataset scripts are no longer supported"),
    OFFLINE: (
        *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "ConnectionError"),
        *("TransportError", "TimeoutError"),  # of httpx, of Python
    ),
    MISSING: (
        *("RepositoryNotFoundError", "DatasetNotFoundError", "DefunctDatasetError"),
        "is not a valid model identifier",
    ),
}
"""Classes of errors, or parts of their messages; the first fault that has one of them counts."""


def hub_fault(error: BaseException) -> tuple[str, str]:
    """Return what went wrong, and the classes and messages of an error and its causes."""
    texts, link = "", error
    while link is not None:
        texts += f" {' '.join(parent.__name__ for parent in type(link).__mro__)} {link}"
        link = link.__cause__ or link.__context__
    faults = (fault for fault, marks in _MARKS.items() if any(mark in texts for mark in marks))
    return next(faults, OTHER), texts


def hub_advice(fault: str, kind: str, name: object) -> str | None:
    """Return a line that says what was wrong and what to do; None for :data:`OTHER`.

    ``fault`` is from :func:`hub_fault`, ``kind`` a model, tokenizer or data set.
    """
    it = f"the {kind} {str(name)!r}"
    if fault == OFFLINE:
        switches = [s for s in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE") if os.environ.get(s)]
        why = (
            f"{switches[0]} is set: unset it" if switches else "there is no network: connect to it"
        )
        return f"{it} is not in this machine's cache, and the hub cannot be asked for it; {why}"
    return {
        GATED: f"{it} is gated: accept its terms on its page on the hub, log in with 'hf auth "
        "login' (or set HF_TOKEN), and try again",
        MISSING: f"the hub has no {kind} {str(name)!r}, or it is private: check the name, or log "
        "in with 'hf auth login'",
        CODE: f"{it} brings code of its own, which is never run",
    }.get(fault)
