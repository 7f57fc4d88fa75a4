"""`finetune_visualglm.main` at one ZeRO stage after another; the last line names which slow modules are imported then.

imported_by_a_run.py STAGE,… FLAG …
"""

import sys

import finetune_visualglm

SLOW = ["boto3", "matplotlib", "pandas", "sympy", "torch._dynamo", "torch._inductor", "transformers"]

if __name__ == "__main__":
    for stage in sys.argv[1].split(","):
        finetune_visualglm.main([*sys.argv[2:], "--zero-stage", stage])
    print([name for name in SLOW if name in sys.modules])
