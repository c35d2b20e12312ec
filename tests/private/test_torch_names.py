"""What torch's private names mean to metalit. Each test says what to do where torch changes one."""

import copy
from collections import namedtuple

import pytest
import torch
from torch import nn
from torch.func import grad, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import weight_norm
from torch.nn.utils.parametrizations import weight_norm as parametrized_weight_norm
from torch.overrides import TorchFunctionMode
from torch.utils.data import default_collate

from metalit import private_torch as private

Pair = namedtuple("Pair", ["first", "second"])


def test_pytrees_go_through_named_tuples_and_keep_none():
    """Elsewhere: ``torch.utils.pytree`` once it is public, or ``optree``, which needs ``none_is_leaf=True``."""
    tree = {"a": Pair(torch.tensor(1.0), None), "b": [torch.tensor(2.0)]}
    values, form = private.tree_flatten(tree)
    assert isinstance(form, private.TreeSpec)
    assert values == private.tree_leaves(tree)
    assert [None if value is None else float(value) for value in values] == [1.0, None, 2.0]
    assert private.tree_unflatten(values, form) == tree
    doubled = private.pytree_map(lambda value: None if value is None else 2 * value, tree)
    assert doubled == {"a": Pair(torch.tensor(2.0), None), "b": [torch.tensor(4.0)]}
    assert private.tree_map_only(int, lambda value: -value, (1, "x")) == (-1, "x")


@pytest.mark.parametrize(
    ("base", "layers"),
    [
        (private.BatchNorm, [nn.BatchNorm1d(2), nn.BatchNorm2d(2), nn.BatchNorm3d(2), nn.SyncBatchNorm(2)]),
        (private.InstanceNorm, [nn.InstanceNorm1d(2), nn.InstanceNorm2d(2), nn.InstanceNorm3d(2)]),
        (private.Dropout, [nn.Dropout(), nn.Dropout1d(), nn.Dropout2d(), nn.Dropout3d(), nn.AlphaDropout()]),
        (private.Dropout, [nn.FeatureAlphaDropout()]),
    ],
)
def test_layers_of_a_kind_have_one_base(base, layers):
    """Elsewhere: the tuple of torch's own classes of the kind."""
    assert all(isinstance(layer, base) for layer in layers)
    assert not isinstance(nn.GroupNorm(1, 2), base)


@pytest.mark.parametrize("normed", [weight_norm, parametrized_weight_norm])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_is_recognised_on_the_layer_that_computes_it(normed):
    """Elsewhere: find out by evaluating the network once under ``ExactSecondDerivatives``."""
    layer = normed(nn.Linear(2, 2))
    assert any(map(private.has_weight_norm, layer.modules()))
    assert not any(map(private.has_weight_norm, nn.Linear(2, 2).modules()))


