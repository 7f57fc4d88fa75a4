"""--config: what a file of flags comes to on the command line, and what is said of one that can't be used."""

import json
import math

import pytest

from model.cli.config_file import flags_as_held, with_config_files
from model.cli.options import Options, parse
from model.cli.resuming import command_line

TRAINING = ["--use_lora", "--train-data", "rows.json"]


@pytest.fixture
def config(tmp_path):
    """Writes a file of flags, and gives its path."""

    def written(text, name="flags.yaml"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return written


def options_of(*argv):
    return parse(with_config_files(argv))


def test_file_is_worth_the_flags_that_it_names(config):
    file = config("""\
use_lora: true
fp16: false                  # as without the flag
train-data: [one.json, two.json]
lr: 1e-3
layer_range: [0, 14]
eva_args: {image_size: [28, 28]}
source_prefix: "- "
max_source_length: auto
ignore_pad_token_for_loss: false
save: none
base:
""")
    options = options_of("--config", file)
    assert (options.use_lora, options.fp16, options.train_data, options.lr) == (
        True,
        False,
        ["one.json", "two.json"],
        1e-3,
    )
    assert (options.layer_range, options.eva_args, options.source_prefix) == ([0, 14], {"image_size": [28, 28]}, "- ")
    assert (options.max_source_length, options.ignore_pad_token_for_loss, options.save, options.base) == (
        None,
        False,
        None,
        None,
    )
    assert "base" not in options.user_set
    assert "fp16" not in options.user_set


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("seed: 0100", "seed", 100),
        ("seed: 1_000", "seed", 1000),
        ("experiment-name: 007", "experiment_name", "007"),
        ("experiment-name: 1.10", "experiment_name", "1.10"),
        ("experiment-name: 12:30:00", "experiment_name", "12:30:00"),
        ("experiment-name: 2024-01-02 3:04:05", "experiment_name", "2024-01-02 3:04:05"),
        ("train-data: [08, 010, 0x10]", "train_data", ["08", "010", "0x10"]),
        ("layer_range: [00, 014, -1]", "layer_range", [0, 14, -1]),
        ("layer_range: 0 2", "layer_range", [0, 2]),
        ("lora_target: query_key_value dense", "lora_target", ["query_key_value", "dense"]),
        ("train-data: my rows.json", "train_data", ["my rows.json"]),
        ("lr: 00.10", "lr", 0.1),
        ("check_seconds: .inf", "check_seconds", math.inf),
        ("eva_args: {image_size: [28, 28], hidden: 0.50}", "eva_args", {"image_size": [28, 28], "hidden": 0.5}),
    ],
)
def test_value_is_the_one_that_is_typed(config, line, name, value):
    assert getattr(options_of("--config", config(line)), name) == value


@pytest.mark.parametrize(("line", "said"), [("holdout: 1:30", "--holdout 1:30: a number is needed."),
                                            ("seed: 0x10", "--seed 0x10: a whole number is needed.")])  # fmt: skip
def test_number_that_the_command_line_does_not_take_is_refused(config, capsys, line, said):
    with pytest.raises(SystemExit, match="2"):
        options_of("--config", config(line))
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("word", ["false", "no", "off", "none"])
def test_file_that_wants_nothing_saved_saves_nothing(config, word):
    assert options_of("--config", config(f"save: {word}")).save is None


@pytest.mark.parametrize("words", [["--lr", "5"], ["--lr=5"]])
def test_command_line_wins_wherever_the_file_stands(config, words):
    file = config("lr: 3\ntrain-data: [a, b]\nbatch-size: 2")
    for argv in (["--config", file, *words, "--train-data", "c"], [*words, "--train-data", "c", f"--config={file}"]):
        options = options_of(*argv)
        assert (options.lr, options.train_data, options.batch_size) == (5, ["c"], 2)


def test_how_long_to_train_is_the_command_lines_however_it_counts(config):
    for text, words, expected in (("train-iters: 9", ["--epochs", "2"], (None, 2)), ("epochs: 9", ["--train-iters=3"], (3, None)),
                                  ("epochs: 9", [], (None, 9)), ("train-iters: 9", ["--epoch", "2"], (None, 2)),
                                  ("epochs: 9", ["--train-it=3"], (3, None))):  # fmt: skip
        options = options_of("--config", config(text), *words)
        assert (options.train_iters, options.epochs) == expected


