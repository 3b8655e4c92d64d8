"""Trackers get the configuration, the metrics and the outcome."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from src.training.tracking import (
    WANDB_RUN_FILE,
    Tracking,
    flat,
    kept_run_id,
    open_tracker,
    require_tracker,
)
from tests.test_train_script import tiny_run


def test_a_record_becomes_one_level():
    record = {"settings": {"loss": {"alpha": 0.5}, "init_from": None}, "other": 1, "final": {}}
    assert flat(record, ("settings", "final", "absent")) == {"settings/loss/alpha": 0.5}


def test_a_tracker_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require_tracker("none")
    with pytest.raises(ValueError, match="pip install tensorboard"):
        require_tracker("tensorboard")


def test_tensorboard_has_the_whole_run(tmp_path, small_teacher_dir, proteins_dir):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "named-run"
    more = ["--report_to", "tensorboard"]
    assert tiny_run(small_teacher_dir, proteins_dir, run, tmp_path / "cache", *more) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"train/loss", "train/soft_loss", "train/tokens_per_second", "eval/loss"} <= set(
        tags["scalars"]
    )
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = [(r["step"], r["eval_loss"]) for r in lines if "eval_loss" in r]
    seen = {event.step: event.value for event in events.Scalars("eval/loss")}
    assert seen == pytest.approx(dict(logged), rel=1e-6)
    texts = {tag.split("/")[0]: tag for tag in tags["tensors"]}
    assert {"configuration", "outcome"} <= set(texts)
    configuration = str(events.Tensors(texts["configuration"])[0].tensor_proto)
    assert "settings/loss/temperature" in configuration
    assert "final/eval_loss" in str(events.Tensors(texts["outcome"])[0].tensor_proto)


def test_wandb_without_a_key_is_refused_before_anything_is_made(
    tmp_path, small_teacher_dir, proteins_dir, monkeypatch, capsys, request
):
    wandb = pytest.importorskip("wandb")
    # It reads its environment once in a process.
    request.addfinalizer(wandb.teardown)
    wandb.teardown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for name, value in {"WANDB_MODE": "online", "HOME": tmp_path, "NETRC": tmp_path / "no"}.items():
        monkeypatch.setenv(name, str(value))
    more = ["--report_to", "wandb"]
    assert tiny_run(small_teacher_dir, proteins_dir, tmp_path / "r", tmp_path / "c", *more) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "--report_to wandb: No API key" in said
    assert "WANDB_MODE=offline" in said
    assert not (tmp_path / "r").exists()


def test_a_resumed_run_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    opened = []

    class Run:
        id = "ab12"
        config: Any = type("Config", (), {"update": lambda *a, **k: None})

    monkeypatch.setattr(wandb, "init", lambda **options: opened.append(options))
    monkeypatch.setattr(wandb, "run", Run())
    open_tracker("wandb", tmp_path)
    state: Any = type("State", (), {"is_world_process_zero": True})
    Tracking("wandb", tmp_path, {}).on_train_begin(None, state, None)
    open_tracker("wandb", tmp_path)
    assert [(o["id"], o["resume"]) for o in opened] == [(None, "allow"), ("ab12", "allow")]
    (tmp_path / WANDB_RUN_FILE).write_text("\x1b[2J")
    assert kept_run_id(tmp_path) is None


def test_a_disabled_wandb_is_no_hindrance(tmp_path, small_teacher_dir, proteins_dir, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    more = ["--report_to", "wandb"]
    assert tiny_run(small_teacher_dir, proteins_dir, tmp_path / "r", tmp_path / "c", *more) == 0
    assert not (tmp_path / "wandb").exists()


def wandb_records(path: Path) -> list:
    """Return the records of an offline run's file: LevelDB's log format after seven bytes."""
    from wandb.proto import wandb_internal_pb2

    kinds: Any = wandb_internal_pb2
    raw, place, block = path.read_bytes(), 7, 32768
    found, pieces = [], b""
    while place + 7 <= len(raw):
        if block - place % block < 7:  # no room for a header: the block's end is filled with zeros
            place += block - place % block
            continue
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        pieces += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or its last piece
            record = kinds.Record()
            record.ParseFromString(pieces)
            found.append(record)
            pieces = b""
    return found


@pytest.mark.slow
def test_an_offline_wandb_run_has_the_whole_run(
    tmp_path, small_teacher_dir, proteins_dir, monkeypatch, request
):
    wandb = pytest.importorskip("wandb")
    request.addfinalizer(wandb.teardown)
    wandb.teardown()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in [name for name in os.environ if name.startswith("WANDB_") and name != "WANDB_MODE"]:
        monkeypatch.delenv(name)
    run = tmp_path / "named-run"
    more = ["--report_to", "wandb"]
    assert tiny_run(small_teacher_dir, proteins_dir, run, tmp_path / "cache", *more) == 0
    wandb.teardown()  # W&B's own process writes the file: to the end before it is read
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    records = wandb_records(path)
    about = next(r.run for r in records if r.HasField("run"))
    assert about.display_name == "named-run"
    assert about.host == ""
    assert about.run_id == (run / "wandb_run.txt").read_text().strip()
    assert about.project == "PROTGPT2_DISTILLATION"
    config = {u.key or "/".join(u.nested_key): u for r in records for u in r.config.update}
    keys = set(config)
    assert {"settings/loss/temperature", "teacher/fingerprint", "data/train/proteins"} <= keys
    # So are the Trainer's arguments and the student's configuration.
    assert {"per_device_train_batch_size", "n_embd", "model/num_parameters"} <= keys
    assert config["output_dir"].value_json == '"named-run"'
    logged = {
        item.key or "/".join(item.nested_key)
        for r in records
        if r.HasField("history")
        for item in r.history.item
    }
    assert {"train/loss", "eval/loss", "eval/soft_loss"} <= logged
    summed = {u.key or "/".join(u.nested_key) for r in records for u in r.summary.update}
    assert {"final/eval_loss", "train_seconds", "peak_memory_bytes"} <= summed
