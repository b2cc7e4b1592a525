"""The server's HTTP side: OpenAI's requests and answers, around the engine in inference/."""
