# Sourced by the recipes. It settles how this machine starts the script:
#
#   "${launch[@]}" "$project/finetune_visualglm.py" "${steps[@]}" "${held_out[@]}" $numbers … --recipe_ends "$@"
#
# $launch    With GPUs: the deepspeed launcher, on all of them or on those in CUDA_VISIBLE_DEVICES. Where that has names (GPU-…,
#            MIG-…), which the launcher can't read: torchrun. Without a GPU, or with CUDA_VISIBLE_DEVICES empty or -1: one
#            plain process. HOSTFILE names a DeepSpeed hostfile, to use other machines too. deepspeed reaches them by pdsh
#            and ssh. Where it can't, start the same command on each machine, with NODE_RANK, its line in the file counted
#            from 0, and MASTER_ADDR, the address of the first; also MASTER_PORT if 29500 is in use there.
# $held_out  A tenth of the rows to evaluate on, unless the user's flags say what to evaluate on.
# $steps     As long as in 2023, unless the user's flags count --epochs.
# $numbers   --fp16. Without a GPU --bf16, if the CPU has instructions for bfloat16: it is then several times faster
#            than float32.

project=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ] && [ -d "$project/.venv" ]; then
    export PATH="$project/.venv/bin:$PATH"
fi
numbers=--fp16
held_out=(--holdout 0.1)
case " $* " in
    *" --valid-data"* | *" --holdout"*) held_out=() ;;
    *" --split 1 "* | *" --split=1 "*) ;; # trains on every row
    *" --split"*) held_out=() ;;
esac
for word in "$@"; do # a file of flags may say what to evaluate on, too
    if [ "${config:-}" = next ]; then config=$word; fi
    case $word in --conf*=*) config=${word#*=} ;; --conf*) config=next ;; esac
    if [ -f "${config:-}" ] && grep -qE '^[[:space:]{]*"?(valid[-_]data|holdout)"?[[:space:]]*:' "$config"; then held_out=(); fi
done
steps=(--train-iters 300)
case " $* " in *" --epochs"*) steps=() ;; esac
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

first=${CUDA_VISIBLE_DEVICES-all}
first=${first%%,*}
if nvidia-smi -L > /dev/null 2>&1 && [ "$first" != "" ] && [ "$first" != "-1" ]; then
    port=$(python -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')
    case $first in
        all | [0-9]*) launch=(deepspeed --log_level warning --master_port "$port") ;;
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
if [ -n "${HOSTFILE:-}" ]; then
    refuse() {
        echo "$(basename "$0"): error: $1" >&2
        exit 2
    }
    [ -f "$HOSTFILE" ] && [ -r "$HOSTFILE" ] || refuse "HOSTFILE=$HOSTFILE: no file that can be read; a DeepSpeed hostfile is needed."
    entry='[^#[:space:]][^[:space:]]*[[:space:]]+slots=[0-9]+'
    machines=$(grep -cE "^[[:space:]]*$entry" "$HOSTFILE" || true)
    wrong=$(grep -vE "^[[:space:]]*(#|\$|$entry)" "$HOSTFILE" | head -n 1 || true)
    needed='lines such as "worker-1 slots=8" are needed.'
    [ -z "$wrong" ] || refuse "HOSTFILE=$HOSTFILE: a line \"$wrong\" in it; $needed"
    [ "$machines" -gt 0 ] || refuse "HOSTFILE=$HOSTFILE: no machine in it; $needed"
    launch=(deepspeed --log_level warning --hostfile "$HOSTFILE" --master_port "${MASTER_PORT:-29500}")
    if [ -n "${NODE_RANK:-}" ]; then
        [[ $NODE_RANK =~ ^[0-9]{1,9}$ ]] && ((10#$NODE_RANK < machines)) ||
            refuse "NODE_RANK=$NODE_RANK: no such line in $HOSTFILE; a number from 0 to $((machines - 1)) is needed."
        [ -n "${MASTER_ADDR:-}" ] || refuse "NODE_RANK=$NODE_RANK without MASTER_ADDR; the address of the first machine is needed."
        launch+=(--no_ssh --node_rank "$NODE_RANK" --master_addr "$MASTER_ADDR")
    fi
fi
