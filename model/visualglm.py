"""VisualGLM: ChatGLM with an image among its word embeddings.

    input_ids    <img> · · · · </img> question gMASK sop  answer
    embeddings   word   image  word   …        word  word word
                       └ image_length positions from pre_image on

Shapes: batch = samples, seq = tokens of the longest one, hidden = the language model's width.
"""

import argparse
import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from model.attention import FusedAttentionMixin, PrefixAttentionMixin
from model.blip2 import BLIP2
from model.checkpoints.config_types import model_problems
from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import VISION
from model.checkpoints.tensors import LazyTensor, LazyTensors, on_device
from model.checkpoints.weights import opened_for
from model.cpu import gelu
from model.data.prompt import AskedAs
from model.distributed import has_gpu
from model.errors import raise_problems
from model.frozen import FrozenLinear, Nf4Linear, make_plain
from model.masks import first_position, glm_position_ids, prefix_mask
from model.model_flags import add_model_flags
from model.sat_compat import import_sat, parallel_output_once, whole_on_every_process

import_sat()

from sat import mpu  # noqa: E402  (sat can be imported only after import_sat)
from sat.model import BaseMixin, ChatGLMModel  # noqa: E402
from sat.model.base_model import get_model  # noqa: E402
from sat.model.official.chatglm_model import ChatGLMFinalMixin, ChatGLMLayerMixin  # noqa: E402

