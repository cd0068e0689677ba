"""One rank's step of a job, taken down without devices: operators, collectives, kept bytes."""
