"""Training at a node: the run's recipe, its data, the model, the inner loop. What is reduced and when is decided in
`collectives.outer`; who takes part, in `collectives`."""
