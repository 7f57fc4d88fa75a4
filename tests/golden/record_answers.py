"""Write answers.json: the greedy answers, as token ids, of SAT's `filling_sequence` to every context by every kind of model.

    PYTHONPATH=.:tests python record_answers.py answers.json      in a checkout of commit e4e4cea

The model is as small as the one of `upstream/`, with random weights, so that any wrong number changes its answers. The
tests build the same models and contexts with this file.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from conftest import GOLDEN, golden_values, load_model, upstream_weights, write_checkpoint

from model.data.prompt import context_ids

NEW_TOKENS = 24
ADAPTERS: dict[str, dict[str, Any]] = {
    "base": {},
    "lora": {"use_lora": True, "lora_rank": 4},
    "lora on all linears": {
        "use_lora": True,
        "lora_rank": 3,
        "lora_target": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    },
    "qlora": {"use_qlora": True, "lora_rank": 4},
    "ptuning": {"use_ptuning": True, "pre_seq_len": 5},
    "lora and ptuning": {"use_lora": True, "lora_rank": 4, "use_ptuning": True, "pre_seq_len": 5},
    "merged": {"use_lora": True, "lora_rank": 4},
    "vision parts": {"use_lora": True, "lora_rank": 4, "train_parts": ["qformer", "glm_proj"]},
    "whole model": {},
}
CONTEXTS: list[dict[str, Any]] = [
    {"query": "这是什么？", "image": 0},
    {"query": "描述这张图片的背景里有什么内容。", "image": 1},
    {"query": "What is in the background?", "image": 2, "english": True},
    {"query": "你好", "image": None},
    {"query": "Who are you?", "image": None, "english": True},
    {"query": "真的？", "image": 0, "history": [["你是谁？", "我是一只猫。"], ["多大？", "三岁。"]]},
    {"query": "一", "image": None, "history": [["a", "b"]]},
]


def louder(name: str, tensor: torch.Tensor, seed: str) -> torch.Tensor:
    """tensor with four times golden noise on it: by `upstream/`'s own weights each answer hangs on little but its last token."""
    if "norm" in name or "ln_vision" in name or "inv_freq" in name:
        return tensor
    return tensor + 4 * torch.from_numpy(golden_values(f"{seed} {name}", list(tensor.shape)))


def write_base(folder: Path) -> Path:
    """The checkpoint that all kinds stand on."""
    config = json.loads((GOLDEN / "upstream/model_config.json").read_text())
    return write_checkpoint(folder, config, {name: louder(name, w, "base") for name, w in upstream_weights().items()})


def model_of(kind: str, base: Path) -> Any:
    """The model of this kind, in eval mode; what is trained is set by a rule, under its name."""
    flags = ADAPTERS[kind]
    model = load_model(base, "FineTuneVisualGLMModel" if flags else "VisualGLMModel", **flags)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kind == "whole model" or (flags and model.is_trained_name(name)):
                parameter.copy_(louder(name, parameter, kind))
    if kind == "merged":
        model.get_mixin("lora").merge_lora()
    return model


def image_of(number: int | None) -> torch.Tensor | None:
    """[1, 3, 224, 224], or None."""
    return None if number is None else 20 * torch.from_numpy(golden_values(f"picture {number}", [1, 3, 224, 224]))


def context_of(context: dict[str, Any], tokenizer: Any) -> tuple[list[int], int]:
    """The context's token ids, and where its picture's slots begin."""
    return context_ids(
        context["query"],
        context.get("history"),
        context["image"] is not None,
        tokenizer,
        32,
        context.get("english", False),
    )


@torch.no_grad()
def sat_answer(model: Any, tokenizer: Any, context: dict[str, Any]) -> list[int]:
    """What SAT's `filling_sequence` adds to one context, token by token, with SAT's cache."""
    from sat.generation.autoregressive_sampling import filling_sequence
    from sat.generation.sampling_strategies import BaseStrategy

    from model.inference.chat import key_value_cache, masks_and_position_ids

    ids, pre_image = context_of(context, tokenizer)
    strategy = BaseStrategy(temperature=1.0, top_p=0.0, top_k=1, end_tokens=[tokenizer.eos_token_id])
    with key_value_cache(model):
        tokens, _ = filling_sequence(
            model,
            torch.tensor(ids + [-1] * NEW_TOKENS),
            batch_size=1,
            strategy=strategy,
            get_masks_and_position_ids=masks_and_position_ids(tokenizer),
            image=image_of(context["image"]),
            pre_image=pre_image,
        )
    return tokens[0, len(ids) :].tolist()


def main() -> None:
    """Write the answers of every kind of model to every context, in the order of CONTEXTS."""
    from model.data.tokenizer import ChatGLMTokenizer

    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    answers = {}
    with tempfile.TemporaryDirectory() as folder:
        base = write_base(Path(folder) / "base")
        for kind in ADAPTERS:
            model = model_of(kind, base)
            answers[kind] = [sat_answer(model, tokenizer, context) for context in CONTEXTS]
    lines = [
        f' "{kind}": [\n' + ",\n".join(f"  {json.dumps(ids)}" for ids in of_kind) + "\n ]"
        for kind, of_kind in answers.items()
    ]
    Path(sys.argv[1]).write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
