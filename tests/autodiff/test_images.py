"""Layers of images by formulas: torch's own values, and derivatives to the third order, in double precision."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from metalit.autodiff import images
from metalit.autodiff.images import ChannelsLast, sees_images

CONVOLUTIONS = {
    "as in Conv4": lambda: nn.Conv2d(3, 4, 3, padding=1),
    "few numbers in a window": lambda: nn.Conv2d(1, 3, 3, padding=1),
    "few, with strides": lambda: nn.Conv2d(1, 3, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
    "strides, dilation, no bias": lambda: nn.Conv2d(3, 4, 3, stride=2, padding=(1, 2), dilation=(2, 1), bias=False),
    "groups": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "of each channel": lambda: nn.Conv2d(4, 4, 3, groups=4, padding=1),
    "padded by name": lambda: nn.Conv2d(3, 4, 3, padding="same"),
    "padded by reflection": lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
}
OTHERS = {
    "BatchNorm": lambda: nn.BatchNorm2d(3, track_running_stats=False),
    "BatchNorm without weights": lambda: nn.BatchNorm2d(3, affine=False, track_running_stats=False),
    "BatchNorm with running statistics": lambda: nn.BatchNorm2d(3).eval(),
    "pool": lambda: nn.MaxPool2d(2),
    "pool of oblong windows": lambda: nn.MaxPool2d((1, 3)),
    "pool of windows that overlap": lambda: nn.MaxPool2d(3, stride=2, padding=1),
}
TOGETHER = {
    "BatchNorm of a product": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False), nn.BatchNorm2d(3, track_running_stats=False)
    ),
    "BatchNorm without weights of a product with a bias": lambda: nn.Sequential(
        nn.Conv2d(2, 3, 2, stride=(1, 2)), nn.BatchNorm2d(3, affine=False, track_running_stats=False)
    ),
    "pool of ReLU": lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d((1, 3))),
    "a block": lambda: nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3, track_running_stats=False), nn.ReLU(), nn.MaxPool2d(2)
    ),
}
LAYERS = {**CONVOLUTIONS, **OTHERS, **TOGETHER}


def layer_and_images(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    channels = next((part.in_channels for part in layer.modules() if isinstance(part, nn.Conv2d)), 3)
    own = {name: torch.randn_like(value) for name, value in layer.named_parameters()}
    return layer, own, torch.randn(2, channels, 6, 7, dtype=torch.float64)


def derivatives(layer, own, x):
    """A value, and its first, second and third derivatives along fixed directions, by the weights and the images."""

    def value(at):
        return functional_call(layer, {name: at[name] for name in own}, (at["x"],)).sin().square().sum()

    def along(fn):
        def slope(at):
            found = grad(fn)(at)
            return sum((torch.linspace(-1, 1, g.numel(), dtype=g.dtype) * g.flatten()).sum() for g in found.values())

        return slope

    at = {**own, "x": x}
    first, second = along(value), along(along(value))
    return value(at), *(grad(fn)(at)[name] for fn in (value, first, second) for name in at)


class PlainNorm(nn.Module):
    """BatchNorm as the textbook has it: of torch's own, the third derivative by its images is wrong."""

    def forward(self, x):
        centred = x - x.mean((0, 2, 3), keepdim=True)
        found = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        own = dict(self.named_parameters())
        return found * own["weight"][:, None, None] + own["bias"][:, None, None] if own else found


def plain(layer):
    if isinstance(layer, nn.Sequential):
        return nn.Sequential(*map(plain, layer))
    if not isinstance(layer, nn.BatchNorm2d) or layer.running_mean is not None:
        return layer
    found = PlainNorm()
    for name, value in layer.named_parameters():
        found.register_parameter(name, value)
    return found


