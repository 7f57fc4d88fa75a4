"""The flags that SAT writes into a checkpoint's config: what they take, and what they refuse in a sentence."""

import argparse
from typing import get_type_hints

import pytest

from model.cli.options import parse
from model.model_flags import MethodOptions, ModelOptions, add_method_flags, add_model_flags


@pytest.mark.parametrize(("add", "options"), [(add_method_flags, MethodOptions), (add_model_flags, ModelOptions)])
def test_every_flag_has_an_annotation(add, options):
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    assert [action.dest for action in parser._actions] == list(get_type_hints(options))


@pytest.mark.parametrize("word", ["vit", "qformer=1e-5", "glm_proj"])
def test_part_of_the_vision_tower_is_taken_with_and_without_a_rate(word):
    assert parse(["--use_lora", "--train_parts", word]).train_parts == [word]


@pytest.mark.parametrize("word", ["eyes", "qformer=fast", "qformer=0", "qformer="])
def test_wrong_part_is_refused_in_a_sentence(word, capsys):
    with pytest.raises(SystemExit):
        parse(["--use_lora", "--train_parts", word])
    assert "needed" in capsys.readouterr().err
