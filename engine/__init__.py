"""Leanscope's engine: every technique of efficient inference, run for real and small enough to read.

PyTorch and NumPy only. Nothing here knows of screens: what a technique does is seen through the taps
that it leaves (`engine.recording`).
"""
