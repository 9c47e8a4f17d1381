"""The fused kernel in Triton's interpreter against dense products in float64, and its compilation.

TRITON_INTERPRET counts when Triton is imported and holds for the whole process, so another process
runs the kernel: this file as a script, which saves the results of every case for the tests here.
What only a GPU shows (layouts, memory, speed) is not seen; that the kernel compiles for one is.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import test_matching
import torch
import torch.nn.functional as F

from network import kernel

TOLERANCE = 1e-6  # of 16-bit features too: their products are exact in float32
SIZES = [  # Q, R, C, K
    (1, 1, 1, 1), (3, 5, 2, 3), (7, 20, 9, 20), (64, 64, 16, 1), (65, 129, 17, 20),
    (130, 150, 40, 32), (40, 63, 100, 5),
]
FULL, BRAIN, HALF = torch.float32, torch.bfloat16, torch.float16


def draw(rows: int, channels: int, seed: int, dtype: torch.dtype = FULL) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(rows, channels, generator=generator), dim=1).to(dtype)


def circle(degrees: torch.Tensor) -> torch.Tensor:
    return torch.stack([degrees.deg2rad().cos(), degrees.deg2rad().sin()], dim=1)


def cases() -> dict[str, tuple]:
    """Query, reference, K and, for some, other constants of the kernel."""
    found = {f"{q}x{r}x{c}, K={k}": (draw(q, c, 1), draw(r, c, 2), k) for q, r, c, k in SIZES}
    for dtype in (BRAIN, HALF):
        found[str(dtype)] = draw(50, 70, 1, dtype), draw(150, 70, 2, dtype), 20
    angles = circle(torch.linspace(-20, 0, 30))
    found["ascending: all of every tile"] = angles, circle(torch.linspace(150, 10, 200)), 20
    found["descending"] = angles, circle(torch.linspace(10, 150, 200)), 20
    found["duplicates"] = draw(30, 8, 1), draw(9, 8, 2).repeat(20, 1), 20
    found["all the same"] = draw(30, 8, 1), draw(1, 8, 2).repeat(130, 1), 20
    found["orthogonal"] = torch.eye(40), torch.eye(40), 8
    found["columns first"] = draw(70, 24, 1).T.contiguous().T, draw(90, 24, 2).T.contiguous().T, 5
    found["every other row"] = draw(70, 24, 1)[1::2], draw(200, 24, 2)[::2], 5
    few = {"SLICE": 70, "PROGRAMS": 6}
    found["slices"] = draw(70, 24, 1), draw(430, 24, 2), 5, few  # three, the last one shorter
    found["slices of one tile, some empty"] = draw(9, 24, 1), draw(450, 24, 2), 20, \
        {"SLICE": 10, "PROGRAMS": 20}
    return found


def questions() -> dict[str, tuple]:
    """What `takes` is asked, and its answer."""
    rows = draw(40, 24, 1)
    return {
        "fits": (rows, rows, 20, True), "half": (rows.half(), rows.half(), 20, True),
        "largest k": (rows, rows, kernel.LARGEST_K, True), "all": (rows, rows[:3], 3, True),
        "k past the members": (rows, rows[:3], 4, False), "no k": (rows, rows, 0, False),
        "k past the registers": (rows, rows, kernel.LARGEST_K + 1, False),
        "no queries": (rows[:0], rows, 1, False), "no members": (rows, rows[:0], 1, False),
        "double": (rows.double(), rows.double(), 1, False), "mixed": (rows, rows.half(), 1, False),
        "integers": (rows.long(), rows.long(), 1, False), "widths": (rows, rows[:, 1:], 1, False),
        "a frame": (rows[None], rows[None], 1, False),
    }


def with_nan() -> tuple[torch.Tensor, torch.Tensor]:
    """One of the queries and one of the members."""
    query, reference = draw(3, 8, 1), draw(70, 8, 2)
    query[1, 2] = reference[40, 5] = float("nan")
    return query, reference


def frames() -> tuple:
    """Query, reference frames and labels."""
    return test_matching.draw(5, 20, 6, 7, factor=2, frames=2)


def run_cases(path: str) -> None:
    """Save what the kernel and `takes` say; for the process with the interpreter."""
    constants = {name: getattr(kernel, name) for name in ("SLICE", "PROGRAMS")}
    found = {}
    multiply_brain_floats()
    for name, (query, reference, k, *special) in cases().items():
        vars(kernel).update(special[0] if special else constants)
        found[name] = kernel.top_k(query, reference, k)
    vars(kernel).update(constants)
    found["nan"] = kernel.top_k(*with_nan(), 5)
    answers = {name: kernel.takes(*asked) for name, (*asked, _) in questions().items()}
    with mock.patch.object(kernel, "top_k", wraps=kernel.top_k) as used:
        found["frames"] = test_matching.match(*frames(), 5, 2, enlarge_first=True)
    found["calls"] = used.call_count
    torch.save({"found": found, "answers": answers}, path)


def multiply_brain_floats() -> None:
    """The interpreter keeps bfloat16 as its bits and multiplies those."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
    create_dot = InterpreterBuilder.create_dot

    def widened(x):
        if x.dtype.scalar != tl.bfloat16:
            return x
        return TensorHandle((x.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(
        self, widened(a), widened(b), *rest)


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    pytest.importorskip("triton")
    path = tmp_path_factory.mktemp("kernel") / "results.pt"
    folder = str(Path(kernel.__file__).parent.parent)
    run = subprocess.run([sys.executable, __file__, path], capture_output=True, text=True,
                         env={**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folder})
    assert run.returncode == 0, run.stderr
    return torch.load(path)


@pytest.mark.parametrize("case", cases())
def test_equals_dense(case, interpreted):
    query, reference, k, *_ = cases()[case]
    values, rows = interpreted["found"][case]
    assert (values.dtype, rows.dtype) == (torch.float32, torch.int64)
    assert values.shape == rows.shape == (len(query), k)
    similarity = query.double() @ reference.double().T
    best = similarity.topk(k, dim=1).values
    found = values.double().sort(dim=1, descending=True).values
    torch.testing.assert_close(found, best, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(values.double(), similarity.gather(1, rows), atol=TOLERANCE, rtol=0)
    assert all(len(row.unique()) == k for row in rows)


def test_nan_is_left_out(interpreted):
    values, rows = interpreted["found"]["nan"]
    query, reference = with_nan()
    best = (query @ reference.T).nan_to_num(nan=-2).topk(5).values[[0, 2]]
    torch.testing.assert_close(values[[0, 2]].sort(descending=True).values, best)
    assert (values[1] == float("-inf")).all() and (rows[1] == 0).all()


def test_the_matching_of_frames_uses_it(interpreted):
    assert interpreted["found"]["calls"] == 2  # sets
    query, references, labels = frames()
    expected = test_matching.dense(query, references, labels, 5, labels.shape[1:])
    torch.testing.assert_close(interpreted["found"]["frames"].double(), expected, atol=1e-5,
                               rtol=0)


@pytest.mark.parametrize("question", questions())
def test_takes(question, interpreted):
    assert interpreted["answers"][question] is questions()[question][-1]


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter takes CPU tensors")
def test_takes_nothing_on_a_cpu():
    assert not kernel.takes(draw(40, 24, 1), draw(40, 24, 2), 20)


def test_takes_nothing_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    spec = importlib.util.spec_from_file_location("kernel_without_triton", kernel.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module.takes(draw(40, 24, 1), draw(40, 24, 2), 20)


@pytest.mark.parametrize("result", [RuntimeError("no C compiler"),
                                    (torch.zeros(100, 5), torch.zeros(100, 5).long())])
def test_a_kernel_that_does_not_work_is_not_taken(result, monkeypatch):
    pytest.importorskip("triton")

    def top_k(*_):
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(kernel, "top_k", top_k)
    monkeypatch.setattr(kernel, "_kernel", None)  # as if interpreted: not for want of a GPU
    with pytest.warns(UserWarning, match="no fused matching on cpu"):
        assert not kernel._works.__wrapped__(torch.device("cpu"), FULL)


@pytest.mark.skipif("TRITON_INTERPRET" in os.environ, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("dtype, name, slots, capability", [
    (FULL, "fp32", 32, 90), (BRAIN, "bf16", 32, 90), (HALF, "fp16", 8, 90), (FULL, "fp32", 1, 80),
])
def test_compiles_for_a_gpu(dtype, name, slots, capability, tmp_path, monkeypatch):
    """To machine code, with Triton's own assembler; no GPU or driver takes part."""
    triton = pytest.importorskip("triton", minversion="3.2")  # another interface before
    backend = pytest.importorskip("triton.backends.compiler")
    compiler = pytest.importorskip("triton.compiler")
    if not hasattr(backend, "GPUTarget") or "nvidia" not in triton.backends.backends:
        pytest.skip("this Triton does not compile for a GPU that it is told of")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    names = kernel._kernel.arg_names
    sizes = dict(zip(("BLOCK_Q", "BLOCK_R", "BLOCK_C"), kernel.BLOCKS[dtype]), SLOTS=slots)
    types = dict.fromkeys(names, "i32") | dict.fromkeys(sizes, "constexpr") | {
        "query": f"*{name}", "reference": f"*{name}", "values_out": "*fp32", "rows_out": "*i64"}
    aligned = ("query", "reference", "values_out", "rows_out", "channels", "query_stride",
               "reference_stride")  # what a launch finds to be a multiple of 16
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = compiler.ASTSource(kernel._kernel, types, sizes, hints)
    built = triton.compile(source, target=backend.GPUTarget("cuda", capability, 32),
                           options={"num_warps": kernel.WARPS, "num_stages": kernel.STAGES})
    assert built.asm["cubin"]
    assert built.metadata.shared <= 99 * 1024
    assert dtype != FULL or "tf32" not in built.asm["ptx"]
    assert ".ftz" not in built.asm["ptx"]  # a maximum must be equal to one of the elements


if __name__ == "__main__":
    run_cases(sys.argv[1])
