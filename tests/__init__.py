"""The tests. Several of their processes share the cores: no OpenMP thread spins for work."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is first imported
