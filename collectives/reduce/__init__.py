"""The data plane of a round: who sends which bytes to whom, and what owners add up."""
