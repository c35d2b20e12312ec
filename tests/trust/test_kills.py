"""Killed at any moment: what a run leaves is what it leaves where nobody disturbs it, bit for bit."""

import os

import pytest
from kills import CASES, META, Case, Counts, killed, undisturbed

SHORT = Case("meta, short", "sine_maml", 60, (*META, "--model.fused_steps=1"))
KILLS = int(os.environ.get("METALIT_KILLS", "360"))
IN_A_RUN = 8


@pytest.mark.parametrize(
    ("case", "kills"),
    [
        pytest.param(SHORT, 1, id=SHORT.name),
        *(pytest.param(case, -(-KILLS // len(CASES)), id=case.name, marks=pytest.mark.trust) for case in CASES),
    ],
)
def test_nothing_is_lost(case, kills, tmp_path, trust):
    expected, seconds = undisturbed(case, tmp_path / "whole")
    done = Counts()
    while done.kills.total() < kills and done.runs < kills:
        most = min(IN_A_RUN, kills - done.kills.total())
        done += killed(case, tmp_path / f"killed{done.runs}", expected, seconds, most, done.runs)
    trust("kills", done)
    assert not done.faults, "\n".join(done.faults)
    assert done.kills.total() == kills
