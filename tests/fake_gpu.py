"""A GPU for tests on machines that have none: tensors that say they are on "cuda:0", and have no numbers.

    with fake_gpu() as memory:
        …                           # torch.empty(3, device="cuda"), module.to("cuda"), loss.backward(), load_checkpoint(…)
        memory.peak                 # bytes on "cuda", at most, since memory.reset()

torch's fake tensors know a device, a dtype and a shape; every operation checks them and gives the next ones. So a rehearsal
finds tensors of two devices in one operation, dtypes that a kernel refuses to mix, wrong shapes, and each question to the
device (`.item()`, `if tensor`, `.tolist()`), which on a GPU means to wait. It can't find what a kernel computes, speed, NCCL,
or what a kernel takes for itself while it works.

A CPU build of torch fails when autograd asks a CUDA tensor for its stream. Inside the block torch's own code sees the device
"lazy:0", which every build knows and nobody uses, and Python's code sees "cuda:0".
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from model.checkpoints import weights
from model.frozen import import_bitsandbytes

CUDA, IN_TORCH = torch.device("cuda:0"), torch.device("lazy:0")
BLOCK = 512  # bytes; torch's allocator gives out multiples of it
GIB = 2**30
# Operations of which a CUDA kernel takes floating-point tensors of one dtype only, and a fake one of several.
OF_ONE_DTYPE = {
    torch.ops.aten.mm.default,
    torch.ops.aten.bmm.default,
    torch.ops.aten.addmm.default,
    torch.ops.aten.native_layer_norm.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
}


class Memory(TorchDispatchMode):
    """Adds up the storages on "cuda" that live, and those on the CPU, and refuses what a CUDA kernel refuses and a fake one takes."""

    def __init__(self) -> None:
        super().__init__()
        self.fake_mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.now = self.peak = 0  # bytes on "cuda"
        self.host_now = self.host_peak = 0  # bytes of fake tensors on the CPU
        self.refuses_waits = False  # whether a copy from "cuda" to the CPU is an error
        self.is_recording = False  # whether one to "cuda" is an error too: no graph can have it
        self._known: dict[int, Any] = {}

    def reset(self) -> None:
        self.peak = self.now

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.prim.device.default:  # every second call: which device a tensor is on
            return function(*args)
        self._refuse(function, args, kwargs or {})
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, FakeTensor) and tensor.device.type in ("cuda", "cpu"):
                self._count(tensor.untyped_storage(), tensor.device.type == "cuda")
        return result

    def _refuse(self, function: Any, args: Any, kwargs: Any) -> None:
        if function in OF_ONE_DTYPE:
            refuse_two("dtypes", function, {tensor.dtype for tensor in tensors_in(args) if tensor.is_floating_point()})
        elif function.namespace == "bitsandbytes":
            refuse_two("devices", function, {tensor.device for tensor in tensors_in(args)})
        elif self.refuses_waits and function == torch.ops.aten._to_copy.default:
            target = kwargs.get("device")
            if target is not None and target.type == "cpu" and args[0].device.type == "cuda":
                raise RuntimeError("a copy to the CPU waits for the device")
        if self.is_recording and function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            other = kwargs.get("device") or args[-1].device
            if (args[0].device.type == "cpu") != (other.type == "cpu"):
                raise RuntimeError("operation not permitted when stream is capturing: a copy between CPU and GPU")

    def _count(self, storage: Any, on_gpu: bool) -> None:
        key = storage._cdata
        if key in self._known:
            return
        size = -(-storage.nbytes() // BLOCK) * BLOCK

        def forget(_: Any) -> None:
            self._add(-size, on_gpu)
            del self._known[key]

        self._known[key] = weakref.ref(storage, forget)
        self._add(size, on_gpu)

    def _add(self, size: int, on_gpu: bool) -> None:
        self.now, self.host_now = self.now + size * on_gpu, self.host_now + size * (not on_gpu)
        self.peak, self.host_peak = max(self.peak, self.now), max(self.host_peak, self.host_now)


def tensors_in(args: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(args) if isinstance(value, torch.Tensor)]


def refuse_two(what: str, function: Any, found: set[Any]) -> None:
    """Raise an error if there are several."""
    if len(found) > 1:
        raise RuntimeError(f"{function}: several {what}, {sorted(map(str, found))}")


class FakeRecorder:
    """In place of `model.inference.cuda_graph.Recorder`: what can't be recorded is refused, and a replay gives what is there."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __call__(self, work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        self.memory.refuses_waits = self.memory.is_recording = True
        try:
            result = work()
        finally:
            self.memory.refuses_waits = self.memory.is_recording = False
        return lambda: result


