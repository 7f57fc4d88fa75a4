"""The command line: its help, its types, and a sentence for each wrong word."""

import argparse
import re
from typing import Any, Literal, get_type_hints

import pytest
from conftest import PROJECT, run_program, run_python

from model.cli import options as module
from model.cli.flag_checks import flag_problems
from model.cli.options import full_parser, parse, spelled_out

RECIPE = (
    "--experiment-name finetune-visualglm-6b --model-parallel-size 1 --mode finetune --train-iters 300 "
    "--resume-dataloader --max_source_length 64 --max_target_length 256 --lora_rank 10 --layer_range 0 14 "
    "--pre_seq_len 4 --train-data ./fewshot-data/dataset.json --valid-data ./fewshot-data/dataset.json "
    "--distributed-backend nccl --lr-decay-style cosine --warmup .02 --checkpoint-activations --save-interval 300 "
    "--eval-interval 10000 --save ./checkpoints --split 1 --eval-iters 10 --eval-batch-size 8 --zero-stage 1 "
    "--lr 0.0001 --batch-size 4 --skip-init --fp16 --use_lora"
)

pytestmark = pytest.mark.usefixtures("no_launcher")


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What parsing these words prints on standard error before it exits with status 2."""
    with pytest.raises(SystemExit) as exit_:
        parse(words)
    assert exit_.value.code == 2
    return capsys.readouterr().err


# --- importing ---------------------------------------------------------------------------------------------------------


def test_import_takes_neither_torch_nor_sat_nor_numpy() -> None:
    assert run_program("import_options").stdout == "[]\n"


# --- help -------------------------------------------------------------------------------------------------------------


def help_of(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What these words print before they end the program with status 0."""
    with pytest.raises(SystemExit) as exit_:
        parse(words)
    assert exit_.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def help_text(capsys: pytest.CaptureFixture[str]) -> str:
    return help_of(capsys, "--help", "all")


@pytest.fixture
def first_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("COLUMNS", "80")
    return help_of(capsys, "--help")


@pytest.mark.parametrize(
    "flag", ["--train-data", "--use_lora", "--use_qlora", "--use_ptuning", "--from_pretrained", "--save", "--lr",
             "--epochs", "--holdout"],
)  # fmt: skip
def test_first_help_shows_what_people_need_first(first_help: str, flag: str) -> None:
    assert re.search(rf"^  {flag}\b", first_help, re.MULTILINE)


def test_first_help_fits_a_screen_and_points_to_the_rest(first_help: str) -> None:
    assert len(first_help.splitlines()) <= 42
    assert first_help.endswith("\n--help all shows every flag.\n")


def test_first_help_leaves_the_other_flags_out(first_help: str) -> None:
    assert "--deepspeed_config" not in first_help
    assert "--layer_range" not in first_help


@pytest.mark.parametrize("words", [["-h"], ["--help", "--use_lora"], ["--use_lora", "--help"]])
def test_help_alone_or_among_flags_is_the_first_help(
    capsys: pytest.CaptureFixture[str], first_help: str, words: list[str]
) -> None:
    assert help_of(capsys, *words) == first_help


def test_short_flag_with_all_shows_every_flag(capsys: pytest.CaptureFixture[str], help_text: str) -> None:
    assert help_of(capsys, "-h", "all") == help_text


def test_help_of_something_else_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, "--help", "lora").startswith("finetune_visualglm.py: error: -h/--help lora: one of ")


def test_help_all_shows_every_flag_of_the_parser_with_its_help(help_text: str) -> None:
    shown = " ".join(help_text.split())
    for action in full_parser()._actions:
        sentence = action.help % {"default": action.default}  # type: ignore[operator]
        assert f"  {action.option_strings[0]}" in help_text, action.option_strings
        assert " ".join(sentence.split()).replace("- ", "-") in shown.replace("- ", "-"), action.option_strings


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
        assert action.help is not None, action.option_strings
        assert action.help.endswith("."), action.option_strings
        has_default = action.default not in (None, False, {}, argparse.SUPPRESS)
        assert not has_default or "default" in action.help, action.option_strings


