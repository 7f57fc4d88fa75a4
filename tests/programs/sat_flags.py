"""Print what SAT's own parser knows of its flags, as JSON: theirs, ChatGLM's, and those of our parser with theirs."""

import argparse
import json

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
        "names": action.option_strings,
        "dest": action.dest,
        "default": action.default,
        "nargs": action.nargs,
        "const": action.const,
        "choices": action.choices,
        "action": type(action).__name__,
        "type": action.type and action.type.__name__,
    }
    for action in built_by_sat(plain)._actions
}
ours = [action.option_strings[-1] for action in built_by_sat(script_parser())._actions]
print(json.dumps({"facts": facts, "chatglm": chatglm, "with_ours": ours}))
