"""A learner is tested on all of other data, normalised as the data was that it was trained on."""

import copy
import warnings

import numpy as np
import pytest
import torch
from fits import bare, last, trainer

from metalit.data import Arrays, ClassTasks, Curves, Episodes, Sine, TaskDataModule
from metalit.errors import InputError
from metalit.hypergradients import Direct, Unrolled
from metalit.inner import SGD
from metalit.modules import MetaLearner
from metalit.networks import MLP
from metalit.problems import FewShot, Prototypes

ALL = {"val": 0, "test": 1}
HELD = pytest.mark.parametrize("split", ["val", "test"])
LR = 0.05


def table(folder, level, rows=5):
    """A file of lines y = level + x · task, at x of 0 to 4."""
    lines = [f"{task},{x},{level + x * task}" for task in range(6) for x in range(rows)]
    file = folder / f"{level}.csv"
    file.write_text("\n".join(["task,x,y", *lines]))
    return str(file)


def curves(file, **options):
    sizes = Episodes(4, 2), Episodes(shots=2), Episodes(shots=2)
    return TaskDataModule(Curves(file, "task", ["x"], ["y"], **options), *sizes)


def learner(inputs=1):
    torch.manual_seed(0)
    return MetaLearner(FewShot(MLP([inputs, 8, 1], activation="Tanh")), SGD(LR), Unrolled(1), eval_steps=2).double()


@pytest.fixture
def trained(tmp_path):
    """What was learned from curves about 30."""
    module = learner()
    trainer(tmp_path, precision="64-true").fit(module, curves(table(tmp_path, 30)))
    return module


def by_hand(module, x, y, support):
    """The losses at the other rows after 0, 1 and 2 steps, of rows in the units of the table."""
    network, scaling, found = copy.deepcopy(module.problem.network), module.scaling, []
    x = (x - scaling.x_mean[0]) / scaling.x_std[0]
    y = (y - scaling.y_mean[0]) / scaling.y_std[0]
    for _ in range(3):
        errors = (network(x) - y).square()
        found.append(float(errors[~support].mean().detach()))
        gradients = torch.autograd.grad(errors[support].mean(), list(network.parameters()))
        with torch.no_grad():
            for parameter, gradient in zip(network.parameters(), gradients, strict=True):
                parameter.sub_(LR * gradient)
    return found


