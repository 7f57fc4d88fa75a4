"""Flags in a file: --config FILE.yaml, and `settings.json`, in which every run writes down its own.

    use_lora: true                              a flag without a value
    train-data: [one.json, two.json]            several values
    lr: 1e-3                                    with - or _ , as the command line takes them; so are numbers
    train_parts: [qformer=1e-5]

A file becomes the words of a command line, which stand before those that were typed, and behind those of a recipe in
scripts/. So its values are checked as flags are, the command line wins, and a recipe loses. `settings.json` of a run is
such a file too: of it those flags are taken that the run was given, and those that have another default by now.

Only the standard library is imported, and PyYAML where there is such a file.
"""

import argparse
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from model.cli.flag_parser import FlagParser
from model.cli.options import Options, full_parser, whole_flags

FLAG = "--config"
RECIPE_ENDS = "--recipe_ends"  # between a recipe's own words and those that were typed
NOT_IN_A_FILE = ("help", "config", "resume", "local_rank", "device")  # what belongs to one start of one process
LENGTHS = {"epochs", "train-iters"}  # how long to train: of what is typed, neither is a file's
TEXT = "tag:yaml.org,2002:str"
NUMBERS = {f"tag:yaml.org,2002:{kind}" for kind in ("int", "float", "timestamp")}
SAME_IN_YAML = r"-?(0|[1-9][0-9]*)|[-+]?\.(inf|nan)"  # numbers of a flag; others stay as they are typed
FLAGS, GIVEN = "flags", "given"  # keys of settings.json


def with_config_files(argv: Sequence[str]) -> list[str]:
    """A command line in which the flags of each --config FILE stand in place of that flag, in front of what was typed.

    A recipe's own words, up to RECIPE_ENDS, stay before them.

    Exits with status 2 and a sentence on standard error where the file can't be read or has what no flag takes.
    """
    argv = whole_flags(argv)
    recipe: list[str] = []
    if RECIPE_ENDS in argv:
        end = argv.index(RECIPE_ENDS)
        recipe, argv = argv[:end], argv[end + 1 :]
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(FLAG, action="append", default=[])
    try:
        found, typed = finder.parse_known_args(argv)
    except argparse.ArgumentError:
        return recipe + argv  # no value: the whole parser says so
    counts = {_key(word.split("=")[0]) for word in typed} & LENGTHS
    of_files = [word for file in found.config for word in words_of_file(file, LENGTHS if counts else ())]
    return _left_of_recipe(recipe, of_files + typed) + of_files + typed


def _left_of_recipe(recipe: Sequence[str], others: Sequence[str]) -> list[str]:
    """A recipe's words without those that contradict the others, or that a run which goes on has already."""
    given = {_key(word.split("=")[0]) for word in others if word.startswith("--")}
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag in ("--split", "--resume"):
        finder.add_argument(flag)
    of_others, _ = finder.parse_known_args([*others])
    if of_others.resume not in (None, "auto"):
        return []
    dropped = {"train-iters"} if "epochs" in given else set()
    if given & {"valid-data", "holdout"} or of_others.split not in (None, "1"):
        dropped.add("holdout")
    left, flag = [], ""
    for word in recipe:
        flag = _key(word.split("=")[0]) if word.startswith("--") else flag
        left += [] if flag in dropped else [word]
    return left


def words_of_file(path: str, without: Collection[str]) -> list[str]:
    """The words of a command line that a file stands for, but for some flags; exits as `with_config_files`."""
    parser = full_parser()

    def refuse(problem: str) -> NoReturn:
        parser.error(f"{FLAG} {path}: {problem}")

    values = _values(path, refuse)
    actions = {_key(option): action for action in parser._actions for option in action.option_strings}
    unknown = [key for key in values if _key(key) not in actions or actions[_key(key)].dest in NOT_IN_A_FILE]
    if unknown:
        parser.error("\n".join(_unknown(path, key, parser) for key in unknown))
    words: list[str] = []
    for key, value in values.items():
        if _key(key) in without:
            continue
        try:
            words += _words(actions[_key(key)], value)
        except ValueError as problem:
            refuse(f'"{key}" is {json.dumps(value, default=str, ensure_ascii=False)}; {problem} is needed.')
    return words


def _key(name: str) -> str:
    return name.lstrip("-").replace("_", "-")


