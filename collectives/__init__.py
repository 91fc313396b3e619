"""Rounds and reductions between peers that come, go, stall and die.

A round is a transaction: one declared membership, reduce, vote, commit by majority. It imports only p2p's face and
torch, and does not know what is trained.
"""
