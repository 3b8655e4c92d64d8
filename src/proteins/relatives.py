"""Finds what proteins resemble: their nearest relatives among others, and known families."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from src.common.cli import progress
from src.proteins.layouts import STANDARD_RESIDUES

WORD = 3
"""Residues of the words that diversity and the search for relatives compare."""
CANDIDATES = 10
"""Training proteins that are aligned with each generated one."""
GAP_OPEN, GAP_EXTEND = -11.0, -1.0
"""Penalties of the first and of each further residue of a gap, with BLOSUM62 as in BLASTP; a gap
of n residues costs 11 + n."""
EVALUE = 1e-3

_CODE = np.full(256, -1, dtype=np.int64)
_CODE[np.frombuffer(STANDARD_RESIDUES.encode(), np.uint8)] = np.arange(len(STANDARD_RESIDUES))


def word_sets(proteins: Sequence[str], width: int = WORD) -> sparse.csr_matrix:
    """Return which words of ``width`` standard residues each protein holds.

    Returns:
        ``(P, 20 ** width)`` of zeros and ones.
    """
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


def local_aligner() -> Any:
    """Return Biopython's aligner for local alignments with BLOSUM62 and affine gaps."""
    from Bio.Align import PairwiseAligner, substitution_matrices

    aligner = PairwiseAligner()
    aligner.mode = "local"
    aligner.substitution_matrix = substitution_matrices.load("BLOSUM62")
    aligner.open_gap_score = GAP_OPEN + GAP_EXTEND
    aligner.extend_gap_score = GAP_EXTEND
    return aligner


_WITHOUT_SCORES = str.maketrans("JOU", "LKC")
"""Residues that BLOSUM62 does not know, by what they resemble."""


def aligned(aligner: Any, query: str, target: str) -> tuple[int, int, int]:
    """Return identical pairs, columns and residues of the query in the best local alignment."""
    query, target = query.translate(_WITHOUT_SCORES), target.translate(_WITHOUT_SCORES)
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


def likeliest_relatives(
    queries: Sequence[str], targets: Sequence[str], count: int = CANDIDATES
) -> np.ndarray:
    """Return the targets that share the most telling words with each query.

    Proteins are compared by the cosine of their words of three residues, each weighted by its
    inverse document frequency ln(targets / targets with it): rare words tell more.

    Returns:
        ``(Q, min(count, targets))`` indices, the most similar first.
    """
    count = min(count, len(targets))
    words = word_sets(targets)
    frequency = np.asarray(words.sum(0), dtype=np.float64).ravel()
    weight = np.log((1 + len(targets)) / (1 + frequency))
    weighted = _unit_rows(words.multiply(weight).tocsr()).T.tocsr()
    asked = _unit_rows(word_sets(queries).multiply(weight).tocsr())
    found = np.zeros((len(queries), count), dtype=np.int64)
    block = max(1, 20_000_000 // max(1, len(targets)))
    for start in range(0, len(queries), block):
        cosine = (asked[start : start + block] @ weighted).toarray()
        best = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
        order = np.argsort(-np.take_along_axis(cosine, best, 1), axis=1, kind="stable")
        found[start : start + block] = np.take_along_axis(best, order, 1)
    return found


def _unit_rows(table: sparse.csr_matrix) -> sparse.csr_matrix:
    norms = np.sqrt(np.asarray(table.multiply(table).sum(1), dtype=np.float64)).ravel()
    scaled = sparse.diags(1 / np.where(norms > 0, norms, 1.0)) @ table
    return sparse.csr_matrix(scaled, dtype=np.float32)


def nearest_identities(
    queries: Sequence[str], targets: Sequence[str], candidates: int = CANDIDATES
) -> dict[str, np.ndarray]:
    """Find the closest target of each query.

    The ``candidates`` of :func:`likeliest_relatives` are aligned locally (Smith & Waterman 1981,
    BLOSUM62, gaps 11 and 1). The identity is that of the one with the most identical pairs:
    **identical pairs / residues of the query**. A short match therefore counts as little as it
    covers, and 1 means that the whole query stands in a target. It is a lower bound: a relative
    that shares hardly any words may be missed. Of 300 proteins of ``test_in_family`` against the
    bundled training part, a sensitive search by MMseqs2 (``-s 7.5``) put 142 over 30 % and 85 over
    50 %; this found 136 of the former and all of the latter.

    Returns:
        ``(Q,)`` each: ``identity``; ``local_identity`` (identical pairs / columns of that
        alignment, gaps counted); ``coverage`` (share of the query within it); ``target``, its
        index, -1 without any.
    """
    found = {name: np.zeros(len(queries)) for name in ("identity", "local_identity", "coverage")}
    nearest = np.full(len(queries), -1, dtype=np.int64)
    if queries and targets:
        aligner = local_aligner()
        likely = likeliest_relatives(queries, targets, candidates)
        for row in progress(range(len(queries)), len(queries), "aligning", "proteins"):
            query = queries[row]
            for target in likely[row] if query else ():
                identical, columns, covered = aligned(aligner, query, targets[int(target)])
                if identical / len(query) > found["identity"][row]:
                    found["identity"][row] = identical / len(query)
                    found["local_identity"][row] = identical / columns
                    found["coverage"][row] = covered / len(query)
                    nearest[row] = target
    return {**found, "target": nearest}


def check_profiles(profiles: str | Path) -> tuple[int, bool]:
    """Return the number of profiles in a file, and whether all have a gathering threshold.

    Raises:
        ValueError: pyhmmer is missing, or the file is not there, empty or no HMM file.
    """
    try:
        import pyhmmer
    except ImportError:
        raise ValueError("--profiles: the search needs pyhmmer: pip install pyhmmer") from None
    if not Path(profiles).is_file():
        raise ValueError(f"--profiles {profiles}: there is no such HMM file")
    count, gathering = 0, True
    try:
        with pyhmmer.plan7.HMMFile(str(profiles)) as file:
            for profile in file:
                count += 1
                gathering = gathering and profile.cutoffs.gathering_available()
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"--profiles {profiles}: not a readable HMM file ({error})") from None
    if not count:
        raise ValueError(f"--profiles {profiles}: holds no profile")
    return count, gathering


