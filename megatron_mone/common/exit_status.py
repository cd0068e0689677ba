"""The statuses that ranks and commands end with; imports nothing, so that commands start fast.

The job script (launch/templates/job.sbatch.j2) decides by them whether a job starts again.
74 and 75 are EX_IOERR and EX_TEMPFAIL of sysexits.h.
"""

USER_ERROR = 2
"""A wrong flag, file, layout or checkpoint: it would end the same way again."""
NOT_FINITE = 3
"""The loss or a gradient is NaN or infinite."""
SAVE_FAILED = 74
"""A checkpoint could not be written; the one before is still there."""
STOPPED = 75
"""Saved and stopped on a signal: start me again."""
LEASE_LOST = 76
"""Another attempt took over the checkpoint folder."""
INTERRUPTED = 130
"""By the user: 128 + SIGINT, as a shell says it."""
