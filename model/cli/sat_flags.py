"""SAT's and DeepSpeed's own flags, with a help text for each.

Names, types, choices and defaults are theirs (SwissArmyTransformer 0.4.12, DeepSpeed 0.19); a test compares them, and lists
where ours differ on purpose.
"""

import argparse
from typing import Literal

LARGEST_SEED = 2**32 - 1  # numpy.random.seed takes no more


class SatOptions:
    """What these flags set: an attribute and a type for each. None is an absent flag."""

    # SAT: training
    experiment_name: str
    train_iters: int | None
    epochs: int | None
    batch_size: int
    gradient_accumulation_steps: int
    lr: float
    mode: str
    seed: int
    zero_stage: int
    checkpoint_activations: bool
    checkpoint_num_layers: int
    checkpoint_skip_layers: int
    fp16: bool
    bf16: bool
    profiling: int
    log_interval: int
    summary_dir: str
    save_args: bool
    lr_decay_iters: int | None
    lr_decay_style: str
    lr_decay_ratio: float
    warmup: float
    weight_decay: float
    save: str | None  # None: nothing is saved
    load: str | None
    force_train: bool
    save_interval: int  # counts where it is user_set, or with save_full_model
    no_save_rng: bool
    no_load_rng: bool
    resume_dataloader: bool
    distributed_backend: str
    local_rank: int | None
    exit_interval: int | None
    wandb: bool
    wandb_project_name: str
    # SAT: data
    train_data: list[str] | None
    train_data_weights: list[int] | None
    iterable_dataset: Literal["custom"] | bool
    iterable_dataset_eval: str
    batch_from_same_dataset: bool
    valid_data: list[str] | None
    test_data: list[str] | None
    split: str
    num_workers: int
    block_size: int
    prefetch_factor: int
    # SAT: evaluation
    eval_batch_size: int | None
    eval_iters: int
    eval_interval: int | None
    strict_eval: bool
    # SAT: model (sizes come from the checkpoint's model_config.json)
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    vocab_size: int
    max_sequence_length: int
    layernorm_order: str
    inner_hidden_size: int | None
    hidden_size_per_attention_head: int | None
    model_parallel_size: int
    skip_init: bool
    use_gpu_initialization: bool
    num_multi_query_heads: int
    is_gated_mlp: bool
    is_rotary_emb: bool
    layernorm_epsilon: float
    hidden_dropout: float
    attention_dropout: float
    drop_path: float
    make_vocab_size_divisible_by: int
    parallel_output: bool
    # SAT: tokenizer
    tokenizer_type: str
    # SAT: generating text (not used in training, except --device)
    temperature: float
    top_p: float
    top_k: int
    num_beams: int
    length_penalty: float
    no_repeat_ngram_size: int
    min_tgt_length: int
    out_seq_length: int
    input_source: str
    output_path: str
    with_id: bool
    max_inference_batch_size: int
    device: int
    # DeepSpeed
    deepspeed: bool
    deepspeed_config: str | None
    deepscale: bool
    deepscale_config: str | None


def add_sat_flags(parser: argparse.ArgumentParser) -> None:
    """Declare every flag of SAT and DeepSpeed, but for those of the model that `model.model_flags` declares."""
    _add_training_flags(parser)
    _add_data_flags(parser)
    _add_evaluation_flags(parser)
    _add_model_config_flags(parser)
    _add_tokenization_flags(parser)
    _add_generation_flags(parser)
    _add_deepspeed_flags(parser)


