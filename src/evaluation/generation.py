"""Samples whole proteins from a causal language model, in batches, reproducibly for a seed.

Every attempt at a protein has its own stream of random numbers, keyed by seed and attempt, and good
attempts are taken in order. Except for rounding, the result does not depend on the batch size, and
short proteins, which end first, are not preferred.

:func:`sample` yields proteins as they come; :func:`sample_proteins` gives them all, with counts.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.common.cli import progress
from src.common.settings import require_moderate
from src.evaluation.draws import Warp, attempt_stream, pick
from src.evaluation.filters import SEEN, Filters, banned_tokens
from src.evaluation.likelihoods import score_proteins
from src.models.decoding import Decoder, sampling_room
from src.proteins.fasta import FastaRecord
from src.proteins.layouts import (
    END_OF_TEXT,
    PROTEIN_LETTERS,
    PROTGPT2,
    RESIDUES_PER_LINE,
    TaggedProtein,
    layout_of,
    stop_token,
)
from src.proteins.tokens import Spelling, encode, require_known, token_letters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTEMPTS_A_SEQUENCE = 20
LEAST_ATTEMPTS = 200
"""By default, sampling stops after 20 attempts for each wanted protein, but at least 200."""
CACHE_BYTES = 8_000_000_000
"""Room for keys and values on a CPU; on a GPU it is a share of the memory that is free."""
CACHE_SHARE = 0.5
PRIOR_ATTEMPTS = 8
"""Good attempts assumed before any is known, when guessing how many must be begun."""

UNFINISHED = "not ended by the model"
EMPTY = "without residues"
NO_PROTEIN = "with characters that are no residues"
TOO_SHORT = "too short"
TOO_LONG = "too long"


@dataclass(frozen=True)
class GenerationSettings:
    """How proteins are sampled. Lengths are in residues, the prompt's included.

    Penalty, temperature, top k and top p are transformers', in its order. The penalty counts
    every token before, prompt and line breaks included, as in the published use of ProtGPT2.

    Attributes:
        num_sequences: how many are wanted.
        max_length: longer proteins are discarded, or cut where ``whole_only`` is off; None: as
            long as the model's positions allow.
        min_length: shorter proteins are discarded.
        prompt: first residues of every protein.
        tag: of every protein, where the layout has one.
        ban_residues: residues that no protein holds: no token with one of them is ever drawn, and
            at each step the others share its probability. (The model's proteins that happen to
            have none are distributed otherwise: to get those, sample and discard.)
        top_k: sample among so many likeliest tokens; 0: among all.
        top_p: sample among the likeliest tokens that hold this share of the probability.
        repetition_penalty: divides the logits of tokens that occurred (multiplies negative ones).
        temperature: divides the logits.
        seed: of all random numbers.
        batch_size: proteins sampled at a time, at most.
        whole_only: discard what the model did not end with the end-of-text token.
        max_attempts: proteins begun, at most; None: 20 for each wanted, at least 200.
    """

    num_sequences: int = 10
    max_length: int | None = None
    min_length: int = 1
    prompt: str = ""
    tag: str = ""
    ban_residues: str = ""
    top_k: int = 950
    top_p: float = 1.0
    repetition_penalty: float = 1.2
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64
    whole_only: bool = True
    max_attempts: int | None = None

    def __post_init__(self) -> None:
        """Check every setting. Raises ``ValueError``."""
        for name, least in (("num_sequences", 1), ("min_length", 1), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} must be at least {least}, got {getattr(self, name)}")
        if self.max_attempts is not None and self.max_attempts < self.num_sequences:
            raise ValueError(
                f"--max_attempts {self.max_attempts} is below --num_sequences {self.num_sequences}"
            )
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(
                f"--max_length {self.max_length} is below --min_length {self.min_length}"
            )
        wrong = sorted(set(self.prompt) - PROTEIN_LETTERS)
        if wrong:
            raise ValueError(
                f"--prompt: {wrong[0]!r} is not a residue (upper-case one-letter codes)"
            )
        if banned := sorted(set(self.prompt) & set(self.ban_residues)):
            raise ValueError(f"--prompt holds {banned[0]}, which --ban_residues bans")
        if self.max_length is not None and len(self.prompt) > self.max_length:
            raise ValueError(f"--prompt has more residues than --max_length {self.max_length}")
        if self.top_k < 0:
            raise ValueError(f"--top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top_p must be in (0, 1], got {self.top_p}")
        for name in ("repetition_penalty", "temperature"):
            require_moderate(name, getattr(self, name))
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"--seed must be in [0, 2^64), got {self.seed}")

    @property
    def attempts_allowed(self) -> int:
        """Return how many proteins may be begun."""
        return self.max_attempts or max(ATTEMPTS_A_SEQUENCE * self.num_sequences, LEAST_ATTEMPTS)


@dataclass(frozen=True)
class GeneratedProtein:
    """A sampled protein: its residues, whether the model ended it, and the attempt it came from."""

    residues: str
    whole: bool
    attempt: int


@dataclass
class Tally:
    """What became of the attempts, kept up to date while proteins are sampled.

    Attributes:
        attempts: attempts up to the last protein that was taken: those kept and all that were
            discarded. It does not depend on the size of a batch.
        kept: proteins that were given out.
        discarded: attempts left out, by reason.
        surplus: attempts begun beside these ahead of need, and dropped.
        tokens: tokens sampled, those of the surplus included.
    """

    attempts: int = 0
    kept: int = 0
    discarded: Counter[str] = field(default_factory=Counter)
    surplus: int = 0
    tokens: int = 0

    @property
    def reasons(self) -> str:
        """How many attempts were discarded for what, for a person."""
        return ", ".join(f"{count:,} {reason}" for reason, count in self.discarded.most_common())


@dataclass
class GenerationResult:
    """What sampling gave: proteins in the order of their attempts, counts, wall time."""

    proteins: list[GeneratedProtein]
    tally: Tally
    seconds: float

    @property
    def sequences(self) -> list[str]:
        """Residues of each protein."""
        return [protein.residues for protein in self.proteins]

    @property
    def counts(self) -> dict[str, int]:
        """Attempts by what became of them."""
        tally = self.tally
        return {"attempts": tally.attempts, "kept": tally.kept, **tally.discarded}


def sample_proteins(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: GenerationSettings | None = None,
    filters: Filters | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> GenerationResult:
    """Sample proteins until there are as many as wanted, with progress: :func:`sample`.

    Returns:
        The proteins: fewer than wanted where the attempts allowed did not suffice.
    """
    settings = settings or GenerationSettings()
    started = time.monotonic()
    tally = Tally()

    def description() -> str:
        return f"sampling ({tally.reasons})" if tally.discarded else "sampling"

    found = sample(model, tokenizer, settings, filters, announce, tally)
    proteins = list(progress(found, settings.num_sequences, description, "proteins"))
    return GenerationResult(proteins, tally, time.monotonic() - started)


@torch.inference_mode()
def sample(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: GenerationSettings | None = None,
    filters: Filters | None = None,
    announce: Callable[[str], None] = lambda line: None,
    tally: Tally | None = None,
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
        sampler = _Sampler(model, tokenizer, settings)
        yield from _in_order(sampler, filters, announce, tally)
    finally:
        model.train(training)


def _in_order(
    sampler: _Sampler, filters: Filters, announce: Callable[[str], None], tally: Tally
) -> Iterator[GeneratedProtein]:
    """Run a sampler and give out what is good, attempt by attempt."""
    settings = sampler.settings
    wanted, allowed = settings.num_sequences, settings.attempts_allowed
    waiting: dict[int, GeneratedProtein | str] = {}  # settled before an earlier attempt
    good: dict[int, str] = {}  # residues of the good ones by attempt, given out or waiting
    likely: set[str | int] = set()  # what of these counts: each, or each sequence
    seen: set[str] = set()
    settled, notice = 0, LEAST_ATTEMPTS // 2
    while True:
        if len(likely) < wanted:
            # Of those under way about as many will be good as were so far.
            luck = (len(likely) + PRIOR_ATTEMPTS) / (settled + PRIOR_ATTEMPTS)
            missing = math.ceil((wanted - len(likely)) / luck) - len(sampler.rows)
            sampler.begin(min(missing, allowed - sampler.begun))
        if sampler.rows:
            for attempt, verdict in sampler.step():
                settled += 1
                if isinstance(verdict, GeneratedProtein):
                    verdict = filters.reason(verdict.residues) or verdict
                if isinstance(verdict, GeneratedProtein):
                    good[attempt] = verdict.residues
                    likely.add(verdict.residues if filters.distinct else attempt)
                    if len(likely) >= wanted:
                        sampler.drop_after(_last_needed(good, wanted, filters.distinct))
                waiting[attempt] = verdict
        tally.tokens = sampler.tokens
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
            tally.surplus = sampler.begun - tally.attempts
            yield verdict
            if tally.kept == wanted:
                return
        if not tally.kept and tally.attempts >= notice:
            notice = 4 * tally.attempts
            announce(f"{tally.attempts:,} attempts, none good so far: {tally.reasons}")
        if not sampler.rows and sampler.begun == allowed:
            return


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


@dataclass
class _Row:
    """A protein under way: its attempt, tokens and random numbers, and how many residues so far."""

    attempt: int
    tokens: list[int]
    levels: np.ndarray
    residues: int


class _Sampler:
    """Proteins under way, the decoder behind them, and one step of all of them."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, settings: GenerationSettings
    ) -> None:
        self.tokenizer, self.settings, self.device = tokenizer, settings, model.device
        self.layout, self.end = layout_of(tokenizer), stop_token(tokenizer)
        if settings.tag and self.layout.tag is None:
            raise ValueError(f"--tag {settings.tag}: the layout {self.layout.template} has none")
        begun = TaggedProtein(settings.prompt, settings.tag)
        (self.prompt,) = encode(tokenizer, [begun], [False])
        if not Spelling(tokenizer).spells(self.prompt, begun):
            raise ValueError(f"--tag {settings.tag}: the tokenizer does not know it")
        wanted = None if settings.max_length is None else self._tokens_of(settings.max_length)
        self.room = sampling_room(model, wanted)
        vocabulary = int(model.config.vocab_size)
        letters = token_letters(tokenizer)[:vocabulary]
        self._check(vocabulary, letters)
        self.each_token = [len(text) for text in letters]
        # Columns that pad the vocabulary stand for no token: they are never sampled.
        never = banned_tokens(tokenizer, settings.ban_residues, vocabulary)
        never[len(letters) :] = True
        self.never = never.to(self.device) if never.any() else None
        self.warp = Warp(
            settings.repetition_penalty, settings.temperature, settings.top_k, settings.top_p
        )
        self.longest = settings.max_length or (
            self.room * max(self.each_token) + len(settings.prompt)
        )
        self.begun = self.tokens = 0
        self.rows: list[_Row] = []
        self.decoder = Decoder(model, torch.tensor(self.prompt, device=self.device), self.room)
        fitting = self._memory() // self.decoder.bytes_of_a_row()
        self.slots = max(1, min(settings.batch_size, fitting))
        # (slots, R) tokens, for the penalty; what opens every protein is nothing new behind it
        self.ids = torch.full((self.slots, self.room), self.prompt[0], device=self.device)

    def _tokens_of(self, residues: int) -> int:
        """Return how many tokens a protein takes at most, with line breaks and markers."""
        return len(self.prompt) + residues + residues // RESIDUES_PER_LINE + 3

    def _check(self, vocabulary: int, letters: list[str]) -> None:
        """Raise ``ValueError`` where tokenizer, model, prompt and lengths do not fit together."""
        settings = self.settings
        opens = self.layout != PROTGPT2 or self.prompt[0] == self.end
        if not opens or self.end >= vocabulary:
            raise ValueError(
                f"the tokenizer or the model does not know {END_OF_TEXT} as its end: this is no "
                "model of proteins in ProtGPT2's layout"
            )
        require_known(max(self.prompt), vocabulary)
        room = self.room - len(self.prompt)
        if room < 1:
            raise ValueError(
                f"--prompt: {len(self.prompt)} tokens leave no room among the model's {self.room} "
                "positions"
            )
        # The end takes a position too, where the model is to set it.
        growing = room - 1 if settings.whole_only else room
        possible = len(settings.prompt) + growing * max(map(len, letters))
        for name, value in (("min", settings.min_length), ("max", settings.max_length)):
            if value is not None and value > possible:
                raise ValueError(
                    f"--{name}_length {value}: the model's {self.room} positions hold at most "
                    f"{possible} residues"
                )

    def _memory(self) -> int:
        """Return the bytes that keys and values may take."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0] * CACHE_SHARE)
        return CACHE_BYTES

    def begin(self, count: int) -> None:
        """Begin the next attempts, at most ``count``, as many as there are slots for."""
        count = min(count, self.slots - len(self.rows))
        if count < 1:
            return
        seed, first = self.settings.seed, len(self.rows)
        for attempt in range(self.begun, self.begun + count):
            levels = attempt_stream(seed, attempt, self.room)
            residues = len(self.settings.prompt)
            self.rows.append(_Row(attempt, list(self.prompt), levels, residues))
        self.ids[first : first + count, : len(self.prompt)] = torch.tensor(self.prompt)
        self.decoder.begin(count)
        self.begun += count

    def drop_after(self, attempt: int) -> None:
        """Give up what is under way for later attempts than one."""
        for index in reversed(range(len(self.rows))):
            if self.rows[index].attempt > attempt:
                self._drop(index)

    def _drop(self, index: int) -> None:
        """Take a row out: the last one comes in its place."""
        last = self.rows.pop()
        self.decoder.drop(index)
        if index < len(self.rows):
            self.rows[index] = last
            self.ids[index] = self.ids[len(self.rows)]
        self.ids[len(self.rows)] = self.prompt[0]

    def step(self) -> list[tuple[int, GeneratedProtein | str]]:
        """Sample a token of each protein; return what is done, or why it is discarded."""
        rows, prompt = self.rows, len(self.prompt)
        newest = torch.tensor([row.tokens[-1] for row in rows]).to(self.device)
        logits = self.decoder.step(newest).float()  # (B, V)
        if self.never is not None:
            logits = logits.masked_fill(self.never, -torch.inf)
        width = max(self.decoder.lengths) - 1
        scores, ids = self.warp(logits, self.ids[: len(rows), :width])
        levels = torch.tensor([row.levels[len(row.tokens) - prompt] for row in rows])
        place = "cpu" if scores.device.type == "mps" else scores.device  # mps has no float64
        chosen = pick(scores.to(place), levels.to(place)).to(scores.device)
        if ids is not None:
            chosen = ids.gather(1, chosen[:, None]).squeeze(1)
        tokens = chosen.tolist()
        if self.warp.repetition_penalty != 1.0:
            at = torch.tensor([len(row.tokens) for row in rows]).to(self.device)
            self.ids[torch.arange(len(rows), device=self.device), at] = chosen
        self.tokens += len(rows)
        settled = []
        for index in reversed(range(len(rows))):
            row, token = rows[index], tokens[index]
            row.tokens.append(token)
            row.residues += self.each_token[token]
            if token == self.end or row.residues > self.longest or len(row.tokens) == self.room:
                settled.append((row.attempt, self._judge(row, token == self.end)))
                self._drop(index)
        return settled

    def _judge(self, row: _Row, whole: bool) -> GeneratedProtein | str:
        """Return the protein that a row's tokens spell, or why it is none that is wanted."""
        settings = self.settings
        text = self.tokenizer.decode(
            row.tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        try:
            residues = self.layout.read(text)
        except ValueError:
            return NO_PROTEIN
        if not residues:
            return EMPTY
        if settings.max_length is not None and len(residues) > settings.max_length:
            if settings.whole_only:
                return TOO_LONG
            residues = residues[: settings.max_length]
        if settings.whole_only and not whole:
            return UNFINISHED
        if len(residues) < settings.min_length:
            return TOO_SHORT
        return GeneratedProtein(residues, whole, row.attempt)


def perplexities(
    model: PreTrainedModel, tokenizer: Any, proteins: Sequence[GeneratedProtein]
) -> list[float | None]:
    """Return each sampled protein's perplexity per residue; None where it does not fit the model.

    It is that of the protein in its layout, at temperature 1 and without penalty, not that of the
    tokens that happened to spell it.
    """
    scores = score_proteins(
        model, tokenizer, [p.residues for p in proteins], [p.whole for p in proteins]
    )
    return scores.perplexity_per_residue


def fasta_records(
    scored: Sequence[tuple[GeneratedProtein, float | None]],
    seed: int,
    names: Mapping[str, str],
    tag: str | None = None,
) -> list[FastaRecord]:
    """Return a FASTA record for each protein, its perplexity per residue in the header.

    Args:
        scored: proteins and their perplexities.
        seed: that they were sampled with.
        names: what else the headers say: the model, and the scorer where it is another.
        tag: key of the layout's tag, if it has one.
    """
    width = max(4, len(str(len(scored))))
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
            },
        )
        for number, (protein, value) in enumerate(scored, start=1)
    ]
