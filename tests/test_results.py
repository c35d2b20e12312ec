"""The results that the README states, from full runs of the shipped configs: minutes each."""

import csv

import pytest

pytestmark = pytest.mark.long

FINN = {1: 0.67, 5: 0.38, 10: 0.35}  # Finn et al. 2017, Table 2, MAML at 5 shots


def errors(metalit, tmp_path, name):
    config = f"configs/{name}.yaml"
    assert metalit("fit", config, tiny=False)[0] == 0
    status, output = metalit("test", config, "--ckpt_path=best", tiny=False)
    assert status == 0
    with (tmp_path / f"lightning_logs/{name}/version_0/test.csv").open() as handle:
        return list(csv.DictReader(handle)), output


def test_precisions_are_compared(shell):
    run = shell("scripts/compare_precisions.py", "--steps", "200")
    assert run.returncode == 0, run.stderr
    rows = {line.split()[1]: line.split() for line in run.stdout.splitlines() if line.startswith("│ ")}
    assert list(rows) == ["64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true"]
    single, brain, half = (float(rows[name][3]) for name in ("32-true", "bf16-mixed", "16-mixed"))
    assert float(rows["64-true"][3]) == 0 < single < 1e-6 < half < 5e-3 < brain < 5e-2


def test_curves_are_compared_with_every_bar(shell, tmp_path):
    short = "--trainer.max_steps=10", f"--trainer.default_root_dir={tmp_path}"
    run = shell("scripts/compare_curves.py", "data/gapminder.csv:country:year:lifeExp", *short)
    assert run.returncode == 0, run.stderr
    (row,) = (line.split("│")[1:-1] for line in run.stdout.splitlines() if line.startswith("│ gapminder"))
    tasks, learner, of_all, of_each, empirical_bayes, inside = (float(cell.split()[0]) for cell in row[1:7])
    assert tasks == 28
    assert empirical_bayes < learner < of_each < of_all
    assert 0 < inside <= 1


def test_sine_maml_is_at_least_as_good_as_published(metalit, tmp_path):
    rows, _ = errors(metalit, tmp_path, "sine_maml")
    assert rows[0]["tasks"] == "600"
    for steps, published in FINN.items():
        assert float(rows[steps]["loss"]) <= published
    before = float(rows[0]["loss"]), float(rows[0]["loss_ci95"])
    assert before[0] > 3.0057 - before[1], "an error before adapting that is lower than any predictor's is a leak"


def test_the_notebooks_protocol_trains_maml_as_well_as_published_after_one_step(metalit, tmp_path):
    rows, _ = errors(metalit, tmp_path, "sine_maml_seed")
    assert float(rows[1]["loss"]) <= FINN[1]
    assert float(rows[10]["loss"]) <= FINN[10] + float(rows[10]["loss_ci95"])
    assert float(rows[0]["loss"]) > 3.0057 - float(rows[0]["loss_ci95"])


def test_cleaning_comes_close_to_training_on_the_clean_examples_alone(metalit, tmp_path):
    rows, _ = errors(metalit, tmp_path, "bilevel_cleaning")
    learned, corrupted, clean = (float(row["accuracy"]) for row in rows)
    assert [row["row"] for row in rows] == ["learned", "all examples alike", "the clean examples alone"]
    assert corrupted < 0.8
    assert 0.92 < learned < clean
    assert float(rows[0]["f1"]) > 0.95


def test_learned_penalties_beat_every_common_penalty_and_find_the_noise(metalit, tmp_path):
    rows, _ = errors(metalit, tmp_path, "bilevel_ridge")
    assert float(rows[0]["loss"]) < min(float(row["loss"]) for row in rows[1:])
    assert float(rows[0]["log_penalty_noise"]) > float(rows[0]["log_penalty_real"]) + 1


def test_low_rank_reaches_the_optimum_with_one_factor_exact_in_a_sixth_of_the_steps(metalit, tmp_path):
    for name in ("low_rank", "low_rank_exact"):
        rows, _ = errors(metalit, tmp_path, name)
        assert float(rows[0]["excess"]) <= 1e-3 * float(rows[0]["eckart_young"])


def test_curves_of_gapminder_beat_polynomials(metalit, tmp_path):
    rows, output = errors(metalit, tmp_path, "curves_gapminder")
    column = "lifeExp_absolute_error"
    learner, of_all, of_each, _ = (float(row[column]) for row in rows)
    assert learner < 0.8 * of_each
    assert learner < 0.3 * of_all
    differences = [line.rsplit(": ", 1)[1].split(" ± ") for line in output.splitlines() if "less the learner's" in line]
    assert len(differences) == 3
    for mean, half_width in differences[:2]:
        assert float(mean) > float(half_width)
    mean, half_width = map(float, differences[2])
    assert mean > -half_width, "an empirical-Bayes polynomial is surely better"
    assert 0.9 < float(rows[0]["inside_95"]) < 0.98
