"""The tracker on onnxruntime, without PyTorch, and the export that writes its graphs."""
