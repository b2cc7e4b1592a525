"""From a model to text: the key-value cache, the context window, sampling."""
