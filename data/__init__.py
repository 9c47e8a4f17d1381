"""Samples to train on, the demo data, downloads."""