def _add_training_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SAT: training").add_argument
    # fmt: off
    add("--experiment-name", type=str, default="MyModel", metavar="NAME",
        help="Checkpoints go to <--save>/<NAME>-<month>-<day>-<hour>-<minute> (default %(default)s).")
    add("--train-iters", type=int, metavar="N",
        help="Iterations, that is optimizer steps, to train (default: 10000 unless --epochs is given).")
    add("--epochs", type=int, metavar="N", help="Times to go through --train-data, in place of --train-iters.")
    add("--batch-size", type=int, default=4, metavar="N",
        help="Samples per GPU and forward pass; auto: see --auto_batch_size (default %(default)s).")
    add("--gradient-accumulation-steps", type=int, default=1, metavar="N",
        help="Forward and backward passes per optimizer step (default %(default)s).")
    add("--lr", type=float, default=1.0e-4, metavar="X", help="Peak learning rate (default %(default)s).")
    add("--mode", type=str, default="pretrain", choices=["pretrain", "finetune", "inference"],
        help="finetune starts a new experiment and obeys --auto_warmup_steps, pretrain goes on with one, "
             "inference is refused here (default %(default)s).")
    add("--seed", type=int, default=1234, metavar="N",
        help="Random seed, 1 or more: of fresh weights, dropout, held-out rows and the order of rows, which for 1234 is "
             "the released script's (default %(default)s).")
    add("--zero-stage", type=int, default=0, choices=[0, 1, 2, 3],
        help="DeepSpeed ZeRO: 0 none, 1 splits optimizer states over the GPUs, 2 gradients too, 3 the model's weights too "
             "(default %(default)s).")
    add("--checkpoint-activations", action="store_true",
        help="Compute activations a second time in the backward pass: less memory, more time.")
    add("--checkpoint-num-layers", type=int, default=1, metavar="N",
        help="Layers per stretch of --checkpoint-activations (default %(default)s).")
    add("--checkpoint-skip-layers", type=int, default=0, metavar="N",
        help="Last layers that --checkpoint-activations leaves out (default %(default)s).")
    add("--fp16", action="store_true", help="Compute in float16 with a dynamic loss scale.")
    add("--bf16", action="store_true", help="Compute in bfloat16.")
    add("--profiling", type=int, default=-1, metavar="N",
        help="Start the CUDA profiler after N iterations; -1 is never (default %(default)s).")
    add("--log-interval", type=int, default=1, metavar="N",
        help="Iterations between two reports (default %(default)s; SAT's own is 50).")
    add("--summary-dir", type=str, default="", metavar="FOLDER",
        help="Folder for TensorBoard's files, in runs/<run> there (default: tensorboard in the run's own folder).")
    add("--save-args", action="store_true", help="Not needed: settings.json in the run's folder has every flag.")
    add("--lr-decay-iters", type=int, metavar="N", help="Iterations until the rate is lowest (default: all).")
    add("--lr-decay-style", type=str, default="linear", choices=["constant", "linear", "cosine", "exponential"],
        help="How the rate falls; this SAT keeps it constant for exponential (default %(default)s).")
    add("--lr-decay-ratio", type=float, default=0.1, metavar="X",
        help="Lowest rate of the cosine, as a fraction of --lr (default %(default)s).")
    add("--warmup", type=float, default=0.01, metavar="X",
        help="Fraction of all iterations, 0 to 1, over which the rate rises to --lr (default %(default)s).")
    add("--weight-decay", type=float, default=0.01, metavar="X", help="Decoupled weight decay (default %(default)s).")
    add("--save", type=_folder_or_none, default="./checkpoints", metavar="FOLDER|none",
        help="Where each run saves in a folder of its own (default %(default)s).")
    add("--load", type=str, metavar="FOLDER",
        help="Checkpoint folder whose weights replace those of --from_pretrained (default: none).")
    add("--force-train", action="store_true", help="Train although the checkpoint lacks some of the weights.")
    add("--save-interval", type=int, default=5000, metavar="N",
        help="Iterations between two checkpoints; the last is always saved (default: an epoch with --epochs, else five "
             "minutes; %(default)s with --save_full_model).")
    add("--no-save-rng", action="store_true", help="Leave the random states out of checkpoints.")
    add("--no-load-rng", action="store_true", help="Leave the random states of a checkpoint alone.")
    add("--resume-dataloader", action="store_true", help="Go on with the data where the checkpoint of --load stopped.")
    add("--distributed-backend", default="nccl", metavar="NAME",
        help="How processes talk: nccl between GPUs, gloo between CPUs (default %(default)s). A run on one GPU with "
             "--zero-stage 0 may take gloo: NCCL keeps 1.2 GiB of an H100 for itself.")
    add("--local_rank", type=int, metavar="N", help="Number of this process on its machine; launchers set it.")
    add("--exit-interval", type=int, metavar="N",
        help="Stop at each iteration that N divides, saved as at a signal, with status 0 (default: never).")
    add("--wandb", action="store_true", help="Report to Weights & Biases (needs the package wandb).")
    add("--wandb-project-name", type=str, default="default_project", metavar="NAME",
        help="Project at Weights & Biases (default %(default)s).")


