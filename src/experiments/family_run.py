"""Puts the stages in order: split, profile, adapt, candidates, specialist, judgement, page.

========================  =====================================================================
``split/``                training, validation and test members (not for a directory of parts)
``profile/``              ``training.hmm``, ``family.hmm`` (all members), ``density.hmm``
``adapted/``              the adapted model
``random/``               the same shape from random weights, for comparison
``candidates/``           ``candidates.fasta``, ``candidates.csv``
``specialist-data/``      natural members and samples
``specialist/``           the small model, if one is asked for
``judgement/``            ``judgement.json`` and the figures of single members
``page.html``             all of it
========================  =====================================================================
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import duration, quiet_libraries, say, unheard
from src.common.devices import choose_device
from src.common.files import read_json, sha256_file, write_json, write_text
from src.common.runs import locked, read_run
from src.common.settings import DEFAULTS, StudentSettings
from src.evaluation.inputs import clusters_of
from src.evaluation.likelihoods import score_proteins
from src.experiments import candidates as c
from src.experiments import specialist as s
from src.models.decoding import sampling_room
from src.models.loading import MOST_POSITIONS, ProteinModel, load_causal_lm, model_fingerprint
from src.models.lora import require_peft
from src.proteins.family_split import (
    FamilySettings,
    family_hits_of,
    read_family,
    require_one_family,
    split_family,
    test_notes,
)
from src.proteins.layouts import PROTGPT2, layout_of
from src.proteins.profiles import (
    align_family,
    best_density,
    profile_nll,
    profile_of,
    read_profiles,
    require_pyhmmer,
    write_profiles,
)
from src.proteins.relatives import check_profiles
from src.proteins.sources import Protein, has_split
from src.proteins.split_files import SPLIT_FILE, read_split, write_split
from src.proteins.tokens import encode
from src.publishing.family_page import build_page

TRAINING, FAMILY, DENSITY = "training.hmm", "family.hmm", "density.hmm"
SPEED_SAMPLES = 64
"""Proteins that a model samples to measure its speed."""
RESULTS_FILE = "judgement.json"
EXAMPLE_TAG = "3.2.1.17"
"""Lysozyme's EC number, for a message."""


@dataclass(frozen=True)
class FamilyRun:
    """Settings of a run of scripts/specialise.py.

    Attributes:
        family: one file of members, or a directory with parts that is split already.
        model: to adapt; directory or hub id.
        output_dir: of everything.
        specialist: shape of the specialist; None: none is made.
        split: how the family is split.
        adaptation: how the model is adapted.
        lora_rank: of the additions that are trained in place of all weights; None: all weights.
        random: how random weights of the model's shape are trained.
        distillation: how the specialist is distilled.
        candidates: how candidates are sampled.
        scratch: also train random weights of the model's shape, for comparison.
        profile: HMM file that recognises the family; None: one is built.
        layout: of proteins: a name, or a template with the value of the layout's tag in it; None:
            the model's.
        allow_mixed: go on where the members look like several families.
        device: ``auto``, ``cpu`` or ``cuda``.
        cache_dir: where tokenised proteins are kept.
        announce: called with each line for a person.
    """

    family: Path
    model: str
    output_dir: Path
    specialist: StudentSettings | None = None
    split: FamilySettings = FamilySettings()
    adaptation: s.FitSettings = s.ADAPTATION
    lora_rank: int | None = None
    random: s.FitSettings = s.FROM_RANDOM
    distillation: s.FitSettings = s.DISTILLATION
    candidates: c.CandidateSettings = c.CandidateSettings()
    scratch: bool = True
    profile: Path | None = None
    layout: str | None = None
    allow_mixed: bool = False
    device: str = "auto"
    cache_dir: str | None = None
    announce: Callable[[str], None] = say


@dataclass
class Family:
    """A family that is split, the model's limit in tokens and its layout of proteins."""

    data: Path
    train: list[Protein]
    validation: list[Protein]
    test: list[Protein]
    clusters: list[str]
    notes: list[str]
    limit: int
    layout: str | None = None

    @property
    def known(self) -> list[str]:
        """Residues of all members."""
        return [p.residues for p in (*self.train, *self.validation, *self.test)]


