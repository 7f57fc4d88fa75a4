"""A training step as the 2023 script does it, and each of our savings alone: what `benchmark.py` compares.

way = Way(SAVINGS, options)                ours; Way([], options) is the released one
with way.of(model):
    loss = way.loss(model, way.batch(samples, features, device, dtype))
"""

import argparse
import contextlib
import importlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any


@contextlib.contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Let owner's attribute be value inside the block."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def separate_attention(model: Any) -> Iterator[None]:
    """SAT's attention, rotary embedding and GELU, in the language model and in the vision part."""
    from sat.model.official.chatglm_model import ChatGLMAttnMixin, gelu

    from model.cpu import gelu as fused_gelu

    class SatAttention(ChatGLMAttnMixin):
        def attention_forward(self, *args: Any, answer_positions: Any = None, **kwargs: Any) -> Any:
            output = super().attention_forward(*args, **kwargs)
            return output if answer_positions is None else output.flatten(0, 1)[answer_positions]

    vision = model.get_mixin("eva").model
    networks = (model, vision.vit, vision.qformer)
    ours = [(network, network.get_mixin("fused-attention")) for network in networks]
    ours_rotary = model.get_mixin("chatglm-attn")
    sats_rotary = SatAttention(model.transformer.hidden_size, model.transformer.layers[0].attention.num_attention_heads)
    sats_rotary.rotary_emb.inv_freq = ours_rotary.rotary_emb.inv_freq
    prefix = model.mixins["ptuning"] if "ptuning" in model.mixins else None  # noqa: SIM401 (a ModuleDict has no get)

    def put(attention: Any, rotary: Any, function: Any) -> None:
        # A prefix stacks on the attention that stands before it, so it leaves and comes back.
        if prefix is not None:
            model.del_mixin("ptuning")
        for network, mixin in ours:
            if attention:
                network.add_mixin("fused-attention", mixin)
            else:
                network.del_mixin("fused-attention")
        model.del_mixin("chatglm-attn")
        model.add_mixin("chatglm-attn", rotary)
        if prefix is not None:
            model.add_mixin("ptuning", prefix)
        for layer in model.transformer.layers:
            layer.mlp.activation_func = function

    put(False, sats_rotary, gelu)
    try:
        yield
    finally:
        put(True, ours_rotary, fused_gelu)


@contextlib.contextmanager
def masks_token_by_token(model: Any) -> Iterator[None]:
    """SAT's own masks and positions, made in Python lists."""
    from sat.model import ChatGLMModel

    def get_inputs(*args: Any, **kwargs: Any) -> Any:
        return ChatGLMModel.get_inputs(model, *args, **kwargs)

    with replaced(model, "get_inputs", get_inputs):
        yield


@contextlib.contextmanager
def recomputed_activations(model: Any) -> Iterator[None]:
    """Activation checkpointing in every layer, as the released recipe has it."""
    from model.training import sat_loop

    layers = importlib.import_module("sat.model.transformer")
    with (
        replaced(model.transformer, "checkpoint_activations", True),
        replaced(layers, "checkpoint", sat_loop.checkpointed),
    ):
        yield


@contextlib.contextmanager
def separate_lora_products(_: Any) -> Iterator[None]:
    """Each part's A and B by themselves."""
    import torch

    from model.lora import LoraLinear

    def forward(self: Any, hidden_states: Any) -> Any:
        changes = [(hidden_states @ a.T) @ b.T * self.scale for a, b in zip(self.matrix_A, self.matrix_B, strict=True)]
        return self.original(hidden_states) + torch.cat(changes, -1)

    with replaced(LoraLinear, "forward", forward):
        yield


@contextlib.contextmanager
def vision_on_the_device(model: Any) -> Iterator[None]:
    """The vision tower and the Q-Former where the language model is: without their features they are asked every step."""
    vision, device = model.get_mixin("eva").model, model.transformer.word_embeddings.weight.device
    tensors = [tensor for part in (vision.vit, vision.qformer) for tensor in (*part.parameters(), *part.buffers())]
    kept = [tensor.data if tensor.device.type == "cpu" else tensor.cpu() for tensor in tensors]
    for tensor in tensors:
        tensor.data = tensor.to(device)
    try:
        yield
    finally:
        for tensor, on_cpu in zip(tensors, kept, strict=True):  # nobody has changed them: no copy back
            tensor.data = on_cpu


@contextlib.contextmanager
def plain_weights(model: Any) -> Iterator[None]:
    """Frozen linears with their weights in rows."""
    from model.cpu import PrepackedLinear

    packed = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(child, PrepackedLinear)
    ]
    for parent, name, child in packed:
        setattr(parent, name, child.plain())
    try:
        yield
    finally:
        for parent, name, child in packed:
            setattr(parent, name, child)


def nothing(_: Any) -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


# What is saved, and how the model goes without it; the first three concern the batch and the loss too, see `Way`.
SAVINGS: dict[str, Callable[[Any], contextlib.AbstractContextManager[None]]] = {
    "padding to the longest row": nothing,
    "kept picture features": vision_on_the_device,
    "last layer and head at supervised positions only": nothing,
    "fused attention and GELU": separate_attention,
    "masks made from lengths": masks_token_by_token,
    "kept activations": recomputed_activations,
    "LoRA in two products": separate_lora_products,
    "frozen weights packed (CPU)": plain_weights,
}


class Way:
    """One way of doing a step: the savings that it has."""

    def __init__(self, savings: Sequence[str], options: argparse.Namespace) -> None:
        self.savings, self.options = set(savings), options

    @contextlib.contextmanager
    def of(self, model: Any) -> Iterator[None]:
        """Let model work this way inside the block."""
        with contextlib.ExitStack() as stack:
            for name, without in SAVINGS.items():
                if name not in self.savings:
                    stack.enter_context(without(model))
            yield

    def batch(
        self, samples: Sequence[dict[str, Any]], features: dict[str, Any], device: Any, dtype: Any
    ) -> dict[str, Any]:
        """The samples as this way feeds them to the model."""
        from model.data.dataset import data_collator

        pictures = "kept picture features" in self.savings
        chosen = [
            {key: value for key, value in sample.items() if key not in ("image", "path")}
            | ({"image_features": features[sample["path"]]} if pictures else {"image": sample["image"]})
            for sample in samples
        ]
        if "padding to the longest row" not in self.savings:
            full = self.options.max_source_length + self.options.max_target_length
            chosen = [padded_to(sample, full) for sample in chosen]
        batch = data_collator(chosen)
        return {
            name: value.to(device, dtype if value.is_floating_point() else None) if hasattr(value, "to") else value
            for name, value in batch.items()
        }

    def loss(self, model: Any, batch: dict[str, Any]) -> Any:
        """The mean cross entropy of a batch."""
        from model.loss import answer_loss
        from model.training.step import loss_sum

        if "last layer and head at supervised positions only" in self.savings:
            return loss_sum(model, batch) / len(batch["answers"])
        pictures = {name: batch[name] for name in ("image", "image_features", "pre_image") if name in batch}
        return answer_loss(model(input_ids=batch["input_ids"], **pictures)[0], batch["labels"])


def padded_to(sample: dict[str, Any], length: int) -> dict[str, Any]:
    """sample with padding on the right that is not learned, as the released script pads."""
    from model.data.prompt import IGNORE_INDEX

    missing = length - len(sample["input_ids"])
    return sample | {
        "input_ids": sample["input_ids"] + [sample["pad_token_id"]] * missing,
        "labels": sample["labels"] + [IGNORE_INDEX] * missing,
    }
