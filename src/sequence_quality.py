"""Describes sets of generated proteins: lengths, repeats, diversity, novelty, known families.

Functions take residues of proteins and return plain dictionaries. Every figure means little alone:
compare it with that of natural proteins and of the same proteins shuffled (:func:`shuffled`), which
keep length and composition and lose everything else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import sparse

from src import metrics
from src.cli import progress
from src.proteins import STANDARD_RESIDUES

LONGEST_UNIT = 30
"""Residues of the longest unit looked for in tandem repeats."""
LEAST_COPIES = 3
LEAST_REPEAT = metrics.LONG_RUN
"""A repeat is at least three copies of its unit and at least six residues."""
WORD = 3
"""Residues of the words that diversity and the search for relatives compare."""
CANDIDATES = 10
"""Training proteins that are aligned with each generated one."""
PAIRS = 500
"""Pairs, at most, whose identity is aligned for diversity."""
GAP_OPEN, GAP_EXTEND = -11.0, -1.0
"""Penalties of the first and of each further residue of a gap, with BLOSUM62 as in BLASTP; a gap
of n residues costs 11 + n."""
NOVELTY_LEVELS = (0.3, 0.5, 0.9)
EVALUE = 1e-3

_CODE = np.full(256, -1, dtype=np.int64)
_CODE[np.frombuffer(STANDARD_RESIDUES.encode(), np.uint8)] = np.arange(len(STANDARD_RESIDUES))


def length_statistics(proteins: Sequence[str]) -> dict[str, float | None]:
    """Return mean, standard deviation, extremes and quartiles of the lengths, in residues."""
    names = ("mean", "sd", "min", "q1", "median", "q3", "max")
    if not proteins:
        return dict.fromkeys(names)
    lengths = np.array([len(p) for p in proteins], dtype=np.float64)
    quartiles = np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])
    return dict(zip(names, map(float, [lengths.mean(), lengths.std(), *quartiles]), strict=True))


def composition(proteins: Iterable[str]) -> dict[str, float]:
    """Return the share of each of the 20 residues; zeros where there is none."""
    counts = metrics.residue_counts(proteins)
    return {
        letter: float(value)
        for letter, value in zip(STANDARD_RESIDUES, counts / max(1, counts.sum()), strict=True)
    }


def valid_share(proteins: Sequence[str]) -> float | None:
    """Return the share of proteins that have residues, all of the standard 20."""
    standard = set(STANDARD_RESIDUES)
    return _mean([bool(p) and set(p) <= standard for p in proteins])


def repeat_share(residues: str, longest_unit: int = LONGEST_UNIT) -> float:
    """Return the share of residues in tandem repeats.

    A tandem repeat is a stretch that equals itself shifted by its unit of 1 to ``longest_unit``
    residues, at least three copies and six residues long: QQQQQQ, GSGSGS, ADEADEADE.

    Returns:
        A share in [0, 1]; 0 of an empty protein.
    """
    letters = np.frombuffer(residues.encode("ascii"), np.uint8)
    covered = np.zeros(len(letters) + 1, dtype=np.int64)
    for unit in range(1, min(longest_unit, len(letters) // LEAST_COPIES) + 1):
        same = np.concatenate([[0], letters[unit:] == letters[:-unit], [0]]).astype(np.int8)
        edges = np.flatnonzero(np.diff(same))
        for start, stop in zip(edges[::2], edges[1::2], strict=True):
            if stop - start + unit >= max(LEAST_COPIES * unit, LEAST_REPEAT):
                covered[start] += 1
                covered[stop + unit] -= 1
    return float((covered.cumsum()[:-1] > 0).mean()) if len(letters) else 0.0


def repetitiveness(proteins: Sequence[str]) -> dict[str, float | None]:
    """Return how much proteins repeat themselves.

    Returns:
        ``longest_run`` (mean over proteins of the longest stretch of one residue),
        ``long_run_share`` (proteins with six or more in a row), ``tandem_repeat_share`` and
        ``low_complexity_share`` (of all residues; :func:`repeat_share` and SEG's first pass,
        :func:`src.metrics.low_complexity_share`).
    """
    runs = [metrics.longest_run(p) for p in proteins]
    sizes = np.array([len(p) for p in proteins], dtype=np.float64)
    tandem = np.array([repeat_share(p) for p in proteins])
    low = np.array([metrics.low_complexity_share(p) for p in proteins])
    total = sizes.sum()
    return {
        "longest_run": _mean(runs),
        "long_run_share": _mean([run >= metrics.LONG_RUN for run in runs]),
        "tandem_repeat_share": float(tandem @ sizes / total) if total else None,
        "low_complexity_share": float(low @ sizes / total) if total else None,
    }


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


def diversity(proteins: Sequence[str], pairs: int = PAIRS, seed: int = 0) -> dict[str, Any]:
    """Return how much proteins differ from each other.

    Args:
        proteins: residues of each.
        pairs: pairs that are aligned, at most; drawn without replacement where there are more.
        seed: of the draw.

    Returns:
        ``distinct_share`` of the proteins; ``word_distance``, the mean over all pairs of one less
        the Jaccard similarity of their sets of words of three residues; ``pairwise_identity``, the
        mean over ``pairs`` of identical residues in the best local alignment, as a share of the
        shorter protein. None where there are fewer than two proteins.
    """
    proteins = [p for p in proteins if p]
    record: dict[str, Any] = {
        "distinct_share": len(set(proteins)) / len(proteins) if proteins else None,
        "word_distance": None,
        "pairwise_identity": None,
        "pairs": 0,
    }
    count = len(proteins)
    if count < 2:
        return record
    words = word_sets(proteins)
    sizes = np.asarray(words.sum(1), dtype=np.float64).ravel()
    similarity = 0.0
    for start in range(0, count, 512):  # blocks bound the memory
        shared = (words[start : start + 512] @ words.T).toarray().astype(np.float64)
        union = sizes[start : start + 512, None] + sizes - shared
        # Two proteins too short for a word are alike when they are equal.
        ratio = np.divide(shared, union, out=np.zeros_like(shared), where=union > 0)
        here = np.arange(start, start + len(shared))
        similarity += ratio.sum() - ratio[np.arange(len(here)), here].sum()
    record["word_distance"] = float(1 - similarity / (count * (count - 1)))
    all_pairs = count * (count - 1) // 2
    chosen = np.random.default_rng(seed).choice(all_pairs, min(pairs, all_pairs), replace=False)
    first = np.floor((1 + np.sqrt(1 + 8 * chosen.astype(np.float64))) / 2).astype(np.int64)
    first -= first * (first - 1) // 2 > chosen  # the root may round up
    second = chosen - first * (first - 1) // 2
    aligner = local_aligner()
    found = []
    for a, b in progress(list(zip(first, second, strict=True)), None, "aligning", "pairs"):
        left, right = proteins[a], proteins[b]
        found.append(aligned(aligner, left, right)[0] / min(len(left), len(right)))
    record["pairwise_identity"], record["pairs"] = _mean(found), len(found)
    return record


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


def novelty(
    proteins: Sequence[str], train: Sequence[str], candidates: int = CANDIDATES
) -> dict[str, Any]:
    """Return how close proteins come to the training proteins.

    Returns:
        ``nearest_identity``: mean and quartiles of the identity of :func:`nearest_identities`;
        ``share_over``: share of proteins over 30, 50 and 90 %; ``copied_share``: share that stands
        whole in the training protein aligned; ``train_proteins``: how many were searched.
    """
    proteins = [p for p in proteins if p]
    identity = nearest_identities(proteins, train, candidates)["identity"]
    if not len(identity) or not train:
        return {"nearest_identity": None, "share_over": None, "train_proteins": len(train)}
    quartiles = np.quantile(identity, [0, 0.25, 0.5, 0.75, 1])
    return {
        "nearest_identity": {
            "mean": float(identity.mean()),
            **dict(zip(("min", "q1", "median", "q3", "max"), map(float, quartiles), strict=True)),
        },
        "share_over": {f"{level:g}": float((identity > level).mean()) for level in NOVELTY_LEVELS},
        "copied_share": float((identity >= 1).mean()),
        "train_proteins": len(train),
    }


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
        ``hit_share`` of the proteins; ``families``: number of different profiles that hit;
        ``profiles`` searched; ``threshold``: ``gathering`` or the E-value.

    Raises:
        ValueError: pyhmmer is missing, or the file is not there, empty or no HMM file.
    """
    try:
        import pyhmmer
    except ImportError:
        raise ValueError("searching for families needs pyhmmer: pip install pyhmmer") from None
    if not Path(profiles).is_file():
        raise ValueError(f"{profiles}: there is no such HMM file")
    count, gathering = 0, True
    try:
        with pyhmmer.plan7.HMMFile(str(profiles)) as file:
            for profile in file:
                count += 1
                gathering = gathering and profile.cutoffs.gathering_available()
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{profiles}: not a readable HMM file ({error})") from None
    if not count:
        raise ValueError(f"{profiles}: holds no profile")
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
        "hit_share": len(hit) / len(proteins) if proteins else None,
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


