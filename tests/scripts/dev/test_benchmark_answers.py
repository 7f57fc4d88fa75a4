"""The benchmark of answers: both ways answer the same, and the last line says what was measured."""

from types import SimpleNamespace

import pytest
from conftest import PROJECT, load_model

from model.cpu import pack_linears
from model.inference.load import load_for_answering
from scripts.dev import benchmark_answers
from scripts.dev.benchmark_answers import (
    Ours,
    Pair,
    Released,
    main,
    measured_pair,
    products_alone,
    report,
    weight_bytes,
)


@pytest.mark.parametrize("rows", [1, 3])
def test_both_ways_answer_the_same_token_by_token(upstream_checkpoint, rows):
    times, ids = Ours(load_model(upstream_checkpoint), 6).run(rows)
    released_times, released_ids = Released(load_model(upstream_checkpoint), 6).run(rows)
    assert len(times) == len(released_times) == len(ids) == 6
    assert ids == released_ids


def test_weights_that_a_token_reads_are_counted_packed_or_not(small_model):
    layers, head = small_model.transformer.layers, small_model.get_mixin("chatglm-final").lm_head
    expected = sum(parameter.nbytes for part in (layers, head) for parameter in part.parameters())
    assert weight_bytes(small_model) == expected
    pack_linears(small_model.requires_grad_(False))
    assert weight_bytes(small_model) == expected


def test_last_line_has_the_medians_of_pairs(capsys):
    ours = [{"a token, batch 1": one, "a token, batch 16": 4.0} for one in (2.0, 4.0, 2.0)]
    released = {"a token, batch 1": 6.0, "a token, batch 16": 8.0}
    line = report([Pair(one, released, 1e9, 1.5) for one in ours], read=1_000_000)
    assert line == "ratio 3.00, bandwidth share 0.50, batch 16 8.0 times the tokens/s of batch 1"
    printed = capsys.readouterr().out
    assert "6.00 (6.00 to 6.00)" in printed
    assert "alone take 1.50 (1.50 to 1.50) ms, a share of 0.67" in printed


def test_rate_of_the_memory_is_the_better_one_before_and_after_the_answer_of_one_row(monkeypatch):
    done, rates = [], iter([1e9, 2e9])
    monkeypatch.setattr(benchmark_answers, "read_rate", lambda _: done.append("rate") or next(rates))
    monkeypatch.setattr(benchmark_answers, "products_alone", lambda _: done.append("products") or 1.5)
    monkeypatch.setattr(benchmark_answers, "figures", lambda way, rows: done.append((way, rows)) or {f"{rows}": 1.0})
    ours, released = SimpleNamespace(device=None, model=None), "released"
    pair = measured_pair(ours, released)
    assert pair == Pair({"1": 1.0, "16": 1.0}, {"1": 1.0, "16": 1.0}, 2e9, 1.5)
    assert done == ["rate", (ours, 1), (released, 1), "products", "rate", (ours, 16), (released, 16)]


@pytest.mark.parametrize("packed", [False, True])
def test_products_alone_are_those_of_every_layer_and_the_head(small_model, packed):
    if packed:
        pack_linears(small_model.requires_grad_(False))
    done = []
    for name, module in small_model.named_modules():
        module.register_forward_hook(lambda *_, name=name: done.append(name))
    assert products_alone(small_model) > 0
    of_layers = ("attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    expected = {
        f"transformer.layers.{n}.{name}" for n in range(len(small_model.transformer.layers)) for name in of_layers
    }
    assert {*done} == expected | {"mixins.chatglm-final.lm_head"}
    assert len(done) == 5 * len(expected | {"the head"})


@pytest.mark.slow
@pytest.mark.parametrize("quant", [(), ("--quant", "4")])
def test_command_measures_a_checkpoint(monkeypatch, capsys, quant):
    monkeypatch.setattr(benchmark_answers, "READ_BYTES", 2**22)
    main(["--from_pretrained", str(PROJECT / "model/tiny"), "--ours_only", "--pairs", "1", "--new_tokens", "3", *quant])
    printed = capsys.readouterr().out
    assert printed.splitlines()[-1].startswith("bandwidth share 0.")
    assert ("torch.float32, 4 bits" in printed) == bool(quant)


@pytest.mark.slow
def test_weights_in_4_bits_are_counted_as_they_are_kept():
    in_float32 = weight_bytes(load_for_answering(PROJECT / "model/tiny")[0])
    in_4_bits = weight_bytes(load_for_answering(PROJECT / "model/tiny", quant=4)[0])
    assert in_float32 / 8 < in_4_bits < in_float32 / 4


def test_released_way_of_a_checkpoint_is_refused_in_a_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--from_pretrained", str(PROJECT / "model/tiny")])
    assert "--ours_only is needed" in capsys.readouterr().err


def test_no_pairs_are_refused_in_a_sentence(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--pairs", "0"])
    assert "--pairs of 1 or more" in capsys.readouterr().err
