"""Several processes are one: they share the very tasks that one would draw."""

import pytest
import torch
from fits import last, scalars
from ranks import fit
from torch.utils._pytree import tree_leaves


def test_two_ranks_end_with_the_parameters_of_one(shell, tmp_path):
    ends = []
    for ranks in (1, 2):
        root = tmp_path / str(ranks)
        run = shell(
            "-m",
            "metalit",
            "fit",
            "--config=configs/sine_maml.yaml",
            f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu",
            f"--trainer.devices={ranks}",
            "--trainer.precision=64-true",
            "--model.compile=false",
            "--model.fused_steps=5",
            "--trainer.max_steps=10",
            "--trainer.val_check_interval=0.5",
            "--trainer.log_every_n_steps=5",
            "--data.train.tasks=6",
            "--data.val.tasks=7",
            "--figures.tasks=0",
        )
        assert run.returncode == 0, run.stdout + run.stderr
        (last,) = root.rglob("last.ckpt")
        ends.append(torch.load(last, weights_only=True))
    one, two = ends
    for name, value in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], value, rtol=1e-12, atol=1e-12)
    scores = [
        next(float(state["best_model_score"]) for key, state in end["callbacks"].items() if key.startswith("Best"))
        for end in ends
    ]
    assert abs(scores[0] - scores[1]) < 1e-6


def test_two_ranks_are_one_for_warm_starts_and_for_sam(shell, tmp_path):
    run = shell("tests/modules/ranks.py", str(tmp_path / "2"), "2")
    assert run.returncode == 0, run.stdout + run.stderr
    fit(tmp_path / "1", 1)
    for name, step in (("bilevel", 8), ("SAM", 4)):
        one, two = (torch.load(last(tmp_path / ranks / name), weights_only=True) for ranks in "12")
        assert one["global_step"] == two["global_step"] == step
        states = ("state_dict", "inner", "optimizer_states", "lr_schedulers")
        pairs = [tree_leaves([part[state] for state in states if state in part]) for part in (one, two)]
        for value, other in zip(*pairs, strict=True):
            if isinstance(value, float | torch.Tensor):
                torch.testing.assert_close(other, value, rtol=1e-12, atol=1e-12)
            else:
                assert other == value
        tags = {"bilevel": ("inner_norm", "grad_norm", "inner_grad_ratio"), "SAM": ("sharpness", "loss", "grad_norm")}
        logged = [scalars(tmp_path / ranks / name) for ranks in "12"]
        for tag in ("val/loss", *(f"train/{tag}" for tag in tags[name])):
            assert [step for step, _ in logged[0][tag]] == [step for step, _ in logged[1][tag]]
            values = [[value for _, value in part[tag]] for part in logged]
            assert values[1] == pytest.approx(values[0], rel=1e-6)
    assert len(two["optimizer_states"]) == 1
    assert (tmp_path / "2/bilevel/run/version_0/results/features.csv").exists()
