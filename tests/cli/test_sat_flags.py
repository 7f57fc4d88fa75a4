"""SAT's and DeepSpeed's flags are theirs exactly, but for what is listed here."""

import json
from typing import Any

import pytest
from conftest import run_program

from model.cli.flag_parser import FlagParser
from model.cli.options import full_parser, script_parser

pytestmark = pytest.mark.slow  # building SAT's parser imports SAT and DeepSpeed

# Where a flag of ours is not SAT's on purpose: flag, fact, SAT's, ours.
DIFFERENCES = [
    ("--log-interval", "default", 50, 1),  # a first run shows every loss
    ("--save", "default", None, "./checkpoints"),  # SAT saves nothing unless told to
    ("--save", "type", "str", "_folder_or_none"),
    ("--split", "default", "1000,1,1", "1"),  # SAT's asks for 10,000 rows
]


@pytest.fixture(scope="module")
def sat_flags() -> dict[str, Any]:
    run = run_program("sat_flags")
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


def flags_of(parser: FlagParser) -> set[str]:
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
