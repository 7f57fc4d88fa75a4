"""The demo in the terminal: one question, a conversation, answers as they grow, and polite ends."""

import contextlib
import fcntl
import io
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import GOLDEN, PICTURE, PROJECT, free_port, load_model, run_here, run_python, write_tuned
from warm_start import commands, started_warm

from model.data.tokenizer import ChatGLMTokenizer
from model.inference.chat import answer_so_far, chat
from model.inference.sampling import Sampling
from scripts.cli_demo import main

COMMAND = PROJECT / "scripts/cli_demo.py"


@pytest.fixture
def demo(upstream_checkpoint, capsys, monkeypatch):
    """Runs the demo with these words after --from_pretrained, and these lines from the keyboard."""

    def run(*words, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        return run_here(main, capsys, "--from_pretrained", upstream_checkpoint, "--max_length", "60", *words)

    return run


@pytest.mark.long
@pytest.mark.run
def test_two_processes_that_share_the_model_answer_as_one_does(demo, upstream_checkpoint):
    words = ["--temperature", "0"]
    typed = f"{PICTURE}\n这是什么？\nnone.png\nclear\nnone.png\nstop\n"
    alone = demo(*words, typed=typed)
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()))
    together = subprocess.run(
        [sys.executable, *launcher, COMMAND, "--from_pretrained", upstream_checkpoint, "--max_length", "60", *words],
        input=typed, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(PROJECT)},
    )  # fmt: skip
    assert together.returncode == alone.returncode == 0, together.stderr
    assert together.stdout[together.stdout.index("输入") :] == alone.stdout[alone.stdout.index("输入") :]


def test_answer_so_far_grows_by_a_token_and_ends_with_the_whole_answer(upstream_checkpoint):
    model = load_model(upstream_checkpoint)
    tokenizer = ChatGLMTokenizer.from_pretrained(GOLDEN / "tokenizer")
    greedy = Sampling(temperature=0)
    texts = list(answer_so_far(None, model, tokenizer, "你好", max_length=20, sampling=greedy))
    assert len(texts) > 2
    assert texts[-1] == chat(None, model, tokenizer, "你好", max_length=20, temperature=0)[0]


def test_one_question_prints_the_answer_alone_and_the_same_each_time_at_temperature_0(demo):
    runs = [demo("--image", PICTURE, "--query", "你好", "--temperature", "0") for _ in range(2)]
    assert [run.returncode for run in runs] == [0, 0], runs[0].stderr
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.splitlines()) == 1
    assert runs[0].stderr == "The answer was cut off (--max_length 60).\n"


@pytest.mark.slow
def test_sampled_answer_is_the_same_with_the_same_seed_and_another_with_another(demo):
    first, again, other = (demo("--query", "你好", "--seed", seed).stdout for seed in (3, 3, 4))
    assert first == again
    assert first != other


def test_conversation_starts_over_at_clear_survives_a_wrong_picture_and_ends_at_stop(demo):
    typed = f"{PICTURE}\nclear\nnothing.png\n\n你好\nstop\n"
    run = demo("--temperature", "0", typed=typed)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("图片的路径或网址") == 3
    assert run.stdout.count("答：") == 2
    assert "there is no file nothing.png" in run.stdout
    assert run.stderr == ""


def test_conversation_says_that_an_answer_was_cut_off_and_how_to_go_on_when_there_is_no_room(demo):
    run = demo("--temperature", "0", "--max_length", "30", typed="\n你好\n你好\nstop\n")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("The answer was cut off (--max_length 30).") == 1
    assert "--max_length must be more, not 30." in run.stdout
    told = next(part for part in run.stdout.split("问：") if "must be more, not 30." in part)
    assert "答：" not in told
    assert run.stdout.count("输入 clear 重新开始，stop 退出。") == 2  # at the start, and where it helps


def test_english_demo_speaks_english(demo):
    run = demo("--english", typed="\nHello\n")
    assert run.stdout.startswith("clear starts over, stop ends.\nPicture, a path or a URL")
    assert "A: " in run.stdout


