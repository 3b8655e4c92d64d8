"""One token at a time of many attempts at a protein, each with its own stream of random numbers.

:class:`Sampler` holds the proteins under way and the decoder behind them. What is to be sampled is
in :class:`GenerationSettings`; :mod:`src.evaluation.generation` decides which attempts are begun
and gives out the good ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.common import processes
from src.common.settings import require_moderate
from src.evaluation.draws import Warp, attempt_stream, pick
from src.evaluation.filters import Filters, banned_tokens
from src.models.decoding import Decoder, sampling_room
from src.proteins.encoding import Spelling, decode, encode, require_known, token_letters
from src.proteins.layouts import (
    END_OF_TEXT,
    PROTEIN_LETTERS,
    PROTGPT2,
    RESIDUES_PER_LINE,
    TaggedProtein,
    layout_of,
    stop_token,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTEMPTS_A_SEQUENCE = 20
LEAST_ATTEMPTS = 200
"""By default, sampling stops after 20 attempts for each wanted protein, but at least 200."""
CACHE_BYTES = 8_000_000_000
"""Room for keys and values on a CPU; on a GPU it is a share of the memory that is free."""
CACHE_SHARE = 0.5

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
            None: what suits the tokens (:func:`suited_penalty`).
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
    repetition_penalty: float | None = None
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
            if (value := getattr(self, name)) is not None:
                require_moderate(name, value)
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"--seed must be in [0, 2^64), got {self.seed}")

    def suited(self, tokenizer: Any) -> GenerationSettings:
        """Return these settings with the penalty that suits the tokenizer, where none is given."""
        if self.repetition_penalty is not None:
            return self
        return replace(self, repetition_penalty=suited_penalty(token_letters(tokenizer)))

    @property
    def attempts_allowed(self) -> int:
        """Return how many proteins may be begun."""
        return self.max_attempts or max(ATTEMPTS_A_SEQUENCE * self.num_sequences, LEAST_ATTEMPTS)


def suited_penalty(letters: Sequence[str]) -> float:
    """Return the repetition penalty for a vocabulary; ``letters`` are the residues of each token.

    1.2, as ProtGPT2's authors advise for tokens of several residues (Ferruz et al. 2022,
    doi:10.1038/s41467-022-32007-7). 1, which is none, where each token is one residue: a protein of
    average length has every residue, so the penalty would only flatten the distribution.
    """
    return 1.2 if max(map(len, letters)) > 1 else 1.0


def prompt_tokens(tokenizer: Any, settings: GenerationSettings) -> list[int]:
    """Return the tokens that every protein begins with."""
    begun = TaggedProtein(settings.prompt, settings.tag)
    return encode(tokenizer, [begun], [False])[0]


def token_room(model: PreTrainedModel, settings: GenerationSettings, prompt: Sequence[int]) -> int:
    """Return the most tokens of a protein, its prompt included (:func:`sampling_room`)."""
    wanted = None
    if settings.max_length is not None:  # with line breaks and markers
        lines = settings.max_length // RESIDUES_PER_LINE
        wanted = len(prompt) + settings.max_length + lines + 3
    return sampling_room(model, wanted)


def possible_residues(
    settings: GenerationSettings, room: int, prompt: Sequence[int], letters: Sequence[str]
) -> int:
    """Return the most residues of a protein, with ``room`` for tokens (:func:`token_room`).

    ``letters`` are the residues of each token.
    """
    # The end takes a position too, where the model is to set it.
    growing = room - len(prompt) - settings.whole_only
    return len(settings.prompt) + growing * max(map(len, letters))


def fitted_length(
    model: PreTrainedModel, tokenizer: Any, settings: GenerationSettings
) -> GenerationSettings:
    """Return these settings with a ``max_length`` that the model's positions can hold."""
    if settings.max_length is None:
        return settings
    prompt, letters = prompt_tokens(tokenizer, settings), token_letters(tokenizer)
    room = token_room(model, settings, prompt)
    possible = possible_residues(settings, room, prompt, letters[: model.config.vocab_size])
    return replace(settings, max_length=min(settings.max_length, possible))


@dataclass(frozen=True)
class GeneratedProtein:
    """A sampled protein: its residues, whether the model ended it, and the attempt it came from."""

    residues: str
    whole: bool
    attempt: int


@dataclass
class Row:
    """A protein under way: its attempt, tokens and random numbers, and how many residues so far."""

    attempt: int
    tokens: list[int]
    levels: np.ndarray
    residues: int


