#!/usr/bin/env bash
# Proves, tunes and times the Triton kernels on this machine's GPU, in under nine minutes.
#
#   bench/gpu.sh [--out DIR] [--rehearse] [--only STAGE,STAGE...]
#
# Writes at most eight files to DIR, to $OUT where that is set, else to bench/results/gpu-run; the summary comes last. Each stage is a
# process with a time limit of its own, so that a failure or a hang takes nothing else along. --rehearse goes through all of them
# without a GPU: Triton's interpreter, tiny sizes. Stage by stage: bench/gpu/.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
out=${OUT:-bench/results/gpu-run} rehearse='' only=''
while [ $# -gt 0 ]; do
    case $1 in
        --out) out=$2; shift 2 ;;
        --rehearse) rehearse=--rehearse; export TRITON_INTERPRET=1 CUDA_VISIBLE_DEVICES=; shift ;;
        --only) only=,$2,; shift 2 ;;
        *) echo "gpu.sh: unknown argument $1" >&2; exit 2 ;;
    esac
done
python=${PYTHON:-$(command -v python3 || command -v python)}
mkdir -p "$out" || exit 1
[ "$only" ] || rm -f "$out"/{run.json,summary.txt,log.txt,configs.txt,profile.txt,speed.png,roofline.png}

total=530 reserve=25 # seconds of everything; what the plots and the summary keep for themselves
stages='environment:20 correctness:110 roofline:20 sweep:125 core:110 models:105 profile:35 plots:20'
failed=0
for entry in $stages; do
    stage=${entry%:*} limit=${entry#*:}
    [ -z "$only" ] || [[ $only == *,$stage,* ]] || continue
    left=$((total - SECONDS))
    [ "$stage" = plots ] || left=$((left - reserve))
    [ -z "$rehearse" ] || limit=120
    [ "$limit" -le "$left" ] || limit=$left
    [ "$limit" -ge 5 ] || limit=5
    began=$SECONDS
    timeout -k 5 "$limit" "$python" bench/gpu "$stage" --out "$out" --limit "$limit" $rehearse >>"$out/log.txt" 2>&1
    status=$?
    [ $status = 0 ] || failed=1
    "$python" -S bench/gpu record --out "$out" --ended "$stage:$status:$((SECONDS - began))" || failed=1
    echo "$stage: status $status, $((SECONDS - began)) s"
done
"$python" -S bench/gpu summary --out "$out" || failed=1
exit $failed
