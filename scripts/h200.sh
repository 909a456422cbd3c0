#!/usr/bin/env bash
# What docs/results.md needs from one GPU, in three calls of at most ten minutes; everything goes to one folder.
#
#     scripts/h200.sh 1 DATA TOKENIZER OUT      right? and which kernels: gpu_check correct, kernels, block, generate
#     scripts/h200.sh 2 DATA TOKENIZER OUT      speed and memory at 7B, trick by trick
#     scripts/h200.sh 3 DATA TOKENIZER OUT      the peer on the same rows, and where the time goes
#     scripts/h200.sh all DATA TOKENIZER OUT
#
# DATA: a preference file with pictures; TOKENIZER: the base's tokenizer.json. Call 3 needs trl, peft, datasets and
# accelerate where Python finds them. No call has run on a GPU yet.
set -uo pipefail # no -e: a section that fails is a result, and the next one is worth having
call=$1
data=$(realpath "$2")
tokenizer=$(realpath "$3")
mkdir -p "$4"
out=$(realpath "$4")
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SHAPE=${SHAPE:-7b}
export PYTHONUNBUFFERED=1
bench=("$PYTHON" -m bench.training --shape "$SHAPE" --data "$data" --tokenizer "$tokenizer")
peer=("$PYTHON" -m bench.trl_peer --shape "$SHAPE" --data "$data" --tokenizer "$tokenizer" --dtype bfloat16 --objective mdpo)

measure() { # measure NAME SECONDS COMMAND...: its output to the screen and to a file, at most so long
    local name=$1 limit=$2 status
    shift 2
    echo "== $name: $*"
    timeout "$limit" "$@" 2> "$out/$name.err" | tee "$out/$name.txt"
    status=${PIPESTATUS[0]}
    echo "$name: exit status $status" | tee -a "$out/status.txt"
    if [ "$status" -ne 0 ]; then tail -n 20 "$out/$name.err"; fi
}

call_1() {
    for section in correct kernels block generate; do
        measure "check-$section" 150 "$PYTHON" -m bench.gpu_check "$section"
    done
}

call_2() { # each row of the table in a call of its own: what a time-out takes is one row
    measure mdpo-all-on 120 "${bench[@]}" --setting all-on # compiles; the others find it in the compiler's cache
    for setting in reference-live not-compiled from-workers recomputed plain; do
        measure "mdpo-$setting" 45 "${bench[@]}" --setting "$setting"
    done
    measure mdpo-16k 55 "${bench[@]}" --setting all-on --tokens-per-batch 16384
    measure mdpo-one-recomputed 40 "${bench[@]}" --setting recomputed --micro-batch 1
    measure mdpo-longest 40 "${bench[@]}" --setting all-on --longest
    measure dpo 40 "${bench[@]}" --setting all-on --objective dpo
    measure check-memory 80 "$PYTHON" -m bench.gpu_check memory
}

call_3() {
    for round in 1 2; do
        measure "ours-$round" 90 "${bench[@]}" --setting all-on --json
        measure "trl-$round" 60 "${peer[@]}" --micro 1
    done
    measure trl-4 50 "${peer[@]}" --micro 4
    measure trl-1-chunked 50 "${peer[@]}" --micro 1 --chunked-head
    measure trl-4-chunked 50 "${peer[@]}" --micro 4 --chunked-head
    measure trl-1-recomputed 50 "${peer[@]}" --micro 1 --checkpointing
    measure trl-4-recomputed 50 "${peer[@]}" --micro 4 --checkpointing
    measure check-profile 100 "$PYTHON" -m bench.gpu_check profile
}

{
    git rev-parse HEAD
    "$PYTHON" -c "import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
} > "$out/machine.txt" 2>&1
case $call in
    1) call_1 ;;
    2) call_2 ;;
    3) call_3 ;;
    all)
        call_1
        call_2
        call_3
        ;;
    *)
        echo "first argument: 1, 2, 3 or all"
        exit 2
        ;;
esac
grep -h -E "^(PASS|FAIL)" "$out"/check-*.txt | sort | uniq -c | sort -rn > "$out/verdicts.txt" || true
echo "everything is in $out"