def test_the_operation_of_weight_norm_passes_through_function_modes():
    """Elsewhere: where torch's second derivative is right by now, delete what ``ExactSecondDerivatives`` does."""
    seen = []

    class Notes(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    layer = parametrized_weight_norm(nn.Linear(2, 2))
    with Notes():
        layer(torch.zeros(1, 2))
    assert private.FUSED_WEIGHT_NORM in seen


def test_what_transforms_wrap_is_told_and_unwrapped():
    """Elsewhere: ``torch.func`` may have a public question by now; else hand ``is_batched`` down."""
    plain, seen = torch.arange(3.0), []

    def note(value):
        seen.append((private.is_batched(value), private.bottom(value)))
        return value.sum()

    vmap(grad(note))(plain)
    grad(note)(plain)
    assert [batched for batched, _ in seen] == [True, False]
    assert all(torch.equal(value, plain) for _, value in seen)
    assert not private.is_batched(plain)
    assert private.bottom(plain) is plain


def test_what_is_traced_has_no_value():
    """Elsewhere: catch what ``int(value)`` raises of a tensor that is traced; there is no public question for it."""
    seen = []

    def note(value):
        seen.append(private.is_traced(value))
        return value.sum()

    make_fx(grad(note), tracing_mode="fake")(torch.arange(3.0))
    grad(note)(torch.arange(3.0))
    assert seen == [True, False]


def test_views_share_memory_and_empty_tensors_do_not():
    """Elsewhere: ``untyped_storage().data_ptr()``, which is 0 for all empty tensors: leave those out by hand."""
    whole = torch.zeros(4)
    assert private.memory(whole) == private.memory(whole[2:]) == private.memory(whole.detach())
    assert private.memory(whole) != private.memory(whole.clone())
    assert private.memory(torch.zeros(0)) != private.memory(torch.zeros(0))


def test_dispatch_modes_see_writes_by_data_and_schemas_name_what_is_written():
    """Elsewhere: ``torch.ops`` names what writes by a trailing underscore, and by ``out=``."""
    written = []

    class Notes(private.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            written.extend(private.written_arguments(func, args, kwargs or {}))
            return func(*args, **(kwargs or {}))

    value, out = torch.zeros(2), torch.zeros(2)
    with Notes():
        value + 1
        assert written == []
        value.data.add_(1.0)
        torch.add(value, 1.0, out=out)
    assert [private.memory(each) for each in written] == [private.memory(value), private.memory(out)]


def test_values_are_copied_to_their_places_at_once():
    """Elsewhere: ``place.copy_(value)`` one by one; it costs microseconds an outer step."""
    places = [torch.zeros(2), torch.zeros(1)]
    private.copy_all(places, [torch.tensor([1.0, 2.0]), torch.tensor([3.0])])
    assert [place.tolist() for place in places] == [[1.0, 2.0], [3.0]]


def test_the_tables_of_a_module_are_what_it_reads():
    """Elsewhere: torch's documentation of ``nn.Module``; all of :mod:`metalit.autodiff.untouched` leans on them."""
    layer = nn.BatchNorm1d(2)
    layer.inner = nn.Linear(2, 2, bias=False)
    assert list(private.parameters_of(layer)) == ["weight", "bias"]
    assert private.parameters_of(layer.inner)["bias"] is None
    assert list(private.children_of(layer)) == ["inner"]
    private.buffers_of(layer)["running_mean"] = None
    assert layer.running_mean is None
    tables = [private.parameters_of(layer), private.buffers_of(layer), private.children_of(layer)]
    assert all(vars(layer)[name] is table for name, table in zip(private.MODULE_TABLES, tables, strict=True))


def test_recurrent_layers_keep_their_weights_a_second_time():
    """Elsewhere: where they no longer do, delete ``RECURRENT_LISTS`` and who reads it."""
    layer = nn.LSTM(2, 3)
    lists = [vars(layer)[name] for name in private.RECURRENT_LISTS]
    assert [id(value) for value in lists[0]] == [id(value) for value in layer.parameters()]
    assert [id(reference()) for reference in lists[1]] == [id(value) for value in layer.parameters()]


def test_fractional_pooling_draws_unless_it_is_given_its_windows():
    """Elsewhere: treat all fractional pooling as drawing."""
    assert private.draws_its_windows(nn.FractionalMaxPool2d(2, output_size=2))
    given = nn.FractionalMaxPool2d(2, output_size=2, _random_samples=torch.rand(1, 1, 2))
    assert not private.draws_its_windows(given)


def test_loaders_stack_values_of_a_type_as_they_are_told():
    """Elsewhere: hand ``collate_fn`` to every loader, or let :class:`~metalit.problem.Points` carry no None."""

    class Own:
        pass

    private.collate_by(Own, lambda each, *, collate_fn_map: ("stacked", len(each)))
    assert default_collate([(Own(), 1), (Own(), 2)])[0] == ("stacked", 2)
    del private.default_collate_fn_map[Own]


def test_step_hooks_are_known():
    """Elsewhere: keep the count of calls by a hook of one's own, or fuse no steps (``suits`` returns False)."""
    optimizer = torch.optim.Adam([nn.Parameter(torch.zeros(1))])
    assert not private.has_step_hooks(optimizer)
    handle = optimizer.register_step_pre_hook(lambda *_: None)
    assert private.has_step_hooks(optimizer)
    handle.remove()
    optimizer.register_step_post_hook(lambda *_: None)
    assert private.has_step_hooks(optimizer)


def test_a_step_that_is_noted_keeps_the_scheduler_quiet(recwarn):
    """Elsewhere: filter the warning of ``lr_scheduler.step()`` before ``optimizer.step()`` where steps are fused."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    private.count_as_stepped(optimizer)
    scheduler.step()
    assert [str(warning.message) for warning in recwarn] == []


def test_the_scheduler_warns_where_no_step_is_noted():
    """Where this one fails, ``count_as_stepped`` has become needless."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before"):
        scheduler.step()


def test_fused_optimisers_unscale_by_themselves():
    """Elsewhere: ``group['fused']`` of its first group."""
    parameters = [nn.Parameter(torch.zeros(1))]
    assert private.unscales_by_itself(torch.optim.Adam(parameters, fused=True))
    assert not private.unscales_by_itself(torch.optim.Adam(parameters))


def test_a_schedulers_progress_is_known_from_its_settings():
    """Where torch keeps more of its progress, add the name to ``SCHEDULER_PROGRESS``; where less, delete it."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    private.count_as_stepped(optimizer)
    before = copy.deepcopy(scheduler.state_dict())
    scheduler.step()
    moved = {name for name, value in scheduler.state_dict().items() if value != before[name]}
    assert moved <= {"last_epoch", *private.SCHEDULER_PROGRESS}
    assert set(private.SCHEDULER_PROGRESS) <= before.keys()


def test_apply_is_called_on_every_module_that_is_converted():
    """``nn.Module._apply``, overridden by ``Unrounded``. Elsewhere: ``to``, ``float``, ``double``, ``half``."""
    called = []

    class Layer(nn.Module):
        def _apply(self, fn, recurse=True):
            called.append(fn)
            return super()._apply(fn, recurse)

    nn.Sequential(Layer()).double()
    assert len(called) == 1


def test_state_dictionaries_are_made_and_loaded_by_what_a_module_overrides():
    """Overridden by ``LowRank``. Elsewhere: hooks, by ``register_state_dict_post_hook`` and its like for loading."""

    class Layer(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[f"{prefix}weight"] = 2 * destination[f"{prefix}weight"]

        def _load_from_state_dict(self, state_dict, prefix, *rest):
            super()._load_from_state_dict(
                {**state_dict, f"{prefix}weight": state_dict[f"{prefix}weight"] / 2}, prefix, *rest
            )

    model = nn.Sequential(Layer(1, 1))
    state = {name: value.clone() for name, value in model.state_dict().items()}
    assert torch.equal(state["0.weight"], 2 * model[0].weight)
    before = model[0].weight.clone()
    model.load_state_dict(state)
    assert torch.equal(model[0].weight, before)
