"""Writes a report on one run as a single, self-contained HTML page."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from src.common.cli import duration, size
from src.common.privacy import publishable
from src.common.runs import FINISHED, RUN_FILE, read_run
from src.evaluation.metrics import MODELS
from src.evaluation.results import (
    SAMPLING,
    cautions,
    floor_cells,
    generation_rows,
    lookup,
    metric_rows,
    pair_rows,
    read_results,
    with_interval,
)
from src.evaluation.schema import NonNegative, Number, Object, Positive, check_record, record_type
from src.proteins.layouts import lines_of
from src.publishing import plots
from src.publishing.pages import Cell, Drawing, make_drawing, render, short_name, split_cell
from src.trainer.callbacks import read_metrics
from src.trainer.early_stopping import outcome_line

EXAMPLES = 3
PARTS = ("train", "validation")

MADE_BY = {"command": list[str], "git.commit": str, "versions": Object}
"""Types of what is shown of a record's command, commit and versions. May be missing or null."""
TRAINED = {
    "name": str,
    "train_seconds": NonNegative,
    "peak_memory_bytes": NonNegative,
    "steps": NonNegative,
    "processes": Positive,
    **{f"{model}.parameters": Positive for model in MODELS},
    **{f"settings.student.{name}": Positive for name in ("n_layer", "n_head", "n_embd")},
    **{f"settings.loss.{name}": Number for name in ("temperature", "alpha")},
    "settings.learning_rate": Number,
    "settings.lr_schedule": str,
    "settings.batch_size": Positive,
    "settings.gradient_accumulation_steps": Positive,
    "settings.batching": str,
    **{f"data.{part}.{count}": NonNegative for part in PARTS for count in ("proteins", "residues")},
    **{f"early_stopping.{step}": NonNegative for step in ("best_step", "last_step")},
    "early_stopping.reason": str,
    **MADE_BY,
}
"""Types of what is shown of a run. May be missing or null."""


def build_report(
    run_dir: Path | None = None, results_path: Path | None = None, fasta: Path | None = None
) -> str:
    """Return the HTML page on a run, its results, or both; styles and figures are in it.

    Of the generated proteins in ``fasta``, or else in the results, the first are shown.

    Raises:
        ValueError: nothing to report on, a file is missing or broken, or the results are those of
            another model than the run's.
    """
    if run_dir is None and results_path is None:
        raise ValueError("nothing to report on: pass --run, --results or both")
    run = _run(run_dir) if run_dir else {}
    results = read_results(results_path) if results_path else {}
    if results_path:
        check_record(results["run"], record_type(MADE_BY), f"{results_path}: run")
    _check_same_model(run, results, run_dir, results_path)
    records = read_metrics(run_dir) if run_dir else []
    sets, rows = generation_rows(results)
    name = run.get("name") or short_name(lookup(results, "run.student.name") or results_path)
    content = {
        "name": name,
        "summary": _summary(run, results),
        "status": _status(run),
        "headlines": _headlines(results),
        "warnings": _warnings(run, results),
        "training": _training(run),
        "curves": _curves(records),
        "metrics": [
            (m.title, m.better, [split_cell(cell) for cell in cells])
            for m, cells in metric_rows(results)
        ],
        "divergences": [(m.title, m.better, split_cell(cell)) for m, cell in pair_rows(results)],
        "floors": floor_cells(results),
        "evaluated": _evaluated(results),
        "reliability": _reliability(results),
        "composition": _composition(results),
        "generated_sets": [(s, lookup(results, f"generation.{s}.sequences")) for s in sets],
        "generated": [(label, [split_cell(cell) for cell in cells]) for label, *cells in rows],
        "sampling": _sampling(results),
        "examples": _examples(results, fasta),
        "costs": _costs(run, results, run_dir, records),
        "location": short_name(run_dir or lookup(results, "run.student.name")),
        "provenance": _provenance(run, results),
        "measured": bool(results),
    }
    return render("report.html.jinja", content)


