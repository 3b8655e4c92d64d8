#!/usr/bin/env bash
# From a fresh clone to a distilled student and ten new proteins, on a CPU, without a model hub:
# installs into .venv, distils the bundled teacher on the bundled proteins, evaluates the student
# on held-out proteins, and generates sequences. Results go to quickstart/.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements.txt

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=.venv/bin/python
out=quickstart
if [ -e "$out" ]; then
    echo "$out/ is there already, from an earlier run: remove it or rename it, then start again" >&2
    exit 2
fi
mkdir "$out"
started=$SECONDS

echo
echo "== 1/3 distil: data/small_teacher into a student of 26 % of its size, cut from it to begin with"
"$python" scripts/train.py --teacher_model data/small_teacher --data data/proteins \
    --n_layer 4 --n_head 4 --n_embd 128 --train_size_prop 1.0 --batch_size 4 \
    --recipe recommended --lr_schedule linear --learning_rate 2e-3 \
    --max_steps 1200 --eval_steps 400 --save_steps 1200 --validation_proteins 200 \
    --cache_dir "$out/cache" --output_dir "$out/student"

echo
echo "== 2/3 evaluate: student and teacher on new members of the families in training"
"$python" scripts/evaluate.py --student_model "$out/student" --max_proteins 500 \
    --num_samples 20 --compute_ece --output "$out/evaluation.json"

echo
echo "== 3/3 generate: ten proteins from the student, and the family that each belongs to"
"$python" scripts/generate.py --model "$out/student" --num_sequences 10 --min_length 40 \
    --max_length 300 --profiles data/proteins/families.hmm.gz --output "$out/generated.fasta"

echo
echo "done in $((SECONDS - started)) s after installation"
echo "  student     $out/student           a GPT-2 checkpoint, with run.json and metrics.jsonl"
echo "  evaluation  $out/evaluation.json   every figure with its 95 % interval"
echo "  proteins    $out/generated.fasta   ten sequences with their perplexity and family"
