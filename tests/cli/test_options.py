"""The command line: the same flags as SAT's and DeepSpeed's, and a sentence for each wrong word."""

import argparse
import json
import subprocess
import sys
from typing import Any

import pytest
from conftest import PROJECT

from model.cli import options as module
from model.cli.flag_checks import method_problems
from model.cli.options import full_parser, parse, script_parser

ROOT = PROJECT
RECIPE = (
    "--experiment-name finetune-visualglm-6b --model-parallel-size 1 --mode finetune --train-iters 300 "
    "--resume-dataloader --max_source_length 64 --max_target_length 256 --lora_rank 10 --layer_range 0 14 "
    "--pre_seq_len 4 --train-data ./fewshot-data/dataset.json --valid-data ./fewshot-data/dataset.json "
    "--distributed-backend nccl --lr-decay-style cosine --warmup .02 --checkpoint-activations --save-interval 300 "
    "--eval-interval 10000 --save ./checkpoints --split 1 --eval-iters 10 --eval-batch-size 8 --zero-stage 1 "
    "--lr 0.0001 --batch-size 4 --skip-init --fp16 --use_lora"
)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "SAT_HOME"):
        monkeypatch.delenv(name, raising=False)


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What parsing these words prints on standard error before it exits with status 2."""
    with pytest.raises(SystemExit) as exit_:
        parse(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


# --- SAT's own parser -------------------------------------------------------------------------------------------------

SAT_FLAGS_SCRIPT = """
import argparse, json
from model.cli.options import script_parser
from model.sat_compat import import_sat

class Built(Exception):
    pass

def built_by_sat(parser):
    def stop(_):
        raise Built
    parser.parse_args = stop
    try:
        sat.get_args([], parser=parser)
    except Built:
        return parser