def run_family(run: FamilyRun) -> dict[str, Any]:
    """Do every stage that is not finished, write the page, and return the judgement.

    Raises:
        ValueError: the family, the model or the directory cannot be used.
    """
    started = time.monotonic()
    quiet_libraries()
    require_pyhmmer()
    if run.profile is not None:
        check_profiles(run.profile)
    with locked(run.output_dir):
        family = prepare(run)
        step(run, "profile")
        build_profiles(run, family)
        step(run, "adapt")
        adapted = adapt_model(run, family)
        step(run, "candidates")
        sampled = make_candidates(run, family, adapted)
        specialist = None
        if run.specialist is not None:
            step(run, "specialist")
            specialist = make_specialist(run, family, adapted)
        step(run, "judge")
        judgement = judge_models(run, family, adapted, specialist, sampled)
        page = run.output_dir / "page.html"
        write_text(page, build_page(run.output_dir, judgement))
    for line in outcome_lines(run, judgement):
        run.announce(line)
    run.announce(f"done in {duration(time.monotonic() - started)}: {page}")
    return judgement


def step(run: FamilyRun, name: str) -> None:
    """Announce the stage that begins."""
    run.announce(f"== {name}")


def prepare(run: FamilyRun) -> Family:
    """Read and split the family, or take over its split."""
    limit, tokenizer = try_model(run)
    if run.family.is_dir() and has_split(run.family, "train"):
        if not has_split(run.family, "validation"):
            raise ValueError(
                f"--family {run.family}: has no validation part, which decides when to stop: add "
                "one, or give one file that is split here"
            )
        return family_of(run, run.family, [], limit, tokenizer)
    folder = run.output_dir / "split"
    source = {}
    if run.family.is_file():
        source = {"file": run.family.name, "sha256": sha256_file(run.family)}
    notes_file = run.output_dir / "split-notes.json"
    if (folder / SPLIT_FILE).is_file():
        record = read_split(folder)
        made = {k: record["settings"].get(k) for k in s.recorded(run.split)}
        if record.get("source") != source or made != s.recorded(run.split):
            raise ValueError(
                f"{folder} holds another family, or one split with other settings: choose another "
                "--output_dir"
            )
        run.announce(f"{folder}: finished before")
        return family_of(run, folder, read_json(notes_file), limit, tokenizer)

    def fits(proteins: Any) -> np.ndarray:
        return np.array([len(row) <= limit for row in encode(tokenizer, proteins)])

    members = read_family(run.family, fits, f"{run.model} takes {limit} tokens", run.announce)
    run.announce(f"searching {len(members):,} members among themselves")
    hits = family_hits_of(members)
    notes = []
    if not run.allow_mixed and (apart := require_one_family(run.family, members, hits)):
        notes.append(
            f"{len(apart)} members have no detectable relative among the others (first "
            f"{apart[0]}): they are kept; are they of this family?"
        )
    split = split_family(members, hits, run.split)
    write_json(notes_file, notes + split.notes)
    write_split(folder, members, split.split, run.split, source=source)
    return family_of(run, folder, notes + split.notes, limit, tokenizer)


def try_model(run: FamilyRun) -> tuple[int, Any]:
    """Return the model's longest input in tokens, and its tokenizer, which carries its layout.

    What a later stage could not do is refused here, before anything is trained.

    Raises:
        ValueError: the model cannot be loaded or sampled from, its layout needs a tag, it is
            smaller than the specialist somewhere, or peft is wanted and missing.
    """
    if run.lora_rank is not None:
        require_peft()
    model, tokenizer = ProteinModel.load(run.model, layout=run.layout, announce=run.announce)
    layout = layout_of(tokenizer)
    if layout.tag is not None:
        raise ValueError(
            f"--model {run.model}: its layout {layout.template} needs {layout.tag}, of which a "
            "family has one value: write it in the layout's place, as in --layout "
            f"'{layout.template.replace(f'{{{layout.tag}}}', EXAMPLE_TAG)}'"
        )
    limit = sampling_room(model, MOST_POSITIONS)
    if run.specialist is not None and model.config.model_type == "gpt2":
        for name in ("n_layer", "n_head", "n_embd"):
            have, wanted = getattr(model.config, name), getattr(run.specialist, name)
            if wanted > have:
                raise ValueError(
                    f"the specialist's {name} is {wanted}, that of {run.model} {have}: a "
                    f"specialist is cut from the model, so give --{name} {have} or less"
                )
    return limit, tokenizer