def _unknown(path: str, key: str, parser: FlagParser) -> str:
    if _key(key) in map(_key, NOT_IN_A_FILE):
        return f"{FLAG} {path}: {key} belongs on the command line; it can't stand in a file."
    return f"{FLAG} {path}: {parser.unknown_flag(key)}"


def _values(path: str, refuse: Any) -> Mapping[str, object]:
    """The flags in a file, by name."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except OSError as error:
        refuse(f"{error.strerror}; a YAML file of flags is needed.")
    except UnicodeDecodeError as error:
        refuse(f"byte {error.start + 1} isn't UTF-8; save the file as UTF-8.")
    values = _parsed(text, refuse)
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        refuse("no flags by name; lines such as `lr: 0.001` are needed.")
    if isinstance(values.get(FLAGS), dict) and isinstance(values.get(GIVEN), list):
        return _flags_of_settings(values)
    return values


def _parsed(text: str, refuse: Any) -> Any:
    import yaml

    def checked(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
        keys = [key for key, _ in pairs]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            refuse(f"{', '.join(twice)} twice; one value is needed.")
        return dict(pairs)

    class Loader(yaml.SafeLoader):
        """PyYAML's, but no key may stand twice, and a flag's 0100, 1:30 and 1.10 don't become 64, 90 and 1.1."""

        def construct_document(self, node: Any) -> Any:
            for _, value in node.value if isinstance(node, yaml.MappingNode) else ():
                for one in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                    if one.tag in NUMBERS and not re.fullmatch(SAME_IN_YAML, one.value, re.IGNORECASE):
                        one.tag = TEXT
            return super().construct_document(node)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            checked([(self.construct_object(key), None) for key, _ in node.value])
            return super().construct_mapping(node, deep)

    try:
        return json.loads(text, object_pairs_hook=checked)
    except ValueError:
        pass  # then it is YAML
    try:
        return yaml.load(text, Loader) or {}
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"line {mark.line + 1} column {mark.column + 1}: " if mark else ""
        refuse(f"{where}not YAML ({getattr(error, 'problem', None) or 'characters that it can not have'}); "
               "lines such as `lr: 0.001` are needed.")  # fmt: skip


def _flags_of_settings(settings: Mapping[str, Any]) -> dict[str, object]:
    """What to give to a run that is to be as the one with these settings."""
    now = vars(full_parser().parse_args([]))
    given = set(settings[GIVEN])
    flags = {name: value for name, value in settings[FLAGS].items() if name not in NOT_IN_A_FILE}
    return {
        name: value
        for name, value in flags.items()
        if name in given or name not in now or value != _plain(name, now[name])
    }


def _words(action: argparse.Action, value: object) -> list[str]:
    """A flag and its value as they are typed.

    Raises:
        ValueError: no such value can be typed; says what is needed.
    """
    flag = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("true or false")
        return [flag] if value else []
    if value is None:
        return []
    if action.nargs in ("+", "*"):
        if isinstance(value, str) and (action.type or action.choices):  # files may have blanks in their names
            value = value.split()
        return [flag, *map(_text, value if isinstance(value, list) else [value])]
    if isinstance(value, list):
        raise ValueError("one value")
    if isinstance(value, bool) and action.nargs == "?":
        value = "true" if value else "false"
    if value is False and action.dest == "save":
        value = "none"
    return [f"{flag}={_text(value)}"]  # in one word: it may begin with a dash


def _text(value: object) -> str:
    if isinstance(value, bool):
        raise ValueError("a text or a number")
    return json.dumps(value) if isinstance(value, dict) else str(value)


# --- settings.json ----------------------------------------------------------------------------------------------------


def flags_as_held(options: Options, held: Mapping[str, object]) -> dict[str, Any]:
    """Every flag with its value, for `settings.json`, and which of them were given.

    Args:
        held: values that the run has in place of the options', by attribute.
    """
    values = {
        name: held.get(name, value) for name, value in vars(options).items() if name not in ("user_set", *NOT_IN_A_FILE)
    }
    given = sorted(name for name in options.user_set if name in values)
    return {FLAGS: {name: _plain(name, value) for name, value in sorted(values.items())}, GIVEN: given}


def _plain(name: str, value: object) -> object:
    """A value as a file has it: --save none is None in Options, where other flags are not set."""
    return "none" if name == "save" and value is None else value
