"""A checkpoint of any kind, loaded to be asked."""

from pathlib import Path

import torch

from model.checkpoints.layout import Checkpoint
from model.checkpoints.metadata import is_finetuned
from model.cpu import pack_linears
from model.data.tokenizer import ChatGLMTokenizer, check_special_ids, find_tokenizer
from model.errors import InputError
from model.sat_compat import model_only, quieten
from model.visualglm import VisualGLMModel


def load_for_answering(
    checkpoint: str | Path | Checkpoint,
    tokenizer_path: str | None = None,
    base: str | None = None,
    force_base: bool = False,
    quant: int | None = None,
) -> tuple[VisualGLMModel, ChatGLMTokenizer]:
    """A checkpoint's model, in eval mode, and its tokenizer: a base, full, adapter or merged one.

    The model is on the GPU in float16 where there is one, else on the CPU in float32.

    Args:
        checkpoint: a folder, an iteration's folder, its weights file, a name in $SAT_HOME, or one found before.
        tokenizer_path: where to find the tokenizer if the folder has none.
        base, force_base: where an adapter's base is, and whether to take another one than it was trained on.
        quant: 8 or 4, to keep the weights of linears in that many bits, on a GPU.

    Raises:
        InputError: no such checkpoint, or one that can't be used; quant without a GPU.
    """
    from model.finetune import FineTuneVisualGLMModel

    quieten()
    if quant is not None and not torch.cuda.is_available():
        raise InputError(
            f"--quant {quant}: SAT's kernels for it run on an NVIDIA GPU only; leave --quant out on a CPU."
        )
    checkpoint = Checkpoint.find(checkpoint)
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder, tokenizer_path))
    check_special_ids(tokenizer, checkpoint.config)
    model_class = FineTuneVisualGLMModel if is_finetuned(checkpoint.config) else VisualGLMModel
    args = model_class.get_args(skip_init=True, fp16=torch.cuda.is_available(), base=base, force_base=force_base)
    with model_only():
        model, _ = model_class.from_pretrained(checkpoint, args)
    if quant is not None:
        from sat.quantization.kernels import quantize

        quantize(model, quant)
    pack_linears(model.requires_grad_(False))
    return model.eval(), tokenizer


def image_size(model: VisualGLMModel) -> int:
    """Height and width, in pixels, of the images that the model takes."""
    return model.get_mixin("eva").model.vit.transformer.property.image_size[0]
