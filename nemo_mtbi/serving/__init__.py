"""Serving: one model, a queue in front of it (batching.py), an OpenAI-compatible endpoint and a web page."""
