"""Layers of images by formulas: torch's own values, and derivatives to the third order, in double precision."""

import pytest
import torch
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

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
LAYERS = {**CONVOLUTIONS, **OTHERS}


def layer_and_images(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    channels = layer.in_channels if isinstance(layer, nn.Conv2d) else 3
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


@pytest.mark.parametrize("kind", ["as in Conv4", "few numbers in a window", "BatchNorm", "pool"])
def test_derivatives_are_those_of_finite_differences(kind):
    layer, own, x = layer_and_images(kind)

    def fn(x, *values):
        with ChannelsLast():
            return functional_call(layer, dict(zip(own, values, strict=True)), (x,))

    given = [value.requires_grad_() for value in (x[..., :4, :4].clone(), *own.values())]
    assert gradcheck(fn, given)
    assert gradgradcheck(fn, given)


@pytest.mark.parametrize("kind", ["as in Conv4", "groups", "few numbers in a window", "BatchNorm", "pool"])
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
