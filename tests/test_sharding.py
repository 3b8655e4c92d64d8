"""src/models/sharding.py: a teacher spread over two processes computes what it computes whole."""

from __future__ import annotations

import pytest
import torch
from small_runs import timeless
from test_distributed import run_jobs
from test_processes import files, statuses

from src.common.runs import read_run
from src.models import sharding
from src.trainer.callbacks import read_metrics


def test_hidden_states_are_the_same_bits_and_half_the_blocks_are_held(tmp_path):
    lines = run_jobs(tmp_path, "sharded")
    assert statuses(lines) == ["sharded: [0, 0]"]
    assert sorted(line for line in lines if line.startswith("rank")) == [
        "rank 0: alike",
        "rank 1: alike",
    ]


def test_a_cache_of_unequal_shares_is_that_of_one_process(tmp_path):
    lines = run_jobs(tmp_path, "shards", "sharded_shards")
    assert statuses(lines)[-1] == "sharded_shards: [0, 0]"
    assert {"rank 0: 16 shards", "rank 1: 15 shards"} <= set(lines)
    assert files(tmp_path / "sharded-shards") == files(tmp_path / "shards-1")


def test_a_bad_number_in_the_first_of_two_batches_of_one_process_stops_both(tmp_path):
    lines = run_jobs(tmp_path, "sharded_nan")
    assert statuses(lines) == ["sharded_nan: [2, 2]"]
    told = {line.split(":")[0]: line for line in lines if line.startswith("rank")}
    assert "student: output of transformer.wte of batch 0 is not finite" in told["rank 1"]


@pytest.mark.slow
def test_a_training_is_the_one_with_the_teacher_whole(tmp_path):
    lines = run_jobs(tmp_path, "inputs", "sharded_training")
    assert statuses(lines)[1:] == [
        "sharded_training: [0, 0]",
        "sharded_training: [0, 0]",
        "sharded_training: [0, 0]",
        "sharded_training: [2]",
    ]
    whole, sharded, cached = (tmp_path / name for name in ("whole", "sharded", "cached"))
    weights = [(folder / "model.safetensors").read_bytes() for folder in (whole, sharded)]
    assert weights[0] == weights[1]
    logs = [[timeless(record) for record in read_metrics(folder)] for folder in (whole, sharded)]
    assert logs[0] == logs[1]
    records = [read_run(folder) for folder in (whole, sharded, cached)]
    assert len({record["teacher"]["fingerprint"] for record in records}) == 1
    losses = [record["final"]["eval_loss"] for record in records]
    assert losses[0] == losses[1] == pytest.approx(losses[2], rel=1e-6)


def test_one_process_or_a_model_without_blocks_is_refused(tiny_lm):
    with pytest.raises(ValueError, match="start them with torchrun"):
        sharding.load_sharded(lambda: (tiny_lm(), None), torch.device("cpu"))
    model = tiny_lm()
    assert not sharding.is_sharded(model)
    with sharding.in_step(model, 3), sharding.in_step(None, 3):
        pass
    model.transformer.h = torch.nn.Identity()
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no list of blocks"):
        sharding.shard(model, None, torch.device("cpu"))  # type: ignore[arg-type]
