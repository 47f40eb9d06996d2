"""Speed: random models of real shapes, and contenders that are measured in turn.

Losses are measured in lminf_edge.evaluate.
"""
