#!/bin/bash
# Started by Accelerate once for each process: rank 0 leaves its process id in $STOP_FILE (see run_and_requeue), then
# the training takes this process over.
set -euo pipefail
if [[ ${RANK:-0} == 0 ]]; then
    echo $$ >"$STOP_FILE"
fi
exec python "$@"
