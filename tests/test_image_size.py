"""Another image size than the checkpoint's: its position embeddings are interpolated as a direct computation does it."""

import math

import numpy
import pytest
import torch
from conftest import load_model


def cubic_weights(offset: float) -> list[float]:
    """Weights of the four neighbours of a point, at -1, 0, 1 and 2 from the one before it (Keys 1981, a = -0.75)."""
    a = -0.75
    near = [(a + 2) * x**3 - (a + 3) * x**2 + 1 for x in (offset, 1 - offset)]
    far = [a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a for x in (1 + offset, 2 - offset)]
    return [far[0], near[0], near[1], far[1]]


def interpolation_matrix(new: int, old: int) -> numpy.ndarray:
    """float64[new, old]: how much of each old place goes into each new one, along one edge of the grid."""
    matrix = numpy.zeros((new, old))
    for place in range(new):
        centre = (place + 0.5) * old / new - 0.5
        start = math.floor(centre)
        for neighbour, weight in enumerate(cubic_weights(centre - start), start - 1):
            matrix[place, min(max(neighbour, 0), old - 1)] += weight
    return matrix


@pytest.fixture
def vit(upstream_checkpoint):
    return load_model(upstream_checkpoint).get_mixin("eva").model.vit


def position_weights(vit) -> torch.Tensor:
    return vit.transformer.position_embeddings.weight.detach()


@pytest.mark.parametrize("factor", [1.5, 2, 0.5])
def test_position_embeddings_of_another_size_are_interpolated(vit, factor):
    old, size = vit.transformer.property, vit.transformer.property.image_size[0]
    before = position_weights(vit).double().numpy()
    edge = int(size * factor) // old.patch_size * old.patch_size
    vit.set_image_size(edge)
    grid_before, grid = size // old.patch_size, edge // old.patch_size
    matrix = interpolation_matrix(grid, grid_before)
    places = before[old.pre_len :].reshape(grid_before, grid_before, -1)
    expected = numpy.einsum("ia,jb,abc->ijc", matrix, matrix, places).reshape(grid * grid, -1)
    after = position_weights(vit).numpy()
    assert after.shape == (old.pre_len + grid * grid, before.shape[1])
    assert numpy.allclose(after[: old.pre_len], before[: old.pre_len], atol=0)
    assert numpy.allclose(after[old.pre_len :], expected, atol=1e-5)


def test_position_embeddings_in_half_precision_are_interpolated_in_float32(vit):
    edge = 2 * vit.transformer.property.image_size[0]
    weight = position_weights(vit).half()
    vit.transformer.position_embeddings.weight.data = weight.float()
    vit.set_image_size(edge)
    expected = position_weights(vit).half()
    return_to = vit.transformer.property.image_size[0] // 2
    vit.transformer.property = type(vit.transformer.property)(
        (return_to, return_to), vit.transformer.property.patch_size, 1, 0
    )
    vit.transformer.position_embeddings = torch.nn.Embedding(*weight.shape, dtype=torch.float16)
    vit.transformer.position_embeddings.weight.data = weight
    vit.set_image_size(edge)
    assert position_weights(vit).dtype == torch.float16
    assert position_weights(vit).equal(expected)


def test_position_embeddings_of_the_same_size_stay(vit):
    before = vit.transformer.position_embeddings
    vit.set_image_size(vit.transformer.property.image_size[0])
    assert vit.transformer.position_embeddings is before


def test_features_of_a_larger_image_have_its_patches(vit):
    size, patch = vit.transformer.property.image_size[0], vit.transformer.property.patch_size
    vit.set_image_size(2 * size)
    with torch.no_grad():
        features = vit(torch.zeros(1, 3, 2 * size, 2 * size))
    assert features.shape[1] == 1 + (2 * size // patch) ** 2
