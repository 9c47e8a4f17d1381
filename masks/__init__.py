"""Reading mask files: which channel holds the mask, and which object each value means."""
