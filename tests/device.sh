#!/usr/bin/env bash
# On a machine with a CUDA GPU, unattended, in at most 7 minutes: the tests that need one, how far each step is from
# the machine's limit, a main job of each script. Without one the CUDA tests are skipped and the rest is made small.
#     bash tests/device.sh [FOLDER]      (default: device-report) what each step printed, its seconds, summary.md
# PYTHON: the interpreter (default python). FASHION: the folder of Fashion-MNIST's four files, where it is not Debian's.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-device-report} python=${PYTHON:-python} fashion=${FASHION:-/usr/share/datasets/fashion-mnist}
mkdir -p "$out"
{ echo "| step | seconds | exit code | last line |"; echo "|---|---|---|---|"; } > "$out/summary.md"

step() {  # NAME SECONDS COMMAND…: what it prints goes to FOLDER/NAME.log, a row to summary.md
    local name=$1 limit=$2 begun=$SECONDS left=$((415 - SECONDS)); shift 2
    [ $((limit = limit < left ? limit : left)) -gt 0 ] || limit=1
    timeout "$limit" "$@" > "$out/$name.log" 2>&1
    local code=$?
    [ $code = 0 ] || failed=1
    local last; last=$(tr '\r' '\n' < "$out/$name.log" | grep . | tail -1 | cut -c1-160)
    echo "| $name | $((SECONDS - begun)) | $code | ${last//|/ } |" | tee -a "$out/summary.md"
}

failed=0
"$python" -c "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else 'no GPU')" | tee "$out/machine.txt"
short=--amp only=""
grep -q "no GPU" "$out/machine.txt" && short=--dry-run only="advaa M=8, digits resnext"
step tests 150 "$python" -m pytest -n 0 -q -s tests/test_cuda.py
step benchmark 170 "$python" tests/benchmark.py --quick --only "$only" --json "$out/benchmark.json"
for script in gretta advaa game_of_noise; do
    step "$script-digits" 60 "$python" $script.py $short --run-dir "$out/runs/$script-digits"
    [ -e "$fashion/train-images-idx3-ubyte.gz" ] || { echo "no Fashion-MNIST in $fashion: left out"; continue; }
    more=""; [ $script = advaa ] && more="--num-train 5000 --epochs 10"
    step "$script-fashion" 90 "$python" $script.py $short --dataset fashion_mnist --data-root "$fashion" $more \
        --run-dir "$out/runs/$script-fashion"
done
for run in "$out"/runs/*; do rm -f "$run"/*.pt "$run"/events*; done
echo "$SECONDS s in all: $out/summary.md"
exit $failed
