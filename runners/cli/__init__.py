"""The command line, one file a command; alone it imports deadbench.analysis."""
