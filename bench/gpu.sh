#!/usr/bin/env bash
# Everything a GPU is wanted for, in about nine minutes, what decides most first.
#
#   bash bench/gpu.sh OUT [SECONDS=520]     the stages share them in fixed proportions
#
# Leaves results.jsonl (a line a measurement, written at once), log.txt and machine.txt in OUT, and
# tables.md, which `report_gpu.py` makes of them. A stage that fails or outstays its time stops no
# other. Needs torch, triton and pytest; peers and the trainer are measured where they are installed,
# or come as wheels of `bench/wheels.sh` in the folder WHEELS.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?the folder of the results} limit=${2:-520}
mkdir -p "$out"
export PYTHONPATH=kernels:.:${PYTHONPATH:-} PYTHONUNBUFFERED=1
export CUBLAS_WORKSPACE_CONFIG=:4096:8 TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.tcache}
unset TRITON_INTERPRET
python=${PYTHON:-python3}
read -ra options <<<"${BENCH_OPTIONS:-}" # of gpu.py, such as --small
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
if [[ -n ${WHEELS:-} ]]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$scratch/site" \
        "$WHEELS"/*.whl && PYTHONPATH=$scratch/site:$PYTHONPATH
fi

stage() { # stage NAME SECONDS COMMAND...; an interrupt first, so that Python says what it knows
    local name=$1 seconds=$2 code=0 began=$SECONDS left=$((limit - SECONDS - 10))
    shift 2
    if ((left < 20)); then
        echo "== $name: no time left" | tee -a "$out/log.txt"
        return
    fi
    seconds=$((seconds < left ? seconds : left))
    timeout -s INT -k 10 "$seconds" "$@" >>"$out/log.txt" 2>&1 || code=$?
    echo "== $name: exit $code after $((SECONDS - began)) s" | tee -a "$out/log.txt"
}

of() { echo $(($1 * limit / 520)); } # of 520 seconds

measure() { # measure SECONDS STAGE...
    local seconds
    seconds=$(of "$1")
    shift
    stage "$*" "$seconds" "$python" bench/gpu.py "$@" --out "$out" --seconds $((seconds - 10)) \
        "${options[@]}"
}

{
    nvidia-smi
    "$python" -m pip list 2>/dev/null
} >"$out/machine.txt" 2>&1
measure 150 ceilings correct safe
measure 120 ratios tiles
measure 80 rows
# tests/conftest.py builds models with the trainer; the kernels' tests need none of it
stage tests "$(of 90)" "$python" -m pytest -q -x --tb=line -p no:cacheprovider --confcutdir=tests/kernels \
    -m gpu tests/kernels/test_gpu.py -k "reduced or random"
if command -v compute-sanitizer >/dev/null; then
    # our kernels alone: with PyTorch's own under its eye it would take many minutes
    stage memcheck "$(of 60)" compute-sanitizer --tool memcheck --error-exitcode 9 \
        --kernel-regex kns=_kernel "$python" bench/gpu.py safe --small --out "$scratch" --seconds 45
fi
measure 120 trainer
touch "$out/results.jsonl"
"$python" bench/report_gpu.py "$out/results.jsonl" >"$out/tables.md" 2>>"$out/log.txt"
cat "$out/tables.md"