@pytest.mark.parametrize(("examples", "number"), [(module.EXAMPLES, 3), (module.FIRST_EXAMPLES, 2)])
def test_examples_in_the_help_have_no_problem(examples: str, number: int) -> None:
    commands = [line for line in examples.replace("\\\n", " ").splitlines() if "finetune_visualglm.py" in line]
    assert len(commands) == number
    for command in commands:
        assert flag_problems(parse(command.split("finetune_visualglm.py")[1].split())) == []


# --- parsing ----------------------------------------------------------------------------------------------------------


def test_parse_when_nothing_is_typed_gives_the_defaults() -> None:
    options = parse([])
    assert (options.max_source_length, options.max_target_length, options.lora_rank, options.pre_seq_len) == (
        64, 256, 10, 8,
    )  # fmt: skip
    assert (options.from_pretrained, options.auto_warmup_steps, options.log_interval) == ("visualglm-6b", 100, 1)
    assert options.layer_range is None
    assert options.ignore_pad_token_for_loss is True


def test_user_set_holds_the_flags_that_were_given_even_with_their_default() -> None:
    assert parse(["--lr", "1e-4", "--use_lora"]).user_set == {"lr", "use_lora"}


def test_parse_when_a_flag_is_abbreviated_takes_it_as_sat_does() -> None:
    options = parse(["--train-it", "5"])
    assert options.train_iters == 5
    assert options.user_set == {"train_iters"}


@pytest.mark.parametrize(
    ("word", "whole"),
    [("--conf", "--config"), ("--lora_r=3", "--lora_rank=3"), ("--save", "--save"), ("--train-dat", "--train-dat"),
     ("--", "--"), ("-h", "-h"), ("--nothing=1", "--nothing=1"), ("conf", "conf")],
)  # fmt: skip
def test_whole_flags_has_in_full_what_can_be_but_one_flag(word: str, whole: str) -> None:
    assert module.whole_flags([word]) == [whole]


def test_parse_of_the_2023_recipe_finds_no_problem() -> None:
    assert flag_problems(parse(RECIPE.split())) == []


