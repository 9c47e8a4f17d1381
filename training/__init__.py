"""What trainings share, and that of the part for boxes and clicks; the loop is `train.py`."""
