"""The sizes that are measured and rehearsed, and models of them with random weights.

SHAPES["6b"]                               the published model's `model_config.json`
random_model(SHAPES["mini"], options, …)   a model of that shape, with the adapters that options asks for
"""

import argparse
import copy
from typing import Any

TOKENIZER_IDS = {"bos_token_id": 130004, "mask_token_id": 130000, "gmask_token_id": 130001, "pad_token_id": 3}
TINY_IDS = {"bos_token_id": 89, "mask_token_id": 85, "gmask_token_id": 86, "pad_token_id": 3}


def shape_config(
    hidden: int,
    layers: int,
    heads: int,
    vocab: int,
    vit: tuple[int, int, int, int],
    qformer: tuple[int, int, int],
    ids: dict,
) -> dict[str, Any]:
    """A model_config.json by its sizes: vit is (hidden, layers, heads, inner), qformer (hidden, layers, heads)."""
    vit_hidden, vit_layers, vit_heads, vit_inner = vit
    common = {"model_parallel_size": 1, "hidden_dropout": 0.0, "attention_dropout": 0.0}
    return {
        "model_class": "VisualGLMModel", "num_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
        "vocab_size": vocab, "layernorm_order": "post", "max_sequence_length": 2048, "inner_hidden_size": 4 * hidden,
        "use_bias": True, "image_length": 32, **common, **ids,
        "eva_args": {
            "num_layers": vit_layers, "hidden_size": vit_hidden, "num_attention_heads": vit_heads, "vocab_size": 1,
            "layernorm_order": "pre", "max_sequence_length": 257, "inner_hidden_size": vit_inner,
            "use_final_layernorm": False, "layernorm_epsilon": 1e-6, "image_size": [224, 224], "pre_len": 1,
            "post_len": 0, "in_channels": 3, "num_classes": 0, "patch_size": 14, **common,
        },
        "qformer_args": {
            "num_layers": qformer[1], "hidden_size": qformer[0], "num_attention_heads": qformer[2], "vocab_size": 32,
            "layernorm_order": "post", "max_sequence_length": 0, "layernorm_epsilon": 1e-12,
            "is_decoder": [layer % 2 == 0 for layer in range(qformer[1])], "cross_attn_hidden_size": vit_hidden, **common,
        },
    }  # fmt: skip


SHAPES = {
    "mini": shape_config(1024, 7, 8, 32768, (384, 10, 6, 1536), (768, 4, 12), TINY_IDS),
    "6b": shape_config(4096, 28, 32, 130528, (1408, 39, 16, 6144), (768, 12, 12), TOKENIZER_IDS),
}


def random_model(config: dict[str, Any], options: argparse.Namespace, dtype: Any, device: Any) -> Any:
    """The model that config describes, with random weights of a useful size, and the method's adapters, not at zero."""
    import torch

    from model.finetune import FineTuneVisualGLMModel
    from model.frozen import Nf4Linear
    from model.sat_compat import model_only

    args = FineTuneVisualGLMModel.get_args(
        **copy.deepcopy(config), skip_init=True, use_lora=options.method == "lora", use_qlora=options.method == "qlora",
        use_ptuning=options.method == "ptuning", layer_range=options.layer_range, lora_rank=10, pre_seq_len=4,
    )  # fmt: skip
    torch.manual_seed(1)
    with torch.device(device), model_only():
        model = FineTuneVisualGLMModel(args, params_dtype=dtype)
    model.to(device, dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name or "ln_vision" in name:
                parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            else:
                parameter.normal_(std=0.02)
        for module in model.modules():
            if isinstance(module, Nf4Linear):
                module.pack(0.02 * torch.randn(module.out_features, module.in_features, device=device))
    model.freeze()
    return model.train()
