"""A discrete-event mesh around the scheduler's own cores, and the schedulers of others to compare with.

Pure and deterministic: time and chance are its own. It reads traces that it is given and sends nothing.
"""

__all__: list[str] = []
