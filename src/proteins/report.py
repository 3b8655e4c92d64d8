"""Counts what was read from a source, kept, dropped and fixed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class ReadReport:
    """What was read, kept, dropped and fixed. Places name files without their directory.

    ``dropped`` and ``fixed`` map a kind to how often it occurred and where first.
    """

    source: str = ""
    read: int = 0
    kept: int = 0
    not_chosen: int = 0
    residues: int = 0
    dropped: dict[str, dict[str, Any]] = field(default_factory=dict)
    fixed: dict[str, dict[str, Any]] = field(default_factory=dict)

    def drop(self, reason: str, place: str, count: int = 1) -> None:
        """Count a protein that was left out."""
        self._count(self.dropped, reason, place, count)

    def fix(self, kind: str, place: str, count: int = 1) -> None:
        """Count something that was mended."""
        self._count(self.fixed, kind, place, count)

    @staticmethod
    def _count(counts: dict[str, dict[str, Any]], kind: str, place: str, count: int) -> None:
        entry = counts.get(kind)
        if entry is None:
            counts[kind] = {"count": count, "first": place}
        else:
            entry["count"] += count

    @property
    def dropped_count(self) -> int:
        """Proteins left out for any reason."""
        return sum(entry["count"] for entry in self.dropped.values())

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ReadReport:
        """Return the report that :meth:`as_dict` described."""
        return cls(**values)

    def lines(self) -> list[str]:
        """Return the report for a person."""
        lines = [f"{self.source}: {self.read:,} proteins read, {self.kept:,} kept"]
        if self.not_chosen:
            lines[0] += f", {self.not_chosen:,} outside the chosen share"
        for verb, counts in (("dropped", self.dropped), ("fixed", self.fixed)):
            for kind, entry in sorted(counts.items(), key=lambda item: -item[1]["count"]):
                lines.append(f"  {verb} {entry['count']:,}: {kind} (first at {entry['first']})")
        return lines