def test_end_of_input_ends_politely(demo):
    run = demo(typed="")
    assert run.returncode == 0
    assert run.stderr == ""
    assert run.stdout.endswith("\n")


@pytest.mark.slow
def test_pictures_in_quotes_and_below_the_home_folder_are_found(demo, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my picture.png").write_bytes(PICTURE.read_bytes())
    typed = "'~/my picture.png'\nclear\n~/my\\ picture.png\nclear\n~/gone.png\nstop\n"
    typed = typed.replace("'~", f"'{tmp_path}")  # a shell takes ~ in quotes as it stands, too
    run = demo("--temperature", "0", typed=typed)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("答：") == 2
    assert f"there is no file {tmp_path}/gone.png; the path or the address of a picture is needed." in run.stdout
    assert demo("--image", "~/my picture.png").returncode == 0


def test_bytes_that_are_no_text_are_asked_as_an_unknown_character(demo, monkeypatch):
    monkeypatch.setattr("io.StringIO", lambda typed: io.TextIOWrapper(io.BytesIO(typed), "utf-8"))
    run = demo("--temperature", "0", typed=b"\n\xff\nstop\n")
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("答：") == 1


# two checkpoints


@pytest.fixture(scope="module")
def tuned(upstream_checkpoint, tmp_path_factory):
    """The same model with other answers."""
    folder = tmp_path_factory.mktemp("tuned") / "tuned"
    return write_tuned(upstream_checkpoint, folder, use_lora=True, lora_rank=4)


@pytest.mark.slow
def test_two_checkpoints_each_answer_with_their_name_and_begin_anew_together(demo, tuned, upstream_checkpoint):
    words = ("--compare", tuned, "--temperature", "0")
    alone = demo("--query", "你好", "--temperature", "0").stdout
    first, second = demo("--query", "你好", *words).stdout.splitlines()
    assert first == f"{upstream_checkpoint}: {alone.strip()}"
    assert second.startswith(f"{tuned}: ")
    assert second != f"{tuned}: {alone.strip()}"
    talk = demo(*words, typed="\n你好\nclear\n\n你好\n").stdout
    assert (
        talk.count(f"答（{upstream_checkpoint}）：") == talk.count(f"答（{tuned}）：{second.partition(': ')[2]}") == 2
    )


# its language


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "variable", "prompt", "problem"),
    [
        ([], "", "图片的路径", "没有文件 gone.png"),
        (["--english"], "", "Picture, a path", "there is no file gone.png"),
        (["--english", "--ui_lang", "zh"], "", "图片的路径", "没有文件 gone.png"),
        (["--ui_lang", "en"], "zh", "Picture, a path", "there is no file gone.png"),
        ([], "en", "图片的路径", "there is no file gone.png"),
    ],
)
def test_prompts_and_problems_are_in_the_demos_language(demo, monkeypatch, words, variable, prompt, problem):
    monkeypatch.setenv("VISUALGLM_UI_LANG", variable)
    monkeypatch.setattr("model.chinese._language", "auto")
    run = demo(*words, typed="gone.png\nstop\n")
    assert prompt in run.stdout
    assert problem in run.stdout


