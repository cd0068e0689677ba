"""Pre-flight: every node of a job is looked at before training, and bad ones are left out.

`check` runs in every task of the allocation and prints one line of facts; `judge` reads all lines
and names the nodes to train on. limits.py has the limits.
"""
