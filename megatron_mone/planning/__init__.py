"""The planner: what a run of a layout would cost in time and memory, before there is a cluster."""
