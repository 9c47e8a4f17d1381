"""An export with weights of 8 bits, a quarter of the size: `-m export --eight_bit`.

Only what is stored is rounded; onnxruntime multiplies float32 as before. It knows graphs as onnx
has them, and nothing of PyTorch.
"""

import numpy as np

import lite

LEAST = 1024  # numbers: smaller tensors stay as they are


def rounded(content: bytes) -> bytes:
    """A graph whose weights are 8 bits and a scale for each output channel.

    Raises:
        ValueError: the package onnx is missing.
    """
    onnx = lite.package("onnx")
    model = onnx.load_from_string(content)
    graph = model.graph
    # of a convolution the first axis is that of outputs, of a matrix the last one
    axes = {node.input[1]: 0 if node.op_type == "Conv" else -1 for node in graph.node
            if node.op_type in ("Conv", "MatMul")}
    nodes = []
    for tensor in list(graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name not in axes or values.size < LEAST or values.dtype != np.float32:
            continue
        axis = axes[tensor.name] % values.ndim
        whole, scales = quantized(values, axis)
        graph.initializer.remove(tensor)
        graph.initializer.extend([onnx.numpy_helper.from_array(whole, f"{tensor.name}.whole"),
                                  onnx.numpy_helper.from_array(scales, f"{tensor.name}.scale")])
        nodes.append(onnx.helper.make_node(
            "DequantizeLinear", [f"{tensor.name}.whole", f"{tensor.name}.scale"], [tensor.name],
            axis=axis))
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *others])  # what makes a weight comes before what takes it
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def quantized(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Float32 -> int8 of the same shape, and (n,) float32 scales along an axis of length n."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(others, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.round(values / scales).astype(np.int8), scales.ravel()
