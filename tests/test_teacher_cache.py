"""The teacher's cache: exact, resumable, and never used when it is not the right one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_runs import Tokens

from src.common.cli import one_line
from src.common.runs import locked
from src.distillation import DistillationTrainer
from src.loss.reference import entropy
from src.models import teacher_cache as tc
from src.models.forward import final_hidden_states, keep_head_alone
from src.models.loading import model_fingerprint
from src.models.teacher_cache import CachedCollator, TeacherCache, capture
from src.proteins.batching import PackedDataset, PackingCollator, PaddingCollator, ProteinDataset
from tests.test_distillation import BOTH, arguments


class Proteins(Tokens):
    """Stands in for tokenised proteins with a fingerprint."""

    fingerprint = "f" * 64


@pytest.fixture
def teacher(tiny_lm):
    return tiny_lm(n_layer=3, n_embd=24, seed=2)


def quiet(line: str) -> None:
    """Say nothing."""


def captured(teacher, folder, proteins=None, announce=quiet, **options) -> TeacherCache:
    return capture(teacher, proteins or Proteins(), folder, announce=announce, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_read_is_what_the_teacher_computes(teacher, tmp_path, dtype):
    teacher, proteins = teacher.to(dtype), Proteins()
    cache = captured(teacher, tmp_path, proteins, shard_bytes=2000, batch_tokens=64)
    assert len(cache.shards) > 3
    for index in range(len(proteins)):
        hidden, figures = cache[index]
        ids = torch.as_tensor(proteins[index])[None]
        with torch.no_grad():
            alone = final_hidden_states(teacher, ids)[0]
            logits = torch.nn.functional.linear(alone, teacher.lm_head.weight).float()
        assert hidden.dtype == dtype
        # Batches of another shape round differently; nothing else may differ.
        close = 1e-5 if dtype == torch.float32 else 0.05
        assert torch.allclose(hidden.float(), alone.float(), atol=close)
        expected = torch.stack([entropy(logits.log_softmax(-1)), logits.amax(-1)], -1)
        assert torch.allclose(figures[:, :2], expected, atol=close * 4)


def test_batches_of_the_same_shape_give_the_same_bits(teacher, tmp_path):
    """Rows of one length in one batch: what is captured is what the step would compute."""
    proteins = Proteins(8, low=20, high=21)
    cache = captured(teacher, tmp_path, proteins, batch_tokens=8 * 20)
    dataset = ProteinDataset(proteins, cache=cache)
    rows = [dataset[i] for i in range(8)]
    batch = CachedCollator(PaddingCollator(0))(rows)
    losses = []
    for inputs in (batch, {k: v for k, v in batch.items() if not k.startswith("teacher")}):
        trainer = DistillationTrainer(
            model=build_student(teacher), teacher_model=teacher, args=arguments(tmp_path), **BOTH
        )
        losses.append(trainer.compute_loss(trainer.model, inputs).item())  # type: ignore[arg-type]
    assert torch.equal(
        batch["teacher_hidden_states"],
        final_hidden_states(teacher, batch["input_ids"], batch["attention_mask"]),
    )
    assert losses[0] == pytest.approx(losses[1], rel=1e-7)


def build_student(teacher):
    from src.common.settings import StudentSettings
    from src.models.loading import build_student, student_config

    return build_student(student_config(StudentSettings(1, 2, 16), teacher.config), seed=0)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_training_from_the_cache_is_training_online(teacher, tmp_path, packed, workers):
    proteins = Proteins()
    cache = captured(teacher, tmp_path / "cache", proteins, shard_bytes=4000)
    finals = []
    for cached in (False, True):
        states = cache if cached else None
        collator = PackingCollator(0, 64) if packed else PaddingCollator(0)
        data = (
            PackedDataset(proteins, 64, 0, states)
            if packed
            else ProteinDataset(proteins, cache=states)
        )
        trainer = DistillationTrainer(
            model=build_student(teacher),
            teacher_model=teacher,
            args=arguments(
                tmp_path / "run", max_steps=4, learning_rate=1e-3, dataloader_num_workers=workers
            ),
            train_dataset=data,
            data_collator=CachedCollator(collator) if cached else collator,
            **BOTH,
        )
        if cached:
            keep_head_alone(teacher)  # no forward pass is possible any more
        trainer.train()
        shares = [r["data_wait_share"] for r in trainer.state.log_history if "loss" in r]
        assert all(0 <= share <= 1 for share in shares)
        finals.append([r["loss"] for r in trainer.state.log_history if "loss" in r])
    assert finals[0] == pytest.approx(finals[1], rel=1e-5)


def test_a_killed_capture_goes_on(teacher, tmp_path, monkeypatch):
    real, calls = tc._write_shard, []

    def dying(folder, number, *rest):
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(number)
        return real(folder, number, *rest)

    monkeypatch.setattr(tc, "_write_shard", dying)
    with pytest.raises(KeyboardInterrupt):
        captured(teacher, tmp_path, shard_bytes=2000)
    monkeypatch.setattr(tc, "_write_shard", lambda *a: calls.append(a[1]) or real(*a))
    cut = captured(teacher, tmp_path, shard_bytes=2000)
    assert calls == list(range(len(cut.shards)))
    monkeypatch.setattr(tc, "_write_shard", real)
    whole = captured(teacher, tmp_path / "other", shard_bytes=2000)
    assert json.loads((cut.folder / "manifest.json").read_text()) == json.loads(
        (whole.folder / "manifest.json").read_text()
    )
    calls.clear()
    again = captured(teacher, tmp_path, shard_bytes=2000)
    assert torch.equal(again[0][0], whole[0][0])


def test_damage_is_noticed(teacher, tmp_path):
    cache = captured(teacher, tmp_path / "a", shard_bytes=2000)
    prints = (model_fingerprint(teacher), Proteins.fingerprint)
    altered = tmp_path / "altered"
    shutil.copytree(cache.folder, altered)
    path = altered / "hidden-00001.bin"
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)
    opened = TeacherCache(altered, *prints)
    with pytest.raises(
        ValueError, match=r"hidden-00001.bin was altered; scripts/cache_teacher.py captures"
    ):
        [opened[index] for index in range(len(Proteins()))]
    path.write_bytes(raw[:-1])
    with pytest.raises(ValueError, match="bytes instead of"):
        TeacherCache(altered, *prints)
    (altered / "manifest.json").write_text('{"format": 1}')
    with pytest.raises(ValueError, match=r"manifest"):
        TeacherCache(altered, *prints)
    with pytest.raises(ValueError, match="another teacher's"):
        TeacherCache(cache.folder, "0" * 64, prints[1])
    with pytest.raises(ValueError, match="of other proteins"):
        TeacherCache(cache.folder, prints[0], "0" * 64)


def spoil(path) -> None:
    raw = bytearray(path.read_bytes())
    raw[5] ^= 1
    path.write_bytes(raw)


def test_capturing_again_mends_what_is_broken_and_only_that(teacher, tmp_path, monkeypatch):
    folder = captured(teacher, tmp_path, shard_bytes=2000).folder
    before = {path.name: path.read_bytes() for path in folder.glob("*.*")}
    (folder / "notes.txt").write_text("of somebody else")
    real, calls, lines = tc._write_shard, [], []
    monkeypatch.setattr(tc, "_write_shard", lambda *a: calls.append(a[1]) or real(*a))

    def again(**options) -> None:
        calls.clear()
        lines.clear()
        again = capture(
            teacher, Proteins(), tmp_path, shard_bytes=2000, announce=lines.append, **options
        )
        [again[index] for index in range(len(Proteins()))]
        assert {name: (folder / name).read_bytes() for name in before} == before
        assert (folder / "notes.txt").read_text() == "of somebody else"

    again(thorough=True)
    assert calls == []
    assert lines == [f"teacher cache found in {folder}"]
    spoil(folder / "hidden-00001.bin")
    again(thorough=True)
    assert calls == [1]
    assert lines[0] == f"teacher cache in {folder} is broken: shards 1 are made again"
    # A length is seen without reading the files.
    (folder / "figures-00002.bin").write_bytes(b"")
    again()
    assert calls == [2]
    (folder / "hidden-00000.bin").unlink()
    spoil(folder / "hidden-00002.bin")
    again()
    assert calls == [0, 2]
    (folder / "manifest.json").write_text("{")
    again()
    assert calls == []
    assert "its manifest is made again" in lines[0]


def test_a_cache_that_another_process_fills_is_waited_for(teacher, tmp_path):
    folder = captured(teacher, tmp_path).folder
    (folder / "manifest.json").unlink()
    lines: list[str] = []
    with ThreadPoolExecutor() as pool:
        with locked(folder):
            waiting = pool.submit(captured, teacher, tmp_path, announce=lines.append)
            while not lines:
                time.sleep(0.01)
            assert not waiting.done()
        assert waiting.result().proteins
    assert lines[0].startswith(f"waiting for {folder}, in use by process {os.getpid()}")


def test_a_full_disk_is_named_with_a_way_out(teacher, tmp_path, full_disk):
    full_disk("src.models.teacher_cache._write_shard")
    with pytest.raises(ValueError, match=r"-float32: no space left .* another --teacher_cache"):
        captured(teacher, tmp_path)


def test_a_workers_error_is_told_in_its_own_words(teacher, tmp_path):
    cache = captured(teacher, tmp_path, shard_bytes=2000)
    spoil(cache.folder / "hidden-00000.bin")
    opened = TeacherCache(cache.folder, model_fingerprint(teacher), Proteins.fingerprint)
    loader = torch.utils.data.DataLoader(
        ProteinDataset(Proteins(), cache=opened), num_workers=1, collate_fn=list
    )
    with pytest.raises(ValueError, match="altered") as caught:
        list(loader)
    said = one_line(caught.value)
    assert said == f"{cache.folder / 'hidden-00000.bin'} was altered; {tc.ADVICE}"


def test_another_teacher_gets_a_cache_of_its_own(teacher, tiny_lm, tmp_path):
    one = captured(teacher, tmp_path)
    other = captured(tiny_lm(n_embd=24, seed=5), tmp_path)
    assert one.folder != other.folder
    assert not torch.equal(one[0][0], other[0][0])


def test_a_small_disk_is_refused_before_the_start(teacher, tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr(tc.shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 30))
    with pytest.raises(ValueError, match=r"needs 1\.1 GB with the reserve, 1\.1 GB are free"):
        capture(teacher, Proteins(), tmp_path, announce=lines.append)
    assert "teacher cache: " in lines[0]
    assert not list(tmp_path.rglob("*.bin"))


def test_size_is_what_was_announced(teacher, tmp_path):
    proteins = Proteins()
    cache = captured(teacher, tmp_path, proteins)
    tokens = int(proteins.lengths.sum())
    written = sum(path.stat().st_size for path in cache.folder.glob("*.bin"))
    assert written == tc.needed_bytes(tokens, 24, torch.float32)


def test_a_copy_for_a_worker_carries_no_data(teacher, tmp_path):
    cache = captured(teacher, tmp_path)
    expected = cache[3]
    raw = pickle.dumps(cache)
    assert len(raw) < 20_000
    for one, other in zip(pickle.loads(raw)[3], expected, strict=True):
        assert torch.equal(one, other)


def test_ranges_hold_every_protein_once():
    rng = np.random.default_rng(0)
    for _ in range(50):
        lengths = rng.integers(1, 50, rng.integers(0, 40))
        ranges = tc.shard_ranges(lengths, 8, int(rng.integers(8, 2000)))
        assert [i for first, last in ranges for i in range(first, last)] == list(
            range(len(lengths))
        )
