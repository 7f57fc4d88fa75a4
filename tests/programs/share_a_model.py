"""Two processes that share one model, of which only the first has data; each writes what it received to a file.

share_a_model.py FOLDER, started by torch.distributed.run
"""

import json
import pathlib
import sys
import types

import torch

from model.sat_compat import broadcast_data, import_sat

import_sat()
from sat import mpu

from model.training.step import get_batch

torch.distributed.init_process_group("gloo")
mpu.initialize_model_parallel(2)
rank = mpu.get_model_parallel_rank()
data = {"a": torch.tensor([1, 2]), "b": torch.tensor([[3.0], [4.0]])} if rank == 0 else {}
whole = broadcast_data(("a",), data, torch.int64, "cpu")
real = broadcast_data(("b",), data, torch.float32, "cpu")
batch = {
    "input_ids": torch.tensor([[5, 6]]),
    "labels": torch.tensor([[-100, 6]]),
    "image": torch.full((1, 3, 2, 2), 0.5),
    "pre_image": 3,
}
args = types.SimpleNamespace(device="cpu", fp16=False, bf16=True)
timer = types.SimpleNamespace(start=lambda: None, stop=lambda: None)
input_ids, labels, image, pre_image = get_batch(iter([batch]) if rank == 0 else None, args, lambda _: timer)
found = [
    whole["a"].tolist(), real["b"].tolist(), input_ids.tolist(), labels.tolist(), image.flatten().tolist(),
    str(image.dtype), pre_image,
]  # fmt: skip
pathlib.Path(sys.argv[1], str(rank)).write_text(json.dumps(found))
torch.distributed.barrier()
torch.distributed.destroy_process_group()
