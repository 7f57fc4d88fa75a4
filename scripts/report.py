"""Make the page on a run anew, or one page on several runs side by side: curves, answers, settings, next commands.

python scripts/report.py checkpoints/MyModel-11-25-00-52
python scripts/report.py checkpoints/one-11-25-00-52 checkpoints/two-11-25-01-10 --out both.html

Of one run the page goes into its folder. Nothing else is needed to show it: pictures and curves are in the file.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from model.errors import interrupt_ends_quietly

if __name__ == "__main__":
    interrupt_ends_quietly()

import argparse
from collections.abc import Sequence

from model.checkpoints.layout import newest_run_named, read_json_object
from model.checkpoints.resume import SETTINGS_FILE
from model.checkpoints.whole import is_replaceable, write_whole
from model.cli.flag_parser import FlagParser
from model.errors import InputError, command, raise_problems
from model.inference.page import OWN_PAGE
from model.progress import say
from model.training.records import ANSWERS_FILE, METRICS_FILE, REPORT_FILE, read_records

SEVERAL = "runs.html"  # in the folder that the first run lies in


def command_line() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = FlagParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run: it has a metrics.jsonl")
    parser.add_argument(
        "--out", metavar="PAGE.html",
        help=f"where the page goes (default: {REPORT_FILE} in the run's folder; of several, {SEVERAL} beside the first)",
    )  # fmt: skip
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command; `model.errors` lists the statuses that it may end with."""
    with command("report.py"):
        options = command_line().parse_args(argv)
        given = {folder.resolve(): folder for folder in map(folder_of, options.runs)}  # each counts once
        folders = list(given.values())
        problems = {folder: problem for folder in folders if (problem := problem_with(folder))}
        if len(problems) == len(folders) or any(not folder.exists() for folder in problems):
            raise_problems(problems.values())
        for problem in problems.values():  # of checkpoints/MyModel-*, say, which also finds what was merged
            say(f"Left out: {problem}")
        folders = [folder for folder in folders if folder not in problems]
        beside = folders[0] / REPORT_FILE if len(folders) == 1 else folders[0].resolve().parent / SEVERAL
        out = Path(options.out).expanduser() if options.out else beside
        if options.out == "-":
            raise InputError("--out -: standard output takes no page; the name of a file is needed.")
        if not out.absolute().parent.is_dir():
            raise InputError(f"--out {out}: no folder {out.absolute().parent}; one that is there is needed.")
        if not is_replaceable(out, OWN_PAGE):
            raise InputError(f"{out}: what is there is no page of report.py; --out with another name is needed.")
        from model.training.report import report

        text = report(folders)
        try:
            write_whole(out, lambda file: file.write_text(text, encoding="utf-8"))
        except OSError as error:
            raise InputError(
                f"{out}: can't be written ({error.strerror}); --out with another place is needed."
            ) from error
        say(f"Report: {out}")


def folder_of(run: str) -> Path:
    """The folder of that name, or of the newest run of that name."""
    folder = Path(run).expanduser()
    return folder if folder.exists() else newest_run_named(folder) or folder


def problem_with(folder: Path) -> str | None:
    """Why no page can be made of a folder, if that is so: an earlier one may have what a broken file lacks now."""
    if not folder.is_dir():
        return f"{folder}: no such folder; the folder of a run is needed."
    if not (folder / METRICS_FILE).is_file() and not (folder / SETTINGS_FILE).is_file():
        return f"{folder}: no {METRICS_FILE} and no {SETTINGS_FILE}; the folder of a run is needed."
    metrics = folder / METRICS_FILE
    if metrics.is_file() and metrics.stat().st_size and not read_records(metrics):
        return f"{metrics}: no line of a run in it; the file as the run wrote it is needed, or none."
    for name, what in ((SETTINGS_FILE, "The settings of a run"), (ANSWERS_FILE, "The answers of a run")):
        try:
            if (folder / name).exists():
                read_json_object(folder / name, what)
        except InputError as problem:
            return str(problem)
    return None


if __name__ == "__main__":
    main()
