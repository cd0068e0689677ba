"""What every report is made of: one self-contained page, plots, a run's recorded numbers."""