def _folder_or_none(text: str) -> str | None:
    return None if text in ("", "none") else text


def _add_data_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SAT: data").add_argument
    # fmt: off
    add("--train-data", nargs="+", metavar="FILE",
        help='JSON or JSON Lines files with the rows to learn: {"img": …, "prompt": …, "label": …}; "img" may be '
             'left out, "history": [[question, answer], …] and "lang": "zh" or "en" may be added.')
    add("--train-data-weights", nargs="+", type=int, metavar="N",
        help="How often each file of --train-data counts, one whole number per file (default: once).")
    add("--iterable-dataset", action="store", default=False, const=True, nargs="?", choices=[True, False, "custom"],
        help="Read webdataset shards; refused here, rows are read by number.")
    add("--iterable-dataset-eval", default="", type=str, choices=["True", "False", ""],
        help="The same for evaluation (default: as --iterable-dataset).")
    add("--batch-from-same-dataset", action="store_true", help="Fill a batch from one iterable dataset.")
    add("--valid-data", nargs="*", metavar="FILE", help="JSON files with rows for evaluation while training.")
    add("--test-data", nargs="*", metavar="FILE", help="JSON files with rows for one evaluation at the end.")
    add("--split", default="1", metavar="SHARES",
        help="Shares of --train-data for training, evaluation and test, as in 8,1,1; 1 trains on every row "
             "(default %(default)s).")
    add("--num-workers", type=int, default=1, metavar="N",
        help="Processes that read pictures, per GPU (default %(default)s).")
    add("--block-size", type=int, default=10000, metavar="N",
        help="Rows that --split shuffles at a time; a file needs at least as many (default %(default)s).")
    add("--prefetch-factor", type=int, default=4, metavar="N",
        help="Batches that each worker reads ahead (default %(default)s).")


def _add_evaluation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SAT: evaluation").add_argument
    # fmt: off
    add("--eval-batch-size", type=int, metavar="N", help="Samples per GPU in evaluation (default: --batch-size).")
    add("--eval-iters", type=int, default=100, metavar="N", help="Not used, an evaluation goes through all rows once (default %(default)s).")
    add("--eval-interval", type=int, metavar="N",
        help="Iterations between two evaluations (default: once per epoch with --epochs, else never).")
    add("--strict-eval", action="store_true",
        help="Evaluate every row once, in order, in place of random batches; here it is always so.")


