"""The race: MoNE's masked experts against dense MoE experts on the same weights and rows.

cases.py says what is raced, adapters/ hold one implementation each, race.py checks, meters and
times them, grid.py runs many cells and goes on where it was, report.py and plots.py show them.
"""

import os

# Before torch is loaded: the profiler's library prints a line at every start and stop.
os.environ.setdefault("KINETO_LOG_LEVEL", "6")