# Functions that fill a tensor in place, torch.nn.init's and a tensor's own.
FILLING = {"normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "zero_", "fill_", "zeros_", "ones_", "constant_"}


class _WithoutMemory(TorchFunctionMode):
    """Tensors that are asked for on the CPU are made on the meta device. SAT asks for the CPU by name.

    Two things stay off the meta device, where torch would import its compiler for them, which takes 2 s: filling a tensor
    does nothing, and numbers that are counted up, which are few, are real ones.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if getattr(function, "__name__", "") in FILLING:
            filled = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        if function is torch.arange:
            kwargs["device"] = torch.device("cpu")
        elif kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cpu":
            kwargs["device"] = torch.device("meta")
        return function(*args, **kwargs)


@contextmanager
def without_memory() -> Iterator[None]:
    """Build models inside the block on the meta device, whatever device SAT names; no weight takes memory or time."""
    with torch.device("meta"), _WithoutMemory():
        yield


def residual_dtype(x: torch.Tensor) -> torch.dtype:
    """What the layers add up in, if x is one of their inputs or weights: x's dtype; float32 for bfloat16 on a CPU.

    Rounded to bfloat16, these sums make three quarters of the gradient's error. A GPU would pay for float32 in memory.
    """
    return torch.float32 if x.dtype == torch.bfloat16 and x.device.type == "cpu" else x.dtype


def residual_layer_norm(x: torch.Tensor, norm: torch.nn.LayerNorm) -> torch.Tensor:
    """norm(x), to which a layer adds its output, in `residual_dtype`."""
    x = x.to(residual_dtype(x))
    weight, bias = norm.weight.to(x.dtype), norm.bias.to(x.dtype)
    return torch.nn.functional.layer_norm(x, norm.normalized_shape, weight, bias, norm.eps)


class AnswerLayerMixin(ChatGLMLayerMixin):
    """ChatGLM's layer. The last one computes only answer_positions, if they are given: the rest is never predicted."""

    def layer_forward(
        self,
        hidden_states: torch.Tensor,
        mask: torch.Tensor,
        *args: Any,
        layer_id: Any,
        answer_positions: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[batch, seq, hidden] → [batch, seq, hidden]; the last layer with answer_positions → [answers, hidden]."""
        layer = self.transformer.layers[layer_id]
        positions = answer_positions if int(layer_id) == self.num_layers - 1 else None
        alpha = (2 * self.num_layers) ** 0.5  # DeepNorm's scale of the residual
        dtype = layer.input_layernorm.weight.dtype
        residual = residual_layer_norm(hidden_states, layer.input_layernorm)
        attended = layer.attention(residual.to(dtype), mask, layer_id=layer_id, answer_positions=positions, **kwargs)
        if positions is not None:
            residual = residual.flatten(0, 1).index_select(0, positions)
        residual = residual_layer_norm(torch.add(attended, residual, alpha=alpha), layer.post_attention_layernorm)
        output = torch.add(layer.mlp(residual.to(dtype), layer_id=layer_id, **kwargs), residual, alpha=alpha)
        return output.to(dtype) if int(layer_id) == self.num_layers - 1 else output


class AnswerHeadMixin(ChatGLMFinalMixin):
    """The language-model head. With answer_positions it is left to `model.loss.head_loss`, which needs less memory."""

    def final_forward(
        self, logits: torch.Tensor, answer_positions: torch.Tensor | None = None, **_: Any
    ) -> torch.Tensor:
        """Logits [batch, seq, vocab] of hidden states [batch, seq, hidden].

        With answer_positions: the hidden states [answers, hidden] as they are, which `AnswerLayerMixin` has chosen.
        """
        return super().final_forward(logits) if answer_positions is None else logits


class ImageMixin(BaseMixin):
    """Puts the image's embeddings into its slots among the words."""

    def __init__(self, args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.image_length = args.image_length
        sat_flags = {"skip_init": args.skip_init, "model_parallel_size": 1}
        with whole_on_every_process(args.model_parallel_size):
            self.model = BLIP2(
                {**args.eva_args, **sat_flags}, {**args.qformer_args, **sat_flags}, args.hidden_size, **kwargs
            )
        if args.model_parallel_size > 1:
            make_plain(self.model)

    def train(self, mode: bool = True) -> "ImageMixin":
        """Switch the trained parts to train mode, and only them: dropout in a frozen part would only add noise."""
        super().train(mode and self.model.is_trained())
        for part in self.model.children():
            part.train(mode and any(parameter.requires_grad for parameter in part.parameters()))
        return self

    def word_embedding_forward(
        self,
        input_ids: torch.Tensor,
        image: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        pre_image: int = 0,
        image_slots: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Embeddings [batch, seq, hidden] of input_ids int64[batch, seq], with the images in their slots.

        Without an image the words alone are embedded. So are new tokens of an answer, which are shorter than the slots.

        Args:
            image: [images, 3, H, W], or else
            image_features: [images, queries, width], the Q-Former's output for them.
            image_slots: int64[images, image_length], the slots of each image in the flattened batch · seq, or else
            pre_image: where the slots begin in every row, with one image a row.
        """
        embeddings = self.transformer.word_embeddings
        is_packed = isinstance(embeddings, FrozenLinear)  # see `model.inference.quantize`
        if is_packed or is_split(embeddings):
            words = embeddings(input_ids)
        else:  # SAT's own forward would wait for the device, to mask other processes' words
            words = torch.nn.functional.embedding(input_ids, embeddings.weight)
        used = self.model if image_features is None else self.model.glm_proj
        given = image if image_features is None else image_features
        if given is not None and not len(given):
            return self._without_images(words, used)
        if given is None or input_ids.shape[1] < pre_image + self.image_length:
            return words
        with self._gradient_of(used):
            if image_features is None:
                image_features = self.model.features(given.to(words.dtype))
            embedded = self.model.glm_proj(image_features.to(words.dtype)).to(words.dtype)
        if image_slots is None:
            return torch.cat((words[:, :pre_image], embedded, words[:, pre_image + self.image_length :]), dim=1)
        slots = image_slots.flatten()
        return words.flatten(0, 1).index_copy(0, slots, embedded.flatten(0, 1)).view_as(words)

    def _without_images(self, words: torch.Tensor, used: torch.nn.Module) -> torch.Tensor:
        """words as they are, where no row of the batch has an image, as another process's may.

        If ZeRO exchanges weights or gradients of what is used there, each process must use it in each step: the others
        would wait for this one. So an empty image is looked at, and no number of it is taken.
        """
        if self.model.is_away:
            used = self.model.glm_proj
        if not is_used_by_all(used):
            return words
        with self._gradient_of(used):
            if used is self.model:
                edge = self.model.vit.transformer.property.image_size[0]
                features = self.model.features(words.new_zeros(1, 3, edge, edge))
            else:
                features = words.new_zeros(1, 1, self.model.glm_proj.in_features)
            return words + self.model.glm_proj(features).to(words.dtype)[:0].sum()

    def _gradient_of(self, used: torch.nn.Module) -> Any:
        is_trained = any(parameter.requires_grad for parameter in used.parameters())
        return torch.set_grad_enabled(torch.is_grad_enabled() and is_trained)


def is_used_by_all(part: torch.nn.Module) -> bool:
    """Whether every step of every process has to use part, whatever its batch holds.

    Data-parallel processes exchange gradients, and with ZeRO 3 weights, each time that it is used. And DeepSpeed's ZeRO 3
    learns in which order modules are used; it fails, now and then, where one step uses others than the step before.
    """
    if not mpu.model_parallel_is_initialized():
        return False
    is_exchanged = torch.is_grad_enabled() and mpu.get_data_parallel_world_size() > 1
    return any(hasattr(weight, "ds_id") or (is_exchanged and weight.requires_grad) for weight in part.parameters())


def is_split(embeddings: Any) -> bool:
    """Whether other model-parallel processes have a part of the vocabulary."""
    return bool(
        getattr(embeddings, "num_embeddings_per_partition", embeddings.num_embeddings) < embeddings.num_embeddings
    )


class VisualGLMModel(ChatGLMModel):
    """ChatGLM, of any size, with a vision part. Parameter names are those of the released checkpoints."""

    asked_as = AskedAs()  # `load_for_answering` takes the checkpoint's

    def __init__(self, args: Any, transformer: torch.nn.Module | None = None, **kwargs: Any) -> None:
        """Build the model that args, SAT's namespace, describes. kwargs are SAT's (params_dtype, parallel_output, …)."""
        self.finish_loading: Callable[[], None] = lambda: None  # see `from_pretrained`
        kwargs = parallel_output_once(args, kwargs)
        super().__init__(args, transformer=transformer, **kwargs)
        self.image_length = args.image_length
        for name in ("chatglm-final", "chatglm-attn", "chatglm-layer"):
            self.del_mixin(name)
        self.add_mixin("chatglm-final", AnswerHeadMixin(args.vocab_size, args.hidden_size))
        self.add_mixin(
            "chatglm-attn", PrefixAttentionMixin(args.hidden_size, args.num_attention_heads, args.max_sequence_length)
        )
        self.add_mixin("chatglm-layer", AnswerLayerMixin(args.num_layers))
        self.add_mixin("fused-attention", FusedAttentionMixin())
        for layer in self.transformer.layers:
            layer.mlp.activation_func = gelu
        # The vision part shares the dtype. The other options of kwargs are meant for the language model.
        vision_kwargs = {name: kwargs[name] for name in ("params_dtype",) if name in kwargs}
        self.add_mixin("eva", ImageMixin(args, **vision_kwargs))

    def get_inputs(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: Any = None, position_ids: Any = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The attention mask [batch, 1, seq, seq] (1 = visible) and positions int64[batch, 2, seq] of input_ids.

        What is given stays. SAT makes the same values in Python lists, token by token.
        """
        seq_length = input_ids.shape[1]
        is_gmask = input_ids == self.gmask_token_id
        mask_position = first_position(torch.where(is_gmask.any(), is_gmask, input_ids == self.mask_token_id))
        context_length = first_position(input_ids == self.bos_token_id)
        pad_length = first_position(input_ids != self.pad_token_id)
        if attention_mask is None:
            dtype = self.transformer.word_embeddings.weight.dtype
            attention_mask = prefix_mask(context_length, pad_length, seq_length).to(dtype)
        if position_ids is None:
            position_ids = glm_position_ids(context_length, mask_position, pad_length, seq_length)
        return attention_mask, position_ids

    def tensors(self) -> LazyTensors:
        """All tensors, by their names in a checkpoint. `state_dict` unpacks every weight at once; this one at a time."""
        entries: dict[str, LazyTensor] = {}
        for name, module in self.named_modules():
            prefix, own = f"{name}." if name else "", dict[str, torch.Tensor]()
            torch.nn.Module._save_to_state_dict(module, own, prefix, keep_vars=False)  # its own, and none of its parts'
            if isinstance(module, FrozenLinear) and module.has_weight:
                shape = module.out_features, module.in_features
                entries[f"{prefix}weight"] = LazyTensor(shape, module.dtype, module.weight_in_full)
            entries |= {key: LazyTensor.of(tensor) for key, tensor in own.items()}
        return LazyTensors(entries)

    def set_image_size(self, edge: int, args: Any) -> None:
        """Take images of edge × edge pixels from now on, and note that in args, SAT's namespace, for checkpoints.

        The position embeddings are no longer the base's, so that a full checkpoint must be saved.
        """
        self.get_mixin("eva").model.vit.set_image_size(edge)
        if args.eva_args["image_size"] != [edge] * 2:
            args.eva_args["image_size"] = [edge] * 2
            args.save_full_model = True

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path | Checkpoint,
        args: Any = None,
        *,
        build_only: bool = False,
        language_later: bool = False,
        prefix: str = "",
        overwrite_args: Mapping[str, Any] = MappingProxyType({}),
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        """The model of a checkpoint, and SAT's namespace with its config.

        SAT's own loader takes a folder only, reads the config anew, and runs code that a weights file may hold. It fills
        the memory twice; here the model is built without any, and each tensor goes from its file straight to its device.

        Args:
            name: a folder, one of its parts, or a name in $SAT_HOME.
            args: SAT's namespace; what it lacks has its default.
            build_only: make no use of the weights: they are drawn by chance, as SAT does.
            language_later: load the vision part only. `finish_loading()` of the model loads the rest.
            prefix: of the tensors' names, as for `load_checkpoint`.
            overwrite_args: what the namespace holds in place of the config's values.
            kwargs: for the constructor.

        Raises:
            InputError: no such checkpoint, one of another model, or a configuration of which none can be built.
        """
        checkpoint = Checkpoint.find(name)
        raise_problems(model_problems(checkpoint.config, str(checkpoint.config_file)))
        given = {} if args is None else vars(args)
        config = copy.deepcopy(checkpoint.config)
        config["model_parallel_size"] = given.get("model_parallel_size", 1)  # not that of the checkpoint's files
        args = argparse.Namespace(**{**vars(cls.get_args()), **given, **config, **overwrite_args})
        args.checkpoint_folder = str(checkpoint.folder)  # where its tokenizer is looked for
        if build_only:
            model = get_model(args, cls, **kwargs)
            return model.to(args.device), args  # SAT moves it too, but goes on after an error, such as no memory
        args.use_gpu_initialization = False  # the weights that SAT would draw there are never made
        dtype = torch.half if getattr(args, "fp16", False) else torch.bfloat16 if getattr(args, "bf16", False) else None
        with without_memory():
            model = cls(args, params_dtype=dtype or torch.float32, **kwargs)
        model.to(dtype)
        args.device = getattr(args, "device", torch.cuda.current_device() if has_gpu() else "cpu")  # as SAT
        device = torch.device(args.device)
        put_into = opened_for(model, checkpoint, args, prefix, model.conversion(device))

        def finish_loading() -> None:
            put_into(lambda name: not name.startswith(VISION))
            model.make_fresh_adapters(device)
            model.finish_loading = lambda: None

        put_into(lambda name: name.startswith(VISION))
        model.finish_loading = finish_loading
        if not language_later:
            model.finish_loading()
        if getattr(args, "mode", "inference") == "inference":
            model.eval()
        return model, args

    def conversion(self, device: torch.device) -> Callable[[str, torch.Tensor], torch.Tensor]:
        """What the tensors of a checkpoint become for this model, which has no memory yet, to be on the device."""
        self.make_unsaved_tensors(device)
        plain = {
            f"{name}.weight".replace(".original.", ".")
            for name, module in self.named_modules()
            if isinstance(module, FrozenLinear)
        }
        dtypes = {name.replace(".original.", "."): tensor.dtype for name, tensor in self.named_parameters()}

        def converted(name: str, tensor: torch.Tensor) -> torch.Tensor:
            name = name.replace(".original.", ".")
            # A weight goes to the device when it is packed, one at a time; other tensors let go of what they were read into.
            return tensor if name in plain else on_device(tensor, device, dtypes.get(name))

        return converted

    def make_unsaved_tensors(self, device: torch.device) -> None:
        """Put on the device, for a model without memory, what no checkpoint has: frequencies, and NF4's places."""
        rotary = self.get_mixin("chatglm-attn").rotary_emb
        rotary.inv_freq = type(rotary)(2 * len(rotary.inv_freq)).inv_freq.to(device, rotary.inv_freq.dtype)
        for module in self.modules():
            if isinstance(module, Nf4Linear):
                module.packed = torch.empty(0, dtype=torch.uint8, device=device)  # where it will pack its weight

    def make_fresh_adapters(self, device: torch.device) -> None:
        """Draw the adapters that no checkpoint had, on the device. This model has none."""

    @classmethod
    def add_model_specific_args(cls, parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Declare what `model_config.json` says of the vision part, so that SAT writes it into every checkpoint."""
        add_model_flags(parser)  # ChatGLM's token ids are among them
        return parser