@contextmanager
def fake_gpu(memory: Memory | None = None) -> Iterator[Memory]:
    """Let tensors in the block be fake ones, "cuda" be a device, and torch say that there is a GPU.

    Args:
        memory: that of an earlier block, whose tensors can be used again.
    """
    memory = memory or Memory()
    import_bitsandbytes()  # where torch says that there is a GPU, it asks for the CUDA that this build lacks
    normalized, device = FakeTensor._normalize_fake_device, FakeTensor.device.fget

    def in_torch(asked: torch.device) -> torch.device:
        return IN_TORCH if asked.type == "cuda" else normalized(asked)

    def seen(tensor: FakeTensor) -> torch.device:
        found = device(tensor)
        return CUDA if found.type == "lazy" else found

    with ExitStack() as undo:
        set_to(undo, FakeTensor, "_normalize_fake_device", staticmethod(in_torch))
        set_to(undo, FakeTensor, "device", property(seen))
        set_to(undo, FakeTensor, "is_cuda", property(lambda tensor: seen(tensor).type == "cuda"))
        set_to(undo, torch.nn.Module, "_apply", applied)
        undo.enter_context(memory.fake_mode)
        set_to(undo, torch.cuda, "is_available", lambda: True)
        set_to(undo, torch.cuda, "current_device", lambda: 0)
        set_to(undo, torch.cuda, "empty_cache", lambda: None)
        for name in ("whole_weights", "read_one_by_one"):  # what is asked of a file's numbers is asked on the CPU
            set_to(undo, weights, name, with_numbers(getattr(weights, name)))
        yield undo.enter_context(memory)


def fake_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A fake tensor like a real one, on its device; inside `fake_gpu` only."""
    mode: Any = detect_fake_mode()
    return mode.from_tensor(tensor)


def with_numbers(function: Callable[..., Any]) -> Callable[..., Any]:
    """function, whose tensors are real ones."""

    def called(*args: Any, **named: Any) -> Any:
        with unset_fake_temporarily():
            return function(*args, **named)

    return called


def set_to(undo: ExitStack, owner: Any, name: str, value: Any) -> None:
    """Let owner.name be value until undo ends."""
    if name in vars(owner):
        undo.callback(setattr, owner, name, vars(owner)[name])
    else:
        undo.callback(delattr, owner, name)
    setattr(owner, name, value)


def fused_attention(query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0) -> Any:
    """The kernel that torch takes on a GPU: flash attention without a mask, the memory-efficient one with it."""
    if attn_mask is None:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, dropout_p)[0]
    bias = attn_mask.expand(query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True, dropout_p)[0]


def applied(module: torch.nn.Module, change: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """`torch.nn.Module._apply`, which `to`, `half` and their like call; torch's own can't put fake parameters in place."""
    for child in module.children() if recurse else ():
        child._apply(change)
    for name, tensor in module._parameters.items():
        if tensor is not None:
            new = torch.nn.Parameter(change(tensor.detach()), requires_grad=tensor.requires_grad)
            vars(new).update(vars(tensor) | vars(new))
            module._parameters[name] = new
    for name, tensor in module._buffers.items():
        if tensor is not None:
            module._buffers[name] = change(tensor)
    return module
