"""Writes the model card of a student: use, measured quality, training.

Every number comes from the run's record or from a results file, with its interval.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.common.runs import rows_of_step
from src.common.settings import BUNDLED_DATA, BUNDLED_TEACHER, DEFAULT_TEACHER
from src.evaluation.metrics import METRICS
from src.evaluation.results import lookup, metric_rows, summary_lines
from src.trainer.early_stopping import outcome_line

if TYPE_CHECKING:
    from src.publishing.usage import Usage

PROJECT = Path(__file__).resolve().parents[2]
TEMPLATE = Path(__file__).with_name("templates") / "model_card.md.jinja"
EXAMPLE_PROTEIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
"""Ubiquitin (UniProt P0CG48, residues 1 to 76)."""
LICENCES = {DEFAULT_TEACHER: "apache-2.0"}
"""Licences of teachers on the hub, as their cards state them."""
OWN_FOLDERS = {"data", "models", "results"}
"""First parts of names that are folders of the project, not accounts on the hub."""
TAGS = ["protein", "protein-language-model", "biology", "distillation", "knowledge-distillation"]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def hub_id(name: str | None) -> str | None:
    """Return a name if it is a hub id, None if it is a path."""
    if not name or name in (BUNDLED_TEACHER, BUNDLED_DATA) or not HUB_ID.fullmatch(name):
        return None
    if name.split("/")[0] in OWN_FOLDERS or Path(name).exists() or (PROJECT / name).exists():
        return None
    return name


def teacher_licence(name: str | None) -> str | None:
    """Return the licence of a teacher: from the table, or from the card in its directory.

    None where it is not known, or where there was no teacher.
    """
    if name is None:
        return None
    card = Path(name) / "README.md"
    if card.is_file():
        from huggingface_hub import ModelCard

        try:
            return ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
        except ValueError:
            return None
    return LICENCES.get(name)


def chosen_licence(record: Mapping[str, Any], wanted: str | None) -> str:
    """Return the licence that the card states.

    Raises:
        ValueError: none was given, and the teacher's is not known or there was no teacher.
    """
    teacher = record["settings"]["teacher_model"]
    licence = wanted or teacher_licence(teacher)
    if not licence:
        why = "this model had no teacher whose licence it could take"
        if teacher is not None:
            why = f"the licence of {teacher}, from which this student was distilled, is not known"
        raise ValueError(
            f"{why}: pass --license with an identifier of the hub, for example apache-2.0"
        )
    return licence


def build_card(
    repo_id: str,
    record: Mapping[str, Any],
    usage: Usage,
    license: str,
    results: Mapping[str, Any] | None = None,
) -> str:
    """Return the text of a model card: YAML metadata, then Markdown.

    The run's record, and the results, of this very model, are already without private paths; the
    license is spelt as on the hub.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; the filters below keep values in their place
    )
    environment.filters |= {"cell": _cell, "inline": _inline, "braces": lambda s: "{" + s + "}"}
    settings = record["settings"]
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        metadata=build_metadata(repo_id, record, license, results, usage.kind).to_yaml(),
        name=record["name"],
        repo_id=repo_id,
        parameters=record["student"]["parameters"],
        origin=origin_text(record),
        distilled=settings["loss"]["alpha"] < 1,
        compression=record["compression"],
        usage=usage,
        new_tokens=min(100, (usage.n_positions or record["max_length"]) - 2),
        example=EXAMPLE_PROTEIN,
        measured=_measured(results) if results else None,
        validation_loss=lookup(record, "final.eval_loss"),
        data=_data(record),
        max_length=record["max_length"],
        loss_text=loss_text(settings["loss"]),
        training=training_rows(record),
        license=license,
        licence_of_teacher=license == teacher_licence(settings["teacher_model"]),
        commit=lookup(record, "git.commit"),
    )


def build_metadata(
    repo_id: str,
    record: Mapping[str, Any],
    license: str,
    results: Mapping[str, Any] | None = None,
    kind: str = "GPT-2",
) -> Any:
    """Return the card's metadata, a ``huggingface_hub.ModelCardData``."""
    from huggingface_hub import EvalResult, ModelCardData

    dataset = hub_id(record["settings"]["data"])
    source = lookup(results or {}, "run.data.source") or record["settings"]["data"]
    metrics = []
    for metric in METRICS:
        value = lookup(results or {}, metric.key) if metric.index else None
        if value is None:
            continue
        label = metric.title or metric.key.replace("_", " ")
        metrics.append(
            EvalResult(
                task_type="text-generation",
                task_name="Protein sequence generation",
                dataset_type=hub_id(source) or _slug(source),
                dataset_name=source,
                dataset_split=lookup(results or {}, "run.data.split"),
                metric_type=metric.index,
                metric_name=f"{label}, student" if metric.per_model else label,
                metric_value=value,
            )
        )
    return ModelCardData(
        base_model=base_model(record),
        datasets=[dataset] if dataset else None,
        license=license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[*TAGS, "gpt2"] if kind == "GPT-2" else TAGS,
        model_name=repo_id.split("/")[-1] if metrics else None,
        eval_results=metrics or None,
    )


