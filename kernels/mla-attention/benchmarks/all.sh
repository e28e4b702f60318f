#!/usr/bin/env bash
# All that wants a GPU in one call: the tests of the ops, the benchmark, the tests of whole models.
#
#     bash kernels/mla-attention/benchmarks/all.sh [OUT] [SECONDS] [options of run.py]
#
# It ends within SECONDS (540) and writes to OUT (results): what each of the three printed, results.json and results.md
# of the benchmark, the device and the packages. PYTHON names the interpreter. The tests of whole models are skipped
# where a dependency of mla-convert is missing, which leaves their time to the benchmark. Paths in options of run.py are
# relative to the root of the repository.
# Exit code 1 where a test or a check failed or time ended before the tests did.
set -uo pipefail
mkdir -p "${1:-results}"
out=$(cd "${1:-results}" && pwd)
limit=${2:-540}
options=("${@:3}")
python=${PYTHON:-python}
cd "$(dirname "${BASH_SOURCE[0]}")/../../.." || exit 1
export PYTHONUNBUFFERED=1 PYTHONPATH="$PWD:$PWD/kernels/mla-attention/torch-ext${PYTHONPATH:+:$PYTHONPATH}"
failed=0

# An interrupt leaves pytest the time to say what it has found.
limited() {
    local seconds=$1 log=$2
    shift 2
    if ((seconds < 5)); then
        echo "no time was left for: $*" | tee "$out/$log"
        failed=1
        return
    fi
    timeout --signal=INT --kill-after=5 "$seconds" "$@" 2>&1 | tee "$out/$log" || failed=1
    echo "$log: $SECONDS s of $limit are over"
}

tests() {
    limited "$1" "$2" "$python" -m pytest -q -p no:cacheprovider --durations=5 "$3"
}

{
    nvidia-smi
    "$python" -m pip freeze
} >"$out/machine.txt" 2>&1 || true

whole=0
if "$python" -c "import accelerate, diffusers, huggingface_hub, pydantic, safetensors, scipy, yaml" 2>/dev/null; then
    whole=$((limit / 8))
fi
tests $((limit / 3)) test_ops.txt tests/gpu/test_gpu_ops.py
# The budget ends before the limit does: the last measurement goes on to its end.
rest=$((limit - SECONDS - whole))
limited "$rest" benchmark.txt "$python" kernels/mla-attention/benchmarks/run.py --out "$out" --budget $((rest - 15)) \
    ${options[@]+"${options[@]}"}
if ((whole)); then
    tests $((limit - SECONDS - 5)) test_models.txt tests/gpu/test_gpu_stream.py
fi
exit "$failed"
