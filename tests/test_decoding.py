"""One token at a time: the logits are those of a whole pass, whatever rows come and go."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from src.models import decoding
from src.models.decoding import Decoder, is_plain_gpt2


@pytest.mark.parametrize(
    "kind", ["gpt2", "gpt2 of transformers", "llama", "scaled", "relu", "parts of the head"]
)
def test_logits_are_those_of_a_whole_pass(tiny_lm, tiny_llama, monkeypatch, kind):
    if kind == "llama":
        model = tiny_llama()
    elif kind == "scaled":
        model = tiny_lm(scale_attn_by_inverse_layer_idx=True, scale_attn_weights=False, n_inner=24)
    else:
        model = tiny_lm(activation_function="relu" if kind == "relu" else "gelu_new")
    model = model.double()
    if kind == "parts of the head":
        monkeypatch.setattr(decoding, "HEAD_ROWS", 10)
        model.lm_head.bias = torch.nn.Parameter(torch.randn(64, dtype=torch.double))
    if kind == "gpt2 of transformers":
        monkeypatch.setattr(decoding, "is_plain_gpt2", lambda model: False)
    assert decoding.is_plain_gpt2(model) == (not kind.startswith(("llama", "gpt2 of")))
    generator = torch.Generator().manual_seed(0)
    prompt = [0, 5, 9]
    decoder = Decoder(model, torch.tensor(prompt))
    rows: list[list[int]] = []
    with torch.inference_mode():
        for step in range(170):  # past the room that the cache gets ahead
            if step in (0, 3, 100):
                rows += [list(prompt) for _ in range(3)]
                decoder.begin(3)
            for row in (1, 0) if step in (40, 120) else ():
                for place, origin in decoder.drop(row):
                    rows[place] = rows[origin]
                rows.pop()
            logits = decoder.step(torch.tensor([row[-1] for row in rows]))
            if step % 13 == 0 or step in (1, 4, 41, 101, 121):
                for row, found in zip(rows, logits, strict=True):
                    torch.testing.assert_close(found, model(torch.tensor([row])).logits[0, -1])
            drawn = torch.randint(0, 64, (len(rows),), generator=generator).tolist()
            for row, token in zip(rows, drawn, strict=True):
                row.append(token)
            assert decoder.lengths == [len(row) for row in rows]
    assert decoder.bytes_of_a_row() == 2 * 2 * 256 * 8 * (8 if kind == "llama" else 16)


@pytest.mark.parametrize("prompt", [[0, 5, 9], [0]])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_rows_of_many_lengths_attend_in_groups(tiny_lm, tiny_llama, monkeypatch, kind, prompt):
    model = (tiny_llama() if kind == "llama" else tiny_lm()).double()
    # as many groups as there are blocks
    monkeypatch.setattr(decoding, "CPU_GROUPS", (2, 1))
    chance = random.Random(0)
    decoder = Decoder(model, torch.tensor(prompt), room=40)
    rows: list[list[int]] = []
    ends: list[int] = []
    pointer = 0
    counts: list[int] = []
    groups = decoder._groups
    monkeypatch.setattr(
        decoder, "_groups", lambda mask: (found := groups(mask), counts.append(len(found)))[0]
    )
    with torch.inference_mode():
        for step in range(160):
            missing = chance.randint(0, 9 - len(rows))
            if missing or not rows:
                missing = max(1, missing)
                rows += [list(prompt) for _ in range(missing)]
                ends += [chance.choice((8, 20, 40)) for _ in range(missing)]
                decoder.begin(missing)
            logits = decoder.step(torch.tensor([row[-1] for row in rows]))
            if step == 60:
                pointer = decoder.buffers[0].data_ptr()
            if step % 13 == 0:
                for row, found in zip(rows, logits, strict=True):
                    torch.testing.assert_close(found, model(torch.tensor([row])).logits[0, -1])
            for row in rows:
                row.append(chance.randrange(64))
            for index in reversed(range(len(rows))):
                if len(rows[index]) >= ends[index]:
                    for place, origin in decoder.drop(index):
                        rows[place], ends[place] = rows[origin], ends[origin]
                    rows.pop()
                    ends.pop()
            lengths = decoder.lengths
            assert lengths == [len(row) for row in rows]
            size = decoder.block
            blocks = [lengths[first : first + size] for first in range(0, len(lengths), size)]
            assert all(min(a) >= max(b) for a, b in itertools.pairwise(blocks))
    assert max(counts, default=None) == (5 if kind == "gpt2" else None)  # of two rows each
    assert decoder.buffers[0].shape[3] <= 100
    assert decoder.buffers[0].data_ptr() == pointer  # columns are used again


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
def test_a_large_head_is_multiplied_in_other_orders(tiny_lm, monkeypatch, count):
    model = tiny_lm().double()
    model.lm_head.bias = torch.nn.Parameter(torch.randn(64, dtype=torch.double))
    decoder = Decoder(model, torch.tensor([0, 5]))
    states = torch.randn(count, 16, dtype=torch.double)
    whole = decoder._head(states)
    monkeypatch.setattr(decoding, "HEAD_ROWS", 10)
    torch.testing.assert_close(decoder._head(states), whole)
    assert decoder._head(states).is_contiguous()


def test_what_is_not_gpt2_itself_runs_in_transformers(tiny_lm):
    model = tiny_lm()
    assert is_plain_gpt2(model)
    model.transformer.h[0].mlp.c_fc = torch.nn.Linear(16, 64)  # as an adapter would
    assert not is_plain_gpt2(model)