sat = import_sat()
from sat.model import ChatGLMModel
plain = argparse.ArgumentParser(add_help=False)
ChatGLMModel.add_model_specific_args(plain)
chatglm = [action.option_strings[0] for action in plain._actions]
facts = {
    action.option_strings[0]: {
        "names": action.option_strings, "dest": action.dest, "default": action.default, "nargs": action.nargs,
        "const": action.const, "choices": action.choices, "action": type(action).__name__,
        "type": action.type and action.type.__name__,
    }
    for action in built_by_sat(plain)._actions
}
ours = [action.option_strings[-1] for action in built_by_sat(script_parser())._actions]
print(json.dumps({"facts": facts, "chatglm": chatglm, "with_ours": ours}))
"""

# Where a flag of ours is not SAT's on purpose: flag, fact, SAT's, ours.
DIFFERENCES = [
    ("--log-interval", "default", 50, 1),  # a first run shows every loss
    ("--split", "default", "1000,1,1", "1"),  # SAT's asks for 10,000 rows
]


@pytest.fixture(scope="module")
def sat_flags() -> dict[str, Any]:
    run = subprocess.run([sys.executable, "-c", SAT_FLAGS_SCRIPT], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def our_facts() -> dict[str, Any]:
    return {
        action.option_strings[-1]: {
            "names": list(action.option_strings),
            "dest": action.dest,
            "default": action.default,
            "nargs": action.nargs,
            "const": action.const,
            "choices": action.choices,
            "action": type(action).__name__,
            "type": getattr(action.type, "__name__", None),
        }
        for action in full_parser()._actions
    }


def flags_of(parser: module.FlagParser) -> set[str]:
    return {action.option_strings[-1] for action in parser._actions}


def test_flags_when_sat_builds_its_parser_are_the_same_but_for_the_listed_differences(
    sat_flags: dict[str, Any],
) -> None:
    ours = our_facts()
    differences = [
        (flag, fact, theirs, ours.get(flag, {}).get(fact))
        for flag, facts in sat_flags["facts"].items()
        for fact, theirs in facts.items()
        if flag not in ours or ours[flag][fact] != theirs
    ]
    assert differences == DIFFERENCES


def test_flags_beyond_sats_are_the_scripts_own(sat_flags: dict[str, Any]) -> None:
    beyond = flags_of(full_parser()) - set(sat_flags["facts"])
    assert beyond == flags_of(script_parser()) - set(sat_flags["chatglm"])


def test_script_parser_when_sat_adds_its_flags_knows_every_flag_once(sat_flags: dict[str, Any]) -> None:
    assert sorted(sat_flags["with_ours"]) == sorted(flags_of(full_parser()))


def test_import_takes_neither_torch_nor_sat_nor_numpy() -> None:
    code = "import sys, model.cli.options; print({'torch', 'sat', 'numpy', 'deepspeed'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout == "set()\n"


# --- help -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        parse(["--help"])
    assert exit_.value.code == 0
    return capsys.readouterr().out


def test_help_shows_our_own_group_first(help_text: str) -> None:
    headings = [line for line in help_text.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert headings[0] == "fine-tuning VisualGLM:"


@pytest.mark.parametrize("flag", ["--use_lora", "--train-iters", "--eval-interval", "--deepspeed_config", "--top_p"])
def test_help_shows_flags_of_every_origin(help_text: str, flag: str) -> None:
    assert f"  {flag}" in help_text


def test_help_of_layer_range_says_that_it_is_a_list(help_text: str) -> None:
    assert "a list, not a range" in " ".join(help_text.split())


def test_help_of_each_flag_is_a_sentence_that_names_its_default() -> None:
    for action in full_parser()._actions:
        assert action.help is not None and action.help.endswith("."), action.option_strings
        has_default = action.default not in (None, False, {}, argparse.SUPPRESS)
        assert not has_default or "default" in action.help, action.option_strings


def test_examples_in_the_help_have_no_problem() -> None:
    commands = [line for line in module.EXAMPLES.replace("\\\n", " ").splitlines() if "finetune_visualglm.py" in line]
    assert len(commands) == 3
    for command in commands:
        assert method_problems(parse(command.split("finetune_visualglm.py")[1].split())) == []


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_parse_when_nothing_is_typed_gives_the_defaults() -> None:
    options = parse([])
    assert (options.max_source_length, options.max_target_length, options.lora_rank, options.pre_seq_len) == (
        64, 256, 10, 8,
    )  # fmt: skip
    assert (options.from_pretrained, options.auto_warmup_steps, options.log_interval) == ("visualglm-6b", 100, 1)
    assert options.layer_range is None
    assert options.ignore_pad_token_for_loss is True


def test_typed_holds_the_flags_that_were_typed_even_with_their_default() -> None:
    assert parse(["--lr", "1e-4", "--use_lora"]).typed == {"lr", "use_lora"}


def test_parse_when_a_flag_is_abbreviated_takes_it_as_sat_does() -> None:
    options = parse(["--train-it", "5"])
    assert options.train_iters == 5
    assert options.typed == {"train_iters"}


def test_parse_of_the_2023_recipe_finds_no_problem() -> None:
    assert method_problems(parse(RECIPE.split())) == []


@pytest.mark.parametrize("words, value", [
    (["true"], True), (["True"], True), (["1"], True), (["yes"], True), ([], True),
    (["false"], False), (["False"], False), (["0"], False), (["no"], False),
])  # fmt: skip
def test_ignore_pad_token_for_loss_takes_truth_words_and_the_bare_flag(words: list[str], value: bool) -> None:
    assert parse(["--ignore_pad_token_for_loss", *words]).ignore_pad_token_for_loss is value


def test_eva_args_takes_a_json_object() -> None:
    assert parse(["--eva_args", '{"num_layers": 2}']).eva_args == {"num_layers": 2}


def test_parsers_share_no_default_object() -> None:
    parse([]).eva_args["num_layers"] = 2
    assert parse([]).eva_args == {}


@pytest.mark.parametrize("words, sentence", [
    (["--train_data", "a"], "--train_data: there is no such flag; did you mean --train-data?"),
    (["--max-source-length", "9"], "--max-source-length: there is no such flag; did you mean --max_source_length?"),
    (["--batchsize=4"], "--batchsize: there is no such flag; did you mean --batch-size?"),
    (["-lr", "1"], "-lr: there is no such flag; did you mean --lr?"),
    (["--xyzzy"], "--xyzzy: there is no such flag; see --help for all flags."),
    (["--use_lora", "yes"], '"yes": it follows no flag that takes it; a flag is needed before it.'),
    (["--batch-size", "four"], "--batch-size four: a whole number is needed."),
    (["--lr", "fast"], "--lr fast: a number is needed."),
    (["--lr"], "--lr: no value found; one is needed."),
    (["--train-data"], "--train-data: no value found; one or more are needed."),
    (["--use_lora=yes"], "--use_lora=yes: it takes no value; --use_lora alone is needed."),
    (["--ignore_pad_token_for_loss", "maybe"],
     '--ignore_pad_token_for_loss: "maybe" found; true or false is needed.'),
    (["--eva_args", "{a}"], "--eva_args: not JSON at column 2; an object {…} is needed."),
    (["--eva_args", "[1]"], "--eva_args: [1] found; a JSON object {…} is needed."),
])  # fmt: skip
def test_parse_when_a_word_is_wrong_exits_with_one_sentence(
    capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert refusal(capsys, *words) == f"finetune_visualglm.py: error: {sentence}\n"


def test_parse_when_a_choice_is_wrong_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "--mode", "tune")
    assert error.startswith("finetune_visualglm.py: error: --mode tune: one of ")
    assert "finetune" in error and "inference" in error


def test_parse_when_a_flag_is_ambiguous_names_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "--train-dat", "a")
    assert "--train-dat: it could be any of --train-data, --train-data-weights; the whole flag is needed." in error


def test_parse_when_two_flags_are_unknown_names_both(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "--train_iters", "5", "--eval_iters", "5")
    assert "did you mean --train-iters?" in error
    assert "did you mean --eval-iters?" in error


def test_parse_when_another_rank_prints_says_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    assert refusal(capsys, "--xyzzy") == ""
