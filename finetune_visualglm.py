"""Fine-tune VisualGLM on your own pictures, questions and answers.

    python finetune_visualglm.py --from_pretrained model/tiny --train-data fewshot-data/dataset.json --use_lora
    deepspeed --num_gpus 2 finetune_visualglm.py …                the same on two GPUs
    python finetune_visualglm.py --help all                       every flag

The way of a sample: JSON row → Row → input_ids, labels → + image → batch → logits → loss.
                     model/data/                                    model/training/step.py, model/loss.py
"""

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
import importlib
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from model import sat_compat
from model.cli.options import Options, script_parser
from model.cli.preflight import Inputs, preflight, rate_notes, with_options
from model.cli.resuming import CommandLine, command_line, finished_note
from model.errors import command
from model.progress import outliving_readers, say
from model.training import sat_loop
from model.training.launcher import Launcher

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
__all__ = [*_HOMES, "create_dataset_function", "main"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def create_dataset_function(
    path: str, args: argparse.Namespace, rows: Any = None, chosen: Sequence[int] | None = None
) -> Any:
    """The samples of one JSON file: input_ids, labels, image and pre_image. The image's size is the model's.

    Args:
        rows: of that file, if they have been read; a bad image is then noted in its sample in place of raising.
        chosen: which of them, counted from 0; all if absent.
    """
    from sat import get_tokenizer

    from model.data.dataset import FewShotDataset
    from model.data.image_processor import BlipImageEvalProcessor

    processor = BlipImageEvalProcessor(args.eva_args["image_size"][0])
    return FewShotDataset(path, processor, get_tokenizer(args), args, rows, chosen, note_bad_images=rows is not None)


def load_vision(args: argparse.Namespace, options: Options, inputs: Inputs) -> tuple[Any, argparse.Namespace]:
    """The checkpoint's model with only its vision part loaded, and args with the checkpoint's sizes."""
    from model.finetune import FineTuneVisualGLMModel

    args.max_source_length, args.max_target_length = inputs.lengths.max_source_length, inputs.lengths.max_target_length
    sat_compat.import_sat().get_tokenizer(outer_tokenizer=inputs.tokenizer)
    model, args = FineTuneVisualGLMModel.from_pretrained(inputs.checkpoint, args, language_later=True)
    if options.image_size:
        model.set_image_size(options.image_size, args)
    model.freeze()
    return model, args


def train(line: CommandLine, inputs: Inputs) -> None:
    """Load the model and let SAT train it."""
    sat_compat.import_sat(training=True)
    from model.data.dataset import data_collator, packed_collator
    from model.training.best_checkpoint import mean_over_tokens
    from model.training.run import guarded_run
    from model.training.sat_args import get_args
    from model.training.step import evaluation_step, forward_step, token_normalized_step

    options = line.options
    step = token_normalized_step() if options.loss_normalization == "token" else forward_step
    with guarded_run(line, inputs) as run:
        args = get_args(line.words, options, script_parser())
        if run.sweep is not None:
            run.sweep.prepare(args)
        run.watchdog.start(options, inputs)
        model, args = load_vision(args, options, inputs)
        run.begin(model, args)
        sat_loop.training_main()(
            args,
            model_cls=type(model),  # SAT asks for the model when its pictures have been looked at: see `begin`
            forward_step_function=step,
            forward_step_eval=run.stop.watching(evaluation_step),
            handle_metrics_function=mean_over_tokens,
            create_dataset_function=create_dataset_function,
            collate_fn=packed_collator if options.packing else data_collator,
            init_function=run.folder.place,
        )


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line argv (sys.argv's by default); `model.errors` lists the statuses that it may end with."""
    with command("finetune_visualglm.py"), ExitStack() as stack:
        Launcher.of_this_command()  # is noted now: rows and pictures take a while
        argv = list(sys.argv[1:] if argv is None else argv)
        line = command_line(argv)
        stack.enter_context(outliving_readers())  # but --help ends there
        inputs = preflight(line.options, partial(sat_compat.import_sat, training=True), line.resumed)
        finished = finished_note(line, inputs.steps)
        if finished:
            say(finished)
            return
        if line.options.dry_run or line.options.auto_batch_size:
            from model.training.dry_run import dry_run_report, with_batch_size

            asked, line = line.options, with_batch_size(line, inputs)
            inputs = with_options(inputs, asked, line.options, line.resumed)
        for note in (*line.notes, *inputs.notes, *rate_notes(line.options, inputs.steps, line.steps_done)):
            say(note)
        if line.options.dry_run:
            say(dry_run_report(line.options, inputs))
            return
        train(line, inputs)


if __name__ == "__main__":
    main()
