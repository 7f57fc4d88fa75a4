"""finetune_visualglm.py, which records what it does not print in full: losses to the last digit and the first batch.

train_and_record.py RECORDED.json FLAG …
"""

import json
import pathlib
import sys

import finetune_visualglm
from model.data import dataset
from model.training import metrics as report

recorded = {"losses": [], "first_batch": None}
report_step, data_collator = report.TrainingReport.step, dataset.data_collator


def recording_step(self, writer, optimizer, rate, loss, *rest):
    recorded["losses"].append(loss)
    report_step(self, writer, optimizer, rate, loss, *rest)


def recording_collator(examples):
    batch = data_collator(examples)
    ids = {key: batch[key].tolist() for key in ("input_ids", "labels")}
    recorded["first_batch"] = recorded["first_batch"] or {**ids, "pre_image": batch["pre_image"]}
    return batch


report.TrainingReport.step, dataset.data_collator = recording_step, recording_collator
finetune_visualglm.main(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(json.dumps(recorded))
