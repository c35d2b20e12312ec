"""Hundreds of thousands of steps: no memory, file or thread is kept that was taken on the way."""

import json
import os

import pytest
from forks import ended, start_ranks
from watching import Sample, Soak

from metalit.__main__ import main

STEPS = int(os.environ.get("METALIT_STEPS", "200000"))
PLAIN = ("--model.compile=false", "--model.fused_steps=1", "--data.train.tasks=2", "--data.train.queries=5")
RUNS = {
    "meta, compiled and fused": ("sine_maml", ("--data.val.tasks=20",)),
    "meta, not compiled": ("sine_maml", ("--data.val.tasks=20", *PLAIN)),
    "bilevel": ("bilevel_ridge", ("--model.compile=false",)),
    "supervised": ("sam_digits", ()),
}
GROWTH = 16.0  # megabytes; the allocator's own coming and going is below that


@pytest.mark.trust
@pytest.mark.parametrize(
    ("name", "steps"),
    [
        pytest.param("meta, compiled and fused", STEPS, id="fused"),
        pytest.param("meta, not compiled", STEPS // 4, id="plain"),
        pytest.param("bilevel", STEPS // 8, id="bilevel"),
        pytest.param("supervised", STEPS // 4, id="supervised"),
    ],
)
def test_nothing_grows(name, steps, tmp_path, trust):
    config, options = RUNS[name]
    samples = tmp_path / "samples.json"
    watch = f"--trainer.callbacks=[{{class_path: watching.Watch, init_args: {{file: {samples}}}}}]"
    often = (
        f"--trainer.max_steps={steps}",
        "--trainer.val_check_interval=0.05",
        f"--trainer.default_root_dir={tmp_path}",
    )
    command = ["fit", f"--config=configs/{config}.yaml", *options, *often, watch, "--figures.tasks=1"]
    statuses = ended(start_ranks(1, tmp_path / "log", main, command), 3600)
    assert statuses == [0], (tmp_path / "log").read_text()[-3000:]
    found = Soak.of(name, [Sample(*sample) for sample in json.loads(samples.read_text())])
    trust(f"soak, {name}", found)
    assert found.files[1] <= found.files[0] + 1
    assert found.threads[1] <= found.threads[0]
    assert found.megabytes[1] <= found.megabytes[0] + GROWTH
