"""Tracking objects through one video, and masks from boxes and points."""
