"""Reading what runs wrote, and turning it into plots, statements and one self-contained page."""
