"""Who may write into a checkpoint folder: one run at a time, over a shared filesystem."""
