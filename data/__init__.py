"""What to train on: samples of sequences, drawn data, downloads. Nothing here knows the network."""
