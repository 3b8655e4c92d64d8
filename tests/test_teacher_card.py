"""The card of a teacher reads the record of scripts/train.py, or an older one."""

from __future__ import annotations

import json

from tools.describe_small_teacher import teacher_card, training_facts

PARTS = {
    "test": {
        "floors": {
            "fitted_proteins": 10,
            **{
                name: {"nats_per_residue": nats, "perplexity_per_residue": 20.0}
                for name, nats in (("uniform", 2.996), ("unigram", 2.9), ("trigram", 2.8))
            },
        },
        "teacher_nats_per_residue": 2.5,
        "teacher_perplexity_per_residue": 12.18,
        "teacher_accuracy": 0.251,
        "teacher_ece": {"accuracy_floor": 0.052},
        "intervals": {"teacher_nats_per_residue": [2.4, 2.6]},
        "gates": {
            "shuffled_minus_natural": {
                "mean": 0.3,
                "low": 0.2,
                "high": 0.4,
                "groups": 5,
                "pairs": 8,
            }
        },
    }
}
RUN = {
    "settings": {
        "student": {"n_layer": 2, "n_head": 4, "n_embd": 64, "dropout": 0.0},
        "optimizer": "muon",
        "learning_rate": 4e-3,
        "other_learning_rate": 3e-3,
        "batch_size": 16,
        "gradient_accumulation_steps": 2,
        "seed": 1,
    },
    "student": {"parameters": 123456},
    "data": {"train": {"proteins": 1000}},
    "processes": 1,
    "precision": "bf16",
    "steps": 5000,
}


def test_the_card_of_a_run(tmp_path):
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "config.json").write_text('{"vocab_size": 512, "n_positions": 256}')
    card = teacher_card(training_facts(tmp_path), PARTS)
    assert "123,456 parameters (2 layers, 4 heads, 64 wide, vocabulary 512, 256 pos" in card
    assert "5,000 steps of 32 proteins from 1,000 training proteins" in card
    assert "matrices with Muon (rate 0.004), the rest with AdamW (0.003), seed 1, in bf16" in card
    assert "| test | **this model** | 12.18 | 2.500 [2.400, 2.600] |" in card
    assert "[0.200, 0.400], 8 pairs in 5 groups of relatives, each of which counts the" in card
    assert "25.1% of the tokens of `test`; the most\nfrequent one for 5.2%" in card


def test_the_card_of_the_bundled_teacher(small_teacher_dir):
    parts = json.loads((small_teacher_dir / "evaluation.json").read_text())["parts"]
    card = teacher_card(training_facts(small_teacher_dir), parts)
    rows = [line for line in card.splitlines() if line.startswith("| test")]
    assert set(rows) <= set((small_teacher_dir / "README.md").read_text().splitlines())
