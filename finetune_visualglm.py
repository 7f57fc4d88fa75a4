"""Fine-tune VisualGLM on your own pictures, questions and answers.

    python finetune_visualglm.py --from_pretrained model/tiny --train-data fewshot-data/dataset.json --use_lora
    deepspeed --num_gpus 2 finetune_visualglm.py …                the same on two GPUs
    python finetune_visualglm.py --help all                       every flag

The way of a sample: JSON row → Row → input_ids, labels → + image → batch → logits → loss.
                     model/data/                                    model/training/step.py, model/loss.py
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

from model.errors import command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

from model import distributed, sat_compat
from model.cli.options import Options, script_parser
from model.cli.preflight import Inputs, preflight, samples_per_step, warm_up_notes
from model.cli.resuming import CommandLine, command_line, finished_note
from model.progress import say
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


def load_model(args: argparse.Namespace, options: Options, inputs: Inputs) -> tuple[Any, argparse.Namespace]:
    """The checkpoint's model, frozen but for what is trained, and args with the checkpoint's sizes."""
    from model.finetune import FineTuneVisualGLMModel
    from model.training.memory import fit_into_memory

    args.max_source_length, args.max_target_length = inputs.lengths.max_source_length, inputs.lengths.max_target_length
    sat_compat.import_sat().get_tokenizer(outer_tokenizer=inputs.tokenizer)
    model, args = FineTuneVisualGLMModel.from_pretrained(inputs.checkpoint, args)
    if options.image_size:
        model.set_image_size(options.image_size, args)
    model.freeze()
    fit_into_memory(model, args.batch_size * (args.max_source_length + args.max_target_length))
    return model, args


def train(line: CommandLine, inputs: Inputs) -> None:
    """Load the model and let SAT train it."""
    sat_compat.import_sat(training=True)
    from model.checkpoints.weights import load_checkpoint, save_checkpoint
    from model.data.dataset import data_collator, packed_collator
    from model.training.best_checkpoint import BestCheckpoint, mean_over_tokens
    from model.training.feature_cache import FeatureCache
    from model.training.loaders import make_loaders
    from model.training.metrics import TrainingReport
    from model.training.run_folder import RunFolder
    from model.training.run_state import RunState
    from model.training.saving import CheckpointSaver, TimedSaves
    from model.training.signals import StopAtSignal
    from model.training.step import evaluation_step, forward_step, token_normalized_step
    from model.training.terminal import Terminal
    from model.training.trouble import told_in_a_sentence, watched

    options, saver = line.options, CheckpointSaver(save_checkpoint)
    run = RunState(TrainingReport(Terminal.of_run(options)), line.resumed, saver.begin)
    hooks = sat_loop.Hooks(load_checkpoint, run.saving(saver.save), run.report, options.auto_warmup_steps)
    hooks.step_watchers.append(TimedSaves.of_run(hooks, options))
    batches = watched(hooks, options, saver.wait)
    step = token_normalized_step() if options.loss_normalization == "token" else forward_step
    with StopAtSignal(hooks) as stop, distributed.launcher_environment(), sat_loop.adapted(hooks):
        with saver, RunFolder(line, inputs, run, hooks) as folder, told_in_a_sentence(batches, options):
            args = sat_loop.get_args(line.words, options, script_parser())
            model, args = load_model(args, options, inputs)
            features = FeatureCache.of_run(model, args, samples_per_step(options), options.feature_cache)
            inputs.selection.left_out = distributed.from_first_process(inputs.selection.left_out)
            run.watch(hooks, line, inputs)
            hooks.make_loaders = partial(make_loaders, selection=inputs.selection, features=features, batches=batches)
            hooks.when_ready = features.offload_vision
            if options.keep_best:
                run.after_evaluation = BestCheckpoint(saver.save).consider
            sat_loop.training_main()(
                args,
                model_cls=model,
                forward_step_function=step,
                forward_step_eval=evaluation_step,
                handle_metrics_function=mean_over_tokens,
                create_dataset_function=create_dataset_function,
                collate_fn=packed_collator if options.packing else data_collator,
                init_function=folder.place,
            )
        stop.leave()
    folder.wait_for_picture()


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line argv (sys.argv's by default); `model.errors` lists the statuses that it may end with."""
    with command("finetune_visualglm.py"):
        argv = list(sys.argv[1:] if argv is None else argv)
        line = command_line(argv)
        inputs = preflight(line.options, partial(sat_compat.import_sat, training=True), line.resumed)
        finished = finished_note(line, inputs.steps)
        if finished:
            say(finished)
            return
        for note in (*line.notes, *inputs.notes, *warm_up_notes(line.options, line.steps_done)):
            say(note)
        train(line, inputs)


if __name__ == "__main__":
    main()
