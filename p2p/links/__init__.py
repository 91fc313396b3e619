"""Tensor links: bulk messages between two peers, over the quickest path there is."""
