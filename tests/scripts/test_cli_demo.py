"""The demo in the terminal: one question, a conversation, answers as they grow, and polite ends."""

import io
import os
import signal
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import GOLDEN, PROJECT, free_port, load_model, run_python

from model.data.tokenizer import ChatGLMTokenizer
from model.inference.chat import answer_so_far, chat
from model.inference.sampling import Sampling
from scripts.cli_demo import main

COMMAND = PROJECT / "scripts/cli_demo.py"
PICTURE = GOLDEN / "upstream/images/0.png"


@dataclass
class Run:
    """How a run of the demo ended, and what it printed."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def demo(upstream_checkpoint, capsys, monkeypatch):
    """Runs the demo with these words after --from_pretrained, and these lines from the keyboard."""

    def run(*words, typed=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(typed))
        capsys.readouterr()
        try:
            main(["--from_pretrained", str(upstream_checkpoint), "--max_length", "60", *map(str, words)])
            code = 0
        except SystemExit as end:
            code = end.code
        return Run(code, *capsys.readouterr())

    return run


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
    assert runs[0].stderr == ""


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


def test_english_demo_speaks_english(demo):
    run = demo("--english", typed="\nHello\n")
    assert run.stdout.startswith("clear starts over, stop ends.\nPicture, a path or a URL")
    assert "A: " in run.stdout


def test_end_of_input_ends_politely(demo):
    run = demo(typed="")
    assert run.returncode == 0
    assert run.stderr == ""
    assert run.stdout.endswith("\n")


@pytest.mark.run
def test_ctrl_c_ends_politely(upstream_checkpoint):
    process = subprocess.Popen(
        [sys.executable, COMMAND, "--from_pretrained", upstream_checkpoint],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=0,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # Tests that run in the background of a shell ignore Ctrl-C, and so would what they start.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout.readline().startswith("输入 clear")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert errors == ""


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--image", "nothing.png"], "there is no file nothing.png"),
        (["--image", "http://127.0.0.1:9/a.png"], "can't be fetched"),
        (["--temperature", "-1"], "0 or more is needed"),
        (["--top_p", "2"], "a number above 0"),
        (["--max_length", "100000"], "--max_length 100000: this model takes"),
        (["--query", "你好", "--max_length", "5"], "--max_length must be more, not 5"),
    ],
)
def test_something_wrong_is_a_sentence_and_status_2(demo, words, part):
    run = demo(*words)
    assert run.returncode == 2
    assert part in run.stderr
    assert len(run.stderr.splitlines()) == 1


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
