"""A checkpoint of any kind, loaded to be asked, in the number format that is asked for or fits.

    fp32, bf16, fp16   all weights; a CPU with instructions for bfloat16 answers twice as fast in it as in float32
    8, 4 bits          the weights of linears and embeddings, see `model.inference.quantize`; the rest as --dtype says

The model is built without memory. Its weights are read one layer at a time, each straight into its number format.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from model.checkpoints.layout import Checkpoint, split_problems
from model.checkpoints.metadata import is_finetuned
from model.checkpoints.sizes import size_text
from model.checkpoints.tensors import on_device
from model.checkpoints.weights import load_checkpoint
from model.cpu import has_low_bit_kernels, has_onednn, keep_rows, pack_linears
from model.data.tokenizer import ChatGLMTokenizer, check_special_ids, find_tokenizer
from model.distributed import done_by_first_process, free_memory, unusable_gpu
from model.errors import InputError, raise_problems
from model.frozen import FrozenLinear, Nf4Linear, dequantized, import_bitsandbytes, quantized
from model.inference.quantize import bytes_of, nf4_linears, quantize_linears
from model.progress import warn
from model.sat_compat import model_only, quieten
from model.visualglm import VisualGLMModel, without_memory

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SMALL = 4 * 2**30  # bytes in float32 of a model that --dtype auto leaves in float32 on a CPU
BESIDE_WEIGHTS = 2**30  # bytes for the largest tensor while it is read, and for keys, values and scores afterwards


@dataclass(frozen=True)
class NumberFormat:
    """What weights are kept in: a dtype, and where bits is 8 or 4, so many bits for those of linears and embeddings."""

    dtype: str  # a key of DTYPES
    bits: int | None = None

    def __str__(self) -> str:
        return self.dtype if self.bits is None else f"{self.bits} bits, {self.dtype} beside"


def load_for_answering(
    checkpoint: str | Path | Checkpoint,
    tokenizer_path: str | None = None,
    base: str | None = None,
    force_base: bool = False,
    quant: int | None = None,
    dtype: str = "auto",
    model_parallel_size: int = 1,
) -> tuple[VisualGLMModel, ChatGLMTokenizer]:
    """A checkpoint's model, in eval mode, and its tokenizer: a base, full, adapter or merged one.

    The model is on the GPU where there is one, else on the CPU. Beside its final size, the largest of its tensors is in
    memory while it is loaded. QLoRA's weights stay in NF4, as they were trained, unless quant says otherwise.

    Args:
        checkpoint: a folder, an iteration's folder, its weights file, a name in $SAT_HOME, or one found before.
        tokenizer_path: where to find the tokenizer if the folder has none.
        base, force_base: where an adapter's base is, and whether to take another one than it was trained on.
        quant: 8 or 4, to keep the weights of linears and embeddings in that many bits.
        dtype: "fp32", "bf16" or "fp16", of all that isn't kept in quant bits; "auto": what is fast and fits.
        model_parallel_size: how many of the processes that a launcher started share a model.

    Raises:
        InputError: no such checkpoint, or one that can't be used; a number format that can't be had here, or, with
            "auto", no memory for any; a model that can't be split.
    """
    quieten()
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    if unusable_gpu():
        warn(f"{unusable_gpu()} The CPU answers.")
    refuse_quant(quant, device)
    checkpoint = Checkpoint.find(checkpoint)
    raise_problems(split_problems(model_parallel_size, checkpoint.config))
    tokenizer = ChatGLMTokenizer.from_pretrained(find_tokenizer(checkpoint.folder, tokenizer_path))
    check_special_ids(tokenizer, checkpoint.config)
    with model_only():
        model, args = empty_model(checkpoint, base, force_base, model_parallel_size)
        chosen = done_by_first_process(lambda: chosen_format(model, dtype, quant, device))
        model.to(DTYPES[chosen.dtype])
        convert = conversion(model, chosen, device)
        load_checkpoint(model, args, load_path=checkpoint, convert=convert)
    arrange_weights(model.requires_grad_(False))
    model.asked_as = checkpoint.asked_as
    return model.eval(), tokenizer


def arrange_weights(model: VisualGLMModel) -> None:
    """Bring a frozen model's weights in full width, in place, into what a CPU answers with fastest.

    The language model mostly reads one token of each row, the vision part a whole picture.
    """
    for part in (model.transformer.layers, model.get_mixin("chatglm-final")):
        keep_rows(part)
    pack_linears(model)


def refuse_quant(quant: int | None, device: torch.device) -> None:
    """Raise an error if weights can't be kept in so many bits on the device.

    Raises:
        InputError: as said.
    """
    if quant is None:
        return
    if device.type == "cpu" and not has_low_bit_kernels():
        raise InputError(
            f"--quant {quant}: torch {torch.__version__} lacks the kernels for it; torch 2.13.0 is needed, or no --quant."
        )
    if device.type == "cuda" and quant == 4:
        try:
            import_bitsandbytes()
        except InputError as error:
            raise InputError(f"--quant 4: {error} --quant 8 does without it.") from None


def empty_model(
    checkpoint: Checkpoint, base: str | None, force_base: bool, model_parallel_size: int = 1
) -> tuple[Any, Any]:
    """The model that a checkpoint describes, on the meta device in float32, and SAT's namespace."""
    from model.finetune import FineTuneVisualGLMModel

    model_class = FineTuneVisualGLMModel if is_finetuned(checkpoint.config) else VisualGLMModel
    args = model_class.get_args(
        skip_init=True, device="meta", base=base, force_base=force_base, model_parallel_size=model_parallel_size
    )
    with without_memory():
        return model_class.from_pretrained(checkpoint, args, build_only=True)