def family_of(
    run: FamilyRun, data: Path, notes: list[str], limit: int, tokenizer: Any = None
) -> Family:
    """Return a split family, and say how it is split."""
    layout = PROTGPT2 if tokenizer is None else layout_of(tokenizer)
    test = s.part_of(data, "test") if has_split(data, "test") else []
    table = clusters_of(data) or {}
    clusters = [table.get(p.name, p.name) for p in test]
    if data == run.family:
        notes = [*notes, *test_notes(len(test), len(set(clusters)), run.split.test_identity)]
    family = Family(
        data,
        s.part_of(data, "train"),
        s.part_of(data, "validation"),
        test,
        clusters,
        notes,
        limit,
        None if layout == PROTGPT2 else layout.template,
    )
    run.announce(
        f"{len(family.train):,} training, {len(family.validation):,} validation and {len(test):,} "
        f"test members ({len(set(clusters)):,} clusters)"
    )
    for note in notes:
        run.announce(f"note: {note}")
    return family


def build_profiles(run: FamilyRun, family: Family) -> dict[str, Any]:
    """Build the profiles of the training members and of all members."""
    folder = run.output_dir / "profile"

    def work() -> dict[str, Any]:
        train = [p.residues for p in family.train]
        alignment = align_family(train)
        density, choice, nats = best_density(alignment, [p.residues for p in family.validation])
        write_profiles(folder / TRAINING, [profile_of(alignment, "training_members")])
        write_profiles(folder / DENSITY, [density])
        everyone = profile_of(align_family(family.known), "all_members")
        write_profiles(folder / FAMILY, [everyone])
        run.announce(f"effective number of sequences by {choice}, of {nats} nats per residue")
        return {"effective_number": choice, "validation_nats": nats}

    return s.run_stage(folder, identity(family), work, run.announce)


def identity(family: Family) -> dict[str, Any]:
    """Return the hashes of the family's parts, for the records of stages."""
    parts = ("train", "validation", "test")
    files = {p: sorted(family.data.glob(f"{p}.*")) for p in parts}
    return {p: [sha256_file(path) for path in paths] for p, paths in files.items() if paths}


def options_of(run: FamilyRun, family: Family) -> dict[str, Any]:
    """Return the options that all trainings share."""
    return {
        "max_length": family.limit,
        "layout": family.layout,
        "announce": run.announce,
        "device_name": run.device,
        "cache_dir": run.cache_dir,
    }


def adapt_model(run: FamilyRun, family: Family) -> dict[str, Any]:
    """Adapt the model and, for comparison, random weights; return the adapted model's record."""
    options = options_of(run, family)
    folder = run.output_dir / "adapted"
    record = s.adapt(
        run.model, family.data, folder, run.adaptation, lora_rank=run.lora_rank, **options
    )
    if run.scratch:
        step(run, "train the same shape from random weights, for comparison")
        place = run.output_dir / "random"
        s.adapt(run.model, family.data, place, run.random, random_weights=True, **options)
    return record


def searched_profile(run: FamilyRun) -> Path:
    """Return the profile that candidates must hit: the user's, or the training members'."""
    return run.profile or run.output_dir / "profile" / TRAINING