@pytest.mark.parametrize("kind", LAYERS)
def test_values_and_three_derivatives_are_those_of_torch(kind):
    layer, own, x = layer_and_images(kind)
    expected = derivatives(plain(layer), own, x)
    with ChannelsLast():
        found = derivatives(layer, own, x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", ["as in Conv4", "few numbers in a window", "BatchNorm", "pool", *TOGETHER])
def test_derivatives_are_those_of_finite_differences(kind):
    layer, own, x = layer_and_images(kind)

    def fn(x, *values):
        with ChannelsLast():
            return functional_call(layer, dict(zip(own, values, strict=True)), (x,))

    given = [value.requires_grad_() for value in (x[..., :4, :4].clone(), *own.values())]
    assert gradcheck(fn, given)
    assert gradgradcheck(fn, given)


@pytest.mark.parametrize("kind", ["as in Conv4", "groups", "few numbers in a window", "BatchNorm", "pool", "a block"])
@pytest.mark.parametrize("shared", [True, False])
def test_of_many_tasks_at_once_as_of_each(kind, shared):
    layer, own, x = layer_and_images(kind)
    images = torch.stack([x, x.flip(0) + 1, x * 2])
    weights = own if shared else {name: torch.stack([v, v + 1, v.flip(0)]) for name, v in own.items()}

    with ChannelsLast():
        found = vmap(lambda own, x: derivatives(layer, own, x)[1:], in_dims=(None if shared else 0, 0))(weights, images)
    for task in range(3):
        at = weights if shared else {name: value[task] for name, value in weights.items()}
        expected = derivatives(plain(layer), at, images[task])[1:]
        torch.testing.assert_close([value[task] for value in found], list(expected), rtol=1e-9, atol=1e-9)


def test_batch_norm_of_a_product_goes_over_no_product(monkeypatch):
    monkeypatch.setattr(images, "standardised", None)
    layer, own, x = layer_and_images("a block")
    with ChannelsLast():
        functional_call(layer, own, (x,))
        with pytest.raises(TypeError, match="not callable"):
            functional_call(layer[1:], {}, (x.expand(-1, 3, -1, -1),))


def test_variances_are_exact_where_images_hardly_vary_but_from_each_other():
    torch.manual_seed(0)
    x = 10 * torch.randn(20, 1, 1, 1) + 1e-3 * torch.randn(20, 1, 8, 8)
    with ChannelsLast():
        found = functional.batch_norm(
            torch.conv2d(x, torch.tensor([[[[1.0, -1.0]]]])), None, None, training=True, eps=0
        )
    torch.testing.assert_close(found.var(), torch.tensor(1.0), rtol=1e-2, atol=0)  # summed in single precision, nan


@pytest.mark.parametrize("kind", ["BatchNorm of a product", "pool of ReLU"])
def test_what_is_changed_between_two_layers_is_not_of_the_first(kind):
    layer, own, x = layer_and_images(kind)

    def found():
        before = functional_call(layer[:-1], {k: v for k, v in own.items() if k.startswith("0")}, (x,))
        return layer[-1](before.sub_(2)), layer[-1](functional.relu(before - 1, inplace=True)), layer[-1](before)

    expected = found()
    with ChannelsLast():
        torch.testing.assert_close(found(), expected)


def test_of_equal_values_the_first_of_a_window_has_the_gradient():
    x = torch.tensor([[1.0, 3.0, 0.0], [3.0, 3.0, 9.0]], requires_grad=True)
    with ChannelsLast():
        nn.MaxPool2d(2)(x[None, None]).sum().backward()
    assert x.grad.tolist() == [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]  # the last column is of no whole window


def test_not_a_number_stays_one():
    x = torch.tensor([[[[1.0, torch.nan], [3.0, 2.0]]]])
    with ChannelsLast():
        assert nn.MaxPool2d(2)(x).isnan().all()


def test_what_is_no_batch_of_images_is_left_to_torch():
    with ChannelsLast():
        assert nn.Conv2d(1, 2, 3)(torch.zeros(1, 5, 5)).shape == (2, 3, 3)
        assert nn.MaxPool2d(2)(torch.zeros(1, 4, 4)).shape == (1, 2, 2)
        assert nn.BatchNorm1d(3)(torch.ones(4, 3)).shape == (4, 3)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            nn.BatchNorm2d(3, track_running_stats=False)(torch.ones(1, 3, 1, 1))
        with pytest.raises(RuntimeError, match="size is too small"):
            nn.MaxPool2d(4)(torch.zeros(1, 1, 2, 2))


def test_images_are_seen_by_convolutions_of_two_dimensions():
    assert sees_images(nn.Sequential(nn.Conv2d(1, 1, 1)).modules())
    assert not sees_images(nn.Sequential(nn.Conv1d(1, 1, 1), nn.Linear(1, 1)).modules())
