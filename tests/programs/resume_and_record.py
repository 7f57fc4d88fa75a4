"""A run, and the same run cut off after an iteration and gone on with, each as the script does it; both are recorded.

resume_and_record.py FOLDER ITERATION FLAG …

FOLDER gets whole/ and cut/, the folders of the runs, and losses.json: {"whole": [loss, …], "cut": [loss, …]}, to the last digit.
"""

import json
import shutil
import sys
from pathlib import Path

import finetune_visualglm
from model.training import metrics

folder, iteration, flags = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
recorded: dict[str, list[float]] = {"whole": [], "cut": []}
report_step = metrics.TrainingReport.step


def recording_step(self, summary_writer, optimizer, next_rate, loss, *rest):
    recorded[part].append(loss)
    report_step(self, summary_writer, optimizer, next_rate, loss, *rest)


metrics.TrainingReport.step = recording_step

part = "whole"
finetune_visualglm.main([*flags, "--save", str(folder / "saved"), "--summary-dir", str(folder)])
(saved,) = (folder / "saved").iterdir()
shutil.copytree(saved, folder / "cut")
saved.rename(folder / "whole")
part = "cut"
print("== cut off")
finetune_visualglm.main(["--resume", str(folder / "cut" / iteration)])
(folder / "losses.json").write_text(json.dumps(recorded))
