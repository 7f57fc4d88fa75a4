"""`finetune_visualglm.main` with the words of the command line; its last line names which slow modules it has imported."""

import sys

import finetune_visualglm

SLOW = ["boto3", "matplotlib", "pandas", "sympy", "torch._dynamo", "torch._inductor", "transformers"]

if __name__ == "__main__":
    finetune_visualglm.main(sys.argv[1:])
    print([name for name in SLOW if name in sys.modules])
