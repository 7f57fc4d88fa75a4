"""How a command ends: problems are collected and told at once; signals and closed pipes leave no traceback."""

import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import PROJECT, free_port, run_python, write_rows

from model.errors import ENDING_SIGNALS, InputError, RowError, command, exit_on_input_error, raise_problems


def test_problems_are_raised_together_a_line_each():
    with pytest.raises(InputError) as error:
        raise_problems(problem for problem in ("row 1: no label.", "row 7: no img."))
    assert str(error.value) == "row 1: no label.\nrow 7: no img."


@pytest.mark.parametrize("problems", [[], iter(())])
def test_no_problems_raise_nothing(problems):
    raise_problems(problems)


def test_input_error_is_a_value_error_with_its_text_alone():
    assert issubclass(InputError, ValueError)
    assert str(InputError("rows.json row 3: no label.")) == "rows.json row 3: no label."


def test_exit_on_input_error_when_one_is_raised_prints_it_and_ends_with_status_2(capsys):
    with pytest.raises(SystemExit) as exit_, exit_on_input_error("evaluate.py"):
        raise InputError("--data gone.json: no such file.")
    assert exit_.value.code == 2
    assert capsys.readouterr() == ("", "evaluate.py: error: --data gone.json: no such file.\n")


def test_exit_on_input_error_when_none_is_raised_does_nothing(capsys):
    with exit_on_input_error("evaluate.py"):
        pass
    assert capsys.readouterr() == ("", "")


def test_exit_on_input_error_leaves_our_own_bugs_alone():
    with pytest.raises(ValueError, match="a bug"), exit_on_input_error("evaluate.py"):
        raise ValueError("a bug")


@pytest.mark.parametrize(("local_rank", "told"), [("0", "x.py: error: no file.\n"), ("1", "")])
def test_bad_input_is_told_by_the_first_process_of_each_machine(monkeypatch, capsys, local_rank, told):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with pytest.raises(SystemExit), exit_on_input_error("x.py"):
        raise InputError("no file.")
    assert capsys.readouterr().err == told


@pytest.mark.parametrize(("error", "told"), [(InputError, ""), (RowError, "x.py: error: a row.\n")])
def test_exit_on_input_error_in_another_process_tells_only_what_that_process_alone_knows(
    capsys, monkeypatch, error, told
):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit), exit_on_input_error("x.py"):
        raise error("a row.")
    assert capsys.readouterr().err == told


def test_path_that_the_system_refuses_is_a_sentence(capsys):
    name = "a" * 300
    with pytest.raises(SystemExit) as exit_, command("x.py"):
        Path(name).is_file()
    assert exit_.value.code == 2
    assert capsys.readouterr().err == f"x.py: error: {name}: File name too long; a path that can be used is needed.\n"


@pytest.mark.parametrize("bug", [FileNotFoundError(2, "No such file", "a"), PermissionError(13, "no socket")])
def test_other_errors_of_the_system_are_bugs_and_shown(bug):
    with pytest.raises(type(bug)), command("x.py"):
        raise bug


@pytest.fixture
def closed(tmp_path):
    """A folder with rows and a picture that the tests' ordinary user can't enter."""
    folder = tmp_path / "closed"
    folder.mkdir()
    write_rows(folder, [{"prompt": "?", "label": "a"}], "rows.json")
    folder.chmod(0)
    yield folder
    folder.chmod(0o700)


