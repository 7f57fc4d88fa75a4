"""Imports SAT as if wandb and triton weren't installed; prints the stand-ins left behind and what unused parts say."""

import sys

sys.modules["wandb"] = sys.modules["triton"] = None  # type: ignore[assignment]

from model.errors import InputError
from model.sat_compat import import_sat

sat = import_sat(training=True)
assert import_sat() is sat is sys.modules["sat"]
stand_ins = [name for name in ("wandb", "triton") if sys.modules.get(name) is not None]
stand_ins += [
    name for name, module in sys.modules.items() if module and name.startswith("sat.") and not module.__spec__
]
import sat.training.deepspeed_training as training

sentences = []
for use in (lambda: training.wandb.log({}), lambda: sat.model.GPT2Model(None)):
    try:
        use()
    except InputError as problem:
        sentences.append(str(problem))
print(stand_ins, *sentences, sep="\n")
