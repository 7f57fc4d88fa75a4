"""Fine-tune VisualGLM on your own pictures, questions and answers.

    python finetune_visualglm.py --from_pretrained model/tiny --train-data fewshot-data/dataset.json --use_lora \\
        --mode finetune --train-iters 20 --batch-size 4 --save ./checkpoints
    deepspeed --num_gpus 2 finetune_visualglm.py …                the same on two GPUs
    python finetune_visualglm.py --help                           every flag

The way of a sample: JSON row → Row → input_ids, labels → + image → batch → logits → loss.
                     (model/rows.py, prompt.py, image.py, dataset.py, step.py)
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from model.checks import Inputs, checked
from model.errors import InputError
from model.options import Options, parse, script_parser
from model.progress import say, warn

PACKED_TOKENS = 2048  # of one sequence with --packing: attention's cost grows with its square

# Public names of the 2023 script. They are looked up when asked for: importing torch takes longer than all the checks.
_HOMES = {
    "VisualGLMModel": "model.visualglm",
    "FineTuneVisualGLMModel": "model.adapters",
    "FewShotDataset": "model.dataset",
    "data_collator": "model.dataset",
    "BlipImageEvalProcessor": "model.image",
    "get_batch": "model.step",
    "forward_step": "model.step",
    "chat": "model.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def create_dataset_function(path: str, args: argparse.Namespace) -> Any:
    """The rows of one JSON file as SAT wants them: a data set of input_ids, labels, image and pre_image.

    SAT calls this for every file of --train-data and --valid-data. The picture's size is the checkpoint's.
    """
    from sat import get_tokenizer

    from model.dataset import FewShotDataset
    from model.image import BlipImageEvalProcessor

    processor = BlipImageEvalProcessor(args.eva_args["image_size"][0])
    return FewShotDataset(path, processor, get_tokenizer(), args)


def announce(options: Options, notes: Sequence[str]) -> None:
    """Say what was found, and which rule slows the first steps down."""
    for note in notes:
        say(note)
    if options.mode == "finetune" and options.auto_warmup_steps:
        say(
            f"The first {options.auto_warmup_steps} steps use at most 5 % of --lr ({0.05 * options.lr:.2g}), as SAT does "
            "in finetune mode; --auto_warmup_steps changes that."
        )


def train(argv: Sequence[str], options: Options, inputs: Inputs) -> None:
    """Load the model and let SAT train it."""
    from model import sat_compat

    sat_compat.import_sat(training=True)
    from model.adapters import FineTuneVisualGLMModel
    from model.checkpoint import load_checkpoint, save_checkpoint
    from model.dataset import data_collator, packed_collator
    from model.features import FeatureCache
    from model.memory import recompute_where_needed
    from model.report import TrainingReport
    from model.step import forward_step, token_normalized_step

    sat_compat.set_launcher_environment()
    sat_compat.adapt_loading(load_checkpoint)
    args = sat_compat.get_args(argv, options, script_parser())
    sat_compat.import_sat().get_tokenizer(outer_tokenizer=inputs.tokenizer)
    model, args = FineTuneVisualGLMModel.from_pretrained(str(inputs.weights), args)
    model.freeze()
    recompute_where_needed(model, args.batch_size * (args.max_source_length + args.max_target_length))

    def samples_planned(rows: int) -> int:
        per_step = args.batch_size * args.gradient_accumulation_steps * args.world_size
        return rows * args.epochs if args.epochs else args.train_iters * per_step

    cache = FeatureCache(model.get_mixin("eva").model, samples_planned, args.num_workers)
    sat_compat.adapt_training(
        save_checkpoint=save_checkpoint,
        report=TrainingReport(),
        auto_warmup_steps=options.auto_warmup_steps,
        when_ready=cache.send_eyes_away,
    )
    sat_compat.training_main()(
        args,
        model_cls=model,
        forward_step_function=token_normalized_step() if options.loss_normalization == "token" else forward_step,
        forward_step_eval=forward_step,
        create_dataset_function=lambda path, args: cache.given_to(create_dataset_function(path, args)),
        collate_fn=partial(packed_collator, capacity=PACKED_TOKENS) if options.packing else data_collator,
        init_function=sat_compat.save_beside_earlier_runs,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line argv (sys.argv's by default); bad input ends it with a sentence and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(argv)
    try:
        inputs = checked(options)
        announce(options, inputs.notes)
        train(argv, options, inputs)
    except InputError as problem:
        warn(f"finetune_visualglm.py: error: {problem}")
        sys.exit(2)


if __name__ == "__main__":
    main()
