"""The HTTP server of `python -m paligemma.serve`, which docs/serve.md describes."""
