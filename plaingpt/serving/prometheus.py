"""
The figures of /metrics, in Prometheus' text format: requests, times, and how busy the engine is.
"""
from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

CONTENT_TYPE = 'text/plain; version=0.0.4; charset=utf-8'
# Seconds: from a short answer of a small model on a GPU to a long one on a laptop.
BUCKETS = (0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class ServerFigures:
    """What a server counts. Each has a registry of its own, so that two in a process don't mix."""

    def __init__(self, engine):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            'plaingpt_http_requests', 'HTTP requests that have ended', ['path', 'status'],
            registry=self.registry)
        self.request_seconds = Histogram(
            'plaingpt_http_request_seconds', 'Time from a request to the end of its answer',
            ['path'], buckets=BUCKETS, registry=self.registry)
        self.first_token_seconds = Histogram(
            'plaingpt_first_token_seconds', 'Time from a request to its first token',
            buckets=BUCKETS, registry=self.registry)
        self.hang_ups = Counter(
            'plaingpt_hang_ups', 'Clients that have hung up before the end of their answer',
            registry=self.registry)
        self.registry.register(EngineFigures(engine))

    def text(self):
        """All figures, bytes."""
        return generate_latest(self.registry)


class EngineFigures:
    """Asks the engine for its EngineStats whenever somebody asks for the figures."""

    def __init__(self, engine):
        self.engine = engine

    def collect(self):
        """Yields the families of figures, for prometheus_client."""
        stats = self.engine.stats()
        gauges = [
            ('active_texts', 'Texts that are read or written now', stats.active),
            ('waiting_texts', 'Texts in the queue', stats.waiting),
            ('cache_positions', 'Positions of keys and values in use', stats.cache_positions),
            ('cache_room', 'Positions of keys and values that there are', stats.cache_room),
            ('engine_healthy', '0 once the engine has failed', int(self.engine.is_healthy)),
        ]
        counters = [
            ('prompt_tokens', 'Tokens of prompts, cached ones included', stats.prompt_tokens),
            ('cached_tokens', 'Tokens of prompts that needed no reading', stats.cached_tokens),
            ('new_tokens', 'Tokens written', stats.new_tokens),
            ('decoding_steps', 'Steps of the model', stats.steps),
        ]
        for name, meaning, value in gauges:
            yield GaugeMetricFamily(f'plaingpt_{name}', meaning, value)
        for name, meaning, value in counters:
            yield CounterMetricFamily(f'plaingpt_{name}', meaning, value)