@HELD
def test_curves_are_normalised_as_those_that_were_trained_on(split, trained, tmp_path):
    data = curves(table(tmp_path, 50), **{**ALL, "val": int(split == "val"), "test": int(split == "test")})
    run = bare(tmp_path, precision="64-true")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        getattr(run, "validate" if split == "val" else "test")(learner(), data, last(tmp_path), verbose=False)
    drawn, expected = data.draw(split, torch.arange(6)), []
    for task in range(6):
        x = torch.arange(5, dtype=torch.float64).unsqueeze(1)
        rows = (drawn.support.x[task] * trained.scaling.x_std[0] + trained.scaling.x_mean[0]).round().flatten().tolist()
        expected.append(by_hand(trained, x, 50 + x * task, torch.tensor([value in rows for value in range(5)])))
    torch.testing.assert_close(
        run.lightning_module.task_losses, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_the_way_to_the_checkpoint_makes_no_difference(trained, tmp_path):
    found = []
    parts = {"problem": learner().problem, "inner_optimizer": SGD(LR), "hypergradient": Unrolled(1), "eval_steps": 2}
    loaded = MetaLearner.load_from_checkpoint(last(tmp_path), **parts)
    for module, path in ((learner(), last(tmp_path)), (trained, None), (loaded, None)):
        data = curves(table(tmp_path, 30), **ALL)
        bare(tmp_path, precision="64-true").test(module, data, path, verbose=False)
        found.append(module.task_losses)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_data_in_other_units_is_told(trained, tmp_path):
    with pytest.warns(UserWarning, match=r"far outside of what the learner was trained on: 'y' from 500 to .* 30 to"):
        bare(tmp_path, precision="64-true").test(trained, curves(table(tmp_path, 500), **ALL), verbose=False)


def test_other_data_with_a_scaling_of_its_own_is_refused(trained, tmp_path):
    with pytest.raises(InputError, match=r"trained on data with the scaling y_mean=.* or test it on all of other data"):
        bare(tmp_path, precision="64-true").test(trained, curves(table(tmp_path, 50)), verbose=False)


def test_inputs_of_another_shape_are_refused(trained, tmp_path):
    (tmp_path / "wide.csv").write_text("task,a,b,y\n" + "\n".join(f"{n % 6},{n},{n},{n}" for n in range(60)))
    data = TaskDataModule(Curves(str(tmp_path / "wide.csv"), "task", ["a", "b"], ["y"], **ALL))
    with pytest.raises(InputError, match=r"trained on inputs of shape \[1\], and those of the present data are \[2\]"):
        bare(tmp_path, precision="64-true").test(trained, data, verbose=False)


class Pictures(Sine):
    """Tasks of the user's own, of another shape than their columns say."""

    def input_shape(self):
        return [1, 1, 1]


def test_tasks_of_the_users_own_shape_are_tested_as_ever(tmp_path):
    sizes = [Episodes(4, 2, 3)] * 3
    module, run = learner(), trainer(tmp_path, precision="64-true")
    run.fit(module, TaskDataModule(Pictures(), *sizes))
    run.test(module, TaskDataModule(Pictures(), *sizes), verbose=False)
    run.test(learner(), TaskDataModule(Pictures(), *sizes), last(tmp_path), verbose=False)


@HELD
def test_nothing_can_be_trained_on_what_is_all_held_out(split, tmp_path):
    data = curves(table(tmp_path, 30), **{"val": int(split == "val"), "test": int(split == "test")})
    with pytest.raises(InputError, match="all is held out, so there is nothing to train on"):
        bare(tmp_path).fit(learner(), data)


def test_without_a_learner_there_is_no_scaling(tmp_path):
    with pytest.raises(InputError, match="give its checkpoint with --ckpt_path"):
        bare(tmp_path).test(learner(), curves(table(tmp_path, 30), **ALL), verbose=False)


def test_a_learner_of_drawn_tasks_is_tested_on_a_table(tmp_path):
    data = TaskDataModule(Sine(), Episodes(4, 2, 3), Episodes(4, 2, 3), Episodes(4, 2, 3))
    trainer(tmp_path).fit(learner().float(), data)
    module = learner().float()
    with pytest.warns(UserWarning, match="far outside of what the learner was trained on"):
        bare(tmp_path).test(module, curves(table(tmp_path, 30), **ALL), last(tmp_path), verbose=False)
    assert module.scaling.x_std == [1.0]
    assert float(module.task_losses[:, 0].min()) > 100  # lines about 30 are far from sines, in their own units


def classes(folder, centre, unit=1.0, **options):
    """Images of 12 classes, of one value each: their number beyond the centre, in this unit."""
    values = centre + unit * np.arange(12.0).repeat(4).reshape(-1, 1, 1, 1) * np.ones((1, 4, 4))
    file = folder / f"{centre}-{unit}.npz"
    np.savez(file, x=values, y=np.arange(12).repeat(4))
    size = Episodes(2, 1, 2, ways=2)
    return TaskDataModule(ClassTasks(Arrays(str(file)), **options), size, size, size)


def test_classes_are_normalised_as_those_that_were_trained_on(tmp_path):
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(16, 4))
    module = MetaLearner(Prototypes(network), hypergradient=Direct(), eval_steps=0)
    trainer(tmp_path).fit(module, classes(tmp_path, 100))
    data = classes(tmp_path, 103, **ALL)
    assert set(data.tasks.class_names("test")) == {str(number) for number in range(12)}
    bare(tmp_path).test(module, data, verbose=False)
    drawn = data.draw("test", torch.arange(3))
    mean, std = module.scaling.x_mean[0], module.scaling.x_std[0]
    names = torch.tensor([float(name) for name in data.tasks.class_names("test")], dtype=torch.float64)
    of_rows = names[drawn.classes.gather(1, drawn.support.y)]
    found = data.tasks.load(drawn, torch.device("cpu")).support.x[..., 0, 0, 0]
    torch.testing.assert_close(found, (103 + of_rows - mean) / std, rtol=1e-12, atol=1e-12)
    with pytest.warns(UserWarning, match="give images in the units of the training data"):
        bare(tmp_path).test(module, classes(tmp_path, 103, 1 / 255, **ALL), verbose=False)
