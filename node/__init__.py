"""The daemon: composition root, configuration, HTTP API, metrics and serving sessions."""