@pytest.mark.parametrize(("words", "value"), [
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


@pytest.mark.parametrize(("words", "sentence"), [
    (["--train_data", "a"], "--train_data: there is no such flag; did you mean --train-data?"),
    (["--max-source-length", "9"], "--max-source-length: there is no such flag; did you mean --max_source_length?"),
    (["--batchsize=4"], "--batchsize: there is no such flag; did you mean --batch-size?"),
    (["-lr", "1"], "-lr: there is no such flag; did you mean --lr?"),
    (["--xyzzy"], "--xyzzy: there is no such flag; --help all shows every flag."),
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


@pytest.mark.parametrize(("flag", "own"), [
    ("--learning_rate", "--lr"), ("--num_train_epochs", "--epochs"), ("--max_steps", "--train-iters"),
    ("--output_dir", "--save"), ("--save_steps", "--save-interval"), ("--logging_steps", "--log-interval"),
    ("--data", "--train-data"), ("--per-device-train-batch-size", "--batch-size"), ("--warmup_ratio", "--warmup"),
    ("--gradient_accumulation_steps", "--gradient-accumulation-steps"), ("--model_name_or_path", "--from_pretrained"),
    ("--resume_from_checkpoint", "--resume"),
])  # fmt: skip
def test_flag_of_other_trainers_is_answered_with_ours(capsys: pytest.CaptureFixture[str], flag: str, own: str) -> None:
    assert f"{flag}: there is no such flag; did you mean {own}?\n" in refusal(capsys, flag, "1")


def test_flags_that_are_named_for_those_of_other_trainers_are_there() -> None:
    assert set(module.FOREIGN_FLAGS.values()) <= set(module.flag_names().values())
    assert not set(module.FOREIGN_FLAGS) & set(module.flag_names().values())
    assert parse(["--lora_r", "4"]).lora_rank == 4


def test_parse_when_a_choice_is_wrong_names_the_choices(capsys: pytest.CaptureFixture[str]) -> None:
    error = refusal(capsys, "--mode", "tune")
    assert error.startswith("finetune_visualglm.py: error: --mode tune: one of ")
    assert "finetune" in error
    assert "inference" in error


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


# --- types ------------------------------------------------------------------------------------------------------------


def annotation_of(action: argparse.Action) -> object:
    """The type that Options must have for a flag."""
    if isinstance(action, argparse._StoreTrueAction):
        return bool
    if action.dest == "iterable_dataset":
        return Literal["custom"] | bool
    value: Any = BY_PARSER.get(getattr(action.type, "__name__", "str"))
    value = list[value] if action.nargs in ("+", "*") else value
    return value | None if action.default is None or action.type is module.length_or_auto else value


BY_PARSER = {
    "_measure": str,
    "_rows_or_share": float,
    "int": int,
    "float": float,
    "str": str,
    "length_or_auto": int,
    "_memory": int,
    "_truth": bool,
    "_json_object": dict[str, object],
    "_part_and_rate": str,
    "_folder_or_none": str | None,
}


def test_options_has_an_annotation_for_every_flag_of_the_type_that_the_parser_gives() -> None:
    annotated = get_type_hints(module.Options)
    assert annotated.pop("user_set") == frozenset[str]
    assert annotated == {a.dest: annotation_of(a) for a in full_parser()._actions if a.dest != "help"}


def test_options_have_a_value_for_every_annotation() -> None:
    assert vars(parse([])).keys() == get_type_hints(module.Options).keys()


@pytest.mark.run
def test_mypy_finds_a_misspelt_option_and_one_that_may_be_auto() -> None:
    program = PROJECT / "tests/programs/misspelt_option.py"
    run = run_python("-m", "mypy", "--config-file", PROJECT / ".mypy.ini", program)
    wrong = [number for number, line in enumerate(program.read_text().splitlines(), 1) if "  # " in line]
    found = re.findall(r"misspelt_option\.py:(\d+): error: (.*)", run.stdout)
    assert [int(line) for line, _ in found] == wrong, run.stdout + run.stderr
    assert found[0][1].startswith('"Options" has no attribute "bf61"')


@pytest.mark.parametrize(
    ("words", "measure"),
    [([], None), (["--keep_best"], "loss"), (["--keep_best", "exact"], "exact"), (["--keep_best=true"], "loss"),
     (["--keep_best=false"], None)],
)  # fmt: skip
def test_keep_best_is_by_the_loss_unless_it_says_otherwise(words: list[str], measure: str | None) -> None:
    """The last two stand in the settings.json of runs of earlier versions."""
    assert module.parse(words).keep_best == measure


def test_flags_that_take_paths_are_known_by_their_help() -> None:
    assert module.path_flags() == {
        "--from_pretrained", "--base", "--tokenizer", "--image_folder", "--feature_cache", "--resume", "--config", "--save",
        "--load", "--summary-dir", "--train-data", "--valid-data", "--test-data", "--input-source", "--output-path",
        "--deepspeed_config", "--deepscale_config",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--save=~/runs"], ["--save=/home/ann/runs"]), (["--save", "~/runs"], ["--save", "/home/ann/runs"]),
        (["--train-data", "a~.json", "~/b.json"], ["--train-data", "a~.json", "/home/ann/b.json"]),
        (["--source_prefix", "~ like this: ~/x"], ["--source_prefix", "~ like this: ~/x"]),
        (["--source_prefix", "~", "--experiment-name=~/x"], ["--source_prefix", "~", "--experiment-name=~/x"]),
        (["--save=~/x=~", "--use_lora"], ["--save=/home/ann/x=~", "--use_lora"]),
    ],
)  # fmt: skip
def test_home_is_spelled_out_where_the_shell_leaves_it(
    words: list[str], meant: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ann")
    assert spelled_out(words) == meant
