"""Whether a run has learned, told by its losses and answers, and the flags to try if it hasn't."""

import pytest

from model.inference.scores import Result
from model.training.answers import Answered
from model.training.records import EVALUATION, STEP, VALIDATION, Record
from model.training.verdict import fall_of, overfitting, verdict

NOISE = [0.1, -0.1] * 50
STILL = [2.5 + one for one in NOISE]
FALLING = [2.5 - 0.02 * step + NOISE[step] for step in range(100)]
FLAGS = {"mode": "finetune", "auto_warmup_steps": 100, "lr": 1e-4, "use_lora": True, "lora_rank": 10, "lora_alpha": 1.0}


def steps(losses):
    return [Record(STEP, number, loss, 0.0) for number, loss in enumerate(losses, 1)]


def evaluations(losses):
    return [Record(EVALUATION, 10 * number, loss, 0.0, split=VALIDATION) for number, loss in enumerate(losses, 1)]


def said(losses, flags=None, data=None, answers=None, positions=None):
    settings = {"flags": FLAGS | (flags or {}), "steps": len(losses), "data": data or {}, "positions": positions}
    return "\n".join(verdict(settings, steps(losses), answers or {}))


def test_fall_beyond_the_noise_is_clear_and_one_within_is_not():
    assert fall_of(FALLING).is_clear
    assert not fall_of(STILL).is_clear
    assert not fall_of([2.5 - 0.0001 * step + NOISE[step] for step in range(100)]).is_clear


def test_few_steps_say_nothing():
    assert fall_of([2.0] * 9) is None
    assert said([2.0] * 9) == ""


def test_run_that_learned_gets_no_advice():
    assert said(FALLING) == "The loss fell from 2.3100 to 0.7100 (the mean of the first 20 steps and of the last)."


def test_run_whose_loss_rose_is_said_to_have_diverged_and_a_lower_rate_is_proposed():
    first, second = said(FALLING[::-1], {"lr": 0.3}).splitlines()
    assert first.startswith("The loss rose from 0.7100 to 2.3100 (the mean of the first 20 steps and of the last).")
    assert "has diverged" in first
    assert second.startswith("Likely: --lr 0.3 is too high; try 0.1, or --find_lr")
    assert "diverged" not in said([one + 0.002 * step for step, one in enumerate(STILL)])


def test_run_that_saves_nothing_is_told_of_no_checkpoint_and_no_keep_best():
    made = evaluations([2.0, 1.5, 1.9])
    for save, is_saved in (("none", False), ("checkpoints", True)):
        text = said(FALLING[::-1], {"lr": 0.3, "save": save})
        assert "The run has diverged: it ends worse than it began." in text
        assert text.endswith("--find_lr, which proposes a rate.") is not is_saved
        assert text.endswith("With --holdout, --keep_best keeps the best checkpoint.") is is_saved
        (line,) = overfitting(steps(FALLING), made, {"flags": {"save": save}})
        assert ("Try --keep_best, --early_stopping 3, fewer epochs" in line) is is_saved
        assert ("Try --early_stopping 3, fewer epochs" in line) is not is_saved


def test_loss_that_rose_over_other_rows_than_before_is_no_divergence():
    losses = [3.1, 3.2, 3.1, *[3.0] * 5, 9.9, 10.1, 10.2]  # long rows came last
    rows = {"before": answered(0, "no", loss=3.1), "after": answered(11, "no", loss=3.1)}
    first, *_, likely = said(
        losses, {"lr": 1e-9, "auto_warmup_steps": 0, "lora_alpha": 10.0}, answers=rows
    ).splitlines()
    assert first == (
        "The loss rose from 3.1333 to 10.0667 (the mean of the first 3 steps and of the last), but of the rows that were "
        "answered it was 3.1000 and is 3.1000: the last steps had harder rows."
    )
    assert likely == "Likely: --lr 1e-09 is low for adapters; --find_lr proposes a rate."
    for loss in (3.3, float("nan")):
        assert "has diverged" in said(losses, answers=rows | {"after": answered(11, "no", loss=loss)})


@pytest.mark.parametrize(
    ("start", "loss_of_rows", "has_diverged"),
    [(2.4, 1.2, True), (2.4, 1.05, False), (2.4, 0.5, False), (6.0, 1.2, False)],
)
def test_loss_that_rose_at_once_and_fell_again_has_diverged_if_the_same_rows_have_a_higher_loss(
    start, loss_of_rows, has_diverged
):
    losses = [start, *(6.0 - 0.05 * step for step in range(59))]
    answers = {"before": answered(0, "no"), "after": answered(60, "no", loss=loss_of_rows)}
    told = said(losses, {"lr": 0.5}, answers=answers)
    assert ("The loss rose from 2.4000 to 3.3750 (the first step and the mean of the last 12)" in told) == has_diverged
    assert ("--lr 0.5 is too high" in told) == has_diverged


@pytest.mark.parametrize(
    ("flags", "data", "part"),
    [
        ({}, {}, "100 of 100 steps had 5 % of --lr at most (5e-06), SAT's rule; try --auto_warmup_steps 0"),
        ({}, {}, "--find_lr proposes a rate"),
        ({}, {}, "alpha/rank = 0.1; try --lora_alpha 10"),
        ({"layer_range": [0, 14]}, {}, "LoRA is in 2 layers only (--layer_range)"),
        ({}, {"a.json": {"rows": 20, "trained_on": 20, "cut_labels": 17}}, "17 of 20 answers are cut off"),
        ({}, {"a.json": {"rows": 5, "samples": 15, "trained_on": 5, "cut_labels": 15}}, "15 of 15 answers are cut off"),
    ],
)
def test_run_that_stood_still_is_told_why_that_is_likely(flags, data, part):
    text = said(STILL, flags, data)
    assert text.startswith("The loss has hardly moved: 2.5000, then 2.5000")
    assert part in text