def family_hits(
    proteins: Sequence[str], profiles: str | Path, evalue: float = EVALUE, cpus: int = 1
) -> dict[str, Any]:
    """Search proteins for known families with HMMER (pyhmmer; Larralde & Zeller 2023, btad214).

    A protein is hit by a profile over the profile's own gathering threshold where every profile
    has one (as Pfam's do), else with an E-value of at most ``evalue``, counted, as ``hmmscan``
    does, over the number of profiles.

    Args:
        proteins: residues of each.
        profiles: HMM file, such as ``Pfam-A.hmm``.
        evalue: threshold where there are no gathering thresholds.
        cpus: threads.

    Returns:
        ``hit`` ``(P,)``, whether each protein is hit; ``families``: number of different profiles
        that hit; ``profiles`` searched; ``threshold``: ``gathering`` or the E-value.

    Raises:
        ValueError: see :func:`check_profiles`.
    """
    count, gathering = check_profiles(profiles)
    import pyhmmer

    alphabet = pyhmmer.easel.Alphabet.amino()
    digital = [_named_sequence(str(i), p).digitize(alphabet) for i, p in enumerate(proteins) if p]
    block: Any = pyhmmer.easel.DigitalSequenceBlock(alphabet, digital)
    options: dict[str, Any] = {"bit_cutoffs": "gathering"} if gathering else {"E": evalue}
    hit: set[str] = set()
    families = 0
    if len(block):
        with pyhmmer.plan7.HMMFile(str(profiles)) as file:
            # hmmsearch is much faster than hmmscan; Z makes its E-values hmmscan's.
            for hits in pyhmmer.hmmsearch(file, block, cpus=cpus, Z=count, **options):
                names = {_text(h.name) for h in hits if h.included or h.reported}
                hit |= names
                families += bool(names)
    return {
        "hit": np.array([str(i) in hit for i in range(len(proteins))], dtype=bool),
        "families": families,
        "profiles": count,
        "threshold": "gathering" if gathering else evalue,
    }


def _named_sequence(name: str, residues: str) -> Any:
    """Return a sequence for pyhmmer, whose names were bytes before they were text."""
    from pyhmmer.easel import TextSequence

    try:
        return TextSequence(name=name, sequence=residues)
    except TypeError:
        return TextSequence(name=name.encode(), sequence=residues)  # type: ignore[arg-type]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
