"""Samples whole proteins from a causal language model, in batches, reproducibly for a seed.

Every attempt at a protein has its own stream of random numbers, keyed by seed and attempt, and the
first good attempts are taken in order. Except for rounding, the result does not depend on the batch
size, and short proteins, which end first, are not preferred.

A batch has a fixed number of slots. A protein that is done leaves its slot to the next attempt at
once: its part of the key-value cache is overwritten with that of the prompt, which is computed once
for all. Rows are aligned at their newest token, so that all of them grow at the same column, and an
attention mask hides what stood in a slot before.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from src.common.cli import progress
from src.common.settings import require_moderate
from src.models.forward import accepts
from src.models.loading import max_positions
from src.proteins.fasta import FastaRecord
from src.proteins.layouts import END_OF_TEXT, PROTEIN_LETTERS, layout, prompt_layout, residues_of
from src.proteins.tokens import token_letters

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ATTEMPTS_A_SEQUENCE = 20
LEAST_ATTEMPTS = 200
"""By default, sampling stops after 20 attempts for each wanted protein, but at least 200."""
CACHE_BYTES = 8_000_000_000
"""Room for keys and values on a CPU; on a GPU it is a share of the memory that is free."""
CACHE_SHARE = 0.5
SPARE_COLUMNS = 64
"""Room that the cache gets ahead, so that it is not copied for every token."""
IDLE_SHARE = 1 / 8
GROWTH = 1.25
"""Shrink the batch when at least 1/8 of its slots are idle, and grow it by at least this factor:
both copy the cache."""
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

    Penalty, temperature, top k and top p are transformers' own, in its order. The penalty counts
    every token before, prompt and line breaks included, as in the published use of ProtGPT2.

    Attributes:
        num_sequences: how many are wanted.
        max_length: longer proteins are discarded, or cut where ``whole_only`` is off; None: as
            long as the model's positions allow.
        min_length: shorter proteins are discarded.
        prompt: first residues of every protein.
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
class GenerationResult:
    """What sampling gave.

    Attributes:
        proteins: in the order of their attempts, at most ``num_sequences``.
        attempts: attempts up to the last protein that was taken: ``len(proteins)`` and all that
            were discarded. It does not depend on the size of a batch.
        discarded: attempts left out, by reason.
        surplus: attempts begun beside these ahead of need, and dropped.
        seconds: wall time.
        tokens: tokens sampled, those of the surplus included.
    """

    proteins: list[GeneratedProtein]
    attempts: int
    discarded: dict[str, int]
    surplus: int
    seconds: float
    tokens: int

    @property
    def sequences(self) -> list[str]:
        """Residues of each protein."""
        return [protein.residues for protein in self.proteins]

    @property
    def counts(self) -> dict[str, int]:
        """Attempts by what became of them."""
        return {"attempts": self.attempts, "kept": len(self.proteins), **self.discarded}


@torch.inference_mode()
def sample_proteins(
    model: PreTrainedModel,
    tokenizer: Any,
    settings: GenerationSettings | None = None,
    announce: Callable[[str], None] = lambda line: None,
) -> GenerationResult:
    """Sample proteins until there are as many as wanted.

    Args:
        model: a causal language model; in eval mode for the while.
        tokenizer: its tokenizer.
        settings: what is wanted.
        announce: called once if many attempts gave no wanted protein.

    Returns:
        The proteins: fewer than wanted where the attempts allowed did not suffice.

    Raises:
        ValueError: tokenizer and model do not fit, prompt or lengths do not fit the model's
            positions, the model's attention is of a kind whose cache this does not know, or its
            output is not a number.
    """
    settings = settings or GenerationSettings()
    started = time.monotonic()
    training = model.training
    verdicts: dict[int, GeneratedProtein | str] = {}
    model.eval()
    try:
        sampler = _Sampler(model, tokenizer, settings)
        good = _good_proteins(sampler, verdicts, announce)
        proteins = list(progress(good, settings.num_sequences, "sampling", "proteins"))
    finally:
        model.train(training)
    proteins.sort(key=lambda protein: protein.attempt)
    proteins = proteins[: settings.num_sequences]
    enough = len(proteins) == settings.num_sequences
    attempts = proteins[-1].attempt + 1 if enough else sampler.begun
    return GenerationResult(
        proteins,
        attempts,
        discard_reasons({a: verdict for a, verdict in verdicts.items() if a < attempts}),
        sampler.begun - attempts,
        time.monotonic() - started,
        sampler.tokens,
    )


def _good_proteins(
    sampler: _Sampler,
    verdicts: dict[int, GeneratedProtein | str],
    announce: Callable[[str], None],
) -> Iterator[GeneratedProtein]:
    """Run a sampler until its first proteins are settled, yielding good ones as they come.

    Fills ``verdicts``: of every settled attempt its protein, or why it was discarded.
    """
    settings = sampler.settings
    wanted, allowed = settings.num_sequences, settings.attempts_allowed
    good: list[int] = []
    announced = False
    while True:
        missing = 0
        if len(good) < wanted:
            # Of those under way about as many will be good as were so far.
            luck = (len(good) + PRIOR_ATTEMPTS) / (len(verdicts) + PRIOR_ATTEMPTS)
            missing = math.ceil((wanted - len(good)) / luck) - len(sampler.active())
        else:
            sampler.drop_after(sorted(good)[wanted - 1])
        sampler.begin(min(missing, allowed - sampler.begun))
        if not sampler.active():
            return
        for attempt, verdict in sampler.step():
            verdicts[attempt] = verdict
            if isinstance(verdict, GeneratedProtein):
                good.append(attempt)
                yield verdict
        if not announced and not good and len(verdicts) >= LEAST_ATTEMPTS // 2:
            announced = True
            announce(
                f"{len(verdicts)} attempts, none good so far: "
                f"{reasons_line(discard_reasons(verdicts))}"
            )


def discard_reasons(verdicts: dict[int, GeneratedProtein | str]) -> dict[str, int]:
    """Count the attempts that were discarded, by reason, the most frequent first."""
    reasons = [verdict for _, verdict in sorted(verdicts.items()) if isinstance(verdict, str)]
    return dict(Counter(reasons).most_common())


def reasons_line(reasons: Mapping[str, int]) -> str:
    """Return how many attempts were discarded for what, for a person."""
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


class _Sampler:
    """The slots of a batch, the cache behind them, and one step of all of them.

    Shapes: B slots, R room (positions of the model), V vocabulary. Row b of ``ids`` holds
    ``lengths[b]`` tokens, and the end token after them: it opens every protein, so that the
    repetition penalty, which looks at whole rows, finds nothing new in it.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: Any, settings: GenerationSettings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.device = model.device
        self.end = int(tokenizer.eos_token_id)
        self.room = max_positions(model.config)
        self.prompt = torch.tensor(
            tokenizer(prompt_layout(settings.prompt), add_special_tokens=False, verbose=False)[
                "input_ids"
            ]
        ).to(self.device)
        vocabulary = int(model.config.vocab_size)
        letters = token_letters(tokenizer)
        self._check(vocabulary, letters)
        # Columns that pad the vocabulary stand for no token: they are never sampled.
        self.known = min(len(letters), vocabulary)
        counts = [len(text) for text in letters[: self.known]]
        self.each_token = torch.tensor(counts, device=self.device)  # (V,) residues
        # Sorting for a top k that leaves nothing out takes time and changes nothing.
        keeps_all = settings.top_k >= self.known
        self.warp = logits_warp(replace(settings, top_k=0) if keeps_all else settings)
        self.longest = settings.max_length or self.room * max(counts) + len(settings.prompt)
        self.cache_name = "cache" if accepts(model, "cache") else "past_key_values"
        self.gives_positions = accepts(model, "position_ids")
        self.begun = self.tokens = 0
        self.attempts: list[int | None] = []  # of each slot; None: idle
        self.lengths = torch.zeros(0, dtype=torch.long)  # (B,) on the CPU: it steers the loop
        self.ids = torch.zeros((0, self.room), dtype=torch.long, device=self.device)  # (B, R)
        self.residues = torch.zeros(0, dtype=torch.long, device=self.device)  # (B,)
        self.randoms = torch.zeros((0, self.room), dtype=torch.float64, device=self.device)
        self.slots = min(settings.batch_size, self._slots_that_fit())
        self.layers, self.opening = self._prefill()

    def active(self) -> list[int]:
        """Return the slots that hold a protein under way."""
        return [slot for slot, attempt in enumerate(self.attempts) if attempt is not None]

    def _check(self, vocabulary: int, letters: list[str]) -> None:
        """Raise ``ValueError`` where tokenizer, model, prompt and lengths do not fit together."""
        settings = self.settings
        if int(self.prompt[0]) != self.end or self.end >= vocabulary:
            raise ValueError(
                f"the tokenizer or the model does not know {END_OF_TEXT} as its end: this is no "
                "model of proteins in ProtGPT2's layout"
            )
        require_known(int(self.prompt.max()), vocabulary)
        room = self.room - len(self.prompt)
        if room < 1:
            raise ValueError(
                f"--prompt: {len(self.prompt)} tokens leave no room among the model's {self.room} "
                "positions"
            )
        # The end takes a position too, where the model is to set it.
        growing = room - 1 if settings.whole_only else room
        possible = len(settings.prompt) + growing * max(map(len, letters[:vocabulary]))
        for name, value in (("min", settings.min_length), ("max", settings.max_length)):
            if value is not None and value > possible:
                raise ValueError(
                    f"--{name}_length {value}: the model's {self.room} positions hold at most "
                    f"{possible} residues"
                )

    def _slots_that_fit(self) -> int:
        """Return how many full-length rows of keys and values the memory holds, at least one."""
        config = self.model.config.get_text_config(decoder=True)
        heads = config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // heads
        heads = getattr(config, "num_key_value_heads", None) or heads
        size = torch.finfo(self.model.dtype).bits // 8
        row = 2 * config.num_hidden_layers * heads * width * self.room * size
        room = CACHE_BYTES
        if self.device.type == "cuda":
            room = int(torch.cuda.mem_get_info(self.device)[0] * CACHE_SHARE)
        return max(1, room // row)

    def _prefill(self) -> tuple[list[_Window], list[tuple[Tensor, Tensor]]]:
        """Return the layers of the cache, and the prompt's keys and values but its last token's.

        Keys and values ``(H, p - 1, d)`` of each layer are computed once for all rows; the last
        token of the prompt is each row's first input.
        """
        self.cache = DynamicCache(config=self.model.config)
        if any(type(layer) is not DynamicLayer for layer in self.cache.layers):
            raise ValueError(
                f"{type(self.model).__name__}: sampling needs full attention in every layer"
            )
        self._forward(self.prompt[None], None, None)
        opening = [
            (layer.keys[0, :, :-1], layer.values[0, :, :-1])  # type: ignore[index]
            for layer in self.cache.layers
        ]
        layers = [_Window() for _ in opening]
        self.cache.layers = list(layers)  # type: ignore[assignment]
        return layers, opening

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> Tensor:
        """Return the logits ``(B, V)`` after the last of each row's new tokens ``(B, n)``."""
        inputs: dict[str, Any] = {self.cache_name: self.cache, "use_cache": True}
        if mask is not None:
            inputs["attention_mask"] = mask
        if positions is not None and self.gives_positions:
            inputs["position_ids"] = positions
        return self.model(input_ids=ids, logits_to_keep=1, **inputs).logits[:, -1]

    def begin(self, count: int) -> None:
        """Begin the next attempts, at most ``count``, as many as there are slots for."""
        active = self.active()
        slots = min(len(active) + max(0, count), self.slots)
        now = len(self.attempts)
        if now < slots >= GROWTH * now or slots < (1 - IDLE_SHARE) * now:
            self._resize(active, slots)
        free = [slot for slot, attempt in enumerate(self.attempts) if attempt is None]
        free = free[: max(0, count)]
        if not free:
            return
        attempts = range(self.begun, self.begun + len(free))
        streams = np.stack([attempt_stream(self.settings.seed, a, self.room) for a in attempts])
        at = torch.tensor(free, device=self.device)
        self.randoms[at] = torch.from_numpy(streams).to(self.device)
        self.ids[at] = self.end
        self.ids[at, : len(self.prompt)] = self.prompt
        self.residues[at] = len(self.settings.prompt)
        self.lengths[free] = len(self.prompt)
        for layer, (keys, values) in zip(self.layers, self.opening, strict=True):
            layer.put(at, keys, values)
        for slot, attempt in zip(free, attempts, strict=True):
            self.attempts[slot] = attempt
        self.begun += len(free)

    def _resize(self, kept: list[int], slots: int) -> None:
        """Keep the slots given, and make up to so many with idle ones."""
        at = torch.tensor(kept, dtype=torch.long, device=self.device)
        self.attempts = [self.attempts[slot] for slot in kept] + [None] * (slots - len(kept))
        self.lengths = resized(self.lengths, at.cpu(), slots)
        self.ids = resized(self.ids, at, slots)
        self.residues = resized(self.residues, at, slots)
        self.randoms = resized(self.randoms, at, slots)
        for layer, (keys, _values) in zip(self.layers, self.opening, strict=True):
            layer.resize(at, slots, keys)

    def drop_after(self, attempt: int) -> None:
        """Give up what is under way for later attempts than one."""
        self.attempts = [a if a is not None and a <= attempt else None for a in self.attempts]

    def step(self) -> list[tuple[int, GeneratedProtein | str]]:
        """Sample a token of each protein; return what is done, or why it is discarded."""
        rows = self.active()
        self.lengths[[s for s, a in enumerate(self.attempts) if a is None]] = 1
        width = int(self.lengths.max())
        for layer in self.layers:
            layer.trim(width - 1)
        at = torch.tensor(rows, device=self.device)  # (b,)
        lengths = self.lengths.to(self.device, copy=True)  # (B,) before this step
        newest = self.ids.gather(1, lengths[:, None] - 1)  # (B, 1)
        mask = None
        if int(self.lengths[rows].min()) < width:
            columns = torch.arange(width, device=self.device)
            mask = (columns >= width - lengths[:, None]).long()  # (B, W)
        logits = self._forward(newest, mask, lengths[:, None] - 1)[at, : self.known].float()
        scores = self.warp(self.ids[at, :width], logits)  # type: ignore[arg-type]  # (b, V)
        chosen = pick(scores, self.randoms[at, lengths[at] - len(self.prompt)])  # (b,)
        self.ids[at, lengths[at]] = chosen
        self.residues[at] += self.each_token[chosen]
        full = lengths[at] + 1 == self.room
        self.lengths[rows] += 1
        self.tokens += len(rows)
        ended = chosen == self.end
        done = ended | (self.residues[at] > self.longest) | full
        settled = []
        for index in done.nonzero().squeeze(-1).tolist():
            slot = rows[index]
            attempt = self.attempts[slot]
            assert attempt is not None
            ids = self.ids[slot, : int(self.lengths[slot])].tolist()
            settled.append((attempt, self._judge(attempt, ids, bool(ended[index]))))
            self.attempts[slot] = None
        return settled

    def _judge(self, attempt: int, ids: list[int], whole: bool) -> GeneratedProtein | str:
        """Return the protein that token ids spell, or why it is none that is wanted."""
        settings = self.settings
        text = self.tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        try:
            residues = residues_of(text)
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
        return GeneratedProtein(residues, whole, attempt)


class _Window(DynamicLayer):
    """A layer's keys and values: the newest columns of a buffer with room to grow.

    The layer that it stands for copies all of them for every token; this one once in a while.
    """

    def __init__(self) -> None:
        super().__init__()
        self.buffers: list[Tensor] = []  # keys and values, (B, H, columns, d)
        self.start = self.stop = 0

    def resize(self, rows: Tensor, slots: int, like: Tensor) -> None:
        """Keep rows, and make up to ``slots`` of them; ``like`` ``(H, n, d)`` gives the shape.

        An empty window gets the ``n`` columns that :meth:`put` fills.
        """
        if self.buffers:
            self.buffers = [
                resized(b[:, :, self.start : self.stop], rows, slots) for b in self.buffers
            ]
            self.start, self.stop = 0, self.stop - self.start
        else:
            heads, self.stop, width = like.shape
            shape = (slots, heads, self.stop, width)
            self.buffers = [like.new_zeros(shape), like.new_zeros(shape)]
        self._show()

    def put(self, rows: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put ``(H, n, d)`` keys and values at the newest columns of rows."""
        for buffer, new in zip(self.buffers, (keys, values), strict=True):
            buffer[rows, :, self.stop - new.shape[1] : self.stop] = new

    def trim(self, columns: int) -> None:
        """Forget all but the newest columns."""
        self.start = max(self.start, self.stop - columns)
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Add columns ``(B, H, n, d)`` and return all keys and values."""
        new = key_states.shape[-2]
        if self.stop + new > self.buffers[0].shape[2]:
            spare = new + max(SPARE_COLUMNS, (self.stop - self.start) // 4)
            self.buffers = [self._with_spare(buffer, spare) for buffer in self.buffers]
            self.start, self.stop = 0, self.stop - self.start
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, self.stop : self.stop + new] = states
        self.stop += new
        self._show()
        return self.keys, self.values  # type: ignore[return-value]

    def _with_spare(self, buffer: Tensor, spare: int) -> Tensor:
        """Return the window of a buffer with spare columns behind it."""
        window = buffer[:, :, self.start : self.stop]
        rows, heads, columns, width = window.shape
        larger = buffer.new_empty((rows, heads, columns + spare, width))
        larger[:, :, :columns] = window
        return larger

    def _show(self) -> None:
        """Let the model see the window."""
        self.keys, self.values = (b[:, :, self.start : self.stop] for b in self.buffers)
        self.dtype, self.device = self.keys.dtype, self.keys.device
        self.is_initialized = True


def resized(table: Tensor, rows: Tensor, slots: int) -> Tensor:
    """Return the rows given of ``(B, ...)``, followed by zeros up to ``slots`` rows."""
    larger = table.new_zeros((slots, *table.shape[1:]))
    larger[: len(rows)] = table[rows]
    return larger


def attempt_stream(seed: int, attempt: int, count: int) -> np.ndarray:
    """Return the uniform numbers in [0, 1) of an attempt: a function of seed and attempt alone."""
    return np.random.Generator(np.random.Philox(key=[seed, attempt])).random(count)


def logits_warp(settings: GenerationSettings) -> LogitsProcessorList:
    """Return transformers' own processors in its own order: penalty, temperature, top k, top p."""
    warp = LogitsProcessorList()
    if settings.repetition_penalty != 1.0:
        warp.append(RepetitionPenaltyLogitsProcessor(settings.repetition_penalty))
    if settings.temperature != 1.0:
        warp.append(TemperatureLogitsWarper(settings.temperature))
    if settings.top_k:
        warp.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p < 1.0:
        warp.append(TopPLogitsWarper(settings.top_p))
    return warp


def pick(scores: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token a row by inverting the cumulative distribution.

    Args:
        scores: ``(B, V)`` warped logits, -inf where excluded.
        uniforms: ``(B,)`` numbers in [0, 1), in float64.

    Returns:
        ``(B,)`` the first token v with Σ_{w ≤ v} softmax(scores)_w above the number: v has
        probability softmax(scores)_v, and none that is excluded is ever drawn.

    Raises:
        ValueError: the scores of a row are not numbers, or all excluded.
    """
    cumulative = scores.softmax(-1).double().cumsum(-1)  # (B, V)
    total = cumulative[:, -1:]
    if not torch.isfinite(total).all():
        raise ValueError("the model's output is not a number: its weights are broken or overflow")
    # The sum misses 1 by rounding: the number is a share of it.
    return torch.searchsorted(cumulative, uniforms[:, None] * total, right=True).squeeze(-1)


@dataclass(frozen=True)
class ProteinScores:
    """Likelihoods of P proteins: ``nll`` in nats, ``residues`` and predicted ``tokens``, ``(P,)``.

    The NLL of a protein that does not fit the model or its tokenizer is NaN.
    """

    nll: np.ndarray
    residues: np.ndarray
    tokens: np.ndarray

    @property
    def perplexity_per_residue(self) -> list[float | None]:
        """exp(NLL / residues) of each protein; None where it does not fit the model."""
        values = np.exp(self.nll / self.residues)
        return [float(value) if math.isfinite(value) else None for value in values]


def require_known(token: int, vocabulary: int) -> None:
    """Raise ``ValueError`` where a token has no place in a model's vocabulary."""
    if token >= vocabulary:
        raise ValueError("the tokenizer has more tokens than the model: is it another model's?")


def score_proteins(
    model: PreTrainedModel,
    tokenizer: Any,
    proteins: Sequence[str],
    whole: Sequence[bool] | None = None,
    batch_size: int = 32,
) -> ProteinScores:
    """Score proteins under a model: -log p(the laid-out protein after its first token | that).

    Line breaks and, of a whole protein, the end are counted.

    Args:
        model: a causal language model.
        tokenizer: its tokenizer.
        proteins: residues of each.
        whole: of each, whether its end counts; None: of all.
        batch_size: proteins scored at a time; they are grouped by length.

    Returns:
        Their likelihoods: NaN where a protein is longer than the model takes, or its tokens do not
        spell it, which would be another protein's.

    Raises:
        ValueError: the model does not know a token.
    """
    from src.evaluation.scoring import EvaluationSettings, protein_nll

    ends = [True] * len(proteins) if whole is None else whole
    texts = [layout(p) if w else prompt_layout(p) for p, w in zip(proteins, ends, strict=True)]
    rows = [
        np.asarray(tokenizer(t, add_special_tokens=False, verbose=False)["input_ids"])
        for t in texts
    ]
    counts = np.array([len(letters) for letters in token_letters(tokenizer)])
    spelt = np.array([counts[row].sum() for row in rows]) == [len(p) for p in proteins]
    lengths = np.array([len(row) for row in rows], dtype=np.int64)
    fits = np.flatnonzero(spelt & (lengths <= max_positions(model.config)))
    require_known(max((int(rows[i].max()) for i in fits), default=0), int(model.config.vocab_size))
    nll = np.full(len(rows), np.nan)
    if len(fits):
        settings = EvaluationSettings(batch_size=batch_size)
        nll[fits] = protein_nll(model, [rows[i] for i in fits], settings, "scoring")
    return ProteinScores(nll, np.array([len(p) for p in proteins]), lengths - 1)


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
    scored: Sequence[tuple[GeneratedProtein, float | None]], seed: int, names: Mapping[str, str]
) -> list[FastaRecord]:
    """Return a FASTA record for each protein, its perplexity per residue in the header.

    Args:
        scored: proteins and their perplexities.
        seed: that they were sampled with.
        names: what else the headers say: the model, and the scorer where it is another.
    """
    width = max(4, len(str(len(scored))))
    return [
        FastaRecord(
            f"protein_{number:0{width}d}",
            protein.residues,
            {
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