def make_candidates(run: FamilyRun, family: Family, adapted: Mapping[str, Any]) -> dict[str, Any]:
    """Sample from the adapted model, drop, rank and describe; return the outcome."""
    folder, model = run.output_dir / "candidates", run.output_dir / "adapted"
    train = [p.residues for p in family.train]
    counted = run.profile or run.output_dir / "profile" / FAMILY
    settings = {
        **s.recorded(run.candidates),
        "adapted": adapted["student"]["fingerprint"],
        "profile": sha256_file(searched_profile(run)),
    }

    def work() -> dict[str, Any]:
        device = choose_device(run.device)
        longest = max(map(len, family.known))

        def sample(wanted: c.CandidateSettings, announce: Any = unheard) -> dict[str, Any]:
            return c.sample_family(model, wanted, longest, device, announce)

        def assess(drawn: Mapping[str, Any]) -> dict[str, Any]:
            most = run.candidates.max_identity
            return c.assess(
                drawn["samples"], drawn["nll"], family.train, searched_profile(run), most
            )

        wanted, pilot = run.candidates, {}
        if wanted.temperature is None:
            chosen, pilot = c.choose_temperature(wanted, sample, assess)
            shares = ", ".join(f"{kept:.0%} at {t}" for t, kept in pilot.items())
            run.announce(f"temperature {chosen:g}: of a pilot of {c.PILOT} are kept {shares}")
            wanted = replace(wanted, temperature=chosen)
        drawn = sample(wanted, run.announce)
        if not drawn["samples"]:
            raise ValueError(
                f"{model} ended no protein ({drawn['counts']}): give more members, a larger "
                "--model, or a --temperature (in another --output_dir)"
            )
        table = assess(drawn)
        c.write_candidates(folder, table)
        counts = c.drop_counts(table)
        for line in c.drop_lines(counts):
            run.announce(line)
        if not counts[c.KEPT]:
            run.announce(
                "no sample is a candidate: lower --temperature, give more members or a larger "
                "--model (in another --output_dir)"
            )
        loaded = ProteinModel.load(model, device)
        held_out = [p.residues for p in (*family.validation, *family.test)]
        described = c.describe_candidates(
            table,
            held_out,
            train,
            counted,
            lambda proteins: score_proteins(*loaded, proteins).nll,
            run.candidates.seed,
        )
        return {
            "temperature": wanted.temperature,
            "pilot": pilot,
            "attempts": drawn["counts"],
            "proteins_per_second": drawn["proteins_per_second"],
            "dropped": counts,
            "limits": c.limits_of(train),
            "sets": described,
        }

    return s.run_stage(folder, settings, work, run.announce)


def make_specialist(run: FamilyRun, family: Family, adapted: Mapping[str, Any]) -> dict[str, Any]:
    """Distil the specialist on natural members and on the candidates that were kept."""
    assert run.specialist is not None
    data = run.output_dir / "specialist-data"
    table = c.read_table(run.output_dir / "candidates" / "candidates.csv")
    kept = [q for q, d in zip(table["sequence"], table["dropped"], strict=True) if not d]
    settings = {"adapted": adapted["student"]["fingerprint"], "samples": len(kept)}
    counts = s.run_stage(
        data, settings, lambda: s.write_distillation_data(data, family.data, kept), run.announce
    )
    run.announce(f"distilling on {counts['natural']:,} members and {counts['sampled']:,} samples")
    return s.distil(
        str(run.output_dir / "adapted"),
        data,
        run.output_dir / "specialist",
        run.specialist,
        run.distillation,
        **options_of(run, family),
    )


