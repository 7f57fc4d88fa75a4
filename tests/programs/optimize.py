"""One step of torch's AdamW: whether torch's compiler was imported for it, and the result.

optimize.py [without]        without: as in a run, where nothing asks for the compiler
"""

import sys

import torch

from model.sat_compat import import_sat
from model.training import sat_loop

parameter = torch.nn.Parameter(torch.ones(2))
if sys.argv[1:]:
    import_sat(training=True)
    for owner, name, value, _ in sat_loop.without_torchs_compiler():
        setattr(owner, name, value)
optimizer = torch.optim.AdamW([{"params": [parameter], "lr": 0.1}])
parameter.grad = torch.tensor([1.0, -2.0])
optimizer.step()
print("torch._dynamo" in sys.modules, parameter.requires_grad, parameter.tolist())