def loss_text(loss: Mapping[str, Any]) -> str:
    """Return the training loss in words."""
    alpha, temperature = loss["alpha"], loss["temperature"]
    if alpha == 1:
        return "Minimised was the cross-entropy of the next token alone; the teacher had no part."
    names = {
        "forward_kl": "KL(teacher ‖ student)",
        "reverse_kl": "KL(student ‖ teacher)",
        "jsd": f"the generalised Jensen-Shannon divergence (β = {loss['divergence_weight']})",
        "skew_kl": f"the skew KL divergence (skew {loss['divergence_weight']})",
    }
    text = (
        f"Minimised was {alpha:g} × the cross-entropy of the next token + {1 - alpha:g} × "
        f"T² × {names[loss['divergence']]} at temperature T = {temperature:g}, "
        "the mean over all tokens."
    )
    if loss["use_uncertainty_weighting"]:
        text += (
            " Positions were weighted by the teacher's entropy "
            f"(`{loss['weighting']}` weights of the project's METHODS)."
        )
    if loss["use_calibration_smoothing"]:
        text += (
            " The teacher's distribution was mixed with the uniform one, by at most "
            f"{loss['smoothing_factor']:g} (`{loss['smoothing']}` smoothing)."
        )
    return text


def training_rows(record: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the settings of a run for a person."""
    settings, train = record["settings"], record["data"]["train"]
    device, stopped = record["device"], record.get("early_stopping")
    commit = lookup(record, "git.commit")
    changes = " with local changes" if lookup(record, "git.dirty") else ""
    rows = [
        ("training proteins", f"{train['proteins']:,} ({train['tokens']:,} tokens)"),
        ("data", settings["data"]),
        ("share of the data", f"{settings['train_size_prop']:g}"),
        ("steps", f"{record['steps']:,}"),
        ("early stopping", stopped and outcome_line(stopped)),
        ("rows of a step", rows_of_step(record)),
        ("initial weights", settings.get("init_from") or "random"),
        ("learning rate", f"{settings['learning_rate']:g}, {settings['lr_schedule']}"),
        ("weight decay", f"{settings['weight_decay']:g}"),
        ("dropout", settings.get("student") and f"{settings['student']['dropout']:g}"),
        ("precision", record["precision"]),
        ("seed", settings["seed"]),
        ("device", device.get("name") or device["type"]),
        ("time", f"{record['train_seconds']:,.0f} s"),
        ("commit", commit and commit + changes),
        ("PyTorch", lookup(record, "versions.torch")),
        ("transformers", lookup(record, "versions.transformers")),
    ]
    return [(name, str(value)) for name, value in rows if value is not None]


def base_model(record: Mapping[str, Any]) -> str | None:
    """Return the hub id of what a model derives from, None where that is not on the hub."""
    settings = record["settings"]
    taught = settings["loss"]["alpha"] < 1
    return hub_id(settings["teacher_model"] if taught else settings.get("init_from"))


def origin_text(record: Mapping[str, Any]) -> str:
    """Return in a sentence or two what a model was made from."""
    settings = record["settings"]
    teacher, start = settings["teacher_model"], settings.get("init_from")
    begun = f"It began with the weights of {_link(start)}." if start else ""
    if settings["loss"]["alpha"] == 1:
        tokenizer = settings.get("tokenizer") or teacher
        return (
            begun or f"It was trained without a teacher, with the tokenizer of {_link(tokenizer)}."
        )
    text = (
        f"It was distilled from {_link(teacher)}, which has {record['teacher']['parameters']:,} "
        f"parameters: {record['compression']:.1f} times as many."
    )
    return f"{text} {begun}".rstrip()


def _link(name: str, kind: str = "") -> str:
    """Return Markdown for something on the hub, or for a local name."""
    if hub_id(name):
        return f"[{name}](https://huggingface.co/{kind}{name})"
    return f"`{_inline(name)}`"


def _data(record: Mapping[str, Any]) -> str:
    proteins = record["data"]["train"]["proteins"]
    return f"{proteins:,} proteins of {_link(record['settings']['data'], 'datasets/')}"


def _measured(results: Mapping[str, Any]) -> dict[str, Any]:
    rows = [[metric.title, *cells] for metric, cells in metric_rows(results)]
    reached = lookup(results, "student_perplexity_per_residue")
    floor = lookup(results, "floors.unigram.perplexity_per_residue")
    source = lookup(results, "run.data.source") or "held-out proteins"
    split = lookup(results, "run.data.split")
    proteins = lookup(results, "data.proteins")
    data = f"`{_inline(source)}`" + (f" ({split})" if split else "")
    return {
        "rows": rows,
        "lines": summary_lines(results),
        "data": (f"{proteins:,} proteins of " if proteins else "") + data,
        "teacher": lookup(results, "run.teacher.name") or "not named",
        "intervals": any((results.get("intervals") or {}).values()),
        "no_better_than_frequencies": None not in (reached, floor) and reached >= floor,
        "calibration_warning": lookup(results, "student_ece.calibration_meaningful") is False,
    }


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "proteins"


def _inline(text: Any) -> str:
    """Return a value in one line, without HTML tags."""
    return " ".join(str(text).split()).replace("<", "&lt;")


def _cell(text: Any) -> str:
    """Return a value for one cell of a Markdown table."""
    return _inline(text).replace("|", "\\|")
