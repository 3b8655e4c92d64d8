"""From a family of proteins to an adapted model and a small specialist: the stages, as functions.

Each stage leaves a directory of its own and is skipped when it is finished. The functions take
paths and settings alone, so that an experiment can call them for many families, starting points
and numbers of members. :mod:`src.experiments.candidates` samples and ranks,
:mod:`src.experiments.family_run` puts the stages in order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from src.common.cli import say
from src.common.files import remove_folder, write_json
from src.common.runs import (
    FINISHED,
    RUN_FILE,
    RUNNING,
    claim_folder,
    provenance,
    read_run,
    write_run,
)
from src.common.settings import LossSettings, StudentSettings, TrainSettings
from src.evaluation.per_protein import write_per_protein
from src.evaluation.results import put_estimate
from src.evaluation.scoring import score_proteins
from src.evaluation.statistics import cluster_bootstrap
from src.models.inspection import (
    explain_loading,
    require_fitting_weights,
    require_model_directory,
)
from src.models.loading import (
    ProteinModel,
    config_of,
    described_parameters,
    gpt2_shape,
    student_config,
)
from src.proteins.fasta import FastaRecord, write_fasta
from src.proteins.sources import Protein, read_proteins
from src.training.stages import train

START, ADAPTED, SCRATCH, SPECIALIST, PROFILE = (
    "unadapted",
    "adapted",
    "from random weights",
    "specialist",
    "profile HMM",
)
"""Names of the judged models."""
SWEEP = (1 / 3, 1.0, 3.0)
"""Learning rates that ``--tune`` tries, as factors of the given one."""


@dataclass(frozen=True)
class FitSettings:
    """How a model is trained on one family. The validation members decide when to stop.

    Attributes:
        learning_rates: one, or several of which the validation loss chooses.
        epochs: passes over the training members, at most.
        least_steps: a small family gets at least so many steps.
        batch_size: members of a step.
        evaluate_each: steps between validations, at least; a large family has one in each epoch.
        patience: validations without improvement after which training stops.
        dropout: probability, of a GPT-2: without it a few dozen members are learnt by heart before
            the model has adapted to their family.
        seed: of weights and order.
    """

    learning_rates: tuple[float, ...] = (1e-3,)
    epochs: int = 20
    least_steps: int = 200
    batch_size: int = 8
    evaluate_each: int = 10
    patience: int = 4
    dropout: float = 0.0
    seed: int = 42

    def train_settings(self, members: int, rate: float, **more: Any) -> TrainSettings:
        """Return the settings of one run on so many training members."""
        epoch = max(1, math.ceil(members / self.batch_size))
        return TrainSettings(
            train_size_prop=1.0,
            learning_rate=rate,
            batch_size=self.batch_size,
            max_steps=max(self.least_steps, self.epochs * epoch),
            eval_steps=max(self.evaluate_each, epoch),
            early_stopping=self.patience,
            seed=self.seed,
            **more,
        )


ADAPTATION = FitSettings(learning_rates=(1.5e-3,), dropout=0.1)
LORA = FitSettings(learning_rates=(3e-3,))
"""Of low-rank additions, which begin at 0 and need larger steps than weights do."""
FROM_RANDOM = FitSettings(learning_rates=(3e-3,))
DISTILLATION = FitSettings(learning_rates=(4e-3,), epochs=5, least_steps=300, evaluate_each=30)
"""All but LoRA's rates are those of models as small as the bundled teacher (:func:`suited`)."""
RATES = ((3.3e6, 1.5e-3), (774e6, 5e-5))
"""Parameters of two models, and the learning rate with which all weights of each are adapted."""


def suited(fit: FitSettings, parameters: int) -> FitSettings:
    """Return settings whose learning rates suit a model of so many parameters.

    They fall with its size by the power law through ``RATES``, and are as given up to the first of
    the two sizes. There 1.5e-3 was best of three rates, a factor 3 apart, for adaptation, on the
    validation members of three families (results/specialists). At 774 million it is 5e-5, which is
    usual for GPT-2 large and was not measured here; nor was the law for other trainings.
    """
    (small, high), (large, low) = RATES
    slope = math.log(low / high) / math.log(large / small)
    factor = min(1.0, (parameters / small) ** slope)
    rates = tuple(float(f"{rate * factor:.2g}") for rate in fit.learning_rates)
    return replace(fit, learning_rates=rates)


