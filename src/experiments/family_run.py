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
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from src.common.cli import duration, quiet_libraries, unheard
from src.common.devices import choose_device
from src.common.files import remove_folder, sha256_file, write_json, write_text
from src.common.runs import RUN_FILE, locked, read_run
from src.common.settings import DEFAULTS
from src.evaluation.scoring import score_proteins
from src.experiments import candidates as c
from src.experiments import specialist as s
from src.experiments.family_inputs import Family, FamilyRun, identity, prepare
from src.models.loading import ProteinModel, load_causal_lm, model_fingerprint
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
from src.publishing.family_page import build_page

TRAINING, FAMILY, DENSITY = "training.hmm", "family.hmm", "density.hmm"
SPEED_SAMPLES = 64
"""Proteins that a model samples to measure its speed."""
RESULTS_FILE = "judgement.json"


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

    wanted = {**identity(family), "models": prints}
    if (folder / RUN_FILE).is_file() and read_run(folder)["settings"].get("models") != prints:
        run.announce("judging again: the models are others than before")
        remove_folder(folder)
    outcome = s.run_stage(folder, wanted, work, run.announce)
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
    judged = s.compare_models(
        nll, family.test, family.clusters, table=folder / "per_member.parquet"
    )
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
