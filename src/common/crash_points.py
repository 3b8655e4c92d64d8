"""Named points at which a test can kill this process, to check that no file is lost there.

``DISTILL_FAIL_AT=checkpoint:after_manifest`` kills the process with SIGKILL at that point;
``DISTILL_FAIL_AT=checkpoint:after_manifest#3`` at the third time. Points are where files are
written, never inside a training step.
"""

from __future__ import annotations

import os
import signal
from collections import Counter

VARIABLE = "DISTILL_FAIL_AT"
_passed: Counter[str] = Counter()


def crash_point(name: str) -> None:
    """Kill this process if the environment names this point."""
    wanted = os.environ.get(VARIABLE)
    if wanted is None:
        return
    point, _, number = wanted.partition("#")
    if point == name:
        _passed[name] += 1
        if _passed[name] == int(number or 1):
            os.kill(os.getpid(), signal.SIGKILL)
