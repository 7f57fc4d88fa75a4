"""Write a VisualGLM of any size with random weights, in SAT's layout, to measure converting and loading.

python scripts/dev/write_random_model.py random --hidden 1536 --layers 34
python scripts/dev/write_random_model.py random --shape 6b

With --hidden and its like it has the vocabulary and the vision part of the small model, and takes 24 · layers · hidden²
bytes in float16. With --shape every part has the size of that shape of benchmark.py; 6b takes 15.6 GB. The weights are
written one after another, so that writing takes no memory. The tokenizer is the small model's. To measure answering:

/usr/bin/time -v python scripts/cli_demo.py --from_pretrained random --query hello --temperature 0 --max_length 64 --quant 4
"""

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # started as a file: the project's root is not on the path

from model.errors import InputError, command, interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

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


def write_random_shape(folder: Path, shape: str) -> None:
    """Write a model of this shape of benchmark.py into the new folder, in float16: norms that change nothing, all else random."""
    import torch

    from model.sat_compat import model_only
    from model.visualglm import VisualGLMModel, without_memory
    from scripts.dev.shapes import SHAPES, TINY_IDS

    config = {**copy.deepcopy(SHAPES[shape]), **TINY_IDS}
    args = VisualGLMModel.get_args(**copy.deepcopy(config), skip_init=True, device="meta")
    with without_memory(), model_only():
        like = VisualGLMModel(args, params_dtype=torch.float16).half().state_dict()
    noise = 0.02 * torch.randn(2**22, generator=torch.Generator().manual_seed(1)).half()

    def value(name: str) -> torch.Tensor:
        shape, numbers = like[name].shape, like[name].numel()
        if "layernorm" in name or "ln_vision" in name:
            return torch.full(shape, float(name.endswith("weight")), dtype=torch.float16)
        return noise.repeat(numbers // len(noise) + 1)[:numbers].view(shape)  # drawing billions takes minutes

    write_checkpoint(folder, config, like, value)


def write_random_model(folder: Path, hidden: int, layers: int, heads: int) -> None:
    """Write it into the new folder, in float16."""
    import torch

    from model.checkpoints.layout import weights_path
    from model.checkpoints.weights import read_weights

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
        mean = 1.0 if name.endswith("norm.weight") else 0.0
        return torch.empty(shapes[name], dtype=torch.float16).normal_(mean, std=0.02, generator=generator)

    write_checkpoint(folder, config, like, value)


def write_checkpoint(
    folder: Path, config: dict[str, Any], like: Mapping[str, Any], value: Callable[[str], Any]
) -> None:
    """Write a checkpoint into the new folder: value gives the tensors that like describes."""
    from model.checkpoints.layout import weights_path
    from model.checkpoints.tensors import write_weights

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
    parser.add_argument(
        "--shape", choices=("mini", "6b"), help="write this shape of benchmark.py in place of these three"
    )
    options = parser.parse_args(argv)
    with command("write_random_model.py"):
        if options.folder.exists():
            raise InputError(f"{options.folder}: something is there already; a new folder is needed.")
        if options.hidden % options.heads or min(options.hidden, options.layers, options.heads) < 1:
            raise InputError(
                f"--hidden {options.hidden} --layers {options.layers} --heads {options.heads}: 1 or more of each are needed, "
                "and a width that the heads divide."
            )
        if options.shape:
            write_random_shape(options.folder, options.shape)
        else:
            write_random_model(options.folder, options.hidden, options.layers, options.heads)
        size = sum(path.stat().st_size for path in options.folder.rglob("*") if path.is_file())
        say(f"{options.folder}: {size / 2**30:.2f} GiB")


if __name__ == "__main__":
    main()
