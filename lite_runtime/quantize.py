"""Store the weights of an export in 8 or 16 bits instead of 32: `--eight_bit`, `--browser`.

Weights only: onnxruntime restores float32 and computes with it, so this saves disk space, and
downloads, but no arithmetic.
"""

import numpy as np

import lite

# Tensors of fewer elements stay float32. Rounding them, too, would save at most 3 kB each, for
# another node in the graph and another rounding error
LEAST = 1024


def rounded(content: bytes, bits: int) -> bytes:
    """Round a graph's convolution and matrix weights.

    Args:
        content: a serialized ONNX model.
        bits: 8, with one scale per output channel, or 16, as float16.

    Returns:
        The serialized model, in which nodes restore float32 weights.

    Raises:
        ValueError: the package onnx is missing.
    """
    onnx = lite.package("onnx")
    model = onnx.load_from_string(content)
    graph = model.graph
    # output channels are a convolution's first axis and a matrix's last one
    axes = {node.input[1]: 0 if node.op_type == "Conv" else -1 for node in graph.node
            if node.op_type in ("Conv", "MatMul")}
    nodes = []
    for tensor in list(graph.initializer):
        values = onnx.numpy_helper.to_array(tensor)
        if tensor.name not in axes or values.size < LEAST or values.dtype != np.float32:
            continue
        axis = axes[tensor.name] % values.ndim
        graph.initializer.remove(tensor)
        if bits == 16:
            stored = {"half": values.astype(np.float16)}
            operator, attributes = "Cast", {"to": onnx.TensorProto.FLOAT}
        else:
            stored = dict(zip(("whole", "scale"), quantized(values, axis)))
            operator, attributes = "DequantizeLinear", {"axis": axis}
        names = [f"{tensor.name}.{part}" for part in stored]
        graph.initializer.extend(map(onnx.numpy_helper.from_array, stored.values(), names))
        nodes.append(onnx.helper.make_node(operator, names, [tensor.name], **attributes))
    others = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *others])  # ONNX wants nodes in topological order
    onnx.checker.check_model(model, full_check=True)
    return model.SerializeToString()


def quantized(values: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray]:
    """Round symmetrically: float32 -> int8 of that shape, and (n,) float32 scales along `axis`."""
    others = tuple(i for i in range(values.ndim) if i != axis)
    largest = np.abs(values).max(others, keepdims=True)
    scales = np.where(largest > 0, largest / 127, 1).astype(np.float32)
    return np.round(values / scales).astype(np.int8), scales.ravel()