def _add_model_config_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SAT: model (sizes come from the checkpoint's model_config.json)").add_argument
    # fmt: off
    add("--num-layers", type=int, default=6, metavar="N", help="Transformer layers (default %(default)s).")
    add("--hidden-size", type=int, default=1024, metavar="N", help="Width of a position (default %(default)s).")
    add("--num-attention-heads", type=int, default=16, metavar="N", help="Attention heads (default %(default)s).")
    add("--vocab-size", type=int, default=100, metavar="N", help="Rows of the word embedding (default %(default)s).")
    add("--max-sequence-length", type=int, default=512, metavar="N",
        help="Most positions in a sequence (default %(default)s).")
    add("--layernorm-order", type=str, default="pre", choices=["post", "pre", "sandwich"],
        help="Where layer norms stand (default %(default)s).")
    add("--inner-hidden-size", type=int, metavar="N",
        help="Width inside the feed-forward part (default: 4 times --hidden-size).")
    add("--hidden-size-per-attention-head", type=int, metavar="N",
        help="Width of one attention head (default: --hidden-size divided by the heads).")
    add("--model-parallel-size", type=int, default=1, metavar="N",
        help="GPUs that share one copy of the model; checkpoints are whole all the same (default %(default)s).")
    add("--skip-init", action="store_true", help="Leave weights uninitialised until the checkpoint fills them: faster.")
    add("--use-gpu-initialization", action="store_true", help="Not used: each weight is read straight to where it belongs.")
    add("--num-multi-query-heads", type=int, default=0, metavar="N",
        help="Groups of keys and values in multi-query attention; 0 is ordinary attention (default %(default)s).")
    add("--is-gated-mlp", action="store_true", help="Use a gated feed-forward part.")
    add("--is-rotary-emb", action="store_true", help="Use SAT's own rotary positions (ChatGLM brings its own).")
    add("--layernorm-epsilon", type=float, default=1e-5, metavar="X",
        help="Epsilon of layer norms (default %(default)s).")
    add("--hidden-dropout", type=float, default=0.1, metavar="P",
        help="Dropout probability of hidden states in training (default %(default)s).")
    add("--attention-dropout", type=float, default=0.1, metavar="P",
        help="Dropout probability of attention weights in training (default %(default)s).")
    add("--drop-path", type=float, default=0.0, metavar="P",
        help="Probability of leaving a vision layer out in training (default %(default)s).")
    add("--make-vocab-size-divisible-by", type=int, default=128, metavar="N",
        help="Round --vocab-size up to a multiple of this (default %(default)s).")
    add("--parallel-output", action="store_true", help="Leave logits split over model-parallel GPUs.")


def _add_tokenization_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SAT: tokenizer").add_argument
    # fmt: off
    add("--tokenizer-type", type=str, default="fake", metavar="NAME",
        help="SAT's name of a tokenizer; not used here, --tokenizer is (default %(default)s).")


def _add_generation_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("SAT: generating text (not used in training, except --device)").add_argument
    # fmt: off
    add("--temperature", type=float, default=1.0, metavar="X", help="Sampling temperature (default %(default)s).")
    add("--top_p", type=float, default=0.0, metavar="P",
        help="Sample from the likeliest tokens of this total probability; 0 is all (default %(default)s).")
    add("--top_k", type=int, default=0, metavar="N",
        help="Sample from this many likeliest tokens; 0 is all (default %(default)s).")
    add("--num-beams", type=int, default=1, metavar="N", help="Beams of a beam search (default %(default)s).")
    add("--length-penalty", type=float, default=0.0, metavar="X",
        help="Favour of long answers in a beam search (default %(default)s).")
    add("--no-repeat-ngram-size", type=int, default=0, metavar="N",
        help="Tokens in a row that may not occur twice; 0 allows all (default %(default)s).")
    add("--min-tgt-length", type=int, default=0, metavar="N", help="Shortest answer in tokens (default %(default)s).")
    add("--out-seq-length", type=int, default=256, metavar="N",
        help="Longest sequence in tokens (default %(default)s).")
    add("--input-source", type=str, default="interactive", metavar="PATH",
        help="A file of questions, or interactive (default %(default)s).")
    add("--output-path", type=str, default="./samples", metavar="FOLDER",
        help="Folder for answers (default %(default)s).")
    add("--with-id", action="store_true", help="Each line of --input-source starts with an id.")
    add("--max-inference-batch-size", type=int, default=12, metavar="N",
        help="Most sequences at once (default %(default)s).")
    add("--device", type=int, default=-1, metavar="N",
        help="GPU of this process, which must equal LOCAL_RANK; choose GPUs with CUDA_VISIBLE_DEVICES "
             "(default %(default)s: LOCAL_RANK).")


def _add_deepspeed_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("DeepSpeed").add_argument
    # fmt: off
    add("--deepspeed", action="store_true", help="Use DeepSpeed; training here always does.")
    add("--deepspeed_config", type=str, metavar="FILE",
        help="DeepSpeed's settings as JSON, whose values win over the flags (default: SAT's values).")
    add("--deepscale", action="store_true", help="Old name of --deepspeed.")
    add("--deepscale_config", type=str, metavar="FILE", help="Old name of --deepspeed_config; not read.")