def chosen_format(model: Any, dtype: str, quant: int | None, device: torch.device) -> NumberFormat:
    """What load_for_answering's dtype and quant mean for the model on the device; what "auto" takes is said.

    Raises:
        InputError: with "auto", no format fits into the free memory.
    """
    if dtype != "auto":
        return NumberFormat(dtype, quant)
    is_small = bytes_of(model, torch.float32, None) <= SMALL
    if device.type == "cpu" and is_small:
        return NumberFormat("fp32", quant)
    on_cpu = ["bf16", "fp32"] if has_onednn(torch.bfloat16) else ["fp32", "bf16"]
    wide = on_cpu if device.type == "cpu" else ["fp16"]
    candidates = [NumberFormat(name, quant) for name in wide]
    if quant is None and not nf4_linears(model.transformer.layers):
        candidates += [NumberFormat(wide[0], bits) for bits in (8, 4)]
    return _first_that_fits(model, candidates, device)


def _first_that_fits(model: Any, candidates: list[NumberFormat], device: torch.device) -> NumberFormat:
    free = free_memory(device)
    needed = [bytes_of(model, DTYPES[found.dtype], found.bits) + BESIDE_WEIGHTS for found in candidates]
    for found, size in zip(candidates, needed, strict=True):
        if size <= free:
            larger = f"; {candidates[0]} would take {size_text(needed[0])}" if found is not candidates[0] else ""
            warn(
                f"--dtype auto: {found}, which is fast here and fits: about {size_text(size)} of {size_text(free)} that "
                f"are free{larger}."
            )
            return found
    raise InputError(
        f"--dtype auto: {size_text(free)} of memory free; {size_text(min(needed))} are needed for this model in "
        f"{candidates[needed.index(min(needed))]}. --dtype and --quant load it all the same."
    )


def conversion(model: Any, chosen: NumberFormat, device: torch.device) -> Callable[[str, torch.Tensor], torch.Tensor]:
    """Get a model on the meta device ready for its number format, and give what a checkpoint's tensors are to become."""
    dtype = DTYPES[chosen.dtype]
    trained_in_nf4 = _weight_names(model, Nf4Linear) if chosen.bits else set()
    if chosen.bits:
        quantize_linears(model, chosen.bits, device)
    model.make_unsaved_tensors(device)
    packed = _weight_names(model, FrozenLinear)

    def converted(name: str, tensor: torch.Tensor) -> torch.Tensor:
        plain = _plain_name(name)
        if plain in trained_in_nf4:
            # What the factors were trained beside. A GPU rounds in no time, a CPU takes most of a minute for a 6B.
            tensor = dequantized(*quantized(tensor.to(device)), torch.float32)
        if plain in packed:
            return tensor.to(device)
        return on_device(tensor, device, dtype)

    return converted


def _weight_names(model: torch.nn.Module, kind: type[torch.nn.Module]) -> set[str]:
    """The names, in a base, of the weights of model's modules of a kind."""
    return {_plain_name(f"{name}.weight") for name, module in model.named_modules() if isinstance(module, kind)}


def _plain_name(name: str) -> str:
    return name.replace(".original.", ".")


def image_size(model: VisualGLMModel) -> int:
    """Height and width, in pixels, of the images that the model takes."""
    return model.get_mixin("eva").model.vit.transformer.property.image_size[0]
