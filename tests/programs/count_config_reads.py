"""Run the script with these words, and print last how often it opened a model_config.json to read it."""

import sys

import finetune_visualglm

reads = []


def note(event: str, arguments: tuple) -> None:
    if event == "open" and str(arguments[0]).endswith("model_config.json") and arguments[1] in ("r", "rb"):
        reads.append(arguments[0])


sys.addaudithook(note)
finetune_visualglm.main(sys.argv[1:])
print(*reads, sep="\n")
print(len(reads))
