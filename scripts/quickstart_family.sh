#!/usr/bin/env bash
# From 50 members of a protein family to ranked candidates and a page, on a CPU, without a model hub:
# installs into .venv, takes a family that the bundled teacher has not seen, adapts the teacher to
# it, distils a specialist and samples candidates. Results go to quickstart_family/.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
make_environment requirements-family.txt

export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python=.venv/bin/python
out=quickstart_family
family="${1:-Q601U1}"
members=data/proteins/test_new.fasta.gz
if [ ! -e "$out" ]; then
    mkdir "$out"
    # The first 50 members; the headers say which family a protein is of.
    gzip -dc "$members" | awk -v family="family=$family" \
        '/^>/ { taken = ($2 == family) && ++count <= 50 } taken' > "$out/$family.fasta"
fi
if [ ! -s "$out/$family.fasta" ]; then
    echo "$members has no family $family: see its headers, or remove $out/" >&2
    exit 2
fi
started=$SECONDS

"$python" scripts/specialise.py --family "$out/$family.fasta" --model data/small_teacher \
    --n_layer 2 --n_head 4 --n_embd 176 --cache_dir "$out/cache" --output_dir "$out/$family"

echo
echo "done in $((SECONDS - started)) s after installation"
echo "  page        $out/$family/page.html"
echo "  candidates  $out/$family/candidates/candidates.fasta   the best first"
echo "  models      $out/$family/adapted, $out/$family/specialist"
