"""Killed at any moment: what a run leaves is what it leaves where nobody disturbs it, bit for bit."""

import os

import pytest
from kills import CASES, META, Case, killed, undisturbed

SHORT = Case("meta, short", "sine_maml", 60, (*META, "--model.fused_steps=1"))
KILLS = int(os.environ.get("METALIT_KILLS", "360"))
IN_A_RUN = 8
RUNS = -(-KILLS // (len(CASES) * IN_A_RUN))


@pytest.mark.parametrize(
    ("case", "runs"),
    [
        pytest.param(SHORT, 1, id=SHORT.name),
        *(pytest.param(case, RUNS, id=case.name, marks=pytest.mark.trust) for case in CASES),
    ],
)
def test_nothing_is_lost(case, runs, tmp_path, trust):
    expected = undisturbed(case, tmp_path / "whole")
    faults = []
    for seed in range(runs):
        counts = killed(case, tmp_path / f"killed{seed}", expected, 2 if case is SHORT else IN_A_RUN, seed)
        trust("kills", counts)
        faults += counts.faults
    assert not faults, "\n".join(faults)
