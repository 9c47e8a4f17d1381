"""Build the static page that tracks objects in a browser: `-m export --browser DIR`.

The page is `examples/browser`, the runtime is the npm package onnxruntime-web, and the network is
an export. Any server that hands out files can host the folder: what compresses well is stored
compressed, and the page decompresses it, because many static hosts don't compress such files.
"""

import gzip
import itertools
import json
import shutil
import tempfile
from pathlib import Path

from datasets import demo
from lite_runtime.export import export
from media import files, images
from videomatch import VideoMatch

PAGE = Path(__file__).parents[1] / "examples" / "browser"
RUNTIME = PAGE / "node_modules" / "onnxruntime-web" / "dist"
# Each flavour is a script and the WebAssembly that it fetches; a browser loads one of them.
FLAVOURS = {"WebAssembly": ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"),
            "WebGPU": ("ort.jspi.bundle.min.mjs", "ort-wasm-simd-threaded.jspi.wasm")}
DEMO_FPS = 12  # the demo clip has 24 frames: two seconds
DEMO_QUALITY = 60  # of 100: 0.6 MB instead of 1.6 at 90, with hardly visible artefacts


def build(model: VideoMatch, folder: Path, bits: int = 16) -> dict[str, int]:
    """Write the page, the runtime, the network and a demo clip to a folder.

    Args:
        model: see `export`.
        bits: per stored weight, see `export`. 16 by default, as 8 move masks (docs/lite.md).

    Returns:
        Bytes of each part.

    Raises:
        FileNotFoundError: the npm package is not installed.
        OSError, ValueError: see `export`.
    """
    runtime = [RUNTIME / name for flavour in FLAVOURS.values() for name in flavour]
    for path in runtime:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, expected onnxruntime-web: npm ci "
                                    f"--omit=dev --ignore-scripts --prefix {PAGE}")
    with tempfile.TemporaryDirectory() as exported:
        export(model, Path(exported), bits)
        for path in sorted(Path(exported).iterdir()):
            _compress(path, folder / "network")
    page = [PAGE / "index.html", *(PAGE / f"{name}.js" for name in ("loop", "picture", "prompts"))]
    for path in page:
        files.write(folder / path.name, path.read_bytes())
    (folder / "ort").mkdir(exist_ok=True)
    for path in runtime:
        if path.suffix == ".wasm":
            _compress(path, folder / "ort")
        else:
            shutil.copyfile(path, folder / "ort" / path.name)
    names = []
    for i, (image, _) in enumerate(itertools.islice(demo.draw(demo.SCENES["val"]["stroll"]), 24)):
        names.append(f"{i:05d}.webp")
        images.write_image(folder / "demo" / names[-1], image, DEMO_QUALITY)
    files.write(folder / "demo" / "demo.json", json.dumps({"fps": DEMO_FPS, "frames": names}))
    sizes = {"page": sum(path.stat().st_size for path in page)}
    for name in ("network", "demo"):
        sizes[name] = sum(path.stat().st_size for path in (folder / name).iterdir())
    return sizes | {flavour: sum(path.stat().st_size for name in names
                                 for path in (folder / "ort").glob(f"{name}*"))
                    for flavour, names in FLAVOURS.items()}


def _compress(path: Path, folder: Path) -> None:
    """Write a file, compressed, to a folder; without a time stamp, so that it is reproducible."""
    files.write(folder / f"{path.name}.gz", gzip.compress(path.read_bytes(), mtime=0))