def _run(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ValueError(f"--run {folder}: there is no such directory")
    if not (folder / RUN_FILE).is_file():
        raise ValueError(f"--run {folder}: no run of scripts/train.py ({RUN_FILE} is missing)")
    run = read_run(folder)
    check_record(run, record_type(TRAINED), folder / RUN_FILE)
    return run


def _check_same_model(
    run: Mapping[str, Any], results: Mapping[str, Any], run_dir: Any, results_path: Any
) -> None:
    """Raise ``ValueError`` where the results are of another model than the run's."""
    own, measured = lookup(run, "student.fingerprint"), lookup(results, "run.student.fingerprint")
    if own and measured and own != measured:
        raise ValueError(
            f"--results {results_path} measured another model than the one in --run {run_dir} "
            "(their fingerprints differ): evaluate that run, or name its own results"
        )


def command_line(words: Sequence[str]) -> str:
    """Return a command as it was typed, but for what may not be published of it."""
    return " ".join(f"'{w}'" if " " in w else w for w in publishable(words))


def _summary(run: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return one or two sentences on what this model is."""
    shape = [lookup(run, f"settings.student.{name}") for name in ("n_layer", "n_head", "n_embd")]
    parameters = lookup(run, "student.parameters") or results.get("student_parameters")
    theirs = lookup(run, "teacher.parameters") or results.get("teacher_parameters")
    teacher = short_name(lookup(run, "teacher.name") or lookup(results, "run.teacher.name"))
    what = "A protein language model"
    if None not in shape:
        what = f"A GPT-2 of {shape[0]} blocks, {shape[1]} heads and width {shape[2]}"
    sentence = f"{what}, {parameters:,} parameters" if parameters else what
    begun = short_name(lookup(run, "settings.init_from"))
    if lookup(run, "settings.loss.alpha") == 1:
        sentence += f", {begun} trained further" if begun else ", trained without a teacher"
    elif teacher:
        sentence += f", distilled from {teacher}"
        if parameters and theirs:
            sentence += f" ({theirs:,} parameters, {theirs / parameters:.1f} times as many)"
    proteins, residues = (lookup(run, f"data.train.{n}") for n in ("proteins", "residues"))
    if proteins:
        source = short_name(lookup(run, "data.source"))
        sentence += f" on {proteins:,} proteins" + (f" of {source}" if source else "")
        sentence += f" ({residues:,} residues)" if residues else ""
    return sentence + "."


def _status(run: Mapping[str, Any]) -> str:
    if not run:
        return ""
    if run.get("status") != FINISHED:
        return "This run is not finished: what follows is where it stands."
    seconds = run.get("train_seconds")
    spent = f" after {duration(seconds)} of training" if seconds else ""
    return f"Finished {_date(run.get('finished'))}{spent}."


def _date(stamp: Any) -> str:
    """Return the day and minute of a time stamp."""
    return str(stamp or "")[:16].replace("T", " ")


def _cell(results: Mapping[str, Any], name: str) -> Cell:
    return split_cell(with_interval(results, name))


def _headlines(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the main metrics: label, cell, and a note on how to read the value."""
    ratio_note = "1 is the teacher"
    bound = lookup(results, "threshold.perplexity_ratio_below")
    if bound:
        verdict = "passed" if lookup(results, "threshold.passed") else "not passed"
        ratio_note += f"; below {bound:.2f} for this size: {verdict}"
    teacher = with_interval(results, "teacher_ece.ece")
    rows = [
        ("perplexity, student / teacher", _cell(results, "perplexity_ratio"), ratio_note),
        ("KL(teacher‖student)", _cell(results, "kl_divergence"),
         "nats per token; 0 is the teacher"),
        ("calibration error (ECE)", _cell(results, "student_ece.ece"),
         f"teacher {teacher}" if teacher else ""),
    ]  # fmt: skip
    compression = results.get("compression_ratio")
    if compression:
        share = results.get("share_of_teacher") or 1 / compression
        note = f"{share:.1%} of the teacher's parameters"
        rows.append(("smaller than the teacher", Cell(f"{compression:.1f} ×"), note))
    return [
        {"label": label, "cell": cell, "note": note} for label, cell, note in rows if cell.value
    ]


def _warnings(run: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """Return warnings about the results: the teacher's check, no intervals, changed code."""
    warnings = []
    if results and not results.get("gates"):
        warnings.append(
            "The teacher was not checked on natural and shuffled proteins before it was measured."
        )
    elif results and not lookup(results, "gates.passed"):
        summary = lookup(results, "gates.summary") or "the teacher was checked, and did not pass"
        warnings.append(f"{summary[0].upper()}{summary[1:]}.")
    warnings += [f"{line[0].upper()}{line[1:]}." for line in cautions(results)]
    if results and not any((results.get("intervals") or {}).values()):
        warnings.append("These results have no intervals: differences may be chance.")
    dirty = [
        what for what, r in (("training", run), ("evaluation", results.get("run"))) if _dirty(r)
    ]
    if dirty:
        warnings.append(
            f"The code of {' and '.join(dirty)} differed from the commit named under provenance."
        )
    return warnings


def _dirty(record: Any) -> bool:
    return bool(lookup(record or {}, "git.dirty"))


def _training(run: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values of the training's models, data and settings."""
    if not run:
        return []
    settings: dict[str, Any] = run["settings"]
    loss = settings.get("loss") or {}
    rows = [
        ("teacher", short_name(lookup(run, "teacher.name") or settings.get("teacher_model"))),
        ("begun from", short_name(settings.get("init_from"))),
        ("data", short_name(lookup(run, "data.source") or settings.get("data"))),
    ]
    for part in PARTS:
        counts = _counts(run, f"data.{part}", {"proteins": "proteins", "residues": "residues"})
        rows.append(("training" if part == "train" else part, ", ".join(counts)))
    if loss:
        enhancements = [
            f"{name} ({loss[kind]})" if loss.get(kind) else name
            for flag, name, kind in (
                ("use_uncertainty_weighting", "uncertainty weighting", "weighting"),
                ("use_calibration_smoothing", "calibration smoothing", "smoothing"),
            )
            if loss.get(flag)
        ]
        if loss.get("alpha") == 1:
            rows.append(("loss", "cross-entropy with the proteins (α = 1)"))
        else:
            named = (("T", loss.get("temperature")), ("α", loss.get("alpha")))
            what = [f"{name} = {value:g}" for name, value in named if value is not None]
            rows.append(("loss", _joined(*what, loss.get("divergence"))))
            rows.append(("enhancements", ", ".join(enhancements) or "none"))
    if settings.get("learning_rate"):
        rate = f"{settings['learning_rate']:g}"
        rows.append(("learning rate", _joined(rate, settings.get("lr_schedule"))))
    if run.get("steps"):
        batch = settings.get("batch_size") or 1
        batch *= (settings.get("gradient_accumulation_steps") or 1) * (run.get("processes") or 1)
        made = f"{run['steps']:,} of {batch:,} rows"
        rows.append(("steps", _joined(made, settings.get("batching"))))
    stopped = run.get("early_stopping") or {}
    if None not in map(stopped.get, ("best_step", "last_step", "reason")):
        rows.append(("early stopping", outcome_line(stopped)))
    longest, seed = run.get("max_length"), settings.get("seed")
    rows.append(("longest input", "" if longest is None else f"{longest} tokens"))
    rows.append(("precision", str(run.get("precision") or "")))
    rows.append(("seed", "" if seed is None else str(seed)))
    return [(label, text) for label, text in rows if text]


def _joined(*parts: Any) -> str:
    """Return the parts that are not empty, with commas between them."""
    return ", ".join(str(part) for part in parts if part)


def _counts(record: Mapping[str, Any], place: str, units: Mapping[str, str]) -> list[str]:
    """Return the counts below a dotted name of a record, each with its unit."""
    counts = ((lookup(record, f"{place}.{name}"), unit) for name, unit in units.items())
    return [f"{count:,} {unit}" for count, unit in counts if count is not None]


def _curves(records: Sequence[Mapping[str, Any]]) -> list[Drawing]:
    wanted = (
        ("hard_loss", "cross-entropy, nats per token", "Cross-entropy with the proteins."),
        ("soft_loss", "divergence from the teacher", "Divergence from the teacher's softened "
         "distribution, before the factor T²."),
    )  # fmt: skip
    drawings = []
    for key, label, caption in wanted:
        # Without a soft loss (α = 1) its records are zeros; where a run diverged, not finite.
        values = [record.get(name) or 0 for record in records for name in (key, f"eval_{key}")]
        if any(value and math.isfinite(value) for value in values):
            draw = functools.partial(plots.learning_curves, {"student": records}, key, label)
            drawings.append(make_drawing(draw, f"curve-{key}", caption))
    return drawings


def _evaluated(results: Mapping[str, Any]) -> str:
    """Return a sentence on the proteins that were evaluated."""
    if not lookup(results, "data.proteins"):
        return ""
    source = short_name(lookup(results, "run.data.source"))
    split = lookup(results, "run.data.split")
    where = f" of {source}" + (f" ({split})" if split else "") if source else ""
    kind = lookup(results, "data.cluster_kind") or "clusters"
    proteins = {"proteins": f"held-out proteins{where}"}
    over = kind if kind == "proteins" else f"{kind} of related proteins"
    if kind != "proteins":
        proteins["clusters"] = kind
    others = {"residues": "residues", "tokens": "predicted tokens"}
    counts = " in ".join(_counts(results, "data", proteins))
    return (
        f"{_joined(counts, *_counts(results, 'data', others))}. Intervals: 95 %, "
        f"from a bootstrap over {over}."
    )


def _reliability(results: Mapping[str, Any]) -> list[Drawing]:
    drawings = []
    for model in MODELS:
        record = results.get(f"{model}_ece") or {}
        if lookup(record, "reliability"):
            draw = functools.partial(plots.reliability_diagram, model, record)
            caption = f"Accuracy of the {model}'s first choice against its confidence."
            drawings.append(make_drawing(draw, f"reliability-{model}", caption))
    return drawings


def _composition(results: Mapping[str, Any]) -> Drawing | None:
    sets = {m: lookup(results, f"generation.{m}.composition") for m in MODELS}
    sets["natural"] = lookup(results, "generation.reference.composition")
    shown = {name: shares for name, shares in sets.items() if shares}
    if not any(model in shown for model in MODELS):
        return None
    return make_drawing(
        lambda: plots.composition_bars(shown),
        "composition",
        "Amino-acid composition of generated proteins; lines: the held-out proteins.",
    )


def _sampling(results: Mapping[str, Any]) -> str:
    """Return a sentence on how the described proteins were sampled."""
    sampling = lookup(results, "generation.student.sampling")
    if not sampling:
        return ""
    shown = [
        f"{name.replace('_', ' ')} {sampling[name]:g}"
        for name in SAMPLING
        if sampling.get(name) is not None
    ]
    seed = sampling.get("seed")
    text = f"Sampled with {_joined(*shown, None if seed is None else f'seed {seed}')}"
    counts = lookup(results, "generation.student.counts") or {}
    if counts.get("attempts"):
        text += f"; the student began {counts['attempts']:,}"
        if counts.get("kept") is not None:
            text += f" and ended {counts['kept']:,}"
    return f"{text}."


def _examples(results: Mapping[str, Any], fasta: Path | None) -> list[tuple[str, list[str]]]:
    """Return name and lines of a few generated proteins."""
    if fasta:
        from src.proteins.sources import read_proteins

        proteins = [(p.name, p.residues) for p in islice(read_proteins(fasta), EXAMPLES)]
    else:
        given = lookup(results, "generation.student.examples") or []
        proteins = [(f"sample {i}", r) for i, r in enumerate(given[:EXAMPLES], start=1)]
    return [
        (f"{name} · {len(residues):,} residues", lines_of(residues)) for name, residues in proteins
    ]


def _costs(
    run: Mapping[str, Any],
    results: Mapping[str, Any],
    run_dir: Path | None,
    records: Sequence[Mapping[str, Any]],
) -> list[tuple[str, str]]:
    """Return sizes and speeds, label by label."""
    rows: list[tuple[str, str]] = []
    for model in MODELS:
        count = lookup(run, f"{model}.parameters") or results.get(f"{model}_parameters")
        if count:
            rows.append((f"parameters, {model}", f"{count:,}"))
    weights = sorted(run_dir.glob("*.safetensors")) if run_dir else []
    if weights:
        rows.append(("weights on disk", size(sum(path.stat().st_size for path in weights))))
    if run.get("train_seconds"):
        where = lookup(run, "device.name") or lookup(run, "device.type") or ""
        rows.append(("training", f"{duration(run['train_seconds'])} on {where}"))
    speeds = sorted(r["tokens_per_second"] for r in records if r.get("tokens_per_second"))
    if speeds:
        rows.append(("training speed, median", f"{speeds[len(speeds) // 2]:,.0f} tokens/s"))
    if run.get("peak_memory_bytes"):
        rows.append(("peak memory, training", size(run["peak_memory_bytes"])))
    where = lookup(results, "performance.device") or ""
    for model in MODELS:
        rate = lookup(results, f"generation.{model}.sequences_per_second")
        if rate:
            rows.append((f"sampling, {model}", f"{rate:.3g} proteins/s on {where}"))
    return rows


def _provenance(run: Mapping[str, Any], results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return commit, command, device, fingerprints and versions of training and evaluation."""
    records = []
    for title, record in (("training", run), ("evaluation", results.get("run") or {})):
        if not record:
            continue
        commit, device = lookup(record, "git.commit"), record.get("device")
        if isinstance(device, Mapping):
            device = device.get("name") or device.get("type")
        versions = record.get("versions") or {}
        rows = [
            ("commit", commit and commit + (" and changes" if _dirty(record) else "")),
            ("command", command_line(record.get("command") or [])),
            ("started", _date(record.get("started"))),
            ("device", device),
            ("seed", record.get("seed", lookup(record, "settings.seed"))),
            *((f"{m} fingerprint", lookup(record, f"{m}.fingerprint")) for m in MODELS),
            *((f"{p} data", lookup(record, f"data.{p}.fingerprint")) for p in PARTS),
            ("evaluated data", lookup(record, "data.fingerprint")),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
        shown = [(label, str(text)) for label, text in rows if text not in (None, "")]
        records.append({"title": title, "rows": shown})
    return records
