"""Serving: a request's session over a chain of stages, from the gateway that takes it to the engine's worker thread.

`gateway` chooses a chain and listens, `stage` runs one link of it, `compute` batches steps for the engine,
`returns` brings tokens back. The messages are in `protocol`. It does not place layers and knows no HTTP.
"""