@pytest.mark.run
@pytest.mark.skipif(os.geteuid() == 0 and not shutil.which("setpriv"), reason="root enters every folder")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("scripts/cli_demo.py", "--query", "?", "--from_pretrained", "{closed}"),
         r"{closed}/\S+: Permission denied; a path that can be used is needed\."),
        (("scripts/report.py", "{closed}"), r"{closed}/\S+: Permission denied; a path that can be used is needed\."),
        (("finetune_visualglm.py", "--use_lora", "--from_pretrained", "model/tiny", "--train-data",
          "fewshot-data/dataset.json", "--save", "{closed}/new"),
         r"{closed}/new: Permission denied; a path that can be used is needed\."),
        (("finetune_visualglm.py", "--use_lora", "--from_pretrained", "model/tiny", "--train-data",
          "fewshot-data/dataset.json", "--save", "none", "--image_folder", "{closed}/pictures"),
         r"--image_folder {closed}/pictures: Permission denied; the one that the pictures are in is needed\."),
        (("scripts/check_data.py", "{closed}/rows.json"),
         r"{closed}/rows\.json: Permission denied; a JSON file of rows is needed\."),
        (("scripts/cli_demo.py", "--from_pretrained", "model/tiny", "--ui_lang", "en", "--image", "{closed}/a.png"),
         r"{closed}/a\.png can't be read \(Permission denied\); a picture .* is needed\."),
    ],
)  # fmt: skip
def test_command_says_that_it_may_not_enter_a_folder(closed, words, said):
    as_ordinary_user = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", "--inh-caps=-all"]
    line = [sys.executable, *(word.format(closed=closed) for word in words)]
    done = subprocess.run(
        line if os.geteuid() else as_ordinary_user + line, cwd=PROJECT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert re.fullmatch(rf"\w+\.py: error: {said.format(closed=closed)}\n", done.stderr)


def refused_late_by_the_first(what_the_other_does: str) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    return run_python(*launcher, PROJECT / "tests/programs/refused_late_by_the_first.py", what_the_other_does)


@pytest.mark.run
def test_first_process_that_is_slower_tells_it_all_the_same():
    """Torchrun ends all processes as soon as one has ended."""
    done = refused_late_by_the_first("refuses")
    assert done.returncode == 1
    assert done.stderr.count("x.py: error: no file.") == 1


@pytest.mark.run
def test_process_that_waits_for_one_that_has_ended_takes_the_launchers_signal():
    done = refused_late_by_the_first("waits")
    assert done.returncode == 1
    assert re.findall(r"exitcode  : (\d+|-\d+)", done.stderr) == ["143", "2"]  # and not -9, half a minute later


# --- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"])
def test_signal_in_a_command_leaves_it_with_128_and_its_number_and_nothing_is_told(capsys, name):
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)  # in the background of a shell it is ignored, and stays so
    try:
        with pytest.raises(SystemExit) as exit_, command("x.py"):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)
    assert exit_.value.code == 128 + number
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [InputError("can't be read as weights."), RuntimeError("from a library")])
def test_signal_that_a_library_makes_an_error_of_is_still_the_signal(capsys, error):

    def library():
        with command("x.py"):
            try:
                signal.raise_signal(signal.SIGTERM)
            except SystemExit:
                raise error from None

    with pytest.raises(SystemExit) as exit_:
        library()
    assert exit_.value.code == 143
    assert capsys.readouterr() == ("", "")


def test_signal_that_a_library_swallows_ends_the_command_all_the_same():
    with pytest.raises(SystemExit) as exit_, command("x.py"), contextlib.suppress(SystemExit):
        signal.raise_signal(signal.SIGTERM)
    assert exit_.value.code == 143


def test_signals_and_streams_are_as_before_after_a_command():
    def found():
        return [
            *(signal.getsignal(number) for number in (*ENDING_SIGNALS, signal.SIGALRM)),
            signal.getitimer(signal.ITIMER_REAL), sys.unraisablehook, sys.stdout.errors, sys.stderr.errors,
        ]  # fmt: skip

    before = found()
    for number in (None, signal.SIGTERM):
        with contextlib.suppress(SystemExit), command("x.py"):
            assert found() != before
            if number:
                signal.raise_signal(number)
        assert found() == before


def test_signal_that_is_ignored_stays_ignored_in_a_command():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command("x.py"):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def imports_torch(process):
    return "libtorch" in (process / "maps").read_text()


def has_children(process):
    return (process / "task" / process.name / "children").read_text() != ""


def has_read_the_long_file(process):
    """That it reads it may last less than the time between two looks."""
    bytes_read = int((process / "io").read_text().split()[1])
    return bytes_read > 15_000_000


