# Sourced by the recipes: how to start the script on this machine, in the array $launch.
#
#   "${launch[@]}" "$project/finetune_visualglm.py" …
#
# With GPUs it is the deepspeed launcher, on all of them or on those in CUDA_VISIBLE_DEVICES, and on other machines too
# where HOSTFILE names a DeepSpeed hostfile. Without a GPU it is one plain process.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$project/.venv" ]; then
    export PATH="$project/.venv/bin:$PATH"
fi
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

if nvidia-smi -L > /dev/null 2>&1 && [ "${CUDA_VISIBLE_DEVICES-all}" != "" ]; then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    launch=(deepspeed --log_level warning --master_port "$port")
    if [ -n "${HOSTFILE:-}" ]; then launch+=(--hostfile "$HOSTFILE"); fi
else
    launch=(python)
fi
