"""Named points at which a test can kill this process, to prove that nothing is lost there.

``DISTILL_FAIL_AT=checkpoint:after_manifest`` ends the process with SIGKILL when it reaches that
point; ``DISTILL_FAIL_AT=checkpoint:after_manifest#3`` when it reaches it for the third time. The
points are where files are written, never in a step, so they cost nothing.
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
