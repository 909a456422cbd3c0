#!/usr/bin/env bash
# What docs/results.md needs from one GPU, in three calls of at most ten minutes; everything goes to one folder.
#
#     scripts/h200.sh 1 DATA TOKENIZER OUT      right? and which kernels: gpu_check correct, kernels, block, generate
#     scripts/h200.sh 2 DATA TOKENIZER OUT      speed and memory at 7B, trick by trick
#     scripts/h200.sh 3 DATA TOKENIZER OUT      the peer on the same rows, and where the time goes
#     scripts/h200.sh all DATA TOKENIZER OUT
#
# DATA: a preference file with pictures; TOKENIZER: the base's tokenizer.json. OUT gets call-N.log, machine.txt,
# verdicts.txt and status.txt, where 124 and 137 mean that it took too long, none that no time was left for it.
# Call 3 needs trl, peft, datasets and accelerate where Python finds them. No call has run on a GPU yet.
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

measure() { # measure NAME SECONDS COMMAND...: runs it, at most so long and never past the call's end
    local name=$1 limit=$2 left=$((call_ends - SECONDS)) status=none
    shift 2
    echo "== $name: $*"
    if [ "$left" -ge 20 ]; then
        timeout --kill-after 5 "$((limit < left ? limit : left))" "$@"
        status=$?
    fi
    echo "$name: exit status $status" | tee -a "$out/status.txt"
}

call_1() {
    measure check-correct 210 "$PYTHON" -m bench.gpu_check correct
    measure check-kernels 90 "$PYTHON" -m bench.gpu_check kernels
    measure check-block 120 "$PYTHON" -m bench.gpu_check block
    measure check-generate 150 "$PYTHON" -m bench.gpu_check generate
}

call_2() { # each row of the table in a process of its own: what a time-out takes is one row
    measure mdpo-all-on 120 "${bench[@]}" --setting all-on # compiles; the others find it in the compiler's cache
    measure mdpo-one-recomputed 45 "${bench[@]}" --setting recomputed --micro-batch 1
    measure check-memory 120 "$PYTHON" -m bench.gpu_check memory
    measure mdpo-16k 60 "${bench[@]}" --setting all-on --tokens-per-batch 16384
    for setting in plain not-compiled reference-live from-workers recomputed; do
        measure "mdpo-$setting" 60 "${bench[@]}" --setting "$setting"
    done
    measure dpo 45 "${bench[@]}" --setting all-on --objective dpo
    measure mdpo-longest 45 "${bench[@]}" --setting all-on --longest
}

call_3() {
    measure ours-1 120 "${bench[@]}" --setting all-on --json
    measure trl-1 80 "${peer[@]}" --micro 1
    measure trl-4-chunked 60 "${peer[@]}" --micro 4 --chunked-head
    measure check-profile 110 "$PYTHON" -m bench.gpu_check profile
    measure trl-4 60 "${peer[@]}" --micro 4
    measure trl-1-chunked 60 "${peer[@]}" --micro 1 --chunked-head
    measure ours-again 60 "${bench[@]}" --setting all-on --json
    measure trl-1-again 60 "${peer[@]}" --micro 1
    measure trl-1-recomputed 60 "${peer[@]}" --micro 1 --checkpointing
    measure trl-4-recomputed 60 "${peer[@]}" --micro 4 --checkpointing
}

run() { # run N: call N, what it prints to the screen and to one file, over within ten minutes
    call_ends=$((SECONDS + 570))
    "call_$1" 2>&1 | tee "$out/call-$1.log"
}

{
    git rev-parse HEAD
    "$PYTHON" -c "import platform, torch; print(platform.python_version(), torch.__version__, torch.version.cuda)"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
} > "$out/machine.txt" 2>&1
case $call in
    1 | 2 | 3) run "$call" ;;
    all) for number in 1 2 3; do run "$number"; done ;;
    *)
        echo "first argument: 1, 2, 3 or all"
        exit 2
        ;;
esac
grep -h -E "^(PASS|FAIL)" "$out"/call-*.log > "$out/verdicts.txt" || true
echo "everything is in $out"