def has_members(group):
    """Whether there are processes of this group, ended ones included until somebody takes note of it."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


COMMANDS = {
    "finetune": (imports_torch, "finetune_visualglm.py", "--from_pretrained", "model/tiny", "--use_lora", "--mode", "finetune",
                 "--train-data", "fewshot-data/dataset.json"),
    "evaluate": (imports_torch, "scripts/evaluate.py", "--from_pretrained", "model/tiny", "--data", "fewshot-data/heldout.json"),
    "cli_demo": (imports_torch, "scripts/cli_demo.py", "--from_pretrained", "model/tiny"),
    "merge_lora": (imports_torch, "scripts/merge_lora.py", "model/tiny", "nowhere"),
    "check_data": (has_children, "scripts/check_data.py", "MANY", "--workers", "2"),
    "convert_data": (has_read_the_long_file, "scripts/convert_data.py", "LONG", "OUT"),
    "build_tiny": (imports_torch, "scripts/dev/build_tiny.py", "--out", "OUT"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """MANY rows with a picture each, a LONG file of conversations, and where to put something OUT."""
    folder = tmp_path_factory.mktemp("files")
    picture = folder / "0.png"
    picture.write_bytes((PROJECT / "fewshot-data/images/train00.png").read_bytes())
    names = [f"{number}.png" for number in range(3000)]  # they take half a second
    for name in names[1:]:
        (folder / name).hardlink_to(picture)
    many = write_rows(folder, [{"img": name, "prompt": "?", "label": "a"} for name in names])
    talk = {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}
    return {"MANY": many, "LONG": write_rows(folder, [talk] * 200_000, "long.json"), "OUT": folder / "out"}


@pytest.mark.run
@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.long)])
def test_signal_while_a_command_starts_or_works_ends_it_and_its_processes_silently(files, name, number):
    busy, *words = COMMANDS[name]
    with subprocess.Popen(
        [sys.executable, *(str(files.get(word, word)) for word in words)], cwd=PROJECT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # it may be ignored around us
    ) as process:  # fmt: skip
        while not busy(Path("/proc", str(process.pid))):
            assert process.poll() is None, "it has ended before it was seen to work"
            time.sleep(0.005)
        time.sleep(0.15)
        process.send_signal(number)
        output = process.communicate(timeout=10)[0]
    # While Python itself starts and at its end, nobody takes the signal: it ends the process by itself.
    assert process.returncode in (128 + number, -number)
    assert "Traceback" not in output
    assert "error" not in output
    deadline = time.monotonic() + 2
    while has_members(process.pid) and time.monotonic() < deadline:  # init has yet to take note of a worker's end
        time.sleep(0.01)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.parametrize(
    "script",
    [*sorted((PROJECT / "scripts").glob("*.py")), PROJECT / "finetune_visualglm.py"],
    ids=lambda path: path.name,
)
def test_command_takes_ctrl_c_before_it_imports_more(script):
    first, _, rest = script.read_text().partition("    interrupt_ends_quietly()\n")
    assert rest
    imports = re.findall(r"^(?:import|from) .*", first, re.MULTILINE)
    needed = [] if script.name == "finetune_visualglm.py" else ["import sys", "from pathlib import Path"]
    assert imports == [*needed, "from model.errors import interrupt_ends_quietly"]


def test_threads_that_wait_for_killed_processes_say_nothing():
    """Python's own, of a pool whose tasks have been given up, would print a traceback until this process is gone."""
    program = """if 1:
        import sys, time
        from concurrent.futures import ProcessPoolExecutor
        from types import SimpleNamespace
        from model.errors import end_now
        pool = ProcessPoolExecutor(1)
        tasks = [pool.submit(time.sleep, 9) for _ in range(9)]
        time.sleep(0.3)
        for task in tasks:
            task.cancel()
        sys.stdout = SimpleNamespace(flush=lambda: time.sleep(0.5))
        end_now(2)
    """
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (130, "")


# --- terminals and pipes


@pytest.mark.run
@pytest.mark.parametrize(
    "words", [("finetune_visualglm.py", "--help", "all"), ("scripts/check_data.py", "fewshot-data/dataset.json")]
)
def test_output_that_nobody_reads_any_more_ends_a_command_silently(words):
    with subprocess.Popen(
        [sys.executable, *words], cwd=PROJECT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


@pytest.mark.run
@pytest.mark.parametrize(
    ("words", "closed", "told"),
    [
        (("scripts/check_data.py", "--help"), ">/dev/full", r"check_data\.py: error: standard output: No space left on device.*"),
        (("scripts/check_data.py", "none.json"), ">&-", r"check_data\.py: error: none\.json: .*"),
        (("scripts/check_data.py", "none.json"), "<&- >&- 2>&-", ""),
    ],
)  # fmt: skip
def test_output_that_is_closed_or_full_is_no_traceback(words, closed, told):
    line = shlex.join([sys.executable, *words])
    done = subprocess.run(f"{line} {closed}", shell=True, cwd=PROJECT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 2
    assert re.fullmatch(told, done.stderr.rstrip("\n"))


def test_broken_pipe_of_something_else_is_a_bug_and_shown(capfd):
    with pytest.raises(BrokenPipeError), command("x.py"):
        raise BrokenPipeError


def long(*words):
    return pytest.param(words, marks=pytest.mark.long)


@pytest.mark.run
@pytest.mark.parametrize("words", [
    ("scripts/check_data.py", "fewshot-data/dataset.json", "--from_pretrained", "model/tiny"),
    ("scripts/check_data.py", "--help"),
    long("scripts/cli_demo.py", "--from_pretrained", "model/tiny", "--query", "你好"),
    ("scripts/cli_demo.py", "--from_pretrained", "model/tiny"),
    long("scripts/evaluate.py", "--from_pretrained", "model/tiny", "--data", "fewshot-data/dataset.json"),
    ("finetune_visualglm.py", "--from_pretrained", "model/tiny", "--use_lora", "--mode", "finetune", "--train-data",
     "fewshot-data/dataset.json", "--train-iters", "1"),
])  # fmt: skip
def test_command_in_a_terminal_without_utf8_works(words, tmp_path):
    words += ("--summary-dir", str(tmp_path), "--save", str(tmp_path)) if words[0].startswith("finetune") else ()
    done = subprocess.run(
        [sys.executable, *words], cwd=PROJECT, capture_output=True, input="\n你好\nstop\n".encode(),
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.isascii()
