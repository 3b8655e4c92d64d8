"""Checkpoints: whole or not used, no pickle, and a resumed run that ends in the same bits."""

from __future__ import annotations

import json
import random
import shutil
import subprocess

import numpy as np
import pytest
import torch
from small_runs import At, assert_same_bits, interrupt, make_trainer, resume
from transformers import TrainerCallback

from src.common.files import remove_temporaries_of, remove_unfinished
from src.trainer.checkpoints import (
    NEEDED_FILES,
    checkpoints_of,
    fault_of,
    newest_valid,
    write_manifest,
)
from src.trainer.states import as_json, random_states, restore_random_states


@pytest.mark.parametrize(
    ("stop_after", "workers", "packed"),
    [(0, 0, False), (4, 2, True), (6, 0, False)],
)
def test_a_resumed_run_ends_in_the_same_bits(
    tiny_lm, tmp_path, undisturbed, stop_after, workers, packed
):
    options = {"packed": packed, "dataloader_num_workers": workers}
    cut = make_trainer(tiny_lm, tmp_path, **options)
    # A step after the checkpoint, and in the next one.
    cut.add_callback(At("on_step_begin", stop_after + 2, interrupt))
    with pytest.raises(KeyboardInterrupt):
        cut.train()
    # Whatever the process did meanwhile must not matter.
    torch.rand(5)
    random.random()
    np.random.rand(3)
    before = newest_valid(tmp_path)
    resumed = resume(make_trainer(tiny_lm, tmp_path, **options))
    assert_same_bits(undisturbed(make_trainer, **options), resumed)
    if before is not None:  # seconds of both sessions count
        spent = json.loads((before / "training_state.json").read_text())["trainer"]["runtime"]
        assert resumed.seconds_before == spent > 0


def test_old_checkpoints_go_and_no_pickle_is_written(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path / "run", save_total_limit=2).train()
    run = tmp_path / "run"
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint-9", "checkpoint-8"]
    suffixes = {path.suffix for path in run.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".jsonl", ".safetensors", ".jinja", ".txt"}
    assert not list(run.glob("*.unfinished"))
    assert fault_of(run / "checkpoint-9") is None


def damaged(folder, kind):
    """Return a checkpoint directory with one fault."""
    path = folder / "model.safetensors"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif kind == "altered":
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
    elif kind == "missing":
        path.unlink()
    else:
        (folder / "manifest.json").write_text(kind)


@pytest.mark.parametrize("kind", ["truncated", "altered", "missing", "", "[]", '{"files": 3}'])
def test_a_damaged_checkpoint_is_passed_over_and_said_so(tmp_path, kind):
    for number in (10, 9, 100):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        for name in ("model.safetensors", *NEEDED_FILES):
            (folder / name).write_bytes(bytes(range(200)))
        write_manifest(folder)
    (tmp_path / "checkpoint-200.unfinished").mkdir()
    damaged(tmp_path / "checkpoint-100", kind)
    lines: list[str] = []
    assert newest_valid(tmp_path, lines.append) == tmp_path / "checkpoint-10"
    assert len(lines) == 1
    assert "checkpoint-100 is not used" in lines[0]


def test_random_states_round_trip_through_json():
    tensors, plain = random_states()
    plain = json.loads(as_json(plain))
    first = (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())
    restore_random_states(tensors, plain)
    assert first == (torch.rand(3).tolist(), random.random(), np.random.rand(3).tolist())


def test_a_run_killed_after_its_last_checkpoint_makes_no_further_step(
    tiny_lm, tmp_path, undisturbed
):
    # Ten steps would be the end of an epoch; nine is the middle of one, where the Trainer of the
    # library would go on.
    make_trainer(tiny_lm, tmp_path).train()
    again = resume(make_trainer(tiny_lm, tmp_path))
    assert again.state.global_step == 9
    assert_same_bits(again, undisturbed(make_trainer))


