"""Saves a checkpoint, makes the disk full in one of several ways, and saves another one or merges it.

    save_without_room.py FOLDER BASE HOW        FOLDER is a small disk of its own; HOW is one of WAYS

Then tells which checkpoint is found, the names in the run's folder, and those on the disk.
"""

import subprocess
import sys
from pathlib import Path

from conftest import write_tuned

from model.checkpoints import save
from model.checkpoints.layout import Checkpoint
from model.checkpoints.save import save_checkpoint
from model.convert import merge_lora
from model.errors import exit_on_input_error
from model.finetune import FineTuneVisualGLMModel

WAYS = ("known", "filling", "extra", "read-only", "merging")


def main(folder: str, base: str, how: str) -> None:
    """Save twice, the second time in the way HOW."""
    run = write_tuned(Path(base), Path(folder, "run"), use_lora=True)
    model, args = FineTuneVisualGLMModel.from_pretrained(base, FineTuneVisualGLMModel.get_args(use_lora=True))
    args.save, args.save_full_model = str(run), how in ("known", "filling")
    extra = {}
    if how == "read-only":
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
    if how == "extra":
        extra = {"training_state.pt": lambda path: path.write_bytes(bytes(2**24))}
    if how in ("known", "filling", "merging"):
        Path(folder, "other").write_bytes(bytes(6 * 2**20))
    if how == "filling":  # another program takes the room while this one saves
        save.free_bytes = lambda path: 2**30
    if how == "merging":
        merge_lora.free_bytes = lambda path: 2**30
    try:
        with exit_on_input_error("saving"):
            if how == "merging":
                merge_lora.merge(str(run), str(Path(folder, "merged")))
            save_checkpoint(2, model, None, None, args, extra)
    finally:
        print("found", Checkpoint.find(run).iteration)
        print(*sorted(path.name for path in run.iterdir()))
        print(*sorted(path.name for path in Path(folder).iterdir()))


if __name__ == "__main__":
    main(*sys.argv[1:])
