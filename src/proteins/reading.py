"""Counts what was read from a source, kept, dropped and fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ReadReport:
    """Counts of proteins read, kept, dropped and fixed.

    ``dropped``, ``fixed`` and ``noticed`` (kept as it is) map a kind to its count and its first
    place, a file name and a line. ``column`` is the table's column that was read, ``notes`` are
    further lines for the user.
    """

    source: str = ""
    read: int = 0
    kept: int = 0
    not_chosen: int = 0
    residues: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    fixed: dict[str, dict[str, Any]] = field(default_factory=dict)
    noticed: dict[str, dict[str, Any]] = field(default_factory=dict)
    column: str = ""
    notes: list[str] = field(default_factory=list)

    def drop(self, reason: str, place: str, count: int = 1) -> None:
        """Count a dropped protein."""
        self._count(self.dropped, reason, place, count)

    def fix(self, kind: str, place: str, count: int = 1) -> None:
        """Count a fixed fault."""
        self._count(self.fixed, kind, place, count)

    def notice(self, kind: str, place: str) -> None:
        """Count something strange in a protein that is kept as it is."""
        self._count(self.noticed, kind, place, 1)

    def note(self, line: str) -> None:
        """Add a line for the user, once."""
        if line not in self.notes:
            self.notes.append(line)

    @staticmethod
    def _count(counts: dict[str, dict[str, Any]], kind: str, place: str, count: int) -> None:
        entry = counts.get(kind)
        if entry is None:
            counts[kind] = {"count": count, "first": place}
        else:
            entry["count"] += count

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadReport:
        """Return the report that :meth:`as_dict` described."""
        return cls(**values)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = [f"{self.source}: {self.read:,} proteins read, {self.kept:,} kept"]
        if self.not_chosen:
            lines[0] += f", {self.not_chosen:,} outside the chosen share"
        if self.column:
            lines.append(f"  residues from the column {self.column!r}")
        lines += [f"  {note}" for note in self.notes]
        verbs = {"dropped": self.dropped, "fixed": self.fixed, "kept": self.noticed}
        for verb, counts in verbs.items():
            for kind, entry in sorted(counts.items(), key=lambda item: -item[1]["count"]):
                lines.append(f"  {verb} {entry['count']:,}: {kind} (first at {entry['first']})")
        return lines
