"""What a job asks for: the launch file, the run it starts, and the checks on both."""
