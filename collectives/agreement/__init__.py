"""Who takes part in an epoch, and what was decided: a pure core."""
