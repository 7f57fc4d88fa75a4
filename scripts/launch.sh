# Sourced by the recipes. It settles how this machine starts the script:
#
#   "${launch[@]}" "$project/finetune_visualglm.py" "${held_out[@]}" $numbers … "$@"
#
# $launch    With GPUs: the deepspeed launcher, on all of them or on those in CUDA_VISIBLE_DEVICES. HOSTFILE names a
#            DeepSpeed hostfile, to use the GPUs of other machines too. Where CUDA_VISIBLE_DEVICES has names (GPU-…, MIG-…),
#            which that launcher can't read: torchrun. Without a GPU, or with CUDA_VISIBLE_DEVICES empty or -1: one plain
#            process.
# $held_out  A tenth of the rows to evaluate on, unless the user's flags say what to evaluate on.
# $numbers   --fp16. Without a GPU --bf16, if the CPU has instructions for bfloat16: it is then several times faster
#            than float32.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$project/.venv" ]; then
    export PATH="$project/.venv/bin:$PATH"
fi
numbers=--fp16
held_out=(--holdout 0.1)
case " $* " in *" --valid-data"* | *" --holdout"*) held_out=() ;; esac
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

first=${CUDA_VISIBLE_DEVICES-all}
first=${first%%,*}
if nvidia-smi -L > /dev/null 2>&1 && [ "$first" != "" ] && [ "$first" != "-1" ]; then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    case $first in
        all | [0-9]*)
            launch=(deepspeed --log_level warning --master_port "$port")
            if [ -n "${HOSTFILE:-}" ]; then launch+=(--hostfile "$HOSTFILE"); fi
            ;;
        MIG-*) launch=(torchrun --nproc-per-node 1 --master-port "$port") ;; # CUDA shows a process one part of a GPU
        *)
            commas=${CUDA_VISIBLE_DEVICES//[!,]/}
            launch=(torchrun --nproc-per-node $((${#commas} + 1)) --master-port "$port")
            ;;
    esac
else
    launch=(python)
    if grep -qwE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2> /dev/null; then
        numbers=--bf16
        echo "No GPU found: training on the CPU in bfloat16, for which it has instructions."
    fi
fi
