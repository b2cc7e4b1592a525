"""experiments/serving_load.py: it starts a server, loads it and reports."""
import json

import pytest
from conftest import run, succeeded


@pytest.mark.slow
def test_streams_are_measured_and_their_first_tokens(tmp_path):
    pytest.importorskip('starlette')
    path = tmp_path / 'figures.json'
    stdout = succeeded(run('experiments/serving_load.py', rounds=1, probes=2, new_tokens=5,
                           dtype='float32', json=path))
    figures = json.loads(path.read_text(encoding='utf-8'))['figures']['serve.py']
    speeds = figures['tokens_per_s']
    assert list(speeds) == ['1', '2', '4', '8', '16']
    assert figures['ratio_16_to_1'] == pytest.approx(speeds['16'] / speeds['1'])
    assert f"| 16 against 1 | {figures['ratio_16_to_1']:.2f} |" in stdout
    found = [(timed['load'], timed['prompt_tokens']) for timed in figures['first_tokens']]
    assert found == [(0, 16), (0, 200), (16, 16), (16, 200)]
    for timed in figures['first_tokens']:
        assert 0 < timed['median'] <= timed['p95']


def test_a_server_that_cannot_start_ends_the_measurement(tmp_path):
    finished = run('experiments/serving_load.py', init_from=tmp_path / 'no.pt')
    assert finished.returncode == 2
    assert 'no.pt' in finished.stderr
    assert 'Traceback' not in finished.stderr
