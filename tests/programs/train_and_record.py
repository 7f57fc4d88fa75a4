"""finetune_visualglm.py, which records what it does not print in full: losses to the last digit, the first batch, and
the names of what is trained.

train_and_record.py RECORDED.json FLAG …
"""

import json
import pathlib
import sys

import finetune_visualglm
from model.data import dataset
from model.finetune import FineTuneVisualGLMModel
from model.training import metrics as report

recorded = {"losses": [], "first_batch": None, "trained": []}
report_step, data_collator = report.TrainingReport.step, dataset.data_collator
disable_untrainable_params = FineTuneVisualGLMModel.disable_untrainable_params


def recording_step(self, writer, optimizer, rate, loss, *rest):
    recorded["losses"].append(loss)
    report_step(self, writer, optimizer, rate, loss, *rest)


def recording_collator(examples):
    batch = data_collator(examples)
    ids = {key: batch[key].tolist() for key in ("input_ids", "labels")}
    recorded["first_batch"] = recorded["first_batch"] or {**ids, "pre_image": batch["pre_image"]}
    return batch


def recording_trained(self):
    disable_untrainable_params(self)
    recorded["trained"] += [name for name, parameter in self.named_parameters() if parameter.requires_grad]


FineTuneVisualGLMModel.disable_untrainable_params = recording_trained
report.TrainingReport.step, dataset.data_collator = recording_step, recording_collator
finetune_visualglm.main(sys.argv[2:])
pathlib.Path(sys.argv[1]).write_text(json.dumps(recorded))
