import pytest
import torch
from cases import draw
from hypothesis import given
from hypothesis import strategies as st
from torch.func import vmap
from torch.testing import assert_close

from metalit.tree import axpy, dot, flatten, leaves, norm, tree_map, unflatten

shapes = st.recursive(
    st.lists(st.integers(0, 3), max_size=2).map(tuple),
    lambda branch: st.dictionaries(st.sampled_from("abcd"), branch, min_size=1, max_size=3),
    max_leaves=5,
)
scales = st.floats(-10, 10)
seeds = st.integers(0, 1000)


def tree_of(shape, seed):
    if isinstance(shape, dict):
        return {key: tree_of(branch, seed + 31 * index) for index, (key, branch) in enumerate(shape.items(), 1)}
    return draw(*shape, seed=seed)


@given(shapes, seeds)
def test_flatten_lays_the_leaves_out_in_order(shape, seed):
    tree = tree_of(shape, seed)
    assert flatten(tree).tolist() == [entry for _, leaf in leaves(tree) for entry in leaf.flatten().tolist()]


@given(shapes, seeds, seeds)
def test_unflatten_is_the_way_back(shape, seed, other):
    tree, like = tree_of(shape, seed), tree_of(shape, other)
    found = unflatten(flatten(tree), like)
    assert [name for name, _ in leaves(found)] == [name for name, _ in leaves(like)]
    assert_close(found, tree, rtol=0, atol=0)


def test_unflatten_under_vmap_is_a_loop():
    like = {"b": draw(2, 1), "a": {"c": draw(), "d": draw(3)}}
    vectors = draw(4, 6, seed=1)
    found = vmap(lambda vector: unflatten(vector, like))(vectors)
    each = [unflatten(vector, like) for vector in vectors]
    assert_close(found, tree_map(lambda *values: torch.stack(values), *each), rtol=0, atol=0)
    assert_close(found["a"]["d"], vectors[:, 3:], rtol=0, atol=0)


@pytest.mark.parametrize("entries", [5, 7])
def test_unflatten_takes_a_vector_of_the_right_length_alone(entries):
    with pytest.raises(RuntimeError, match="split"):
        unflatten(draw(entries), {"b": draw(2, 1), "a": draw(4)})


@given(shapes, seeds, seeds, scales)
def test_axpy_is_axpy_of_the_flat_vectors(shape, one, other, scale):
    x, y = tree_of(shape, one), tree_of(shape, other)
    result = axpy(scale, x, y)
    assert_close(flatten(result), scale * flatten(x) + flatten(y), rtol=1e-14, atol=1e-14)
    assert [name for name, _ in leaves(result)] == [name for name, _ in leaves(x)]


@given(shapes, seeds, seeds)
def test_dot_and_norm_are_those_of_the_flat_vectors(shape, one, other):
    x, y = tree_of(shape, one), tree_of(shape, other)
    assert_close(dot(x, y), (flatten(x) * flatten(y)).sum(), rtol=1e-12, atol=1e-12)
    assert_close(norm(x), flatten(x).square().sum().sqrt(), rtol=1e-12, atol=0)


@given(shapes, seeds, seeds, seeds, scales)
def test_dot_is_bilinear_and_symmetric(shape, one, other, third, scale):
    x, y, z = (tree_of(shape, seed) for seed in (one, other, third))
    assert_close(dot(axpy(scale, x, y), z), scale * dot(x, z) + dot(y, z), rtol=1e-11, atol=1e-11)
    assert_close(dot(x, y), dot(y, x), rtol=1e-13, atol=1e-13)


@given(shapes, seeds, seeds)
def test_cauchy_schwarz_and_the_parallelogram(shape, one, other):
    x, y = tree_of(shape, one), tree_of(shape, other)
    assert dot(x, y).abs() <= norm(x) * norm(y) * (1 + 1e-12)
    sides = 2 * (dot(x, x) + dot(y, y))
    diagonals = norm(axpy(1.0, x, y)) ** 2 + norm(axpy(-1.0, x, y)) ** 2
    assert_close(diagonals, sides, rtol=1e-12, atol=1e-12)


def test_the_norm_of_the_norms_is_the_norm_of_the_concatenation():
    tree = {"a": draw(3, 2), "b": {"c": draw(4, seed=1), "d": draw(seed=2)}}
    norms = torch.stack([leaf.norm() for _, leaf in leaves(tree)])
    assert_close(norm(tree), norms.norm(), rtol=1e-14, atol=0)
    assert_close(norm(tree), flatten(tree).norm(), rtol=1e-14, atol=0)


def test_leaves_are_named_by_their_path_in_insertion_order():
    tree = {"b": torch.tensor(1), "a": {"z": torch.tensor(2), "y": {"x": torch.tensor(3)}}}
    assert [(name, leaf.item()) for name, leaf in leaves(tree)] == [("b", 1), ("a.z", 2), ("a.y.x", 3)]
    assert [name for name, _ in leaves(torch.tensor(0))] == [""]
    assert list(leaves({})) == []


def test_axpy_takes_a_tensor_as_its_scale():
    assert_close(axpy(torch.tensor(2.0), {"a": torch.ones(2)}, {"a": torch.ones(2)}), {"a": torch.full((2,), 3.0)})


def test_tree_map_pairs_leaves_by_name_and_keeps_the_first_order():
    x = {"a": torch.tensor(1), "b": torch.tensor(2)}
    y = {"b": torch.tensor(20), "a": torch.tensor(10)}
    result = tree_map(torch.add, x, y)
    assert list(result) == ["a", "b"]
    assert [value.item() for value in result.values()] == [11, 22]


def test_tree_map_leaves_its_arguments():
    x = {"a": torch.ones(2)}
    assert tree_map(lambda value: value + 1, x)["a"] is not x["a"]
    assert_close(x, {"a": torch.ones(2)})


@pytest.mark.parametrize(
    ("first", "other", "told"),
    [
        ({"a": 1.0}, {"b": 1.0}, r"trees differ: \['a'\] and \['b'\]"),
        ({"a": 1.0}, {"a": 1.0, "b": 1.0}, r"trees differ: \['a'\] and \['a', 'b'\]"),
        ({"a": 1.0, "b": 1.0}, {"a": 1.0}, r"trees differ: \['a', 'b'\] and \['a'\]"),
        ({"a": {"c": 1.0}}, {"a": {"d": 1.0}}, r"trees differ: \['c'\] and \['d'\]"),
        ({"a": 1.0}, 1.0, r"trees differ: \['a'\] and Tensor"),
        ({}, {"a": 1.0}, r"trees differ: \[\] and \['a'\]"),
    ],
)
@pytest.mark.parametrize("operation", [dot, lambda x, y: axpy(1.0, x, y), lambda x, y: tree_map(torch.add, x, x, y)])
def test_mismatched_structures_raise(first, other, told, operation):
    def tensors(tree):
        return {key: tensors(branch) for key, branch in tree.items()} if isinstance(tree, dict) else torch.tensor(tree)

    with pytest.raises(ValueError, match=told):
        operation(tensors(first), tensors(other))


@pytest.mark.parametrize("first", [torch.ones(2), {"a": torch.ones(2)}])
def test_a_tensor_against_a_dictionary_raises(first):
    other = {"b": torch.ones(2)} if isinstance(first, torch.Tensor) else {"a": {"b": torch.ones(2)}}
    with pytest.raises(ValueError, match="trees differ"):
        tree_map(torch.add, first, other)


def test_dot_does_not_broadcast():
    with pytest.raises(ValueError, match="trees differ"):
        dot(torch.ones(4, 1), torch.ones(4))
