"""What the processes that share a model answer, and its losses; each writes them to a file. Alone, a process has all of it.

answer_in_parts.py FOLDER CHECKPOINT=QUANT …, started by torch.distributed.run
"""

import json
import os
import pathlib
import sys

from model.data.prompt import Lengths, context_ids, sample_from_row
from model.data.rows import Row
from model.distributed import world_size
from model.inference.batch import answers_as_they_finish, label_losses
from model.inference.engine import Engine, Question
from model.inference.load import load_for_answering
from model.inference.sampling import Sampling

PAIRS = [("这是什么？", "一只猫在这里。"), ("图片里有什么动物，它在做什么？", "狗。"), ("好", "好")]
ROWS = [Row(None, prompt, label, "here") for prompt, label in PAIRS]
LENGTH = 32  # tokens, those of a question with them: two processes wait for each other some ten times for each


def found(checkpoint: str, quant: int | None) -> dict:
    """The greedy answers to questions of three lengths, one that is drawn by chance, and the losses of the labels."""
    model, tokenizer = load_for_answering(checkpoint, quant=quant, model_parallel_size=world_size())
    contexts = [context_ids(row.prompt, [], False, tokenizer, model.image_length) for row in ROWS]
    greedy = dict(answers_as_they_finish([Question(*one) for one in contexts], model, tokenizer, LENGTH, 2))
    engine = Engine(model, tokenizer, positions=LENGTH)
    drawn = engine.submit(Question(*contexts[0], sampling=Sampling(temperature=5.0, top_p=1.0, top_k=0)))
    while not drawn.finished:
        engine.step()
    samples = [sample_from_row(row, tokenizer, Lengths(model.image_length, LENGTH, LENGTH)) for row in ROWS]
    losses = [loss for loss, _ in label_losses(samples, None, model, tokenizer)]
    return {"greedy": [greedy[number] for number in range(len(ROWS))], "drawn": drawn.ids, "losses": losses}


if __name__ == "__main__":
    folder, *checkpoints = sys.argv[1:]
    answers = []
    for word in checkpoints:
        checkpoint, quant = word.split("=")
        answers.append(found(checkpoint, int(quant) if quant else None))
    pathlib.Path(folder, os.environ.get("RANK", "0")).write_text(json.dumps(answers))
