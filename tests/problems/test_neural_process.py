import pytest
import torch
from cases import each_of, regression_tasks, task_at
from torch.func import vmap
from torch.nn import functional as F
from torch.testing import assert_close

from metalit.errors import InputError
from metalit.problem import Points, Task
from metalit.problems import NeuralProcess

each_kind = pytest.mark.parametrize("attention", [False, True], ids=["mean", "attention"])


def process(attention, inputs=2, outputs=1, **options):
    torch.manual_seed(0)
    return NeuralProcess(inputs, outputs, 6, attention=attention, **options).double()


def answers(problem, task):
    outer = problem.outer()
    inner = problem.init(outer, task)
    given = inner, outer, task.query.x
    return problem.predict(*given), problem.spread(*given), problem.outer_loss(inner, outer, task)


@each_kind
def test_the_order_of_the_support_points_does_not_matter(attention):
    problem, task = process(attention, 3, 2), task_at(regression_tasks(3, 2), 0)
    order = torch.tensor([3, 0, 4, 2, 1])
    turned = task._replace(support=Points(task.support.x[order], task.support.y[order]))
    assert_close(answers(problem, turned), answers(problem, task), rtol=1e-12, atol=1e-14)


@each_kind
def test_the_values_of_padded_rows_change_nothing(attention):
    problem, task = process(attention), task_at(regression_tasks(2, 1, ragged=True), 0)
    assert not bool(task.support.mask.all())
    other = task._replace(support=task.support._replace(x=task.support.x.where(task.support.mask[:, None], 7.0)))
    real = Points(*(part[task.support.mask] for part in task.support[:2]))
    assert_close(answers(problem, other), answers(problem, task), rtol=1e-12, atol=0)
    assert_close(answers(problem, task._replace(support=real)), answers(problem, task), rtol=1e-12, atol=1e-15)


@each_kind
def test_the_loss_is_the_likelihood_of_what_it_predicts(attention):
    problem, task = process(attention, 3, 2), task_at(regression_tasks(3, 2), 1)
    mean, std, loss = answers(problem, task)
    expected = -torch.distributions.Normal(mean, std).log_prob(task.query.y).mean()
    assert_close(loss, expected, rtol=1e-12, atol=0)
    inner, outer = problem.init(problem.outer(), task), problem.outer()
    mean, std = (told(inner, outer, task.support.x) for told in (problem.predict, problem.spread))
    expected = -torch.distributions.Normal(mean, std).log_prob(task.support.y).mean()
    assert_close(problem.inner_loss(inner, outer, task, 0), expected, rtol=1e-12, atol=0)


def test_attention_to_points_of_one_place_is_their_mean():
    problem, task = process(True), task_at(regression_tasks(2, 1), 0)
    x = task.support.x[:1].expand(5, -1)
    inner = problem.init(problem.outer(), task._replace(support=Points(x, task.support.y)))
    found = problem.predict(inner, problem.outer(), task.query.x)
    code = inner["codes"].mean(0).expand(7, -1)
    raw = problem.decoder(torch.cat([task.query.x, code], 1))
    assert_close(found, raw[:, :1], rtol=1e-12, atol=0)
    deviation = problem.spread(inner, problem.outer(), task.query.x)
    assert_close(deviation, 0.01 + F.softplus(raw[:, 1:]), rtol=1e-12, atol=0)


@each_kind
def test_the_deviation_is_bounded_below(attention):
    problem, task = process(attention, least_std=0.25), task_at(regression_tasks(2, 1), 0)
    with torch.no_grad():
        problem.decoder.out.bias[1] = -1000.0
    assert answers(problem, task)[1].min() == 0.25


@each_kind
def test_all_tasks_at_once_are_one_after_the_other(attention):
    problem, tasks = process(attention), regression_tasks(2, 1, ragged=True)
    found = vmap(lambda task: answers(problem, task), (each_of(tasks),))(tasks)
    each = [answers(problem, task_at(tasks, index)) for index in range(3)]
    for number, part in enumerate(found):
        assert_close(part, torch.stack([one[number] for one in each]), rtol=1e-12, atol=1e-15)


@each_kind
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_masks_hold_in_half_precision(attention, dtype):
    problem = process(attention)
    task = task_at(regression_tasks(2, 1, ragged=True), 0)
    expected = answers(problem, task)
    low = problem.to(dtype)
    rounded = Task(*(part._replace(x=part.x.to(dtype), y=part.y.to(dtype)) for part in task[:2]), task.key)
    for one, other in zip(answers(low, rounded), expected, strict=True):
        assert_close(one.double(), other, rtol=0.1, atol=0.1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"width": 0}, "NeuralProcess: width=0 must be at least 1"),
        ({"inputs": "auto"}, "NeuralProcess: inputs='auto' is for a configuration; give the number of columns"),
        ({"least_std": 0.0}, "NeuralProcess: least_std=0.0 must be a finite positive number, such as 0.01"),
        ({"activation": "Nothing"}, "MLP: activation='Nothing' is no activation of torch.nn; try 'ReLU'"),
    ],
)
def test_what_cannot_be_is_said(given, message):
    with pytest.raises(InputError) as raised:
        NeuralProcess(**{"inputs": 1, "outputs": 1} | given)
    assert str(raised.value) == message
