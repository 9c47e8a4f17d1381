"""The parts of the network: tensors in, tensors out. Nothing here knows a file or a video."""
