"""A metric is one entry of the table: every output shows it without another change."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from huggingface_hub import ModelCard

from src.evaluation import metrics
from src.evaluation.metrics import Metric, compute_metrics
from src.evaluation.results import print_table, read_results, write_results
from src.publishing import comparison
from src.publishing.model_card import build_card
from src.publishing.report import build_report
from tests.test_model_card import USAGE, make_record, make_results


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS])
    monkeypatch.setattr("src.evaluation.results.METRICS", metrics.METRICS)
    for user in ("comparison", "model_card"):
        monkeypatch.setattr(f"src.publishing.{user}.METRICS", metrics.METRICS)
    surprise = Metric(
        "{model}_surprise",
        "surprise",
        "bits",
        "lower",
        compute=lambda sums, model: sums[f"nll_{model}"] / sums["tokens"] + 1000,
        column="surprise",
        index="surprise",
    )
    metrics.METRICS.append(surprise)


def test_a_made_up_metric_is_shown_everywhere(table, tmp_path, capsys):
    sums = {name: np.array([float(i + 2)]) for i, name in enumerate(
        ("tokens", "residues", "kl", "reverse_kl", "js", "agree",
         *(f"{key}_{m}" for key in ("nll", "correct", "brier", "entropy") for m in metrics.MODELS))
    )}  # fmt: skip
    values = compute_metrics(sums)
    assert values["student_surprise"] == sums["nll_student"] / 2 + 1000
    results = {**make_results(), "intervals": {"student_surprise": [1003.0, 1009.0]}}
    results |= {name: float(v[0]) for name, v in values.items() if "surprise" in name}
    path = tmp_path / "r.json"
    write_results(path, results)
    assert json.loads(path.read_text())["teacher_surprise"] == results["teacher_surprise"]
    shown, other = "1004 [1003, 1009]", f"{results['teacher_surprise']:.4g}"
    assert results["student_surprise"] == 1004.0
    print_table(read_results(path))
    printed = capsys.readouterr().out
    assert re.search(rf"surprise, bits +{re.escape(shown)} +{other}", printed)
    headings, (row,) = comparison.table(comparison.read_entries([path])[0])
    assert dict(zip(headings, row, strict=True))["surprise"] == shown
    page = build_report(None, path)
    for text in ("surprise, bits", "[1003, 1009]"):
        assert text in page
    assert 'title="lower is better">surprise' in page
    card = build_card("me/x", make_record(), USAGE, "mit", results)
    assert f"| surprise, bits | {shown} | {other} |  |" in card
    index = {r.metric_type: r.metric_value for r in ModelCard(card).data["eval_results"]}
    assert index["surprise"] == 1004.0


def test_values_of_the_wrong_type_are_refused_and_names_are_unique(table, tmp_path):
    with pytest.raises(ValueError, match=r"r.json: teacher_surprise must be a number, got 'x'"):
        write_results(tmp_path / "r.json", {**make_results(), "teacher_surprise": "x"})
    names = [name for metric in metrics.METRICS for name, _ in metric.names()]
    assert len(set(names)) == len(names)
