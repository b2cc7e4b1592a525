"""The figures of /metrics."""
from prometheus_client.parser import text_string_to_metric_families
from running_server import running
from scripted_engine import ScriptedEngine


def figures_of(server):
    """{(name, labels): value} of all figures."""
    text = server.call('/metrics').content.decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_requests_and_the_engines_figures_are_counted():
    with running(ScriptedEngine()) as server:
        for _ in range(2):
            server.call('/v1/completions', {'prompt': 'a'})
        server.call('/v1/completions', {'prompt': ''})
        server.call('/v1/' + 'x' * 50)
        figures = figures_of(server)

    def requests(path, status):
        labels = (('path', path), ('status', status))
        return figures['plaingpt_http_requests_total', labels]

    assert requests('/v1/completions', '200') == 2
    assert requests('/v1/completions', '400') == 1
    assert requests('other', '404') == 1  # else anybody could make figures without end
    assert figures['plaingpt_first_token_seconds_count', ()] == 2
    assert figures['plaingpt_http_request_seconds_count', (('path', '/v1/completions'),)] == 3
    assert figures['plaingpt_prompt_tokens_total', ()] == 7
    assert figures['plaingpt_cached_tokens_total', ()] == 3
    assert figures['plaingpt_new_tokens_total', ()] == 5
    assert figures['plaingpt_decoding_steps_total', ()] == 2
    assert figures['plaingpt_cache_positions', ()] == 11
    assert figures['plaingpt_cache_room', ()] == 99
    assert figures['plaingpt_engine_healthy', ()] == 1
    assert figures['plaingpt_waiting_texts', ()] == 0


def test_two_servers_in_a_process_count_apart():
    with running(ScriptedEngine()) as one, running(ScriptedEngine()) as other:
        one.call('/health')
        label = ('plaingpt_http_requests_total', (('path', '/health'), ('status', '200')))
        assert figures_of(one)[label] == 1
        assert label not in figures_of(other)
