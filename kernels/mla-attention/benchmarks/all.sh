#!/usr/bin/env bash
# Run everything that needs a GPU in one call: the benchmark, then the tests of the ops, then those of whole models.
#
#     bash kernels/mla-attention/benchmarks/all.sh [OUT] [SECONDS] [options of run.py]
#
# It ends within SECONDS (590) and writes only to OUT (results): the output of the three, results.json, results.md and
# tiles.json of the benchmark, and the device and installed packages. The benchmark also measures tiles unless --tiles
# names a file of them. If a benchmark process is lost to the device or to a call that hangs, another one continues
# without the call that failed. The tests come last. Those of the ops take a sixth of SECONDS, in several processes if
# pytest-xdist is installed; those of whole models take an eighth, or none if a dependency of mla-convert is missing.
# PYTHON names the interpreter (python3). Paths in options of run.py are relative to the root of the repository.
# The exit code is 1 if a test or a check failed, or if time ran out before the tests finished.
set -uo pipefail
mkdir -p "${1:-results}"
out=$(cd "${1:-results}" && pwd)
limit=${2:-590}
options=("${@:3}")
python=${PYTHON:-python3}
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels/mla-attention/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
failed=0 code=0
rm -f "$out"/benchmark.txt "$out"/test_ops.txt "$out"/test_models.txt

# SIGINT lets pytest report what it has found.
limited() {
    local seconds=$1 log=$2
    shift 2
    if ((seconds < 5)); then
        echo "no time left for: $*" | tee -a "$out/$log"
        failed=1 code=1
        return
    fi
    timeout --signal=INT --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$out/$log"
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    echo "$log: $SECONDS of $limit s used"
}

tests() {
    limited "$1" "$2" "$python" -m pytest -q -p no:cacheprovider --durations=5 ${parallel[@]+"${parallel[@]}"} "$3"
}

{
    nvidia-smi
    "$python" -m pip freeze
} >"$out/machine.txt" 2>&1 || true

# A test process of the ops takes up to 12 GB of GPU memory.
parallel=()
if "$python" -c "import xdist" 2>/dev/null; then
    memory=$(nvidia-smi --query-gpu=memory.total --format=csv,noheader,nounits 2>/dev/null | head -n 1)
    workers=$((${memory:-144000} / 12000))
    parallel=(-n $((workers > 12 ? 12 : workers > 1 ? workers : 1)))
fi
whole=0
if "$python" -c "import accelerate, diffusers, huggingface_hub, pydantic, safetensors, scipy, yaml" 2>/dev/null; then
    whole=$((limit / 8))
fi

# The budget ends before the limit, because the last measurement still runs to its end.
again=()
while :; do
    rest=$((limit - SECONDS - whole - limit / 6))
    limited "$rest" benchmark.txt "$python" kernels/mla-attention/benchmarks/run.py --out "$out" \
        --budget $((rest - 15)) ${again[@]+"${again[@]}"} ${options[@]+"${options[@]}"}
    ((code == 3 && rest > 60)) || break
    again=(--resume)
done
tests $((limit - SECONDS - whole - 5)) test_ops.txt tests/gpu/test_gpu_ops.py
if ((whole)); then
    parallel=()
    tests $((limit - SECONDS - 5)) test_models.txt tests/gpu/test_gpu_stream.py
fi
exit "$failed"
