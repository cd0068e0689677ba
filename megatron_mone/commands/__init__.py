"""One file a command, thin: what is asked, the rooms that answer, what is printed."""
