"""The model: released names and numbers, SAT's mask and positions, and the image among the words.

Token ids of the golden model: [MASK] 85, [gMASK] 86, <sop> 89, <eop> 90, <pad> 3.
"""

import json

import pytest
import torch
from conftest import GOLDEN, golden_values, load_model

from model.sat_compat import import_sat
from model.visualglm import VisualGLMModel, residual_layer_norm

import_sat()

from sat.model import ChatGLMModel  # noqa: E402

CONTEXT = [859, *[3] * 32, 775, 2685]  # <img>, image slots, </img>, question
WITHOUT_PADDING = [[*CONTEXT, 86, 89, 554, 1759, 90], [*CONTEXT, 86, 89, 17, 3, 90]]
PADDED_RIGHT = [[*CONTEXT, 86, 89, 554, 1759, 90], [*CONTEXT, 86, 89, 90, 3, 3], [859, 775, 86, 89, *[3] * 36]]
PADDED_LEFT = [[*CONTEXT, 86, 89, 554, 1759, 90], [3, 3, *CONTEXT, 86, 89, 90], [*[3] * 37, 86, 89, 90]]
INSIDE_MASK = [[859, 85, 775, 89, 554, 90], [3, 85, 859, 775, 89, 90]]  # [MASK] in place of [gMASK]


@pytest.fixture
def model(upstream_checkpoint):
    return load_model(upstream_checkpoint)


@pytest.fixture(scope="module")
def image():
    return torch.from_numpy(golden_values("an image", [2, 3, 224, 224]))


def freeze(module, trained=False):
    for parameter in module.parameters():
        parameter.requires_grad_(trained)


# names and numbers


def test_parameters_have_the_released_names_and_shapes(model):
    released = json.loads((GOLDEN / "upstream/parameters.json").read_text())
    assert {name: list(parameter.shape) for name, parameter in model.named_parameters()} == {
        name: shape for name, shape in released.items() if not name.endswith("inv_freq")
    }


def test_checkpoint_when_q_former_and_language_model_differ_in_width_loads(model, upstream_config):
    projection = model.get_mixin("eva").model.glm_proj.weight
    wide, narrow = upstream_config["hidden_size"], upstream_config["qformer_args"]["hidden_size"]
    assert (wide, narrow) == (64, 48)
    released = golden_values("mixins.eva.model.glm_proj.weight", [wide, narrow])
    assert torch.equal(projection.detach(), torch.from_numpy(released))


def sat_weights(parameters, heads):
    """Tensors by SAT's names, set by the golden rule under their Hugging Face names (mapping: golden/README.md)."""
    weights = {}
    for name, shape in parameters.items():
        tensor = torch.from_numpy(golden_values(name, shape))
        if name.endswith("inv_freq"):
            continue  # keeps its own value
        if "query_key_value" in name:
            tensor = tensor.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
        weights[name.replace("lm_head", "mixins.chatglm-final.lm_head")] = tensor
    return weights


@torch.no_grad()
def test_logits_of_text_equal_the_released_hugging_face_code(model, upstream_config):
    golden = json.loads((GOLDEN / "hf/expected.json").read_text())
    weights = sat_weights(golden["parameters"], upstream_config["num_attention_heads"])
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(name.startswith("mixins.eva.") or name.endswith("inv_freq") for name in missing)

    logits = model(input_ids=torch.tensor([golden["input_ids"]]))[0][0]

    # golden values are rounded at 1e-6 and 1e-5; the rest is float32 in another order of summing
    assert logits[-1].tolist() == pytest.approx(golden["logits_last_position"], abs=5e-6)
    assert logits.norm(dim=-1).tolist() == pytest.approx(golden["logits_norm_per_position"], abs=5e-5)
    assert logits.argmax(dim=-1).tolist() == golden["argmax_per_position"]


@torch.no_grad()
def test_forward_in_bfloat16_when_the_image_is_float32_works(model, image):
    logits = model.bfloat16()(input_ids=torch.tensor(WITHOUT_PADDING), image=image, pre_image=1)[0]
    assert logits.dtype == torch.bfloat16
    assert logits.isfinite().all()


# mask and positions


@pytest.mark.parametrize("rows", [WITHOUT_PADDING, PADDED_RIGHT, PADDED_LEFT, INSIDE_MASK])
def test_mask_and_positions_equal_sats_own(model, rows):
    input_ids = torch.tensor(rows)
    mask, positions = model.get_inputs(input_ids)
    sat_mask, sat_positions = ChatGLMModel.get_inputs(model, input_ids)
    assert torch.equal(mask, sat_mask)
    assert mask.dtype == sat_mask.dtype
    assert torch.equal(positions, sat_positions)
    assert positions.dtype == sat_positions.dtype