def judge_models(
    run: FamilyRun,
    family: Family,
    adapted: Mapping[str, Any],
    specialist: Mapping[str, Any] | None,
    sampled: Mapping[str, Any],
) -> dict[str, Any]:
    """Judge every model on the test members, measure the speed of sampling, and write it all."""
    folder = run.output_dir / "judgement"
    models: dict[str, str] = {s.START: run.model, s.ADAPTED: str(run.output_dir / "adapted")}
    if run.scratch:
        models[s.SCRATCH] = str(run.output_dir / "random")
    if specialist is not None:
        models[s.SPECIALIST] = str(run.output_dir / "specialist")
    prints = {name: model_fingerprint(load_causal_lm(path)) for name, path in models.items()}

    def work() -> dict[str, Any]:
        return {
            "held_out": held_out_figures(run, family, models, folder),
            "models": {
                name: parameters_and_speed(run, path, name, sampled["temperature"])
                for name, path in models.items()
            },
        }

    outcome = s.run_stage(folder, {**identity(family), "models": prints}, work, run.announce)
    profile = {
        "searched": named_profile(run, "the training members"),
        "counted": named_profile(run, "all members, held-out ones included"),
        **read_run(run.output_dir / "profile")["outcome"],
    }
    judgement = {
        **outcome,
        "family": {
            "name": run.family.name,
            "train": len(family.train),
            "validation": len(family.validation),
            "test": len(family.test),
            "notes": family.notes,
        },
        "model": run.model,
        "profile": profile,
        "adaptation": fit_summary(adapted),
        "distillation": fit_summary(specialist) if specialist else None,
        "candidates": dict(sampled),
    }
    write_json(folder / RESULTS_FILE, judgement)
    return judgement


def named_profile(run: FamilyRun, members: str) -> str:
    """Return what a profile was made of, for a reader."""
    return f"the given {run.profile.name}" if run.profile else f"a profile of {members}"


def held_out_figures(
    run: FamilyRun, family: Family, models: Mapping[str, str], folder: Path
) -> dict[str, Any] | None:
    """Return the judgement on the test members; None where there are none."""
    if not family.test:
        return None
    device = choose_device(run.device)
    proteins = [p.residues for p in family.test]
    nll = {n: s.nats_of(path, proteins, device, family.layout) for n, path in models.items()}
    density = read_profiles(run.output_dir / "profile" / DENSITY)[0]
    nll[s.PROFILE], known = profile_nll(density, proteins)
    judged = s.judge(nll, family.test, family.clusters, table=folder / "per_member.parquet")
    return {**judged, "not_recognised_by_profile": int((~known).sum())}


def parameters_and_speed(
    run: FamilyRun, path: str, name: str, temperature: float
) -> dict[str, Any]:
    """Return a model's parameters and, of those that sample the family, their speed."""
    record: dict[str, Any] = {"parameters": s.parameters_of(path)}
    if name in (s.ADAPTED, s.SPECIALIST):
        few = replace(run.candidates, num_candidates=SPEED_SAMPLES, temperature=temperature)
        table = c.read_table(run.output_dir / "candidates" / "candidates.csv")
        longest = max(map(len, table["sequence"]))
        drawn = c.sample_family(path, few, longest, choose_device(run.device), unheard)
        record["proteins_per_second"] = drawn["proteins_per_second"]
    return record


def fit_summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings and the outcome of a training that the page shows."""
    settings = {"optimizer": DEFAULTS.optimizer, **record["settings"]}  # defaults are left out
    return {
        **{name: settings[name] for name in ("learning_rate", "optimizer", "batch_size")},
        **record["early_stopping"],
        "seconds": record["train_seconds"],
    }


def outcome_lines(run: FamilyRun, judgement: Mapping[str, Any]) -> list[str]:
    """Return the main numbers and the files, for the terminal."""
    from src.evaluation.results import with_interval

    lines = []
    held_out = judgement["held_out"]
    if held_out:
        lines.append(f"nats per residue on {held_out['proteins']} held-out members:")
        lines += [
            f"  {name:<20} {with_interval(held_out, f'nats.{name}')}" for name in held_out["nats"]
        ]
        if held_out.get("kept") is not None:
            lines.append(f"the specialist kept {with_interval(held_out, 'kept')} of the gain")
    dropped = judgement["candidates"]["dropped"]
    lines.append(
        f"{dropped[c.KEPT]:,} of {sum(dropped.values()):,} samples are candidates: "
        f"{run.output_dir / 'candidates' / 'candidates.fasta'}"
    )
    return lines
