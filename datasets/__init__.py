"""Data sets on disk: their layouts, downloads, and the demo data."""
