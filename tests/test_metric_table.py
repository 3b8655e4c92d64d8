"""A metric is one entry of the table: every output shows it without another change."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from src.evaluation import metrics
from src.evaluation.metrics import Metric, compute_metrics
from src.evaluation.results import print_table, read_results, write_results
from src.evaluation.token_statistics import token_statistics
from src.publishing import comparison
from src.publishing.model_card import build_card
from src.publishing.report import build_report
from tests.test_model_card import USAGE, make_record, make_results


@pytest.fixture
def table(monkeypatch):
    monkeypatch.setattr(metrics, "METRICS", [*metrics.METRICS])
    for user in ("results", "token_statistics"):
        monkeypatch.setattr(f"src.evaluation.{user}.METRICS", metrics.METRICS)
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
    difference = Metric(
        "top_difference",
        "difference of the first choices",
        per_token=lambda log_probs, targets, model: (
            log_probs["student"].max(-1).values - log_probs["teacher"].max(-1).values
        ),
        column="difference",
        index="difference",
    )
    metrics.METRICS.extend([surprise, difference])
    return SimpleNamespace(surprise=surprise, difference=difference)


def test_a_made_up_metric_is_shown_everywhere(table, tmp_path, capsys):
    sums = {name: np.array([float(i + 2)]) for i, name in enumerate(
        ("tokens", "residues", "kl", "reverse_kl", "js", "agree", "top_difference",
         *(f"{key}_{m}" for key in ("nll", "correct", "brier", "entropy") for m in metrics.MODELS))
    )}  # fmt: skip
    values = compute_metrics(sums)
    assert values["student_surprise"] == sums["nll_student"] / 2 + 1000
    assert values["top_difference"] == 4.0  # the mean over tokens
    results = {**make_results(), "intervals": {"student_surprise": [1003.0, 1009.0]}}
    results |= {name: float(v[0]) for name, v in values.items() if "surprise" in name}
    results["top_difference"] = 4.0
    path = tmp_path / "r.json"
    write_results(path, results)
    assert json.loads(path.read_text())["teacher_surprise"] == results["teacher_surprise"]
    shown, other = "1004 [1003, 1009]", f"{results['teacher_surprise']:.4g}"
    assert results["student_surprise"] == 1004.5
    shown = shown.replace("1004", f"{1004.5:.4g}")
    print_table(read_results(path))
    printed = capsys.readouterr().out
    assert re.search(rf"surprise, bits +{re.escape(shown)} +{other}", printed)
    assert "difference of the first choices: 4.000" in printed
    headings, (row,) = comparison.table(comparison.read_entries([path])[0])
    assert dict(zip(headings, row, strict=True))["surprise"] == shown
    assert dict(zip(headings, row, strict=True))["difference"] == "4.000"
    page = build_report(None, path)
    for text in ("surprise, bits", "[1003, 1009]", "difference of the first choices", "4.000"):
        assert text in page
    assert 'title="lower is better">surprise' in page
    card = build_card("me/x", make_record(), USAGE, "mit", results)
    assert f"| surprise, bits | {shown} | {other} |  |" in card
    assert "- difference of the first choices: 4.000" in card
    index = {r.metric_type: r.metric_value for r in ModelCard(card).data["eval_results"]}
    assert index["surprise"] == 1004.5
    assert index["difference"] == 4.0


def test_a_metric_may_bring_its_own_statistic_of_each_token(table):
    student, teacher = torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(0))
    values = token_statistics(student, teacher, torch.zeros(7, dtype=torch.long))
    expected = student.softmax(-1).max(-1).values.log() - teacher.softmax(-1).max(-1).values.log()
    torch.testing.assert_close(values["top_difference"], expected)


def test_values_of_the_wrong_type_are_refused_and_names_are_unique(table, tmp_path):
    with pytest.raises(ValueError, match=r"r.json: teacher_surprise must be a number, got 'x'"):
        write_results(tmp_path / "r.json", {**make_results(), "teacher_surprise": "x"})
    names = [name for metric in metrics.METRICS for name, _ in metric.names()]
    assert len(set(names)) == len(names)
