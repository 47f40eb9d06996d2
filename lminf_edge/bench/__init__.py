"""Speed: random models of real shapes, and contenders measured in turn.

Losses are measured in lminf_edge.evaluate.
"""
