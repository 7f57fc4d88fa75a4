"""Write a VisualGLM of any size with random weights, in SAT's layout, to measure converting and loading.

python scripts/dev/write_random_model.py random --hidden 1536 --layers 34

It has the vocabulary and the vision part of the small model, and takes 24 · layers · hidden² bytes in float16. The weights
are written one after another, so that writing takes no memory.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.progress import say

TINY = Path(__file__).resolve().parents[2] / "model" / "tiny"


def random_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shapes of the language model's tensors, under SAT's names."""
    hidden, inner, vocabulary = config["hidden_size"], config["inner_hidden_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"transformer.word_embeddings.weight": (vocabulary, hidden)}
    linears = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.dense": (hidden, hidden),
        "mlp.dense_h_to_4h": (inner, hidden),
        "mlp.dense_4h_to_h": (hidden, inner),
    }
    for layer in range(config["num_layers"]):
        prefix = f"transformer.layers.{layer}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes |= {f"{prefix}{norm}.weight": (hidden,), f"{prefix}{norm}.bias": (hidden,)}
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    shapes |= {"transformer.final_layernorm.weight": (hidden,), "transformer.final_layernorm.bias": (hidden,)}
    return shapes | {"mixins.chatglm-final.lm_head.weight": (vocabulary, hidden)}


def write_random_model(folder: Path, hidden: int, layers: int, heads: int) -> None:
    """Write it into the new folder, in float16."""
    import torch

    from model.checkpoints.layout import weights_path
    from model.checkpoints.weights import read_weights
    from model.convert.merge_lora import write_weights

    config = json.loads((TINY / "model_config.json").read_text())
    config |= {
        "hidden_size": hidden,
        "num_layers": layers,
        "num_attention_heads": heads,
        "inner_hidden_size": 4 * hidden,
    }
    vision = {
        name: tensor for name, tensor in read_weights(weights_path(TINY, 1)).items() if name.startswith("mixins.eva")
    }
    projection = "mixins.eva.model.glm_proj."
    shapes = random_shapes(config) | {
        name: (hidden, *tensor.shape[1:]) for name, tensor in vision.items() if name.startswith(projection)
    }
    like = vision | {name: torch.empty(shape, dtype=torch.float16, device="meta") for name, shape in shapes.items()}
    generator = torch.Generator().manual_seed(1)

    def value(name: str) -> torch.Tensor:
        if name not in shapes:
            return vision[name]
        return torch.empty(shapes[name], dtype=torch.float16).normal_(std=0.02, generator=generator)

    weights = weights_path(folder, 1)
    weights.parent.mkdir(parents=True)
    write_weights(weights, like, value)
    (folder / "model_config.json").write_text(json.dumps(config, indent=4))
    (folder / "latest").write_text("1")
    shutil.copyfile(TINY / "ice_text.model", folder / "ice_text.model")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="a new folder")
    parser.add_argument("--hidden", type=int, default=768, metavar="N", help="width (default %(default)s)")
    parser.add_argument("--layers", type=int, default=6, metavar="N", help="layers (default %(default)s)")
    parser.add_argument("--heads", type=int, default=12, metavar="N", help="attention heads (default %(default)s)")
    options = parser.parse_args(argv)
    write_random_model(options.folder, options.hidden, options.layers, options.heads)
    size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
    say(f"{options.folder}: {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
