#!/bin/bash
# Started by srun once on each node: Accelerate's launcher for the node's GPUs. Arguments: a script and its options.
set -euo pipefail
processes=$((SLURM_NNODES * PROCESSES_PER_NODE))
launch=(accelerate launch --num_processes "$processes")
if ((processes == 1)); then
    launch+=(--config_file hub_configs/accelerate/single_gpu.yaml)
else
    launch+=(--config_file hub_configs/accelerate/multi_node.yaml --num_machines "$SLURM_NNODES")
    launch+=(--machine_rank "$SLURM_NODEID" --main_process_ip "$MAIN_ADDRESS" --main_process_port "$MAIN_PORT")
fi
exec "${launch[@]}" --no_python bash hub_configs/slurm/process.sh "$@"
