"""`finetune_visualglm.main` three times in one process, as in a notebook: LoRA, P-Tuning, and LoRA again.

main_three_times.py FLAG …        flags for all three
"""

import os
import sys

import finetune_visualglm

before = dict(os.environ)
for method in ("--use_lora", "--use_ptuning", "--use_lora"):
    print("==", method, flush=True)
    finetune_visualglm.main([method, *sys.argv[1:]])
added = {name for name in os.environ if name not in before} & {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"}
print("==", f"{added} is set" if added else "the environment is as before")
