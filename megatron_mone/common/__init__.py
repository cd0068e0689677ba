"""What every room stands on: files, exit statuses, words of a command line. Imports no room."""