@pytest.mark.slow
def test_checkpoint_that_was_trained_in_english_is_asked_in_english(demo, upstream_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("VISUALGLM_UI_LANG", "")
    monkeypatch.setattr("model.chinese._language", "auto")
    tuned = write_tuned(upstream_checkpoint, tmp_path / "tuned", use_lora=True, lora_rank=2, lang="en")
    run = demo("--from_pretrained", tuned, "--temperature", "0", typed=f"{PICTURE}\nstop\n")
    assert run.stdout.startswith("clear starts over, stop ends.\nPicture, a path or a URL")
    asked = demo("--from_pretrained", tuned, "--temperature", "0", "--image", PICTURE, "--query", "Describe the image.")
    assert f"A: {asked.stdout}" in run.stdout


# at a terminal


class Terminal:
    """The demo in a terminal of its own, as a person has it."""

    def __init__(self, *words, **environment):
        self.keyboard, self.screen = pty.openpty()
        self.settings = termios.tcgetattr(self.screen)
        self.written, self.read = b"", 0  # read: how much of it was waited for
        command = [*map(str, (COMMAND, "--temperature", "0", *words))]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm", "LANG": "C.UTF-8", **environment}
        screens = (self.screen, self.screen, self.screen)
        self.process = started_warm(command, os.getcwd(), environment, screens, own_session=True) or subprocess.Popen(
            [sys.executable, *command],
            stdin=self.screen, stdout=self.screen, stderr=self.screen, start_new_session=True, env=environment,
            preexec_fn=self._take,
        )  # fmt: skip

    @staticmethod
    def _take():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for number in (signal.SIGINT, signal.SIGHUP):  # which tests in the background ignore, and what they start
            signal.signal(number, signal.SIG_DFL)

    @property
    def shown(self):
        return self.written.decode(errors="replace")

    def until(self, text):
        """Wait until text is shown, behind what was waited for before."""
        while (place := self.written.find(text.encode(), self.read)) < 0:
            assert select.select([self.keyboard], [], [], 60)[0], self.shown
            self.written += os.read(self.keyboard, 4096)
        self.read = place + len(text.encode())

    def press(self, keys):
        os.write(self.keyboard, keys.encode())

    def ended(self, again=lambda: None):
        """The status that the demo ended with; the terminal is as it was before, and at the start of a line.

        again: what ends it, for readline may miss a signal that comes between its prompt and its waiting for keys.
        """
        while self.process.poll() is None:
            again()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(5)
        status = self.process.returncode
        while select.select([self.keyboard], [], [], 0)[0]:
            self.written += os.read(self.keyboard, 4096)
        assert termios.tcgetattr(self.screen) == self.settings
        assert self.shown.endswith("\n"), self.shown
        assert "Traceback" not in self.shown
        os.close(self.keyboard)
        os.close(self.screen)
        return status


UP, LEFT, BACKSPACE, CTRL_C, CTRL_D = "\x1b[A", "\x1b[D", "\x7f", "\x03", "\x04"
TINY = ("--from_pretrained", PROJECT / "model/tiny")


@pytest.mark.run
def test_terminal_has_line_editing_and_earlier_lines_and_ctrl_d_leaves(tmp_path):
    history = tmp_path / "visualglm/history"
    history.parent.mkdir()
    history.write_text("从前的问题\n")
    terminal = Terminal(*TINY, XDG_STATE_HOME=str(tmp_path))
    terminal.until("stop：退出）：")
    terminal.press("\r")
    terminal.until("问：")
    terminal.press(UP + UP)
    terminal.until("从前的问题")
    terminal.press("吗" + LEFT + BACKSPACE * 5 + "你好" + "\r")
    terminal.until("答：")
    terminal.until("问：")
    terminal.press(CTRL_D)
    assert terminal.ended() == 0
    assert history.read_text().splitlines() == ["从前的问题", "你好吗"]


@pytest.mark.run
@pytest.mark.parametrize("locale", ["C", "xx_XX.UTF-8"])  # the second isn't installed
def test_chinese_is_typed_and_edited_by_characters_in_a_locale_without_it(tmp_path, locale):
    terminal = Terminal(*TINY, XDG_STATE_HOME=str(tmp_path), LC_ALL=locale)
    terminal.until("stop：退出）：")
    terminal.press("\r")
    terminal.until("问：")
    terminal.press("图里有狗" + BACKSPACE + "猫吗？" + LEFT + BACKSPACE + "呢\r")
    terminal.until("答：")
    terminal.until("问：")
    terminal.press(CTRL_D)
    assert terminal.ended() == 0
    assert (tmp_path / "visualglm/history").read_text() == "图里有猫呢？\n"


@pytest.mark.run
def test_ctrl_c_at_the_prompt_leaves_without_a_folder_for_the_history():
    terminal = Terminal(*TINY, XDG_STATE_HOME="/dev/null/state")
    terminal.until("stop：退出）：")
    terminal.press("half a line")
    terminal.until("half a line")
    assert terminal.ended(lambda: terminal.press(CTRL_C)) == 130


@pytest.mark.run
def test_ctrl_c_while_it_answers_leaves(upstream_checkpoint, tmp_path):
    terminal = Terminal("--from_pretrained", upstream_checkpoint, XDG_STATE_HOME=str(tmp_path))  # it answers for long
    terminal.until("stop：退出）：")
    terminal.press("\r")
    terminal.until("问：")
    terminal.press("你好\r")
    terminal.until("答：")
    assert terminal.ended(lambda: terminal.press(CTRL_C)) == 130
    assert (tmp_path / "visualglm/history").read_text() == "你好\n"


@pytest.mark.run
@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGHUP, 129, marks=pytest.mark.long)]
)
def test_signal_at_the_prompt_gives_the_terminal_back(tmp_path, number, status):
    terminal = Terminal(*TINY, XDG_STATE_HOME=str(tmp_path))
    terminal.until("stop：退出）：")
    assert terminal.ended(lambda: terminal.process.send_signal(number)) == status


