"""The short form of `make chaos`: a few faults, none of which may show."""

from dataclasses import asdict

import pytest

from tests.chaos.__main__ import run

pytestmark = pytest.mark.multiproc


def test_faults_do_not_show(tmp_path):
    rows = run(tmp_path, num_kills=2, num_promotions=1, num_jobs=0, num_outages=0, seed=0)
    assert [row.injected for row in rows] == [2, 1, 0, 0]
    assert all(row.faultless for row in rows), [asdict(row) for row in rows]


@pytest.mark.slow
def test_outages_and_neighbours_do_not_show(tmp_path):
    rows = run(tmp_path, num_kills=0, num_promotions=0, num_jobs=3, num_outages=2, seed=1)
    assert [row.injected for row in rows] == [0, 0, 3, 2]
    assert all(row.faultless for row in rows), [asdict(row) for row in rows]
