#!/usr/bin/env bash
# Everything for the owner of a GPU, in one command and under ten minutes: build, self-test, op
# tests, compute-sanitizer, micro-benchmarks, a decode step, charts. Nothing is installed into your
# environment, which needs torch with CUDA, triton, transformers, typer, rich, pytest, matplotlib.
#
#   benchmarks/gpu.sh                           # results in benchmarks/results/<name of the GPU>/
#   KVCOMP_GPU_BUILD=plain benchmarks/gpu.sh
#
#   KVCOMP_GPU_BUILD  isolated (default): builds as `pip install .` does; plain: without isolation,
#                     with the build tools of your environment; installed: takes what is installed
#   KVCOMP_GPU_OUT    where the results go
#   KVCOMP_GPU_DRY=1  the same steps on the CPU, with toy inputs and no build: does all of it run?
#   PYTHON            default python3
#
# A step that fails or runs out of time does not stop the others; the exit code is 1, and the last
# lines name it. A log of each step is in logs/.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
dry=${KVCOMP_GPU_DRY:-}
build=${KVCOMP_GPU_BUILD:-isolated}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 2 # at the root, Python would find the sources before what was built

if [ -n "$dry" ]; then
  gpu="dry run" device=cpu smoke=--smoke kernels=cpu build=installed
else
  gpu=$("$python" -c 'import torch; print(torch.cuda.get_device_name())') || {
    echo "benchmarks/gpu.sh: torch sees no GPU (KVCOMP_GPU_DRY=1 runs the steps without)" >&2
    exit 2
  }
  device=cuda smoke='' kernels='((cuda and not cuda-host) or triton)'
fi
case $build in isolated | plain | installed) ;; *)
  echo "benchmarks/gpu.sh: KVCOMP_GPU_BUILD: expected isolated, plain or installed, got $build" >&2
  exit 2
  ;;
esac
name=$(tr '[:upper:]' '[:lower:]' <<<"${gpu#NVIDIA }" | tr -cs 'a-z0-9\n' '-')
out=${KVCOMP_GPU_OUT:-$root/benchmarks/results/$name}
mkdir -p "$out/logs" && out=$(cd "$out" && pwd) || exit 2

failed=()
# step NAME SECONDS COMMAND...: runs it with its output here and in logs/NAME.txt.
step() {
  local name=$1 limit=$2 began=$SECONDS
  shift 2
  [ -n "$dry" ] && limit=$((limit * 10)) # a machine without a GPU may be a slow one
  printf '\n=== %s  [%ss]\n' "$name" "$SECONDS"
  timeout "$limit" "$@" 2>&1 | tee "$out/logs/$name.txt"
  local code=${PIPESTATUS[0]}
  [ "$code" = 0 ] && return
  [ "$code" = 124 ] && echo "stopped after $((SECONDS - began)) s"
  failed+=("$name")
}

versions() {
  date -u +%Y-%m-%dT%H:%MZ
  echo "commit $(git -C "$root" describe --always --dirty --abbrev=10 2>/dev/null || echo unknown)"
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv
  nvcc --version | tail -2
  "$python" -m pip list 2>/dev/null |
    grep -iE '^(torch|triton|transformers|numpy|flash|flashinfer|nvidia-cud)'
  true # what is not there has said so
}
export -f versions
export root python
step versions 60 bash -c versions

if [ "$build" != installed ]; then
  options=(--no-deps --target "$work/site")
  [ "$build" = plain ] && options+=(--no-build-isolation)
  KVCOMP_CUDA=require step "build-$build" 240 "$python" -m pip install "${options[@]}" "$root"
  if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
  fi
  export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
fi

# One element, odd sizes and rows of different lengths, for every kernel: 16-bit K and V go through
# the tensor cores, and what has none is float32.
small="$kernels and (one- or odd or ragged) and (float32 or bfloat16)"
op_tests() { # CASES PREFIX...
  local cases=$1
  shift
  "$@" "$python" -m pytest -q -p no:cacheprovider -c "$root/pyproject.toml" \
    "$root/tests/test_ops.py" -k "test_op and $cases"
}
# The ops divided among as many processes as there are cores: what Triton compiles takes longest.
all_ops() { # CASES
  local cores parts
  cores=$(nproc)
  parts=$("$python" - "$cores" <<<'import sys
from kvcomp.ops import OPS
names, parts = [f"{name}-" for name in OPS], int(sys.argv[1])
print(*(" or ".join(names[i::parts]) for i in range(min(parts, len(names)))), sep="\n")') || return
  xargs -P "$cores" -d '\n' -I{} bash -c 'op_tests "({}) and $0" || [ $? = 5 ]' "$1" <<<"$parts"
}
export -f op_tests all_ops # 5: a part without such cases
if [ -n "$dry" ]; then
  step op-tests 120 bash -c 'all_ops "$0"' "$small"
else
  step op-tests 200 bash -c 'all_ops "$0"' "$kernels"
  if command -v compute-sanitizer >/dev/null; then
    # Without torch's pool, so that every tensor has an end that can be overrun.
    export PYTORCH_NO_CUDA_MEMORY_CACHING=1
    for tool in memcheck racecheck; do
      step "$tool" 120 bash -c 'op_tests "$0" "$@"' "$small and not triton" \
        compute-sanitizer --tool "$tool" --error-exitcode 1
    done
    unset PYTORCH_NO_CUDA_MEMORY_CACHING
  else
    echo "no compute-sanitizer here: it comes with the CUDA toolkit"
  fi
fi

# Triton has compiled for the op tests what all its cases use.
step selftest 120 "$python" -m kvcomp info --selftest

bench() { # NAME SECONDS SCRIPT OPTIONS...
  local name=$1 limit=$2 script=$3
  shift 3
  step "$name" "$limit" "$python" "$root/benchmarks/$script" --device "$device" $smoke \
    --json "$out/$name.json" "$@"
}
sizes=(--dtype bf16 --tokens 4096 16384 65536 --batch 1 16 --baseline-budget 0.3)
bench ops-attention 120 bench_ops.py "${sizes[@]}" \
  --op decode_attention append_attention second_turn merge_states
bench ops-latent 40 bench_ops.py --op latent_attention "${sizes[@]}"
bench ops-codes 60 bench_ops.py --op quantize_rows hadamard eight_bits "${sizes[@]}"
bench ops-pages 40 bench_ops.py --op page_scores select_pages attend_and_select store_slots "${sizes[@]}"
bench ops-eviction 50 bench_ops.py "${sizes[@]}" \
  --op attention_hits recurrence_update select_victims compact_kv rotate_keys lazy_eviction
bench ops-retrieval 60 bench_ops.py "${sizes[@]}" \
  --op kmeans query_similarity segment_boundaries store_segments unit_scores select_units fetch_rows
bench ops-overhead 20 bench_ops.py --op overhead
model=(--shape r1-distill-qwen-1.5b)
bench decode 80 bench_decode.py "${model[@]}" --tokens 4096 16384 --seconds 8
# The middles of five equal parts of 18K tokens: what a generation of that length sees.
bench decode-graph 80 bench_decode.py --part graph "${model[@]}" --batch 64 --rounds 16 \
  --tokens 1843 5530 9216 12902 16589

shopt -s nullglob
measured=("$out"/ops-*.json "$out/decode.json")
step plots 60 "$python" "$root/benchmarks/plot.py" "${measured[@]}" --out "$out"

printf '\n=== %s s; results in %s\n' "$SECONDS" "$out"
if [ ${#failed[@]} -gt 0 ]; then
  echo "FAILED: ${failed[*]}"
  exit 1
fi
