"""The command line: flags of each mode, and what they set up."""
