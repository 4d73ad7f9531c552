#!/bin/bash
# Encode a run with Slurm: one job plans it, an array of jobs makes its parts, and a last job finishes it.
#
#     SBATCH_OPTIONS="--partition=gpu --gpus=1 --cpus-per-task=8 --mem=16G --time=12:00:00" \
#         deploy/slurm/encode.sh 40 --pipeline splade-mini --corpus /shared/corpus.jsonl --out /shared/runs/corpus
#
# 40 is the number of parts; the rest are arguments of `sparse-ingest encode`, without --plan-only, --part and --finish.
# Corpus, model and run are in folders that all nodes share, or in a store. All jobs need the same kind of device,
# because the first one decides --dtype auto. `sparse-ingest` must be on the PATH, which sbatch passes on.
#
# When a job has failed or was stopped by its time limit, run the same command again: finished shards are checked and
# kept, and so are the finished windows of an unfinished shard. To make only some parts again:
#
#     sbatch --array=3,7 $SBATCH_OPTIONS deploy/slurm/encode.sh part 40 --pipeline ...
#
# The last job has exit code 3 if bad documents were skipped, which Slurm shows as FAILED; the run is complete.

# SIGTERM one minute before the time limit ends `encode` after its window. A preempted job starts again.
#SBATCH --job-name=sparse-ingest
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --signal=B:TERM@60
#SBATCH --requeue
#SBATCH --open-mode=append

set -euo pipefail

usage="Usage: $0 PARTS ENCODE_ARGUMENTS..., such as: $0 40 --pipeline splade-mini --corpus C --out RUN"
step=${1:?$usage}
shift
case $step in
plan) exec sparse-ingest encode "$@" --plan-only ;;
part)
    # Not SLURM_ARRAY_TASK_COUNT, which is smaller than the number of parts when only some of them run again.
    parts=$1
    shift
    exec sparse-ingest encode "$@" --part "$SLURM_ARRAY_TASK_ID/$parts"
    ;;
finish) exec sparse-ingest encode "$@" --finish ;;
esac

[[ $step =~ ^[1-9][0-9]*$ && $# -gt 0 ]] || { echo "$usage" >&2; exit 2; }
read -ra options <<<"${SBATCH_OPTIONS:-}"
submit() { sbatch --parsable --kill-on-invalid-dep=yes "${options[@]}" "$@" | cut -d ';' -f 1; }

plan=$(submit "$0" plan "$@")
parts=$(submit --dependency="afterok:$plan" --array="1-$step" "$0" part "$step" "$@")
finish=$(submit --dependency="afterok:$parts" "$0" finish "$@")
echo "Submitted: plan $plan, $step parts $parts, finish $finish. squeue --me shows them."
