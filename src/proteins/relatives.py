"""Finds the nearest relatives of proteins among others, and their known families."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from src.common.cli import progress
from src.proteins.layouts import STANDARD_RESIDUES

WORD = 3
"""Residues of a word, for diversity and the search for relatives."""
LINK_WORD, SHARED_WORDS = 4, 0.3
"""Residues of a word, and the share of words, by which relatives are told without an alignment."""
CANDIDATES = 10
"""Training proteins that are aligned with each query."""
GAP_OPEN, GAP_EXTEND = -11.0, -1.0
"""Penalties of the first and of each further residue of a gap, with BLOSUM62 as in BLASTP; a gap
of n residues costs 11 + n."""
EVALUE = 1e-3

_CODE = np.full(256, -1, dtype=np.int64)
_CODE[np.frombuffer(STANDARD_RESIDUES.encode(), np.uint8)] = np.arange(len(STANDARD_RESIDUES))


def word_sets(proteins: Sequence[str], width: int = WORD) -> sparse.csr_matrix:
    """Return which words of ``width`` standard residues each protein has, ``(P, 20 ** width)``."""
    rows, columns = [], []
    base = len(STANDARD_RESIDUES) ** np.arange(width)
    for row, residues in enumerate(proteins):
        codes = _CODE[np.frombuffer(residues.encode("ascii"), np.uint8)]
        if len(codes) < width:
            continue
        windows = np.lib.stride_tricks.sliding_window_view(codes, width)
        words = np.unique(windows[(windows >= 0).all(1)] @ base)
        rows.append(np.full(len(words), row))
        columns.append(words)
    shape = (len(proteins), len(STANDARD_RESIDUES) ** width)
    if not rows:
        return sparse.csr_matrix(shape, dtype=np.float32)
    place = (np.concatenate(rows), np.concatenate(columns))
    return sparse.csr_matrix((np.ones(len(place[0]), np.float32), place), shape=shape)


def relatives_of(proteins: Sequence[str]) -> np.ndarray:
    """Return the group ``(P,)`` of each protein: proteins that share words are in one.

    Two are linked if ``SHARED_WORDS`` of the words of the one with fewer are the other's. Identity
    p conserves p⁴ of the words, so links begin at about 74 %, or where one is a part of the other;
    two unrelated proteins of 500 residues share about 0.5 %.
    """
    words = word_sets(proteins, LINK_WORD)
    shared = (words @ words.T).toarray()
    own = np.maximum(shared.diagonal(), 1)
    linked = shared >= SHARED_WORDS * np.minimum(own, own[:, None])
    return connected_components(sparse.csr_matrix(linked), directed=False)[1]


def local_aligner() -> Any:
    """Return Biopython's aligner for local alignments with BLOSUM62 and affine gaps."""
    from Bio.Align import PairwiseAligner, substitution_matrices

    aligner = PairwiseAligner()
    aligner.mode = "local"
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    aligner.open_gap_score = GAP_OPEN + GAP_EXTEND
    aligner.extend_gap_score = GAP_EXTEND
    return aligner


_REPLACEMENTS = str.maketrans("JOU", "LKC")
"""Residues that BLOSUM62 does not have, and the most similar ones that it has."""


def aligned(aligner: Any, query: str, target: str) -> tuple[int, int, int]:
    """Return identical pairs, columns and residues of the query in the best local alignment."""
    query, target = query.translate(_REPLACEMENTS), target.translate(_REPLACEMENTS)
    if aligner.score(query, target) <= 0:
        return 0, 0, 0
    alignment = aligner.align(query, target)[0]
    blocks = alignment.aligned  # (2, blocks, 2)
    (q_start, q_stop), (t_start, t_stop) = ((int(side[0][0]), int(side[-1][1])) for side in blocks)
    identical = paired = 0
    for (q0, q1), (t0, t1) in zip(blocks[0], blocks[1], strict=True):
        identical += sum(a == b for a, b in zip(query[q0:q1], target[t0:t1], strict=True))
        paired += int(q1 - q0)
    columns = (q_stop - q_start) + (t_stop - t_start) - paired
    return identical, columns, q_stop - q_start


