"""Reads the results of a benchmark and writes their tables into a page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from src.common.files import read_json, replace_section

SCHEMA_VERSION = 1
KIND = "benchmark"
SECTIONS = (
    "loss",
    "step",
    "students",
    "generation",
    "evaluation",
    "trl",
    "liger",
)
SAMPLED = {"teacher": "small teacher", "student": "its student of 27 %", "hf_tiny": "hf-tiny"}
FIGURES = {
    "loss_memory": "loss, peak memory, float32",
    "loss_memory_bf16": "loss, peak memory, bfloat16",
    "loss_time_fp32": "loss, time, float32",
    "loss_time_bf16": "loss, time, bfloat16",
    "cached_step_4l512": "step from the cache, student 4L/4H/512E",
    "cached_step_6l768": "step from the cache, student 6L/8H/768E",
    "cached_step_12l1024": "step from the cache, student 12L/16H/1024E",
    "online_step_4l512": "step with the teacher online, student 4L/4H/512E",
    "online_step_6l768": "step with the teacher online, student 6L/8H/768E",
    "online_step_12l1024": "step with the teacher online, student 12L/16H/1024E",
    "three_students_three_epochs": "three students, three epochs, with the capture",
    **{
        f"generation_{model}_{rows}_{side}": f"sampling, {label}, {rows} at a time, against {other}"
        for model, label in SAMPLED.items()
        for rows in (1, 16, 256)
        for side, other in (("ctranslate2", "CTranslate2"), ("generate", "model.generate"))
    },
    "generation_100": "100 proteins sampled in a batch",
    "evaluation_1000": "1,000 proteins evaluated in batches",
    "evaluation_batches_4096": "the same in batches of 4,096 tokens",
    "evaluation_batches_1024": "the same in batches of 1,024 tokens",
    "evaluation_threads": "the same, a batch on each thread",
    "evaluation_onednn": "the same with oneDNN's products",
    "evaluation_bf16": "the same in bfloat16, whose figures differ",
    "trl_step": "step against TRL's GKD loss",
    "liger_loss_time": "loss against Liger's, time",
    "liger_loss_memory": "loss against Liger's, peak memory",
}
"""Labels of the ratios, those of earlier results (evaluation_..., generation_100) included."""
SECTION = "benchmark tables"
"""The generated section of docs/PERFORMANCE.md."""


def read_benchmark(path: str | Path) -> dict[str, Any]:
    """Read the results of a benchmark.

    Raises:
        ValueError: it cannot be read, or is none.
    """
    results = read_json(path)
    if not isinstance(results, dict) or results.get("kind") != KIND or "ratios" not in results:
        raise ValueError(f"{path}: not the results of tools/benchmark/run.py")
    if results.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path}: of another version: measure again")
    return results


def measures(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Return every measured ratio with its rounds, in the order of :data:`FIGURES`."""
    found: dict[str, dict[str, Any]] = {}
    for section in results["sections"].values():
        found |= section.get("measured", {})
    return {name: found[name] for name in FIGURES if name in found}


def fill_page(page: str | Path, results: Sequence[str | Path]) -> None:
    """Replace a page's generated section by the tables of results.

    Raises:
        ValueError: the page has no such section, or there are no results.
    """
    if not results:
        raise ValueError("results/: no benchmark_*.json; run tools/benchmark/run.py first")
    replace_section(page, SECTION, "\n\n".join(table(path) for path in results))


def table(path: str | Path) -> str:
    """Return the tables of one results file, in Markdown."""
    results = read_benchmark(path)
    lines = [
        f"From `{Path(path).as_posix()}`: {device_line(results)}.",
        "",
        "| what | plain way | ours | ratio (lowest to highest round) |",
        "|---|---|---|---|",
    ]
    for name, each in measures(results).items():
        low, high = each["lowest"], each["highest"]
        spread = f" ({low:.2f} to {high:.2f})" if len(each["ours"]) > 1 else ""
        values = (quantity(name, each, side) for side in ("reference", "ours"))
        row = " | ".join([FIGURES[name], *values, f"**{each['ratio']:.2f}**{spread}"])
        lines.append(f"| {row} |")
    for name, section in results["sections"].items():
        if "skipped" in section:
            lines.append(f"\nLeft out: {name} ({section['skipped']}).")
    work = results["sections"].get("step", {}).get("work", {})
    if work:
        lines += [
            "",
            "| student | step | GFLOP | GFLOP/s | share of the peak |",
            "|---|---|---|---|---|",
        ]
    for student, sides in work.items():
        for side, each in sides.items():
            share = "" if each["mfu"] is None else f"{each['mfu']:.0%}"
            rate = each["flops_per_second"] / 1e9
            lines.append(
                f"| {student} | {side} | {each['flops'] / 1e9:,.1f} | {rate:,.0f} | {share} |"
            )
    return "\n".join(lines)


def device_line(results: Mapping[str, Any]) -> str:
    """Return on what and by which code results were measured."""
    device, run = results["device"], results["run"]
    threads = device.get("threads")
    name = f"{run['platform']['machine']}, {threads} thread{'' if threads == 1 else 's'}"
    name = device.get("name") or name
    commit = (run["git"]["commit"] or "no commit")[:10]
    changed = " with changes" if run["git"]["dirty"] else ""
    quick = ", tiny shapes" if results["quick"] else ""
    return f"{name}, PyTorch {run['versions']['torch']}, commit {commit}{changed}{quick}"


def quantity(name: str, measured: Mapping[str, Any], side: str) -> str:
    """Return the median of a side's rounds with its unit."""
    values = sorted(measured[side])
    middle = (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2
    if "memory" in name:
        return f"{middle / 1e6:,.0f} MB"
    if measured.get("unit") == "seconds for each token":
        return f"{middle * 1e3:.2f} ms a token"
    return f"{middle:.2f} s" if middle >= 1 else f"{middle * 1e3:.1f} ms"
