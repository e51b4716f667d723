"""The command line: arguments in, one call, what is printed."""