def parameters_of(model: str | Path, student: StudentSettings | None = None) -> int:
    """Return the parameters of a model in a directory or on the hub, or of a student of it.

    Raises:
        ValueError: the model is missing or broken.
    """
    if require_model_directory(model):
        require_fitting_weights(Path(model))
    with explain_loading("model", model):
        config = config_of(model)
        return described_parameters(student_config(student, config) if student else config)


def run_stage(
    folder: Path,
    settings: Mapping[str, Any],
    work: Callable[[], dict[str, Any]],
    announce: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Do a stage's work unless its directory says that it is done; return its outcome.

    Raises:
        ValueError: the directory holds the stage with other settings.
    """
    if claim_folder(folder, settings, resume=True) == "finished":
        announce(f"{folder}: finished before")
        return read_run(folder)["outcome"]
    folder.mkdir(parents=True, exist_ok=True)
    record = {"name": folder.name, "status": RUNNING, "settings": dict(settings), **provenance()}
    write_run(folder, record)
    outcome = work()
    write_run(folder, {**record, "status": FINISHED, "outcome": outcome})
    return outcome


def part_of(data: str | Path, part: str) -> list[Protein]:
    """Return the proteins of one part of a directory."""
    return list(read_proteins(data, split=part))


def fit_best(
    folder: Path,
    settings: FitSettings,
    members: int,
    announce: Callable[[str], None],
    options: Mapping[str, Any],
    **more: Any,
) -> dict[str, Any]:
    """Train with each learning rate, and keep the run of the lowest validation loss in ``folder``.

    The runs lie beside it until it is chosen: a record names its data from where it lies.
    ``NAME-rates.json`` has the validation loss of each rate.

    Returns:
        The record of the run that is kept.
    """

    def fit(rate: float, place: Path) -> dict[str, Any]:
        wanted = settings.train_settings(members, rate, **more)
        return train(
            wanted, place, resume=True, skip_teacher_check=True, announce=announce, **options
        )

    rates = settings.learning_rates
    if len(rates) == 1:
        return fit(rates[0], folder)
    if (folder / RUN_FILE).is_file():  # chosen before
        done = float(read_run(folder)["settings"]["learning_rate"])
        return fit(done if done in rates else rates[0], folder)
    places = {rate: folder.with_name(f"{folder.name}-{rate:.1e}") for rate in rates}
    losses = {}
    for rate, place in places.items():
        announce(f"{folder.name}: learning rate {rate:g}")
        losses[rate] = final_loss(fit(rate, place))
    best = min(losses, key=lambda rate: losses[rate])
    sweep = {f"{rate:g}": loss for rate, loss in losses.items()}
    write_json(folder.with_name(f"{folder.name}-rates.json"), sweep)
    announce(f"{folder.name}: learning rate {best:g} has the lowest validation loss of {sweep}")
    places.pop(best).rename(folder)
    for place in places.values():
        remove_folder(place)
    return fit(best, folder)


def final_loss(record: Mapping[str, Any]) -> float:
    """Return the validation loss of the weights that a run kept."""
    return float(record["early_stopping"]["best_eval_loss"])


def adapt(
    model: str,
    data: str | Path,
    folder: Path,
    settings: FitSettings = ADAPTATION,
    *,
    random_weights: bool = False,
    lora_rank: int | None = None,
    layout: str | None = None,
    max_length: int = 512,
    announce: Callable[[str], None] = say,
    **options: Any,
) -> dict[str, Any]:
    """Train a model on a family's members with plain cross-entropy.

    Args:
        model: to start from: directory or hub id.
        data: directory with the parts ``train`` and ``validation``.
        folder: the run's directory.
        settings: of the training.
        random_weights: take the model's tokenizer and shape, and not its weights.
        lora_rank: train additions of this rank (:mod:`src.models.lora`); None: all weights.
        layout: of proteins; None: the model's.
        max_length: tokens; longer members are cut.
        announce: called with each line for a person.
        **options: of :class:`src.training.stages.RunOptions`.

    Returns:
        The record of the run.
    """
    start: dict[str, Any] = {"teacher_model": model, "init_from": model}
    if random_weights:
        start = {"teacher_model": None, "tokenizer": model}
    student = gpt2_shape(model)
    return fit_best(
        folder,
        settings,
        len(part_of(data, "train")),
        announce,
        options,
        student=student and replace(student, dropout=settings.dropout),
        loss=LossSettings(alpha=1.0),
        data=str(data),
        max_length=max_length,
        lora_rank=lora_rank,
        layout=layout,
        **start,
    )


def distil(
    teacher: str,
    data: str | Path,
    folder: Path,
    shape: StudentSettings,
    settings: FitSettings = DISTILLATION,
    *,
    max_length: int = 512,
    layout: str | None = None,
    announce: Callable[[str], None] = say,
    **options: Any,
) -> dict[str, Any]:
    """Distil a GPT-2 from an adapted teacher, at T = 1 without the hard loss.

    It is cut from the teacher, or starts from random weights where that is no GPT-2. Arguments,
    record and errors are those of :func:`adapt`; ``data`` holds natural members and samples of
    the teacher (:func:`write_distillation_data`).
    """
    return fit_best(
        folder,
        settings,
        len(part_of(data, "train")),
        announce,
        options,
        student=shape,
        loss=LossSettings(temperature=1.0, alpha=0.0),
        data=str(data),
        max_length=max_length,
        layout=layout,
        teacher_model=teacher,
        init_from=teacher if gpt2_shape(teacher) else None,
    )


def write_distillation_data(
    folder: Path, natural: str | Path, samples: Sequence[str]
) -> dict[str, Any]:
    """Write a data directory: natural training members and samples, natural validation members."""
    train_part = [FastaRecord(p.name, p.residues) for p in part_of(natural, "train")]
    counts = {"natural": len(train_part), "sampled": len(samples)}
    train_part += [FastaRecord(f"sample_{i}", s) for i, s in enumerate(samples, start=1)]
    write_fasta(folder / "train.fasta", train_part)
    validation = [FastaRecord(p.name, p.residues) for p in part_of(natural, "validation")]
    write_fasta(folder / "validation.fasta", validation)
    return counts


def nats_of(
    model: str | Path, proteins: Sequence[str], device: Any = "cpu", layout: str | None = None
) -> np.ndarray:
    """Return -log p of each protein under a model in nats, ``(P,)``; NaN where it does not fit."""
    return score_proteins(*ProteinModel.load(model, device, layout), proteins).nll


def compare_models(
    nll: Mapping[str, np.ndarray],
    proteins: Sequence[Protein],
    clusters: Sequence[str],
    *,
    bootstrap: int = 2000,
    table: Path | None = None,
) -> dict[str, Any]:
    """Compare models on held-out members.

    Args:
        nll: of each protein by name of the model, ``(P,)`` in nats, with :data:`START` among them;
            NaN: it does not fit that model, and no model is judged on it.
        proteins: the held-out members.
        clusters: ``(P,)``, resampled for the intervals.
        bootstrap: replicates.
        table: parquet file for the values of single proteins.

    Returns:
        ``nats.MODEL``, nats per residue with line breaks and end; ``gain.MODEL``, those of the
        unadapted model less the model's; ``kept``, the specialist's gain over the adapted
        model's; ``intervals`` by dotted name; counts.

    Raises:
        ValueError: no protein fits all models.
    """
    fits = np.asarray(np.isfinite(np.stack(list(nll.values()))).all(0))
    if not fits.any():
        raise ValueError("no held-out member fits all models")
    arrays = {name: values[fits] for name, values in nll.items()}
    arrays["residues"] = np.array([len(p.residues) for p in proteins])[fits]
    places = np.flatnonzero(fits).tolist()
    labels = [clusters[i] for i in places]

    def statistic(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        values = {f"nats.{name}": sums[name] / sums["residues"] for name in nll}
        for name in nll:
            if name != START:
                values[f"gain.{name}"] = values[f"nats.{START}"] - values[f"nats.{name}"]
        if {ADAPTED, SPECIALIST} <= set(nll):
            with np.errstate(divide="ignore", invalid="ignore"):
                values["kept"] = values[f"gain.{SPECIALIST}"] / values[f"gain.{ADAPTED}"]
        return values

    record: dict[str, Any] = {
        "proteins": int(fits.sum()),
        "not_fitting": int((~fits).sum()),
        "residues": int(arrays["residues"].sum()),
        "clusters": len(set(labels)),
        "intervals": {},
    }
    for name, estimate in cluster_bootstrap(statistic, arrays, labels, bootstrap).items():
        put_estimate(record, name, estimate)
    if table is not None:
        names = [proteins[i].name for i in places]
        columns = {f"nll {name}": arrays[name] for name in nll}
        write_per_protein(
            table, {"protein": names, "cluster": labels, "residues": arrays["residues"], **columns}
        )
    return record


def tuned(settings: FitSettings) -> FitSettings:
    """Return settings that sweep the learning rate around their own."""
    rate = settings.learning_rates[0]
    return replace(settings, learning_rates=tuple(float(f"{rate * f:.2g}") for f in SWEEP))


def recorded(settings: Any) -> dict[str, Any]:
    """Return a dataclass as JSON values, for the record of a stage."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()}
