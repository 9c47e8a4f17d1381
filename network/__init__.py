"""The network's parts: tensors in, tensors out. It knows no file."""
