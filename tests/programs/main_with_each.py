"""`finetune_visualglm.main` with each command line of a JSON file of lists; prints how each ended.

main_with_each.py COMMAND_LINES.json
"""

import contextlib
import io
import json
import pathlib
import sys

import finetune_visualglm
from model.data import workers

workers.PATIENCE = 60  # seconds: however busy the machine is, nothing is imported beside a check that finds the mistake
found = []
for argv in json.loads(pathlib.Path(sys.argv[1]).read_text()):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            finetune_visualglm.main(argv)
            status = "trained"
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    found.append({"status": status, "out": out.getvalue(), "err": err.getvalue(), "torch": "torch" in sys.modules})
print(json.dumps(found))