@pytest.mark.parametrize("words", [["--conf", "FILE"], ["--confi=FILE"]])
def test_file_counts_by_an_abbreviated_flag_too(config, words):
    file = config("lr: 3")
    assert options_of(*(word.replace("FILE", file) for word in words)).lr == 3


def test_of_several_files_the_later_one_wins(config):
    files = [config("lr: 1\nseed: 7", "a.yaml"), config('{"lr": 2}', "b.json")]
    options = options_of("--config", files[0], "--config", files[1])
    assert (options.lr, options.seed) == (2, 7)


@pytest.mark.parametrize(("text", "said"), [
    ("learning_rat: 3\nlrr: 1", "learning_rat: there is no such flag; --help all shows every flag.\nerror: FILE: lrr: there is no such flag; did you mean --lr?"),
    ("resume: auto", "resume belongs on the command line; it can't stand in a file."),
    ("- lr", "no flags by name; lines such as `lr: 0.001` are needed."),
    ("lr: [1", "line 1 column 7: not YAML (expected ',' or ']', but got '<stream end>'); lines such as `lr: 0.001` are needed."),
    ("fp16: 3", '"fp16" is 3; true or false is needed.'),
    ("lr: [1, 2]", '"lr" is [1, 2]; one value is needed.'),
    ("feature_cache: yes", '"feature_cache" is true; a text or a number is needed.'),
    ("save: on", '"save" is true; a text or a number is needed.'),
    ("lr: no", '"lr" is false; a text or a number is needed.'),
    ("train-data: [no]", '"train-data" is [false]; a text or a number is needed.'),
    ("lr: 1\nseed: 2\nlr: 3", "lr twice; one value is needed."),
    ('{"lr": 1, "lr": 3}', "lr twice; one value is needed."),
])  # fmt: skip
def test_file_that_cannot_be_used_is_named_with_what_is_wrong(config, capsys, text, said):
    file = config(text)
    with pytest.raises(SystemExit, match="2"):
        with_config_files(["--config", file])
    expected = f"finetune_visualglm.py: error: FILE: {said}\n".replace("\nerror: ", "\n").replace(
        "FILE", f"--config {file}"
    )
    assert capsys.readouterr().err == expected


def test_file_that_is_not_there_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        with_config_files(["--config", str(tmp_path / "none.yaml")])
    assert "none.yaml: No such file or directory; a YAML file of flags is needed." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "said"),
    [("lr: high", "--lr high: a number is needed."), ("zero-stage: 7", "--zero-stage 7: one of 0, 1, 2, 3 is needed.")],
)
def test_values_are_checked_as_flags_are(config, capsys, text, said):
    with pytest.raises(SystemExit, match="2"):
        options_of("--config", config(text))
    assert said in capsys.readouterr().err


def test_flag_without_a_file_is_told_as_of_any_flag(capsys):
    with pytest.raises(SystemExit, match="2"):
        options_of("--config")
    assert "--config: no value found; one is needed." in capsys.readouterr().err


def test_run_remembers_the_flags_and_not_the_file(config):
    line = command_line(["--config", config("lr: 3"), *TRAINING])
    assert line.words == ["--lr=3", *TRAINING]
    assert line.options.lr == 3


def test_run_remembers_nothing_of_its_launcher_by_an_abbreviated_flag():
    assert command_line(["--local", "0", *TRAINING]).words == TRAINING


def test_settings_of_a_run_give_its_flags_again(config):
    options = parse(
        [
            *TRAINING,
            "--lr",
            "0.5",
            "--save",
            "none",
            "--max_source_length",
            "auto",
            "--seed",
            "1234",
            "--train_parts",
            "qformer=1e-5",
        ]
    )
    settings = {"version": 1, **flags_as_held(options, {"max_source_length": 77, "batch_size": 9}), "steps": 20}
    again = options_of("--config", config(json.dumps(settings), "settings.json"))
    differing = {name for name, value in vars(options).items() if getattr(again, name) != value}
    assert differing == {"max_source_length", "batch_size", "user_set"}
    assert (again.max_source_length, again.batch_size) == (77, 9)
    assert again.user_set == options.user_set | {"batch_size"}


def test_settings_have_every_flag():
    options = parse(TRAINING)
    flags = flags_as_held(options, {})["flags"]
    assert set(Options.__annotations__) - set(flags) == {"config", "resume", "user_set"}
    assert "lr" in flags
    assert json.loads(json.dumps(flags)) == flags
