"""Training: samples, synthetic motion, losses, reports, and the prompt decoder."""
