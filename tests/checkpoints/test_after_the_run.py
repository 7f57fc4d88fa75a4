"""From training to an answer, in new processes: {method} × {adapter, full checkpoint}.

One process trains each method and saves both kinds, with the logits that the model in training gives. One more loads them
all, merges what can be merged, and answers.
"""

import json
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, run_program

pytestmark = pytest.mark.run

WEIGHTS = "3/mp_rank_00_model_states.pt"
METHODS = {
    "lora": ["--use_lora", "--lora_rank", "4", "--layer_range", "0", "2"],
    "qlora": ["--use_qlora", "--lora_rank", "4", "--lora_alpha", "8"],
    "ptuning": ["--use_ptuning", "--pre_seq_len", "3"],
    "lora+ptuning": ["--use_lora", "--lora_rank", "2", "--use_ptuning", "--pre_seq_len", "3"],
    "lora+qformer": [
        "--use_lora", "--lora_target", "dense", "dense_h_to_4h", "dense_4h_to_h", "--train_parts", "qformer=0.001",
    ],
}  # fmt: skip
KINDS = ("adapter", "full")
MERGEABLE = ("lora", "qlora", "lora+qformer")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, upstream_checkpoint: Path) -> Path:
    """A folder with the base model, and for each method its two checkpoints and its logits in training."""
    root = tmp_path_factory.mktemp("runs")
    (root / "base").symlink_to(upstream_checkpoint)
    for method, flags in METHODS.items():
        (root / method).mkdir()
        run = run_program(
            "train_and_save_both_kinds", root / method, "--from_pretrained", root / "base", "--mode", "finetune", *flags,
            "--train-data", GOLDEN / "upstream/dataset.json", "--train-iters", "3", "--batch-size", "2",
            "--auto_warmup_steps", "0", "--max_source_length", "80", "--num-workers", "0", "--lr", "0.03",
            "--save", root, "--summary-dir", root / "summaries", OMP_NUM_THREADS="1",
        )  # fmt: skip
        assert run.returncode == 0, run.stdout + run.stderr
    return root


@pytest.fixture(scope="module")
def facts(root: Path) -> dict:
    run = run_program("load_and_merge", root, GOLDEN / "upstream/images/0.png", OMP_NUM_THREADS="1")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", METHODS)
def test_loaded_checkpoint_gives_the_logits_of_the_model_in_training(facts, method, kind):
    fact = facts[f"{method} {kind}"]
    assert fact["from_base"] > 1e-3
    assert fact["from_training"] < 1e-5


@pytest.mark.parametrize("way", ["file", "memory"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_checkpoint_is_a_plain_one_with_the_same_logits_and_answer(facts, method, kind, way):
    merged = facts[f"{method} {kind}"][f"merged_in_{way}"]
    assert merged["difference"] < 1e-5
    assert merged["same_answer"]
    assert merged["plain_names"]


def weights(folder: Path) -> dict:
    return torch.load(folder / WEIGHTS)["module"]


@pytest.mark.parametrize("method", METHODS)
def test_adapter_checkpoint_holds_what_was_trained_and_nothing_else(root, method):
    names = weights(root / method / "adapter")
    trained = (
        ["matrix_"] * ("lora" in method) + ["ptuning"] * ("ptuning" in method) + ["qformer"] * ("qformer" in method)
    )
    assert {part for part in trained if any(part in name for name in names)} == set(trained)
    assert all(any(part in name for part in trained) for name in names)


def test_part_with_a_rate_of_its_own_is_trained_at_that_rate(root):
    """Adam's three steps are about as long as the rate, 0.03 for the adapters and 0.001 for the Q-Former."""
    before = torch.load(root / "base" / "1/mp_rank_00_model_states.pt")["module"]
    after = weights(root / "lora+qformer" / "adapter")
    factors = max(tensor.abs().max() for name, tensor in after.items() if "matrix_B" in name)
    part = max((tensor - before[name]).abs().max() for name, tensor in after.items() if "qformer" in name)
    assert 0.0003 < part < 0.004 < 0.02 < factors


def test_full_checkpoint_of_lora_has_exactly_the_released_names_and_shapes(root):
    released = json.loads((GOLDEN / "upstream/parameters.json").read_text())
    for layer in (0, 2):
        for name, parts in (("query_key_value", 3), ("dense", 1)):
            linear = f"transformer.layers.{layer}.attention.{name}"
            for tensor in ("weight", "bias"):
                released[f"{linear}.original.{tensor}"] = released.pop(f"{linear}.{tensor}")
            for part in range(parts):
                released |= {f"{linear}.matrix_A.{part}": [4, 64], f"{linear}.matrix_B.{part}": [64, 4]}
    released["mixins.chatglm-attn.rotary_emb.inv_freq"] = [4]
    found = {name: list(tensor.shape) for name, tensor in weights(root / "lora" / "full").items()}
    assert found == released


def test_full_checkpoint_of_qlora_has_the_names_of_loras_in_full_width(root):
    found = weights(root / "qlora" / "full")
    assert found["transformer.layers.1.mlp.dense_h_to_4h.weight"].shape == (256, 64)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}


def test_adapter_checkpoint_is_a_small_part_of_a_full_one(root):
    sizes = {kind: (root / "lora" / kind / WEIGHTS).stat().st_size for kind in KINDS}
    assert sizes["adapter"] < 30_000 < 3_000_000 < sizes["full"]