class Sampler:
    """Proteins under way, the decoder behind them, and one step of all of them."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Any,
        settings: GenerationSettings,
        shared: bool = False,
        first: int = 0,
    ) -> None:
        """Take attempts from ``first`` on, in turn with the other processes where ``shared``."""
        settings = settings.suited(tokenizer)
        self.tokenizer, self.settings, self.device = tokenizer, settings, model.device
        self.layout, self.end = layout_of(tokenizer), stop_token(tokenizer)
        if settings.tag and self.layout.tag is None:
            raise ValueError(f"--tag {settings.tag}: the layout {self.layout.template} has none")
        begun = TaggedProtein(settings.prompt, settings.tag)
        self.prompt = prompt_tokens(tokenizer, settings)
        if not Spelling(tokenizer).spells(self.prompt, begun):
            raise ValueError(f"--tag {settings.tag}: the tokenizer does not know it")
        self.room = token_room(model, settings, self.prompt)
        vocabulary = int(model.config.vocab_size)
        letters = token_letters(tokenizer)[:vocabulary]
        self._check(vocabulary, letters)
        self.residues_of = [len(text) for text in letters]
        # Columns that pad the vocabulary stand for no token: they are never sampled.
        never = banned_tokens(tokenizer, settings.ban_residues, vocabulary)
        never[len(letters) :] = True
        self.never = never.to(self.device) if never.any() else None
        assert settings.repetition_penalty is not None
        self.warp = Warp(
            settings.repetition_penalty, settings.temperature, settings.top_k, settings.top_p
        )
        self.longest = settings.max_length or (
            self.room * max(self.residues_of) + len(settings.prompt)
        )
        # Attempts of this process: the next to begin, and the steps between them.
        rank, self.stride = (processes.rank(), processes.count()) if shared else (0, 1)
        self.next = first + (rank - first) % self.stride
        self.tokens = 0
        self.rows: list[Row] = []
        self.decoder = Decoder(model, torch.tensor(self.prompt, device=self.device), self.room)
        fitting = self._memory() // self.decoder.bytes_of_a_row()
        self.slots = max(1, min(settings.batch_size, fitting))
        # (slots, R) tokens for the penalty; rows are filled up with a token that all of them hold
        self.ids = torch.full((self.slots, self.room), self.prompt[0], device=self.device)

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
        if self.room <= len(self.prompt):
            raise ValueError(
                f"--prompt: {len(self.prompt)} tokens leave no room among the model's {self.room} "
                "positions"
            )
        possible = possible_residues(settings, self.room, self.prompt, letters)
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

    def begin(self, count: int, limit: int) -> None:
        """Begin the next attempts below a limit, at most ``count``, as many as there are slots."""
        left = len(range(self.next, limit, self.stride))
        count = min(count, left, self.slots - len(self.rows))
        if count < 1:
            return
        seed, first = self.settings.seed, len(self.rows)
        for attempt in range(self.next, self.next + count * self.stride, self.stride):
            levels = attempt_stream(seed, attempt, self.room)
            residues = len(self.settings.prompt)
            self.rows.append(Row(attempt, list(self.prompt), levels, residues))
        self.ids[first : first + count, : len(self.prompt)] = torch.tensor(self.prompt)
        self.decoder.begin(count)
        self.next += count * self.stride

    def drop_from(self, attempt: int) -> None:
        """Give up what is under way for an attempt and later ones."""
        for index in reversed(range(len(self.rows))):
            if self.rows[index].attempt >= attempt:
                self._drop(index)

    def _drop(self, index: int) -> None:
        """Take a row out; later ones come in its place."""
        for place, origin in self.decoder.drop(index):
            self.rows[place], self.ids[place] = self.rows[origin], self.ids[origin]
        self.rows.pop()
        self.ids[len(self.rows)] = self.prompt[0]

    def run(self, filters: Filters, steps: int) -> list[tuple[int, GeneratedProtein | str]]:
        """Sample up to so many tokens of each protein; return what is done, judged by filters."""
        settled = []
        for _ in range(steps):
            settled += self.step() if self.rows else []
        for i, (attempt, verdict) in enumerate(settled):
            if isinstance(verdict, GeneratedProtein):
                settled[i] = attempt, filters.reason(verdict.residues) or verdict
        return settled

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
            row.residues += self.residues_of[token]
            if token == self.end or row.residues > self.longest or len(row.tokens) == self.room:
                settled.append((row.attempt, self._judge(row, token == self.end)))
                self._drop(index)
        return settled

    def _judge(self, row: Row, whole: bool) -> GeneratedProtein | str:
        """Return the protein that a row's tokens spell, or why it is discarded."""
        settings = self.settings
        try:
            residues = decode(self.tokenizer, row.tokens)
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
