"""Samples whole proteins from a causal language model, in batches, reproducibly for a seed.

Every attempt at a protein has its own stream of random numbers, keyed by seed and attempt, and good
attempts are taken in order. Except for rounding, the result does not depend on the batch size, and
short proteins, which end first, are not preferred. Nor does it depend on how many processes share
the attempts: they exchange the outcomes.

:func:`sample` yields proteins as they come; :func:`sample_proteins` gives them all, with counts.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from src.common import processes
from src.common.cli import progress, unheard
from src.common.files import atomic_write, read_json_lines
from src.evaluation.filters import SEEN, Filters
from src.evaluation.sampler import LEAST_ATTEMPTS, GeneratedProtein, GenerationSettings, Sampler
from src.evaluation.scoring import score_proteins
from src.models.loading import ProteinModel, model_fingerprint
from src.proteins.fasta import FastaRecord
from src.proteins.layouts import TaggedProtein

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PRIOR_ATTEMPTS = 8
"""Good attempts assumed before any is known, when guessing how many must be begun."""
MOST_BEGUN_BYTES = 1 << 32
STEPS_APART = 16
"""Tokens of each protein between two exchanges between the processes."""


@dataclass
class Tally:
    """Counts of attempts by outcome, kept up to date while proteins are sampled.

    Attributes:
        attempts: attempts up to the last protein that was taken: those kept and all that were
            discarded. It does not depend on the size of a batch.
        kept: proteins that were given out.
        discarded: attempts left out, by reason.
        tokens: tokens sampled, also of attempts begun ahead of need and dropped.
    """

    attempts: int = 0
    kept: int = 0
    discarded: Counter[str] = field(default_factory=Counter)
    tokens: int = 0

    @property
    def reasons(self) -> str:
        """The numbers of discarded attempts by reason, for a person."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.discarded.most_common())


@dataclass
class GenerationResult:
    """The sampled proteins in the order of their attempts, counts, seconds and settings.

    The first ``begun`` of the proteins are from a run that was stopped; seconds and tokens are
    those of the others.
    """

    proteins: list[GeneratedProtein]
    tally: Tally
    seconds: float
    settings: GenerationSettings
    begun: int = 0

    @property
    def sequences(self) -> list[str]:
        """Residues of each protein."""
        return [protein.residues for protein in self.proteins]

    @property
    def counts(self) -> dict[str, int]:
        """Numbers of attempts by outcome."""
        tally = self.tally
        return {"attempts": tally.attempts, "kept": tally.kept, **tally.discarded}


def sample_proteins(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: GenerationSettings | None = None,
    filters: Filters | None = None,
    announce: Callable[[str], None] = unheard,
    shared: bool = False,
    begun: Begun | None = None,
) -> GenerationResult:
    """Sample proteins until there are as many as wanted, with progress: :func:`sample`.

    Proteins are written to ``begun`` as they come, and those that it has are not sampled again.

    Returns:
        The proteins: fewer than wanted where the attempts allowed did not suffice.
    """
    settings = (settings or GenerationSettings()).suited(tokenizer)
    started = time.monotonic()
    proteins: list[GeneratedProtein] = []
    tally = Tally()
    if begun is not None:
        proteins, tally = processes.agreed(lambda: begun.read(settings.num_sequences))
        if proteins:
            announce(f"{begun.path}: going on after {len(proteins):,} proteins")

    def description() -> str:
        return f"sampling ({tally.reasons})" if tally.discarded else "sampling"

    had = len(proteins)
    sampled = sample(model, tokenizer, settings, filters, announce, tally, shared, proteins)
    for protein in progress(sampled, settings.num_sequences - had, description, "proteins"):
        proteins.append(protein)
        if begun is not None and processes.is_first():
            begun.add(protein, tally)
    return GenerationResult(proteins, tally, time.monotonic() - started, settings, had)