def test_answers_that_are_cut_off_by_the_checkpoint_are_not_told_to_try_auto():
    flags = {"auto_warmup_steps": 0, "lr": 0.01, "lora_alpha": 10.0}
    flags |= {
        "max_source_length": 64,
        "max_target_length": 448,
        "max_sequence_length": 512,
    }  # the last is SAT's default
    data = {"a.json": {"rows": 20, "trained_on": 20, "cut_labels": 1}}
    assert "try --max_target_length auto" in said(STILL, flags, data, positions=2048)
    text = said(STILL, flags, data, positions=512)
    assert text.splitlines()[-1] == (
        "Likely: 1 of 20 answers are cut off, so their ends are never learned; this checkpoint takes 512 tokens with the "
        "question, so try a smaller --max_source_length."
    )


def test_reason_that_does_not_hold_is_not_named():
    text = said(STILL, {"auto_warmup_steps": 0, "lr": 0.01, "lora_alpha": 10.0})
    assert text.splitlines()[-1] == "Likely: more steps may be needed, or another rate: --find_lr proposes one."


def answered(step, *answers, loss=1.0):
    return Answered(step, [Result("", "?", "yes", one, one == "yes", one == "yes", 0.0, loss, 1) for one in answers])


def test_run_whose_answers_improved_gets_no_advice_where_its_last_rows_were_harder():
    losses = [3.1, 3.2, 3.1, *[3.0] * 5, 9.9, 10.1, 10.2]
    improved = {"before": answered(0, "no", loss=3.1), "after": answered(11, "yes", loss=0.2)}
    same = {"before": answered(0, "no", loss=3.1), "after": answered(11, "no", loss=3.1)}
    for answers, is_advised in ((improved, False), (same, True)):
        text = said(losses, answers=answers)
        assert "the last steps had harder rows" in text
        assert ("Likely: " in text) == is_advised


def test_answers_before_and_after_are_counted_and_training_rows_called_so():
    answers = {"held_out": False, "before": answered(0, "no", "no"), "after": answered(9, "yes", "no")}
    assert "Of 2 training rows, answers right: before 0/2, after 1/2; ROUGE-L 0.000, then 0.000; 1 changed." in said(
        FALLING, answers=answers
    )
    assert "no answer has changed" in said(STILL, answers=answers | {"after": answered(9, "no", "no")})


def test_turns_of_one_row_are_not_called_rows():
    answers = {"held_out": True, "rows": 1, "after": answered(9, "yes", "no")}
    assert "Of 2 turns of 1 held-out row, answers right: 1/2; ROUGE-L 0.000." in said(FALLING, answers=answers)


def test_evaluation_that_rises_while_training_falls_is_told_with_its_best_step():
    (line,) = overfitting(steps(FALLING), evaluations([2.0, 1.5, 1.6, 1.9]))
    assert "lowest at step 20 (1.5000) and rose to 1.9000" in line
    assert "--early_stopping" in line


@pytest.mark.parametrize("losses", [[2.0, 1.5], [2.0, 1.5, 1.51], [2.0], []])
def test_evaluation_that_falls_or_hardly_rises_is_not_told(losses):
    assert overfitting(steps(FALLING), evaluations(losses)) == []


def test_evaluation_that_rises_with_training_is_no_overfitting():
    assert overfitting(steps(FALLING[::-1]), evaluations([2.0, 1.5, 1.9])) == []


def test_run_that_learned_little_has_not_learned_rows_by_heart():
    losses = [*STILL[:80], *(one - 0.01 for one in STILL[80:])]
    made = evaluations([2.0, 1.5, 1.9])
    assert overfitting(steps(losses), made)
    lines = verdict({"flags": FLAGS}, steps(losses) + made, {})
    assert lines[0].startswith("The loss has hardly moved")
    assert not any("by heart" in line for line in lines)


def test_evaluations_over_other_rows_are_not_compared():
    starts = [{"after_step": 0, "valid_data": ["a"]}, {"after_step": 20, "valid_data": ["b"]}]
    made = evaluations([2.0, 1.5, 2.6, 2.5])
    assert overfitting(steps(FALLING), made, {"starts": starts}) == []
    same = [start | {"valid_data": ["a"]} for start in starts]
    of_an_older_program = [{"after_step": 0}, starts[1]]
    for starts_over_the_same in (same, of_an_older_program):
        assert "lowest at step 20" in overfitting(steps(FALLING), made, {"starts": starts_over_the_same})[0]
    (line,) = overfitting(steps(FALLING), evaluations([1.0, 1.5, 2.6, 2.9]), {"starts": starts})
    assert "lowest at step 30 (2.6000)" in line


def test_what_the_run_does_already_is_not_advised():
    flags = {"keep_best": "loss", "early_stopping": 1}
    (line,) = overfitting(steps(FALLING), evaluations([2.0, 1.5, 1.6, 1.9]), {"flags": flags})
    assert line.endswith("Try fewer epochs, or more rows.")
    (line,) = overfitting(steps(FALLING), evaluations([2.0, 1.5, 1.6, 1.9]), {"flags": {"keep_best": "loss"}})
    assert line.endswith("Try --early_stopping 3, fewer epochs, or more rows.")
