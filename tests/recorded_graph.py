"""CUDA graphs for tests on machines without a GPU: what is done while one is recorded is done again, operation by operation.

As with a real one, a replay works on the same tensors. What Python has decided meanwhile, and numbers that aren't in a tensor,
stay what they were; and what is recorded must not wait for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_in(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def storage_of(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class Recording(TorchDispatchMode):
    """The operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Callable[[], None]] = []
        self.made: set[int] = set()  # storages of what has been computed

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default and storage_of(args[0]) in self.made:
            raise RuntimeError("operation not permitted when stream is capturing: it waits for the device")
        result = function(*args, **kwargs)
        # Views look at what has been recorded; what is changed in place is changed again.
        own = {storage_of(tensor) for tensor in tensors_in((args, kwargs)) if not tensor.is_mkldnn}
        made = [tensor for tensor in tensors_in(result) if storage_of(tensor) not in own]
        self.made.update(map(storage_of, made))

        def again() -> None:
            for old, new in zip(made, tensors_in(function(*args, **kwargs)), strict=True):
                old.copy_(new)

        if made:
            self.operations.append(again)
        elif function._schema.is_mutable:
            self.operations.append(lambda: function(*args, **kwargs))
        return result


class Recorder:
    """In place of `model.inference.cuda_graph.Recorder`."""

    def __init__(self) -> None:
        self.replays: list[int] = []  # of each graph

    def __call__(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        number = len(self.replays)
        with Recording() as recording:
            result = work()
        self.replays.append(0)

        def replayed() -> torch.Tensor:
            self.replays[number] += 1
            for operation in recording.operations:
                operation()
            return result

        return replayed
