"""finetune_visualglm.py with --wandb, offline; what the real package has in its file goes into FOLDER/history.json.

train_and_read_wandb.py FOLDER FLAG …
"""

import json
import sys
from pathlib import Path

import finetune_visualglm

BLOCK, BEFORE_BLOCKS, BEFORE_A_PART = 32768, 7, 7  # bytes of LevelDB's log format, in which wandb writes
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4

folder, flags = Path(sys.argv[1]), sys.argv[2:]
finetune_visualglm.main([*flags, "--wandb", "--save", str(folder / "saved")])

from wandb.proto.wandb_internal_pb2 import Record


def records(content):
    """The records of a .wandb file: parts with a checksum, 2 bytes of length and a kind; none crosses a block's end."""
    position, record = BEFORE_BLOCKS, b""
    while position + BEFORE_A_PART <= len(content):
        left = BLOCK - position % BLOCK
        if left < BEFORE_A_PART:
            position += left
            continue
        length, kind = int.from_bytes(content[position + 4 : position + 6], "little"), content[position + 6]
        position += BEFORE_A_PART
        record += content[position : position + length]
        position += length
        if kind in (FULL, LAST):
            yield Record.FromString(record)
            record = b""


(file,) = (folder / "saved").glob("*/wandb/offline-run-*/run-*.wandb")
history = [
    {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
    for record in records(file.read_bytes())
    if record.WhichOneof("record_type") == "history"
]
(folder / "history.json").write_text(json.dumps(history))