def describe(
    proteins: Sequence[str],
    natural: Sequence[str],
    train: Sequence[str] | None = None,
    profiles: str | Path | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Describe generated proteins in one record.

    Args:
        proteins: residues of each; empty ones count as not valid and nothing else.
        natural: natural proteins, the reference of composition.
        train: training proteins, for novelty; None: leave it out.
        profiles: HMM file, for families; None: leave them out.
        seed: of the pairs that are aligned.

    Returns:
        ``sequences``, ``valid_share``, ``length``, ``composition``, ``kl_from_natural`` (nats),
        ``repetitiveness``, ``diversity``, and ``novelty`` and ``families`` where asked for.
    """
    whole = [p for p in proteins if p]
    counts = metrics.residue_counts(whole)
    record: dict[str, Any] = {
        "sequences": len(proteins),
        "valid_share": valid_share(proteins),
        "length": length_statistics(whole),
        "composition": composition(whole),
        "kl_from_natural": float(metrics.composition_kl(counts, metrics.residue_counts(natural))),
        "repetitiveness": repetitiveness(whole),
        "diversity": diversity(whole, seed=seed),
    }
    if train is not None:
        record["novelty"] = novelty(whole, train)
    if profiles is not None:
        record["families"] = family_hits(whole, profiles)
    return record


def describe_with_controls(
    generated: Mapping[str, Sequence[str]],
    natural: Sequence[str],
    train: Sequence[str] | None = None,
    profiles: str | Path | None = None,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Describe each model's proteins, beside natural ones and those shuffled.

    Args:
        generated: residues of each protein by model.
        natural: natural proteins that no model was trained on.
        train: as for :func:`describe`.
        profiles: as for :func:`describe`.
        seed: of all draws.

    Returns:
        A record of :func:`describe` for each model, for ``natural`` and for ``shuffled``: as many
        natural proteins as the largest set has, because diversity and novelty are best compared
        between sets of one size.
    """
    largest = max((len(proteins) for proteins in generated.values()), default=0)
    some = list(natural)
    if 0 < largest < len(some):
        chosen = np.random.default_rng(seed).choice(len(some), largest, replace=False)
        some = [some[i] for i in np.sort(chosen)]
    sets = {**generated, "natural": some, "shuffled": shuffled(some, seed)}
    return {
        name: describe(proteins, natural, train, profiles, seed) for name, proteins in sets.items()
    }


def shuffled(proteins: Sequence[str], seed: int = 0) -> list[str]:
    """Return each protein with its residues in a random order, given by it and the seed alone."""
    from src.evaluation import shuffled as shuffle

    return [shuffle(p, seed) for p in proteins]


def _mean(values: Sequence[float]) -> float | None:
    """Return the mean, None of nothing."""
    return math.fsum(values) / len(values) if len(values) else None