class Begun:
    """The proteins of a call of :func:`sample_proteins` so far, in a file: a line of JSON for each.

    The first line says what decides the proteins: the model, what is asked of them, and the seed,
    and not how many are wanted and how many are sampled at a time.
    """

    def __init__(
        self, path: Path, loaded: ProteinModel, settings: GenerationSettings, filters: Filters
    ) -> None:
        self.path = path
        self._given = loaded, settings, filters
        self._lines: list[dict[str, Any]] = []
        self._written = False

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The first line. Weights are hashed for it, once and in the first process alone."""
        loaded, settings, filters = self._given
        asked = asdict(settings)
        for name in ("num_sequences", "max_attempts", "batch_size"):
            del asked[name]
        return {
            **asked,
            "drop_repeats": filters.drop_repeats,
            "distinct": filters.distinct,
            "max_identity": filters.max_identity,
            "against": hashlib.sha256("\n".join(filters.against).encode()).hexdigest(),
            "layout": loaded.layout.template,
            "model": model_fingerprint(loaded.model),
        }

    def read(self, wanted: int) -> tuple[list[GeneratedProtein], Tally]:
        """Return the first of the proteins, and the tally with the last of them.

        Raises:
            ValueError: they were sampled otherwise.
        """
        lines = read_json_lines(self.path, MOST_BEGUN_BYTES) if self.path.exists() else []
        if lines and lines[0] != self.identity:
            other = [key for key in self.identity if lines[0].get(key) != self.identity[key]]
            raise ValueError(
                f"{self.path}: proteins of a stopped run with another {', '.join(other)}: delete "
                "it, or pass what that run was given"
            )
        self._lines, tag = lines[1:], self._given[1].tag
        proteins = []
        for line in self._lines[:wanted]:
            residues = TaggedProtein(line["residues"], tag) if tag else line["residues"]
            proteins.append(GeneratedProtein(residues, line["whole"], line["attempt"]))
        if not proteins:
            return [], Tally()
        discarded = Counter(self._lines[len(proteins) - 1]["discarded"])
        return proteins, Tally(proteins[-1].attempt + 1, len(proteins), discarded)

    def add(self, protein: GeneratedProtein, tally: Tally) -> None:
        """Write a protein, so that it outlives this process."""
        if not self._written:  # anew: the last line may be cut
            with atomic_write(self.path) as handle:
                handle.writelines(json.dumps(x) + "\n" for x in [self.identity, *self._lines])
            self._written = True
        with self.path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({**asdict(protein), "discarded": tally.discarded}) + "\n")

    def remove(self) -> None:
        """Remove the file: the proteins are where they belong."""
        self.path.unlink(missing_ok=True)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: GenerationSettings | None = None,
    filters: Filters | None = None,
    announce: Callable[[str], None] = unheard,
    tally: Tally | None = None,
    shared: bool = False,
    begun: Sequence[GeneratedProtein] = (),
) -> Iterator[GeneratedProtein]:
    """Yield sampled proteins in the order of their attempts, until there are as many as wanted.

    Args:
        model: a causal language model; in eval mode until the last protein is taken.
        tokenizer: its tokenizer.
        settings: what is wanted.
        filters: what else is wanted of a protein; each judges it alone, and ``distinct`` against
            those before.
        announce: called where many attempts gave no wanted protein.
        tally: kept up to date.
        shared: all processes call this together and take every protein; each samples a share of
            the attempts.
        begun: proteins that an earlier call gave until it was stopped; ``tally`` is its tally. The
            others are yielded.

    Raises:
        ValueError: tokenizer and model do not fit, prompt or lengths do not fit the model's
            positions, the model's attention is of a kind whose cache this does not know, or its
            output is not a number.
    """
    settings, filters = settings or GenerationSettings(), filters or Filters()
    tally = Tally() if tally is None else tally
    training = model.training
    model.eval()
    try:
        sampler = Sampler(model, tokenizer, settings, shared, tally.attempts)
        yield from _in_order(sampler, filters, announce, tally, shared, begun)
    finally:
        model.train(training)


def _in_order(
    sampler: Sampler,
    filters: Filters,
    announce: Callable[[str], None],
    tally: Tally,
    shared: bool,
    begun: Sequence[GeneratedProtein],
) -> Iterator[GeneratedProtein]:
    """Yield the good proteins in the order of attempts, the same in all processes."""
    settings = sampler.settings
    wanted, limit = settings.num_sequences, settings.attempts_allowed
    waiting: dict[int, GeneratedProtein | str] = {}  # outcomes behind an attempt under way
    good = {p.attempt: p.residues for p in begun}  # residues of good attempts
    # good attempts, or distinct sequences
    likely: set[str | int] = {p.residues if filters.distinct else p.attempt for p in begun}
    seen = {p.residues for p in begun}
    settled, notice = tally.attempts, LEAST_ATTEMPTS // 2
    while tally.kept < wanted and tally.attempts < settings.attempts_allowed:
        missing = limit  # all before the last that is needed
        if len(likely) < wanted:
            # Attempts under way are assumed to succeed as often as finished ones.
            luck = (len(likely) + PRIOR_ATTEMPTS) / (settled + PRIOR_ATTEMPTS)
            missing = math.ceil((wanted - len(likely)) / luck / sampler.stride) - len(sampler.rows)
        sampler.begin(missing, limit)
        own = sampler.run(filters, STEPS_APART if shared else 1)
        shares = processes.gathered((own, sampler.tokens)) if shared else [(own, sampler.tokens)]
        tally.tokens = sum(tokens for _, tokens in shares)
        for attempt, verdict in (pair for pairs, _ in shares for pair in pairs):
            settled += 1
            waiting[attempt] = verdict
            if isinstance(verdict, GeneratedProtein):
                good[attempt] = verdict.residues
                likely.add(verdict.residues if filters.distinct else attempt)
        if len(likely) >= wanted:
            limit = _last_needed(good, wanted, filters.distinct) + 1
            sampler.drop_from(limit)
        while tally.attempts in waiting:
            verdict = waiting.pop(tally.attempts)
            tally.attempts += 1
            if isinstance(verdict, GeneratedProtein) and filters.distinct:
                verdict = SEEN if verdict.residues in seen else verdict
            if isinstance(verdict, str):
                tally.discarded[verdict] += 1
                continue
            seen.add(verdict.residues)
            tally.kept += 1
            yield verdict
            if tally.kept == wanted:
                return
        if not tally.kept and tally.attempts >= notice:
            notice = 4 * tally.attempts
            announce(f"{tally.attempts:,} attempts, none good so far: {tally.reasons}")


def _last_needed(good: Mapping[int, str], wanted: int, distinct: bool) -> int:
    """Return the attempt by which enough good ones were begun."""
    seen: set[str] = set()
    count = 0
    for attempt in sorted(good):
        count += not distinct or good[attempt] not in seen
        seen.add(good[attempt])
        if count == wanted:
            return attempt
    raise AssertionError("not enough are good")


def perplexities(
    model: PreTrainedModel, tokenizer: Any, proteins: Sequence[GeneratedProtein]
) -> list[float | None]:
    """Return each sampled protein's perplexity per residue; None where it does not fit the model.

    It is that of the protein in its layout, at temperature 1 and without penalty, not that of the
    tokens that happened to spell it. All processes call this together.
    """
    scores = score_proteins(
        model, tokenizer, [p.residues for p in proteins], [p.whole for p in proteins], shared=True
    )
    return scores.perplexity_per_residue


def fasta_records(
    scored: Sequence[tuple[GeneratedProtein, float | None]],
    seed: int,
    names: Mapping[str, str],
    tag: str | None = None,
    families: Sequence[str | None] | None = None,
) -> list[FastaRecord]:
    """Return a FASTA record for each protein, its perplexity per residue in the header.

    ``names`` are what else the headers say: the model, and the scorer where it is another; ``tag``
    is the key of the layout's tag, if it has one; ``families`` are those that the proteins are
    recognised as, if that was asked.
    """
    width = max(4, len(str(len(scored))))
    named = [{} for _ in scored] if families is None else [{"family": f} for f in families]
    return [
        FastaRecord(
            f"protein_{number:0{width}d}",
            protein.residues,
            {
                **({tag: getattr(protein.residues, "tag", None)} if tag else {}),
                "perplexity_per_residue": value,
                "residues": len(protein.residues),
                **names,
                "seed": seed,
                "attempt": protein.attempt,
                "whole": "yes" if protein.whole else "no",
                **named[number - 1],
            },
        )
        for number, (protein, value) in enumerate(scored, start=1)
    ]
