"""Fine-tune VisualGLM on your own pictures, questions and answers.

    python finetune_visualglm.py --from_pretrained model/tiny --train-data fewshot-data/dataset.json --use_lora
    deepspeed --num_gpus 2 finetune_visualglm.py …                the same on two GPUs
    python finetune_visualglm.py --help                           every flag

The way of a sample: JSON row → Row → input_ids, labels → + image → batch → logits → loss.
                     model/data/                                    model/training/step.py, model/loss.py
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from model import distributed, sat_compat
from model.cli.options import Options, parse, script_parser
from model.cli.preflight import Inputs, checked, samples_per_step
from model.data.split import HELD_OUT, Selection
from model.errors import InputError, RowError
from model.progress import say, warn, warn_from_any_process
from model.training import sat_loop

# Public names of the 2023 script. They are looked up when asked for: importing torch takes longer than all the checks.
_HOMES = {
    "VisualGLMModel": "model.visualglm",
    "FineTuneVisualGLMModel": "model.finetune",
    "FewShotDataset": "model.data.dataset",
    "data_collator": "model.data.dataset",
    "BlipImageEvalProcessor": "model.data.image_processor",
    "get_batch": "model.training.step",
    "forward_step": "model.training.step",
    "chat": "model.inference.chat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def create_dataset_function(
    path: str, args: argparse.Namespace, selection: Selection | None = None, cache: Any = None
) -> Any:
    """The rows of one JSON file as SAT wants them: a data set of input_ids, labels, image and pre_image.

    SAT calls this for every file of --train-data and --valid-data. The picture's size is the model's. With a selection,
    the rows are those that it has read and chosen; a cache (`model.training.feature_cache`) gives them their pictures' features.
    """
    from sat import get_tokenizer
    from torch.utils.data import ConcatDataset

    from model.data.dataset import FewShotDataset
    from model.data.image_processor import BlipImageEvalProcessor

    processor = BlipImageEvalProcessor(args.eva_args["image_size"][0])
    if selection is None:
        return FewShotDataset(path, processor, get_tokenizer(), args)

    def chosen_rows(file: str, training: bool) -> Any:
        rows, chosen = selection.rows[file], selection.chosen(file, training)
        dataset = FewShotDataset(file, processor, get_tokenizer(), args, rows, chosen, note_bad_images=True)
        return dataset if cache is None else cache.given_to(dataset)

    if path == HELD_OUT:
        return ConcatDataset([chosen_rows(file, training=False) for file in selection.held_out])
    return chosen_rows(path, training=True)


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
    sat_compat.import_sat(training=True)
    from model.checkpoints.weights import load_checkpoint, save_checkpoint
    from model.data.dataset import data_collator, packed_collator
    from model.finetune import FineTuneVisualGLMModel
    from model.training.best_checkpoint import BestCheckpoint, mean_over_tokens
    from model.training.feature_cache import FeatureCache
    from model.training.memory import fit_into_memory
    from model.training.metrics import TrainingReport
    from model.training.step import evaluation_step, forward_step, token_normalized_step

    distributed.set_launcher_environment()
    sat_loop.adapt_loading(load_checkpoint)
    args = sat_loop.get_args(argv, options, script_parser())
    args.max_source_length, args.max_target_length = inputs.lengths.max_source_length, inputs.lengths.max_target_length
    sat_compat.import_sat().get_tokenizer(outer_tokenizer=inputs.tokenizer)
    model, args = FineTuneVisualGLMModel.from_pretrained(str(inputs.weights), args)
    if options.image_size:
        model.take_pictures_of(options.image_size, args)
    model.freeze()
    fit_into_memory(model, args.batch_size * (args.max_source_length + args.max_target_length))

    def samples_planned(rows: int) -> int:
        return rows * args.epochs if args.epochs else args.train_iters * samples_per_step(options)

    cache = FeatureCache(model.get_mixin("eva").model, samples_planned, args.num_workers, options.feature_cache)
    report = TrainingReport()
    sat_loop.adapt_training(
        save_checkpoint=save_checkpoint,
        report=report,
        auto_warmup_steps=options.auto_warmup_steps,
        when_ready=cache.send_eyes_away,
    )
    sat_loop.adapt_data(args)
    if options.keep_best:
        sat_loop.after_evaluation(BestCheckpoint(save_checkpoint).consider, report)
    inputs.selection.left_out = distributed.from_first_process(inputs.selection.left_out)
    sat_loop.training_main()(
        args,
        model_cls=model,
        forward_step_function=token_normalized_step() if options.loss_normalization == "token" else forward_step,
        forward_step_eval=evaluation_step,
        handle_metrics_function=mean_over_tokens,
        create_dataset_function=partial(create_dataset_function, selection=inputs.selection, cache=cache),
        collate_fn=packed_collator if options.packing else data_collator,
        init_function=sat_loop.save_beside_earlier_runs,
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line argv (sys.argv's by default); bad input ends it with a sentence and status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    options = parse(argv)
    try:
        inputs = checked(options, lambda: importlib.import_module("model.sat_compat").import_sat(training=True))
        announce(options, inputs.notes)
        train(argv, options, inputs)
    except InputError as problem:
        tell = warn_from_any_process if isinstance(problem, RowError) else warn
        tell(f"finetune_visualglm.py: error: {problem}")
        sys.exit(2)


if __name__ == "__main__":
    main()
