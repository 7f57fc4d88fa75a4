"""Tune the small golden model in several ways, and write the model_config.json of each checkpoint to FOLDER/<way>.json.

The files in golden/saved_configs were made by the code as it was before `model/adapter_config.py`, with
PYTHONPATH=.:tests python tests/programs/write_saved_configs.py tests/golden/saved_configs
What differs from machine to machine is replaced: the base's place, its fingerprint and the packages' versions.
"""

import json
import sys
import tempfile
from pathlib import Path

from conftest import GOLDEN, upstream_weights, write_checkpoint, write_tuned

from model.sat_compat import import_sat

WAYS = {
    "lora": {"use_lora": True, "lora_rank": 3, "layer_range": [2, 0]},
    "lora_options": {
        "use_lora": True, "lora_alpha": 6.0, "lora_dropout": 0.1, "lora_target": ["dense_4h_to_h", "dense"],
        "train_parts": ["qformer=1e-5", "glm_proj"],
    },
    "qlora": {"use_qlora": True, "lora_rank": 2},
    "ptuning": {"use_ptuning": True, "pre_seq_len": 4},
    "both": {"use_lora": True, "lora_rank": 2, "layer_range": [1], "use_ptuning": True},
}  # fmt: skip


def write_saved_configs(folder: Path) -> None:
    import_sat()
    config = json.loads((GOLDEN / "upstream/model_config.json").read_text())
    with tempfile.TemporaryDirectory() as place:
        base = write_checkpoint(Path(place) / "base", config, upstream_weights())
        for way, flags in WAYS.items():
            keep(write_tuned(base, Path(place) / way, **flags), place, folder / f"{way}.json")
        resumed = write_tuned(Path(place) / "lora", Path(place) / "resumed", full=True, use_ptuning=True, lora_rank=9)
        keep(resumed, place, folder / "lora_then_ptuning.json")


def keep(checkpoint: Path, place: str, path: Path) -> None:
    text = (checkpoint / "model_config.json").read_text(encoding="utf-8")
    described = json.loads(text)["finetuning"]
    versions = json.dumps(described["versions"], indent=4).replace("\n", "\n        ")
    assert versions in text
    path.write_text(
        text.replace(versions, "{}").replace(place, "").replace(described["base"]["fingerprint"], "…"), encoding="utf-8"
    )


if __name__ == "__main__":
    write_saved_configs(Path(sys.argv[1]))