class Relatives:
    """Proteins among which the nearest relatives of others are looked for, by their words.

    Similarity is the cosine over words of three residues, weighted by inverse document frequency
    ln(targets / targets with the word).
    """

    def __init__(self, targets: Sequence[str]) -> None:
        """Index the targets, of which ``CANDIDATES`` are aligned with each query."""
        self.targets, self.count = targets, min(CANDIDATES, len(targets))
        words = word_sets(targets)
        frequency = np.asarray(words.sum(0), dtype=np.float64).ravel()
        self.weight = np.log((1 + len(targets)) / (1 + frequency))
        self.words = _unit_rows(words.multiply(self.weight).tocsr()).T.tocsr()
        self.aligner = local_aligner()

    def likeliest(self, queries: Sequence[str]) -> np.ndarray:
        """Return the targets ``(Q, count)`` whose words are most similar, the most similar first.

        They are indices.
        """
        query_words = _unit_rows(word_sets(queries).multiply(self.weight).tocsr())
        nearest = np.zeros((len(queries), self.count), dtype=np.int64)
        block = max(1, 20_000_000 // max(1, len(self.targets)))
        for start in range(0, len(queries), block):
            cosine = (query_words[start : start + block] @ self.words).toarray()
            best = np.argpartition(-cosine, self.count - 1, axis=1)[:, : self.count]
            order = np.argsort(-np.take_along_axis(cosine, best, 1), axis=1, kind="stable")
            nearest[start : start + block] = np.take_along_axis(best, order, 1)
        return nearest

    def identities(self, queries: Sequence[str], show: bool = False) -> dict[str, np.ndarray]:
        """Return :func:`nearest_identities`, with progress where ``show`` is on."""
        best = {name: np.zeros(len(queries)) for name in ("identity", "local_identity", "coverage")}
        nearest = np.full(len(queries), -1, dtype=np.int64)
        likely = self.likeliest(queries)
        rows = range(len(queries))
        for row in progress(rows, len(queries), "aligning", "proteins") if show else rows:
            query = queries[row]
            for target in likely[row] if query else ():
                identical, columns, covered = aligned(
                    self.aligner, query, self.targets[int(target)]
                )
                if identical / len(query) > best["identity"][row]:
                    best["identity"][row] = identical / len(query)
                    best["local_identity"][row] = identical / columns
                    best["coverage"][row] = covered / len(query)
                    nearest[row] = target
        return {**best, "target": nearest}


def _unit_rows(table: sparse.csr_matrix) -> sparse.csr_matrix:
    norms = np.sqrt(np.asarray(table.multiply(table).sum(1), dtype=np.float64)).ravel()
    scaled = sparse.diags(1 / np.where(norms > 0, norms, 1.0)) @ table
    return sparse.csr_matrix(scaled, dtype=np.float32)


def nearest_identities(queries: Sequence[str], targets: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the identity of each query with its closest target.

    The targets of :meth:`Relatives.likeliest` are aligned locally (Smith & Waterman 1981,
    BLOSUM62, gaps 11 and 1). Identity is **identical pairs / residues of the query**, for the
    target with the most identical pairs: short matches count little, and 1 means that the whole
    query is part of a target. It is a lower bound, because a relative with few common words may be
    missed: of 300 proteins of ``test_in_family``, a sensitive search by MMseqs2 (``-s 7.5``) in the
    bundled training part put 142 over 30 % and 85 over 50 %; this search put 136 and 85.

    Returns:
        ``(Q,)`` each: ``identity``; ``local_identity`` (identical pairs / columns of that
        alignment, gaps included); ``coverage`` (aligned share of the query); ``target``, its index,
        or -1.
    """
    if queries and targets:
        return Relatives(targets).identities(queries, show=True)
    none = {name: np.zeros(len(queries)) for name in ("identity", "local_identity", "coverage")}
    return {**none, "target": np.full(len(queries), -1, dtype=np.int64)}


def check_profiles(profiles: str | Path) -> tuple[int, bool]:
    """Return the number of profiles in a file, and whether all have a gathering threshold.

    Raises:
        ValueError: pyhmmer is missing, or the file is missing, empty or no HMM file.
    """
    try:
        import pyhmmer  # noqa: F401
    except ImportError:
        raise ValueError("--profiles: the search needs pyhmmer: pip install pyhmmer") from None
    if not Path(profiles).is_file():
        raise ValueError(f"--profiles {profiles}: there is no such HMM file")
    count, gathering = 0, True
    try:
        with open_profiles(profiles) as file:
            for profile in file:
                count += 1
                gathering = gathering and profile.cutoffs.gathering_available()
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"--profiles {profiles}: not a readable HMM file ({error})") from None
    if not count:
        raise ValueError(f"--profiles {profiles}: holds no profile")
    return count, gathering


def family_hits(proteins: Sequence[str], profiles: str | Path) -> dict[str, Any]:
    """Search proteins for known families with HMMER (pyhmmer; Larralde & Zeller 2023, btad214).

    If every profile has a gathering threshold, as in Pfam, it decides what is a hit; otherwise an
    E-value of at most ``EVALUE``, relative to the number of profiles as in ``hmmscan``.

    Args:
        proteins: residues of each.
        profiles: HMM file, such as ``Pfam-A.hmm``.

    Returns:
        ``hit`` ``(P,)``, whether each protein is hit; ``names`` ``(P,)``: accession and name of the
        profile with the highest score, or None; ``families``: number of different profiles
        that hit; ``profiles`` searched; ``threshold``: ``gathering`` or the E-value.

    Raises:
        ValueError: see :func:`check_profiles`.
    """
    count, gathering = check_profiles(profiles)
    best: dict[int, tuple[float, str]] = {}
    families = 0
    for profile, hits in _searched(proteins, profiles, count, gathering):
        families += bool(hits)
        for protein, score in hits.items():
            best[protein] = max(best.get(protein, (-np.inf, "")), (score, full_name(profile)))
    return {
        "hit": np.array([i in best for i in range(len(proteins))], dtype=bool),
        "names": [best[i][1] if i in best else None for i in range(len(proteins))],
        "families": families,
        "profiles": count,
        "threshold": "gathering" if gathering else EVALUE,
    }


def profile_scores(proteins: Sequence[str], profiles: str | Path) -> dict[str, np.ndarray]:
    """Return each profile's scores of all proteins, with the thresholds of :func:`family_hits`.

    Returns:
        For each profile that hits a protein, by accession (or name, without one), ``(P,)``: the
        log-odds score against HMMER's background in nats, 0 without a hit.

    Raises:
        ValueError: see :func:`check_profiles`.
    """
    count, gathering = check_profiles(profiles)
    scores: dict[str, np.ndarray] = {}
    for profile, hits in _searched(proteins, profiles, count, gathering):
        if hits:
            nats = scores[profile_key(profile)] = np.zeros(len(proteins))
            nats[list(hits)] = np.log(2) * np.array(list(hits.values()))
    return scores


def _searched(
    proteins: Sequence[str], profiles: str | Path, count: int, gathering: bool
) -> Iterator[tuple[Any, dict[int, float]]]:
    """Yield each profile and its hits: index of the protein, score in bits."""
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.amino()
    digital = [
        pyhmmer.easel.TextSequence(name=str(i), sequence=p).digitize(alphabet)
        for i, p in enumerate(proteins)
        if p
    ]
    block: Any = pyhmmer.easel.DigitalSequenceBlock(alphabet, digital)
    options: dict[str, Any] = {"bit_cutoffs": "gathering"} if gathering else {"E": EVALUE}
    if len(block):
        with open_profiles(profiles) as file:
            # hmmsearch is much faster than hmmscan; Z makes its E-values hmmscan's.
            for hits in pyhmmer.hmmsearch(file, block, cpus=1, Z=count, **options):
                good = (h for h in hits if h.included or h.reported)
                yield hits.query, {int(h.name): h.score for h in good}


def profile_key(profile: Any) -> str:
    """Return a profile's accession, or its name where it has none."""
    return profile.accession or profile.name


def full_name(profile: Any) -> str:
    """Return a profile's accession and name, such as ``PF00829.24 Ribosomal_L21p``."""
    return " ".join(part for part in (profile.accession, profile.name) if part)


@contextmanager
def open_profiles(profiles: str | Path) -> Iterator[Any]:
    """Open an HMM file, gzipped or not, as an iterable of pyhmmer's profiles."""
    import pyhmmer

    opened: Any = gzip.open if Path(profiles).suffix == ".gz" else open
    with opened(profiles, "rb") as raw, pyhmmer.plan7.HMMFile(raw) as file:
        yield file
