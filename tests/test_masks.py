"""The prefix mask, the two positions and the shift by one, each as its docstring draws it.

That SAT makes the same of whole rows is in test_visualglm.py; packed rows are in data/test_packing.py.
"""

import torch

from model.masks import (
    first_position,
    glm_position_ids,
    mask_and_positions,
    next_labels,
    prefix_mask,
    supervised_positions,
)


def test_prefix_mask_with_padding_and_an_answer_is_as_drawn():
    mask = prefix_mask(context_length=torch.tensor([3]), pad_length=torch.tensor([1]), seq_length=5)
    assert mask.dtype == torch.bool
    assert mask.int().tolist() == [
        [
            [
                [0, 0, 0, 0, 0],  # padding
                [0, 1, 1, 0, 0],  # context
                [0, 1, 1, 0, 0],
                [0, 1, 1, 1, 0],  # answer
                [0, 1, 1, 1, 1],
            ]
        ]
    ]


def test_prefix_mask_of_two_rows_gives_each_its_own_context():
    mask = prefix_mask(torch.tensor([1, 2]), torch.tensor([0, 0]), 3)
    assert mask.shape == (2, 1, 3, 3)
    assert mask[:, 0].int().tolist() == [[[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0], [1, 1, 1]]]


def test_glm_position_ids_with_padding_and_an_answer_are_as_drawn():
    # tokens: · c c gMASK sop a a
    positions = glm_position_ids(torch.tensor([4]), torch.tensor([3]), torch.tensor([1]), 7)
    assert positions.tolist() == [[[0, 0, 1, 2, 2, 2, 2], [0, 0, 0, 0, 1, 2, 3]]]


def test_glm_position_ids_when_the_mask_stands_inside_stay_there():
    # tokens: c MASK c sop a
    positions = glm_position_ids(torch.tensor([3]), torch.tensor([1]), torch.tensor([0]), 5)
    assert positions.tolist() == [[[0, 1, 2, 1, 1], [0, 0, 0, 1, 2]]]


def test_first_position_of_several_or_none_is_the_first_or_0():
    found = torch.tensor([[False, True, True], [False, False, False]])
    assert first_position(found).tolist() == [1, 0]


def test_mask_and_positions_of_a_prompt_have_gmask_right_before_sop():
    # tokens: · c gMASK sop a, and c c gMASK sop a
    context_length, pad_length = torch.tensor([3, 3]), torch.tensor([1, 0])
    mask, positions = mask_and_positions(context_length, pad_length, 5)
    assert torch.equal(mask, prefix_mask(context_length, pad_length, 5))
    assert positions.tolist() == [[[0, 0, 1, 1, 1], [0, 0, 0, 1, 2]], [[0, 1, 2, 2, 2], [0, 0, 0, 1, 2]]]


def test_next_labels_of_a_row_stand_one_position_earlier():
    labels = torch.tensor([[-100, -100, 89, 7, 90], [-100, 89, 90, -100, -100]])
    assert next_labels(labels, -100).tolist() == [[-100, 89, 7, 90, -100], [89, 90, -100, -100, -100]]


def test_supervised_positions_of_two_rows_are_those_before_each_supervised_token():
    labels = torch.tensor([[-100, -100, 89, 7, 90], [-100, 89, 90, -100, -100]])
    positions, answers = supervised_positions(labels, -100)
    assert positions.tolist() == [1, 2, 3, 5, 6]
    assert answers.tolist() == [89, 7, 90, 89, 90]


def test_supervised_positions_without_labels_are_none():
    positions, answers = supervised_positions(torch.full((2, 3), -100), -100)
    assert (positions.tolist(), answers.tolist()) == ([], [])
