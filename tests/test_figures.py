"""Figures and tables are made from the results that are committed, and say what those say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from scripts import figures as script
from src.experiments import figures
from src.experiments.cells import PROTEINS
from tests.spoiling import refusals

ROOT = Path(__file__).resolve().parents[1]
CLAIM = ROOT / "results" / "claim"
ANALYSED = sorted(path.parent for path in CLAIM.glob("*/analysis.json"))


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("figures")
    return folder, figures.make_all(CLAIM, folder)


def test_every_figure_of_the_claim_is_made(made):
    folder, found = made
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {
        "effects", "learning_curves",
        *(
            f"calibration_{path.name}_{'s11' if path.name.endswith('-s11') else 's27'}"
            for path in ANALYSED
        ),
    }  # fmt: skip
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert (folder / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    assert not found["missing"]


def test_the_committed_tables_are_up_to_date(made):
    folder, _ = made
    text = (folder / "tables.md").read_text(encoding="utf-8")
    assert (CLAIM / "figures" / "tables.md").read_text(encoding="utf-8") == text
    assert (folder / "tables.tex").read_text().count(r"\begin{tabular}") == text.count("## ")


@pytest.mark.parametrize("folder", ANALYSED, ids=lambda path: path.name)
def test_the_analysis_is_that_of_the_tables_of_single_proteins(folder):
    """Means of arms and the interaction, computed here from the rows alone."""
    analysis = json.loads((folder / "analysis.json").read_text())["sizes"]
    grid = "synergy-random" if folder.name.startswith("random") else "synergy"
    for size, record in analysis.items():
        y: dict[str, list[float]] = {}
        for seed in record["seeds"]:
            own = [("grid", "=", grid), ("size", "=", size), ("seed", "=", seed)]
            frame = pq.read_table(folder / PROTEINS, filters=own).to_pandas()
            assert set(frame["split"]) == {"test"}
            for arm, rows in frame.groupby("arm"):
                total = float(rows["nll_student"].astype(np.float64).sum() / rows["residues"].sum())
                y.setdefault(str(arm), []).append(total)
        assert len(record["seeds"]) >= 5
        assert set(y) == set(record["arms"])
        for arm, values in y.items():
            assert record["arms"][arm]["estimate"] == pytest.approx(np.mean(values), abs=1e-6)
        mean = {arm: float(np.mean(values)) for arm, values in y.items()}
        found = record["designs"]["published"]["contrasts"]["I"]["estimate"]
        expected = mean["both"] - mean["uncertainty"] - mean["calibration"] + mean["baseline"]
        assert found == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("stratum", "size"), [("cut-1200", "s27"), ("random-1200", "s27"), ("cut-1200-s11", "s11")]
)
def test_the_answer_for_the_present_teacher_is_the_analysis(stratum, size):
    """The table of RESULTS after 1,200 steps, and what README says of 27 %."""
    record = json.loads((CLAIM / stratum / "analysis.json").read_text())["sizes"][size]
    design = record["designs"]["published"]
    assert design["verdict"] == "refuted"
    text, readme = (
        " ".join(path.read_text(encoding="utf-8").split())
        for path in (ROOT / "docs" / "RESULTS.md", ROOT / "README.md")
    )
    for part, entry in design["contrasts"].items():
        numbers = (entry["estimate"], *entry["interval"])
        value, low, high = (f"{number:+.4f}".replace("-", "−") for number in numbers)
        assert f"{value} [{low}, {high}]" in text
        if size == "s27" and part in ("B", "I"):
            value, low, high = (f"{number:+.3f}".replace("-", "−") for number in numbers)
            assert f"{value} [{low}, {high}]" in readme


def test_what_is_missing_is_named_with_its_command(tmp_path, capsys):
    (tmp_path / "results").mkdir()
    assert script.main(["--results", str(tmp_path / "results")]) == 0
    out = capsys.readouterr().out
    assert "left out: effects: " in out
    assert "python scripts/analyse_ablation.py" in out
    assert script.main(["--results", str(tmp_path / "nowhere")]) == 2
    assert "is no directory" in capsys.readouterr().err


def analysed(folder: Path) -> tuple[Path, dict]:
    """Return where an analysis stands below a folder, and a committed one of a single size."""
    path = folder / "synergy" / "analysis.json"
    path.parent.mkdir()
    record = json.loads((CLAIM / "cut-1200" / "analysis.json").read_text())
    return path, {"sizes": {"s27": record["sizes"]["s27"]}}


def test_an_analysis_with_anything_wrong_is_shown_or_refused(tmp_path, monkeypatch):
    path, record = analysed(tmp_path)
    monkeypatch.setattr(figures, "write_text", lambda *_: None)
    monkeypatch.setattr(figures.plots, "save_figure", lambda *_: None)
    for makers, of_each, share in (
        ({"FIGURES": (), "TABLES": (figures.contrast_tables,)}, 2, 1.0),
        ({"FIGURES": (figures.effects,), "TABLES": ()}, 1, 0.05),
    ):
        for name, value in makers.items():
            monkeypatch.setattr(figures, name, value)
        messages = refusals(record, path, make_again(tmp_path), of_each, share=share)
        assert messages
        assert all(str(tmp_path) in m for m in messages), messages


def make_again(folder):
    return lambda: figures.make_all(folder, folder / "made")


def test_sizes_that_were_not_analysed_alike_are_refused(tmp_path):
    path, record = analysed(tmp_path)
    more = json.loads(json.dumps(record["sizes"]["s27"]))
    for entries in (more["arms"], more["against"]["baseline"]):
        entries["hard_only"] = entries["both"]
    path.write_text(json.dumps({"sizes": {"s27": more, "s11": record["sizes"]["s27"]}}))
    with pytest.raises(ValueError, match="11 %, synergy lacks arms"):
        list(figures.effects(tmp_path))
