"""The command line: each command reads its options, calls one stage and prints the result."""
