#!/usr/bin/env bash
# Everything a GPU is wanted for, in about nine minutes: is it right, is it safe, how fast is it?
#
#   bash bench/gpu.sh [RESULTS]      default: bench/results/<device>
#
# Each step has its own limit and its own log, and a step that fails stops no other; the last lines
# say which steps passed. Needs torch, triton, pytest and hypothesis, and nothing of the trainer.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH=kernels PYTHONUNBUFFERED=1
unset TRITON_INTERPRET
python=${PYTHON:-python3}
device=$("$python" -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))') || {
    echo "bench/gpu.sh: no CUDA device" >&2
    exit 2
}
results=${1:-bench/results/$device}
mkdir -p "$results"
summary=()

step() { # step NAME SECONDS COMMAND...
    local name=$1 limit=$2 code=0 began=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$results/$name.log" 2>&1 || code=$?
    summary+=("$(printf '%-12s exit %3d  %4d s' "$name" "$code" $((SECONDS - began)))")
    echo "== ${summary[-1]}"
    tail -n 12 "$results/$name.log"
}

# tests/conftest.py builds models with the trainer; the kernels' tests need none of it
tests=("$python" -m pytest -q -p no:cacheprovider --confcutdir=tests/kernels -m "not slow")
step tests 120 "${tests[@]}" tests/kernels/test_gpu.py
step first 90 "$python" bench/first_measurements.py --out "$results"
for hidden in 1536 2048 3584 4096; do
    step "loss-d$hidden" 40 "$python" bench/loss.py --device cuda --dtype bfloat16 --vocab 151936 \
        --tokens 8192 --hidden "$hidden" --repeats 5 --out "$results" --name "loss-d$hidden"
done
for tokens in 512 2048; do
    step "loss-t$tokens" 30 "$python" bench/loss.py --device cuda --dtype bfloat16 --vocab 151936 \
        --tokens "$tokens" --hidden 2048 --repeats 5 --out "$results" --name "loss-t$tokens"
done
step random 30 "$python" bench/loss.py --device cuda --dtype bfloat16 --vocab 151936 --tokens 2048 \
    --hidden 2048 --inputs random --repeats 5 --out "$results" --name loss-random
if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "${tests[@]}" tests/kernels/test_gpu.py -k reduced
    done
else
    summary+=("memcheck, racecheck: compute-sanitizer is not there")
fi
printf '%s\n' "" "${summary[@]}"