@pytest.mark.run
@pytest.mark.long
def test_reader_that_goes_ends_the_demo_quietly():
    read, write = os.pipe()
    os.close(read)
    words = [commands() / "python", COMMAND, *TINY, "--query", "你好", "--temperature", "0"]
    run = subprocess.run(words, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (run.returncode, run.stderr) == (141, "")


@pytest.mark.run
def test_ctrl_c_ends_politely(upstream_checkpoint):
    process = subprocess.Popen(
        [commands() / "python", COMMAND, "--from_pretrained", upstream_checkpoint],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # Tests that run in the background of a shell ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("输入 clear")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130  # its input is still open
    assert process.stderr.read() == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--image", "nothing.png"], "there is no file nothing.png"),
        (["--image", "http://127.0.0.1:9/a.png"], "can't be fetched"),
        (["--temperature", "-1"], "0 or more is needed"),
        (["--top_p", "2"], "a number above 0"),
        (["--max_length", "100000"], "--max_length 100000: this model takes"),
        (["--query", "你好", "--max_length", "5"], "--max_length must be more, not 5"),
        (["--query", ""], "--query: it is empty; a value is needed, or no --query."),
        (["--image", "  "], "--image: it is empty"),
        (
            ["--from_pretrained", "model/tiny", "--compare", "./model/tiny", "--query", "你好"],
            "--compare ./model/tiny: the same as --from_pretrained; another checkpoint is needed.",
        ),
        (["--prompt_zh", ""], "--prompt_zh: it is empty; a value is needed, or no --prompt_zh."),
        (["--prompt_en", " "], "--prompt_en: it is empty; a value is needed, or no --prompt_en."),
    ],
)
def test_something_wrong_is_a_sentence_and_status_2(demo, words, part):
    run = demo(*words)
    assert run.returncode == 2
    assert part in run.stderr
    assert len(run.stderr.splitlines()) == 1


def test_address_of_no_picture_is_named(demo, monkeypatch):
    class NoPicture(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"no picture")

        def log_message(self, *_):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), NoPicture) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/fake.png"
        assert demo("--image", url).stderr.startswith(f"cli_demo.py: error: {url} isn't a picture; ")
        monkeypatch.setenv("VISUALGLM_UI_LANG", "zh")
        told = "不是图片；需要一张图片（JPEG、PNG、WebP、GIF、BMP、TIFF 等）。"
        assert demo("--image", url).stderr == f"cli_demo.py：错误：{url} {told}\n"
        server.shutdown()


@pytest.mark.run
@pytest.mark.parametrize("words", [("--quant", "4"), pytest.param(("--dtype", "bf16"), marks=pytest.mark.long)])
def test_number_formats_answer(demo, words):
    run = demo("--query", "你好", "--temperature", "0", "--max_length", "60", *words)
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.run
def test_answering_imports_no_deepspeed(upstream_checkpoint):
    code = (
        "import sys; from scripts.cli_demo import main; main(sys.argv[1:]); "
        "print({'deepspeed', 'wandb', 'bitsandbytes'} & set(sys.modules))"
    )
    run = run_python("-c", code, "--from_pretrained", upstream_checkpoint, "--query", "你好", "--max_length", "20")
    assert run.stdout.endswith("set()\n"), run.stderr
