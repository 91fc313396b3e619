"""The daemon: composition root, configuration, HTTP API, metrics and serving sessions.

Only `shoal` and `testnet` import it. `node.config` and `node.errors` are cheap; `node.daemon` brings torch and libp2p.
"""
