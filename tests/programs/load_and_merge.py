"""Load all that train_and_save_both_kinds.py saved under ROOT, merge it, answer, and print how they differ, as JSON.

load_and_merge.py ROOT IMAGE
"""

import json
import sys
from pathlib import Path

import torch
from question import QUESTION

from model.convert.merge_lora import merge
from model.inference.chat import chat
from model.inference.load import load_for_answering

root, image = Path(sys.argv[1]), sys.argv[2]


def seen(checkpoint, in_memory=False):
    model, tokenizer = load_for_answering(str(checkpoint))
    if in_memory:
        model.get_mixin("lora").merge_lora()
    with torch.no_grad():
        logits = model(**QUESTION)[0]
    answer = chat(image, model, tokenizer, "这是什么？", max_length=50, temperature=0)[0]
    return logits, answer, sorted(model.state_dict())


facts = {}
base_logits, _, base_names = seen(root / "base")
for folder in sorted(path.parent for path in root.glob("*/logits.pt")):
    in_training = torch.load(folder / "logits.pt")
    for kind in ("adapter", "full"):
        logits, answer, _ = seen(folder / kind)
        fact = {
            "from_training": (logits - in_training).abs().max().item(),
            "from_base": (logits - base_logits).abs().max().item(),
        }
        if "ptuning" not in folder.name:
            merge(str(folder / kind), str(folder / f"{kind}-merged"))
            for way, merged in (
                ("file", seen(folder / f"{kind}-merged")), ("memory", seen(folder / kind, in_memory=True)),
            ):  # fmt: skip
                fact[f"merged_in_{way}"] = {
                    "difference": (merged[0] - logits).abs().max().item(),
                    "same_answer": merged[1] == answer,
                    "plain_names": merged[2] == base_names,
                }
        facts[f"{folder.name} {kind}"] = fact
print(json.dumps(facts))
