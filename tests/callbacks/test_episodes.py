"""The picture of an episode shows the support images of each class, and marks queries that are taken for another."""

import numpy as np
import pytest
from fits import events, trainer
from kinds import NAMES, Kinds, namer
from PIL import Image

from metalit.callbacks import FitFigures
from metalit.callbacks.drawing import pixels
from metalit.callbacks.episodes import draw_episode, last_part
from metalit.data import Episodes, TaskDataModule


def episode(*shape, ways=3, shots=2, **options):
    learner = namer(*shape, outputs=ways, **options)
    data = TaskDataModule(Kinds(*shape, spread=2.0), *[Episodes(4, shots, 5, ways)] * 3)
    learner.scaling = data.tasks.scaling()
    return learner, data


def drawn(*shape, **options):
    learner, data = episode(*shape, **options)
    tasks = data.pictured("test", 1)
    figure = draw_episode(learner, tasks, NAMES)
    return learner, tasks, figure


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 4, 6), (2, 4, 4)], ids=["grey", "colours", "two channels"])
def test_marks_what_is_taken_for_another_class_and_says_for_which(shape):
    learner, tasks, figure = drawn(*shape)
    (axes,) = figure.axes
    answers = learner.query_predictions(tasks)[0, 1].argmax(-1)
    called = [NAMES[number] for number in tasks.classes[0]]
    wrong = [
        f"✗{last_part(called[own], called)}"[:4]
        for own, true in zip(answers, tasks.query.y[0], strict=True)
        if own != true
    ]
    assert 0 < len(wrong) < 15
    captions = [text.get_text()[:4] for text in axes.texts if text.get_text().startswith("✗")]
    assert captions == wrong
    assert len(axes.images) == 3 * (2 + 5)
    dashed = [patch for patch in axes.patches if patch.get_linestyle() != "-" and patch.get_linestyle() != "solid"]
    assert len(dashed) == len(wrong)
    assert len(axes.patches) == len(axes.images)
    assert figure.axes[0].texts[0].get_text() == f"after 1 inner step: {15 - len(wrong)} of 15 queries right"
    assert pixels(figure).shape[1] > 1.5 * pixels(figure).shape[0]


def test_of_many_classes_says_how_many_are_shown():
    *_, figure = drawn(1, 4, 4, ways=6, shots=4)
    assert figure.axes[0].texts[0].get_text().endswith("; 5 of 6 classes are shown")
    assert len(figure.axes[0].images) == 5 * 8
    words = "\n".join(text.get_text() for text in figure.axes[0].texts)
    assert max(map(len, words.splitlines()[3:])) <= 15


def test_rows_of_numbers_have_none():
    assert drawn(2)[2] is None


def test_is_written_and_shown_at_validations_and_in_a_test(tmp_path, recwarn):
    learner, data = episode(1, 4, 4)
    run = trainer(tmp_path, 2, callbacks=[FitFigures(2)])
    run.fit(learner, data)
    run.test(learner, data, verbose=False)
    assert not [warning for warning in recwarn if "not drawn" in str(warning.message)]
    assert {"pictures/episode_val", "pictures/episode_test"} <= set(events(tmp_path).Tags()["images"])
    for split in ("val", "test"):
        with Image.open(tmp_path / f"run/version_0/figures/{split}.png") as image:
            assert np.asarray(image).std() > 10


def test_a_name_that_two_groups_share_is_written_whole():
    names = ["Greek/a", "Latin/a", "Latin/b"]
    assert [last_part(name, names) for name in names] == ["Greek/a", "Latin/a", "b"]
