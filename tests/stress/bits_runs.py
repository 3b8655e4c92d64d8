"""The short runs whose bits ``tests/stress/bits.py`` compares.

A run is a list of command lines of ``scripts/``. They start in a directory of the run's own; beside
it are the bundled ``data``, a few of its proteins in ``parts``, and ``variants.csv``. A command
after ``SIGTERM@N`` is stopped at step N. What stands below ``disturbed`` must then equal what
stands below ``undisturbed``.
"""

from __future__ import annotations

TRAIN = (
    "train --data ../parts --train_size_prop 1 --max_length 96 --batch_size 4 --max_steps 4 "
    "--eval_steps 2 --save_steps 2 --validation_proteins 4 --warmup_steps 1 --precision fp32 "
    "--device cpu --cache_dir ../cache --skip_teacher_check "
)
DISTIL = TRAIN + "--teacher_model ../data/small_teacher --n_layer 1 --n_head 2 --n_embd 32 "
BOTH = "--use_uncertainty_weighting --use_calibration_smoothing "
GRID = (
    "ablation --teacher_model ../data/small_teacher --data ../parts --max_steps 4 --device cpu "
    "--cache_dir ../cache "
)
TUNING = (
    GRID + "--grid synergy-tuning --arms baseline both_controlled weight_matched --sizes s11 "
    "--seeds 7 --rates 0.002 0.008 "
)


def in_both_forms(flags: str) -> list[str]:
    """Return a training with the fused loss and one with the reference loss."""
    return [f"{DISTIL}{flags} --loss_impl {x} --output_dir {x}" for x in ("fused", "reference")]


RUNS: dict[str, list[str]] = {
    "forward_kl": in_both_forms(""),
    "published": in_both_forms(BOTH + "--dropout 0.1"),
    "mean_one_confident": in_both_forms(BOTH + "--weighting mean_one --smoothing confident"),
    "inverse_constant": in_both_forms(BOTH + "--weighting inverse --smoothing constant"),
    "matched_matched": in_both_forms(BOTH + "--weighting matched --smoothing matched"),
    "permuted": in_both_forms("--use_uncertainty_weighting --weighting permuted"),
    "reverse_kl": in_both_forms("--use_uncertainty_weighting --divergence reverse_kl"),
    "jsd": in_both_forms(BOTH + "--divergence jsd --divergence_weight 0.3"),
    "skew_kl": in_both_forms(BOTH + "--divergence skew_kl --divergence_weight 0.1"),
    "packed": [
        f"{DISTIL}{BOTH}--batching packed --gradient_accumulation_steps 2 --output_dir fp32",
        f"{DISTIL}{BOTH}--batching packed --precision bf16 --output_dir bf16",
    ],
    "padded": [
        f"{DISTIL}{BOTH}--batching padded --lr_schedule cosine --max_steps -1 "
        "--num_train_epochs 0.06 --output_dir student"
    ],
    "bf16": in_both_forms(BOTH + "--precision bf16"),
    "teacher_cut": [
        f"{DISTIL}--init_from teacher --temperature 1 --alpha 0 --n_layer 2 --n_head 4 --n_embd 64 "
        "--output_dir student"
    ],
    "fine_tuning": [
        f"{TRAIN}--init_from ../data/small_teacher --alpha 1 --learning_rate 1e-4 "
        "--output_dir student"
    ],
    "guards": [
        f"{DISTIL}--learning_rate 0.5 --eval_steps 1 --save_steps 1 --max_steps 12 "
        "--early_stopping 1 --output_dir early_stopping",
        f"{DISTIL}--max_steps 40 --eval_steps 40 --save_steps 40 --skip_loss_spikes 1.01 "
        "--output_dir spikes",
    ],
    "teacher_cache": [
        "cache_teacher --teacher_model ../data/small_teacher --data ../parts --train_size_prop 1 "
        "--max_length 96 --validation_proteins 4 --precision fp32 --device cpu "
        "--cache_dir ../cache --teacher_cache cache",
        f"{DISTIL}{BOTH}--teacher_cache cache --output_dir captured_before",
        f"{DISTIL}{BOTH}--precision bf16 --teacher_cache cache --output_dir captured_on_the_way",
    ],
    "resume": [
        command
        for name, flags in {
            "bucketed": BOTH + "--gradient_accumulation_steps 2 --max_steps 7 --dropout 0.1",
            "packed": BOTH + "--batching packed --weighting mean_one --precision bf16",
        }.items()
        for command in (
            f"{DISTIL}{flags} --output_dir {name}/undisturbed",
            f"SIGTERM@3 {DISTIL}{flags} --output_dir {name}/disturbed",
            f"{DISTIL}{flags} --output_dir {name}/disturbed --resume",
        )
    ],
    "grid": [
        TUNING + "--results undisturbed/results --work undisturbed/work",
        "SIGTERM@3 " + TUNING + "--results disturbed/results --work disturbed/work",
        TUNING + "--results disturbed/results --work disturbed/work",
        TUNING + "--results undisturbed/results --work undisturbed/work --choose",
        TUNING + "--results disturbed/results --work disturbed/work --choose",
        GRID + "--grid owner --results owner/results --work owner/work",
    ],
    "evaluation": [
        f"{DISTIL}--init_from teacher --n_layer 3 --n_head 4 --n_embd 256 --output_dir student",
        "evaluate --student_model student --compute_ece --bootstrap 50 --batch_size 8 "
        "--device cpu --cache_dir ../cache --output test.json --per_protein test.parquet",
        "evaluate --student_model student --split validation --max_proteins 8 --bootstrap 50 "
        "--num_samples 4 --generation_metrics --device cpu --cache_dir ../cache "
        "--output generation.json",
    ],
    "generation": [
        "generate --model ../data/small_teacher --num_sequences 6 --max_length 60 "
        "--allow_unfinished --seed 3 --device cpu --rank_by_perplexity --output ranked.fasta",
        "generate --model ../data/small_teacher --num_sequences 3 --max_length 120 --prompt MKT "
        "--top_p 0.9 --temperature 0.8 --device cpu --output prompted.fasta",
    ],
    "scoring": [
        f"{DISTIL}--output_dir student",
        "score --model student --teacher_model ../data/small_teacher --input ../variants.csv "
        "--bootstrap 50 --device cpu --output variants.csv --correlations spearman.json",
        "score --model ../data/small_teacher --input ../parts/test.fasta.gz --device cpu "
        "--output proteins.csv",
    ],
}
