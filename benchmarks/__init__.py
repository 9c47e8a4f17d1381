"""What `bench.py` measures, beside the matching and the scoring."""