class End(TrainerCallback):
    """Ends the training after the validation of a step, as early stopping does."""

    def on_evaluate(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 6


def test_a_run_that_a_callback_ended_makes_no_further_step(tiny_lm, tmp_path):
    runs = [make_trainer(tiny_lm, tmp_path / name) for name in ("whole", "killed")]
    for trainer in runs:
        trainer.add_callback(End())
        trainer.train()
    again = make_trainer(tiny_lm, tmp_path / "killed")
    again.add_callback(End())
    resume(again)
    assert again.state.global_step == 6
    assert_same_bits(runs[0], again, step=6)


def test_a_checkpoint_of_a_step_can_be_made_again(tiny_lm, tmp_path):
    trainer = make_trainer(tiny_lm, tmp_path, max_steps=2)
    trainer.train()
    final = tmp_path / "checkpoint-2"
    before = final.stat().st_ino
    trainer.save_checkpoint()
    assert final.stat().st_ino != before
    assert fault_of(final) is None
    (final / "config.json").write_text("{}")
    trainer.save_checkpoint()
    assert fault_of(final) is None
    # The whole one was replaced; the broken one is kept for a look.
    (final / "config.json").write_text("{}")
    trainer.save_checkpoint()
    kept = {path.name for path in tmp_path.glob("checkpoint*")}
    assert kept == {"checkpoint-2", "checkpoint-2.broken-1", "checkpoint-2.broken-2"}


def killed(trainer):
    """Train, or go on, for three steps."""
    trainer.add_callback(At("on_step_end", 3, interrupt))
    with pytest.raises(KeyboardInterrupt):
        resume(trainer)


def names(checkpoints):
    return [path.name for path in checkpoints]


def test_a_checkpoint_is_kept_beside_broken_ones_of_any_step(tiny_lm, tmp_path):
    make_trainer(tiny_lm, tmp_path, save_total_limit=2).train()
    assert names(checkpoints_of(tmp_path)) == ["checkpoint-9", "checkpoint-8"]
    for folder in checkpoints_of(tmp_path):
        damaged(folder, "truncated")
    killed(make_trainer(tiny_lm, tmp_path, save_total_limit=2))
    assert newest_valid(tmp_path, lambda line: None) == tmp_path / "checkpoint-2"
    # A broken one of an earlier step does not push a whole one out either.
    shutil.copytree(tmp_path / "checkpoint-2", tmp_path / "checkpoint-3")
    damaged(tmp_path / "checkpoint-3", "altered")
    killed(make_trainer(tiny_lm, tmp_path, save_total_limit=2))
    assert newest_valid(tmp_path, lambda line: None) == tmp_path / "checkpoint-4"
    assert fault_of(tmp_path / "checkpoint-2") is None
    resume(make_trainer(tiny_lm, tmp_path, save_total_limit=2))
    whole = [path for path in checkpoints_of(tmp_path) if fault_of(path) is None]
    assert names(whole) == ["checkpoint-9", "checkpoint-8"]
    assert {"checkpoint-8.broken-1", "checkpoint-9.broken-1"} <= set(names(tmp_path.iterdir()))


def test_of_a_link_to_a_checkpoint_the_link_alone_goes(tiny_lm, tmp_path):
    run, disk = tmp_path / "run", tmp_path / "other disk"
    killed(make_trainer(tiny_lm, run, save_total_limit=2))
    shutil.move(run / "checkpoint-2", disk)
    (run / "checkpoint-2").symlink_to(disk)
    resume(make_trainer(tiny_lm, run, save_total_limit=2))
    assert names(checkpoints_of(run)) == ["checkpoint-9", "checkpoint-8"]
    assert fault_of(disk) is None
    (run / "model.unfinished").symlink_to(disk)
    assert remove_unfinished(run) == ["model.unfinished"]
    assert fault_of(disk) is None


def test_a_full_disk_leaves_the_last_checkpoint_and_a_clear_line(tiny_lm, undisturbed, small_disk):
    run = small_disk / "run"
    fill = small_disk / "other data"
    trainer = make_trainer(tiny_lm, run)
    save = trainer.save_checkpoint

    def save_on_a_full_disk():
        if trainer.state.global_step == 6:
            free = shutil.disk_usage(small_disk).free
            fill.write_bytes(bytes(max(0, free - 40_000)))
        save()

    trainer.save_checkpoint = save_on_a_full_disk
    with pytest.raises(ValueError, match="no space left on the disk; checkpoint-4 is whole"):
        trainer.train()
    assert [path.name for path in checkpoints_of(run)] == ["checkpoint-4", "checkpoint-2"]
    assert all(fault_of(path) is None for path in checkpoints_of(run))
    assert not list(run.glob("*.unfinished"))
    fill.unlink()
    assert_same_bits(undisturbed(make_trainer), resume(make_trainer(tiny_lm, run)))


@pytest.fixture
def small_disk(tmp_path):
    """Return a file system of four megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("file systems can be mounted by root alone")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_model_is_written_file_by_file_when_whole(tiny_lm, tmp_path, small_disk):
    """A full disk at the end leaves no half of a model under the model's name."""
    trainer = make_trainer(tiny_lm, small_disk)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "other data").write_bytes(bytes(free - 8_000))
    with pytest.raises(ValueError, match="no space left"):
        trainer.save_model(str(small_disk / "model"))
    assert not list((small_disk / "model").glob("*.*"))
    (small_disk / "other data").unlink()
    trainer.save_model(str(small_disk / "model"))
    assert {"config.json", "model.safetensors"} <= {
        p.name for p in (small_disk / "model").iterdir()
    }


def test_leftovers_of_a_killed_run_go_and_nothing_else(tmp_path):
    ours = ["checkpoint-3.unfinished", "checkpoint-2.old.unfinished", "model.unfinished"]
    ours.append(".run.json.abcdefgh.unfinished")
    theirs = [
        "notes.unfinished",
        "results.tmp",
        ".hidden",
        "checkpoint-2.broken-17",
        ".thesis.chapter1.tmp",
        "thesis.txt",
    ]
    for name in [*ours[:3], "thesis.unfinished"]:
        (tmp_path / name).mkdir()
    for name in [ours[3], *theirs]:
        (tmp_path / name).write_text("x")
    assert sorted(remove_unfinished(tmp_path)) == sorted(ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [*theirs, "thesis.unfinished"]
    )


def test_what_is_left_of_one_file_goes_and_nothing_else(tmp_path):
    ours = [f".a[1].json.{letters}.unfinished" for letters in ("abcdefgh", "12345678")]
    theirs = [f".{name}.json.abcdefgh.unfinished" for name in ("a1", "b")]
    theirs += ["a[1].json", ".a[1].json.x.unfinished", ".a[1].json.abcdefgh.tmp"]
    for name in [*ours, *theirs]:
        (tmp_path / name).write_text("x")
    (tmp_path / ".a[1].json.directed.unfinished").mkdir()
    remove_temporaries_of(tmp_path / "a[1].json")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(theirs)
