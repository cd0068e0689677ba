"""Counting and measuring what a training step costs."""
