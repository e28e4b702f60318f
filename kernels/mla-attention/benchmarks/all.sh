#!/usr/bin/env bash
# All that wants a GPU in one call: the benchmark, then the tests of the ops and those of whole models.
#
#     bash kernels/mla-attention/benchmarks/all.sh [OUT] [SECONDS] [options of run.py]
#
# It ends within SECONDS (590) and writes to OUT (results), nowhere else: what each of the three printed, results.json,
# results.md and tiles.json of the benchmark, the device and the packages. The benchmark measures the tiles, too, unless
# --tiles names a file of them. Where a process of it is lost to the device or to a call that does not end, another one
# goes on without what ran. The tests come last, in a sixth of SECONDS, on several processes where pytest-xdist is
# there; those of whole models have an eighth, or none where a dependency of mla-convert is missing. PYTHON names the
# interpreter (python3). Paths in options of run.py are relative to the root of the repository.
# Exit code 1 where a test or a check failed or time ended before the tests did.
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

# An interrupt leaves pytest the time to say what it has found.
limited() {
    local seconds=$1 log=$2
    shift 2
    if ((seconds < 5)); then
        echo "no time was left for: $*" | tee -a "$out/$log"
        failed=1 code=1
        return
    fi
    timeout --signal=INT --kill-after=5 "$seconds" "$@" 2>&1 | tee -a "$out/$log"
    code=${PIPESTATUS[0]}
    ((code == 0)) || failed=1
    echo "$log: $SECONDS s of $limit are over"
}

tests() {
    limited "$1" "$2" "$python" -m pytest -q -p no:cacheprovider --durations=5 ${parallel[@]+"${parallel[@]}"} "$3"
}

{
    nvidia-smi
    "$python" -m pip freeze
} >"$out/machine.txt" 2>&1 || true

# A process of the tests of ops holds up to 12 GB.
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

# The budget ends before the limit does: the last measurement goes on to its end.
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