def test_mask_and_positions_when_given_are_kept(model):
    mask, positions = torch.ones(1, 1), torch.zeros(2, 2, 40, dtype=torch.int64)
    given = model.get_inputs(torch.tensor(WITHOUT_PADDING), attention_mask=mask, position_ids=positions)
    assert given[0] is mask
    assert given[1] is positions


# the picture


@torch.no_grad()
def test_picture_embeddings_land_exactly_in_the_slots(model, image):
    input_ids = torch.tensor([[563, 775, 2685, *[3] * 32, 859, 86, 89, 90]] * 2)
    eva = model.get_mixin("eva")
    embeddings = eva.word_embedding_forward(input_ids, image=image, pre_image=3)
    words = model.transformer.word_embeddings(input_ids)
    assert torch.equal(embeddings[:, :3], words[:, :3])
    assert torch.equal(embeddings[:, 3:35], eva.model(image))
    assert torch.equal(embeddings[:, 35:], words[:, 35:])


@torch.no_grad()
def test_embeddings_without_an_image_are_the_words(model):
    input_ids = torch.tensor(WITHOUT_PADDING)
    embeddings = model.get_mixin("eva").word_embedding_forward(input_ids)
    assert torch.equal(embeddings, model.transformer.word_embeddings(input_ids))


@torch.no_grad()
def test_embeddings_of_one_more_token_from_the_cache_are_the_words(model, image):
    input_ids = torch.tensor([[554], [17]])
    embeddings = model.get_mixin("eva").word_embedding_forward(input_ids, image=image, pre_image=3)
    assert torch.equal(embeddings, model.transformer.word_embeddings(input_ids))


@torch.no_grad()
def test_logits_of_another_picture_are_others(model, image):
    input_ids = torch.tensor(WITHOUT_PADDING[:1] * 2)
    logits = model(input_ids=input_ids, image=image, pre_image=1)[0]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_frozen_vision_when_the_model_trains_stays_in_eval_mode(model):
    freeze(model.get_mixin("eva"))
    model.train()
    assert model.transformer.training
    assert not any(module.training for module in model.get_mixin("eva").modules())


def test_part_of_the_vision_that_is_trained_goes_to_train_mode_and_back_alone(model):
    vision = model.get_mixin("eva").model
    freeze(vision)
    vision.glm_proj.bias.requires_grad_(True)
    model.train()
    in_train_mode = {name for name, part in vision.named_children() if any(m.training for m in part.modules())}
    assert in_train_mode == {"glm_proj"}
    model.eval()
    assert not any(module.training for module in vision.modules())


def test_frozen_vision_builds_no_gradient_graph(model, image):
    freeze(model.get_mixin("eva"))
    image = image.clone().requires_grad_(True)
    model(input_ids=torch.tensor(WITHOUT_PADDING), image=image, pre_image=1)[0].mean().backward()
    assert image.grad is None
    assert model.transformer.word_embeddings.weight.grad is not None


def test_trained_projection_gets_a_gradient(model, image):
    freeze(model)
    projection = model.get_mixin("eva").model.glm_proj
    freeze(projection, trained=True)
    model(input_ids=torch.tensor(WITHOUT_PADDING), image=image, pre_image=1)[0].square().mean().backward()
    assert projection.weight.grad.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_residual_layer_norm_on_a_cpu_is_the_norm_in_float32(dtype):
    norm = torch.nn.LayerNorm(8, eps=1e-3).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 8).to(dtype)
    expected = torch.nn.functional.layer_norm(x.float(), (8,), norm.weight.float(), norm.bias.float(), 1e-3)
    found = residual_layer_norm(x, norm)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)


def test_layers_in_bfloat16_on_a_cpu_add_up_in_float32_until_the_last(model):
    model.bfloat16()
    added = []
    mixin, layer_forward = model.get_mixin("chatglm-layer"), model.hooks["layer_forward"]
    model.hooks["layer_forward"] = lambda *args, **kwargs: added.append(layer_forward(*args, **kwargs)) or added[-1]
    logits = model(input_ids=torch.tensor([[5, 6, 86, 89, 7, 90]]))[0]
    assert [output.dtype for output in added] == [torch.float32] * (mixin.num_layers - 1) + [torch.bfloat16]
    assert logits.dtype == torch.bfloat16


def test_model_that_cant_be_moved_to_its_device_is_an_error(upstream_checkpoint, monkeypatch):
    def move(model, *_):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(VisualGLMModel, "to", move)  # SAT's get_model calls it too, and swallows the error
    with pytest.raises(torch.OutOfMemoryError):
        load_model(upstream_checkpoint)
