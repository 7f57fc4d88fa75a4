"""Training equals the script released in 2023: the golden flags give the golden batch, losses and parameters.

See golden/README.md for where the values come from.
"""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import GOLDEN, load_model, run_program, upstream_weights, write_checkpoint

pytestmark = pytest.mark.run


def trainable_shapes(checkpoint, expected):
    """{name: shape} of the golden trainable tensors, as the model has them when it is built with the golden flags."""
    from model.cli.options import parse

    options = parse(expected["flags"])
    names = ("use_lora", "use_ptuning", "lora_rank", "layer_range", "pre_seq_len")
    model = load_model(checkpoint, "FineTuneVisualGLMModel", **{name: getattr(options, name) for name in names})
    shapes = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    return {name: shapes[name] for name in expected["final_trainable_parameters"]}


@pytest.fixture(scope="module", params=["lora", "ptuning"])
def run(request, tmp_path_factory, upstream_checkpoint, upstream_config):
    """One training run with the golden flags from the golden weights: what it printed, recorded and saved."""
    import torch

    folder = tmp_path_factory.mktemp(request.param)
    expected = json.loads((GOLDEN / f"upstream/expected_{request.param}.json").read_text())
    weights = upstream_weights(trainable_shapes(upstream_checkpoint, expected))
    checkpoint = write_checkpoint(folder / "start", upstream_config, weights)
    done = run_program(
        "train_and_record", folder / "recorded.json", *expected["flags"],
        "--from_pretrained", checkpoint, "--save_full_model", "--save", folder / "saved",
        cwd=GOLDEN / "upstream",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (saved,) = (folder / "saved").glob("gold-*/20/mp_rank_00_model_states.pt")
    recorded = json.loads((folder / "recorded.json").read_text())
    return SimpleNamespace(
        expected=expected, printed=done.stdout, weights=torch.load(saved)["module"], start=weights, **recorded
    )


def test_first_batch_with_the_golden_flags_equals_the_released_scripts(run):
    golden = run.expected["first_batch"]
    seq = len(run.first_batch["input_ids"][0])
    assert run.first_batch["pre_image"] == golden["pre_image"]
    for key, padding in (("input_ids", 3), ("labels", -100)):
        assert run.first_batch[key] == [row[:seq] for row in golden[key]]
        assert {token for row in golden[key] for token in row[seq:]} == {padding}


def test_losses_of_20_iterations_equal_the_released_scripts(run):
    assert len(run.losses) == 20
    assert run.losses == pytest.approx(run.expected["losses"], rel=1e-5)


def test_trained_parameters_after_20_iterations_equal_the_released_scripts(run):
    for name, golden in run.expected["final_trainable_parameters"].items():
        assert run.weights[name].norm().item() == pytest.approx(golden["norm"], rel=1e-4), name
        assert run.weights[name].mean().item() == pytest.approx(golden["mean"], rel=1e-4, abs=1e-6), name


def test_trainable_tensors_are_exactly_the_released_scripts(run):
    assert set(run.trained) == set(run.expected["final_trainable_parameters"])
    assert len(run.trained) == len(set(run.trained))
    told = re.search(r"^Trainable, .* parameters in (\d+) tensors?:$", run.printed, re.MULTILINE)
    assert int(told[1]) == len(run.trained)


def test_other_tensors_are_saved_as_they_were_loaded(run):
    frozen = set(run.start) - set(run.expected["final_trainable_parameters"])
    saved = {name.replace(".original.", "."): tensor for name, tensor in run.weights.items()}
    inv_freq = "mixins.chatglm-attn.rotary_emb.inv_freq"
    assert all(saved[name].equal(run.start[name]) for name in frozen - {inv_freq})
    assert saved[inv_freq].equal(run.start[inv_freq].to(saved[inv_freq].dtype))
