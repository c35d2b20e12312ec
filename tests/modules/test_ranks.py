"""Several processes are one: they share the very tasks that one would draw."""

import torch


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
