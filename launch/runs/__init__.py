"""Run folders: starting, following, stopping and going on with what is in them."""
