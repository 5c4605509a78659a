"""Shorter runs of what benchmarks/soak.py does for long: a server that is killed, and a queue from two clients."""

import pytest
from killing import run_with_kills
from load import run_load

pytestmark = [pytest.mark.server, pytest.mark.slow]


def test_a_batch_survives_kill_9_of_server_and_client(host, tmp_path):
    outcome = run_with_kills(host, tmp_path, items=60, kills=2, client_kills=1, seed=1, side=64)
    assert outcome.written == 60
    assert (outcome.lost, outcome.doubled, outcome.half_written, outcome.temporary_files) == (0, 0, 0, 0)
    assert outcome.other_than_undisturbed == 0


def test_sixty_edits_from_two_clients(server):
    outcome = run_load(server, 60)
    assert (outcome.correct, outcome.wrong, outcome.foreign_events) == (60, 0, 0)
    assert outcome.files_end <= outcome.files_settled + 5
    assert outcome.own_slope_per_100 < 12  # MiB; a picture that stays behind after each edit would be 19
