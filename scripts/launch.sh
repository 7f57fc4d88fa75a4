# Sourced by the recipes: how to start the script on this machine, in the array $launch, with which numbers, and what to
# evaluate on: a tenth of the rows, in the array $held_out, unless the flags that follow name something else.
#
#   "${launch[@]}" "$project/finetune_visualglm.py" "${held_out[@]}" $numbers … "$@"
#
# With GPUs it is the deepspeed launcher, on all of them or on those in CUDA_VISIBLE_DEVICES, and on other machines too
# where HOSTFILE names a DeepSpeed hostfile. Without a GPU it is one plain process, in bfloat16 where the CPU multiplies
# such matrices by itself, several times faster than float32 ones.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$project/.venv" ]; then
    export PATH="$project/.venv/bin:$PATH"
fi
numbers=--fp16
held_out=(--holdout 0.1)
case " $* " in *" --valid-data"* | *" --holdout"*) held_out=() ;; esac
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

if nvidia-smi -L > /dev/null 2>&1 && [ "${CUDA_VISIBLE_DEVICES-all}" != "" ]; then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    launch=(deepspeed --log_level warning --master_port "$port")
    if [ -n "${HOSTFILE:-}" ]; then launch+=(--hostfile "$HOSTFILE"); fi
else
    launch=(python)
    if grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null; then
        numbers=--bf16
        echo "No GPU found: training on the CPU in bfloat16, for which it has instructions."
    fi
fi
