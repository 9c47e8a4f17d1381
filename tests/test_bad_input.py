"""Bad input of every kind: one clear line, exit status 2, nothing half-written."""

import os
import pickle
import struct
import zipfile
import zlib

import cv2
import numpy as np
import pytest
import torch
from conftest import draw_frame, write_list, write_sequence
from PIL import Image

import main
from videomatch import VideoMatch

FRAME = "DAVIS/JPEGImages/480p/dog/00002.jpg"
MASK = "DAVIS/Annotations/480p/dog/00002.png"
FIRST = "DAVIS/Annotations/480p/dog/00000.png"
LIST = "DAVIS/ImageSets/480p/val.txt"


@pytest.fixture
def folder(tmp_path, model, monkeypatch):
    """A valid data set, checkpoint, clip and mask, which each case damages."""
    for name in ("ant", "bee", "dog"):
        write_sequence(tmp_path / "DAVIS", name, frames=4)
    write_list(tmp_path / "DAVIS", "480p", "train", ["ant", "bee"])
    write_list(tmp_path / "DAVIS", "480p", "val", ["dog"])
    model.save(tmp_path / "vm.pth")
    (tmp_path / "clip").mkdir()
    for i in range(3):
        image, mask = draw_frame(i)
        Image.fromarray(image).save(tmp_path / "clip" / f"{i}.png")
        Image.fromarray(mask).save(tmp_path / "first.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(arguments, capsys):
    """Run main.py on a folder; returns the exit status and standard error."""
    model = [] if {"-o", "--encoder_weights"} & set(arguments) else ["-o", "vm.pth"]
    mode = arguments[arguments.index("-m") + 1]
    common = {"train": ["-d", "DAVIS"], "segment": ["-j", "out"]}.get(
        mode, ["-d", "DAVIS", "-j", "out"])
    code = main.main([*common, "-c", "cpu", *model, *arguments])
    return code, capsys.readouterr().err


def expect_one_line(arguments, words, capsys):
    code, printed = run(arguments, capsys)
    lines = [line for line in printed.splitlines() if line.startswith("main.py: error: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in printed, printed
    for word in words.split("|"):
        assert word in lines[0]


def cut(path, size=500):
    return lambda root: (root / path).write_bytes((root / path).read_bytes()[:size])


def put(path, data):
    return lambda root: (root / path).write_bytes(data)


def picture(path, mode, size=(80, 48), colour=0):
    return lambda root: Image.new(mode, size, colour).save(root / path)


def replace_by_folder(path):
    def spoil(root):
        (root / path).unlink()
        (root / path).mkdir()
    return spoil


def replace_by_loop(path):
    def spoil(root):
        (root / path).unlink()
        os.symlink(root / path, root / path)
    return spoil


def wrong_crc(root):
    data = bytearray((root / MASK).read_bytes())
    data[data.index(b"IDAT") + 6] ^= 255
    (root / MASK).write_bytes(data)


def bomb(path):
    """A PNG that declares 60000 x 60000 pixels."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I",
                                                                        zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return put(path, b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
               + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b""))


def three_hundred_objects(root):
    ids = np.arange(48 * 80, dtype=np.uint16).reshape(48, 80) % 301
    cv2.imwrite(str(root / FIRST), ids)


def noise(root):
    cv2.imwrite(str(root / MASK), np.random.default_rng(0).integers(0, 256, (48, 80, 3), np.uint8))


def one_frame(root):
    for path in (root / "DAVIS").glob("*/480p/dog/0000[1-3].*"):
        path.unlink()


DATA = {
    "truncated frame": (cut(FRAME), "dog/00002.jpg"),
    "frame of zero bytes": (put(FRAME, b""), "dog/00002.jpg"),
    "frame of text": (put(FRAME, b"hello"), "dog/00002.jpg"),
    "frame of another size": (picture(FRAME, "RGB", (80, 50)), "dog/00002.jpg|80x50|80x48"),
    "folder in place of a frame": (replace_by_folder(FRAME), "dog/00002.jpg"),
    "frame that links to itself": (replace_by_loop(FRAME), "dog/00002.jpg"),
    "frame that is missing": (lambda root: (root / FRAME).unlink(), "dog/00002.jpg|no such frame"),
    "frame that is a bomb": (bomb(FRAME), "dog/00002.jpg|bomb"),
    "truncated mask": (cut(MASK, 60), "dog/00002.png"),
    "mask of zero bytes": (put(MASK, b""), "dog/00002.png"),
    "mask with a wrong check-sum": (wrong_crc, "dog/00002.png"),
    "mask of another size": (picture(MASK, "L", (8, 9)), "dog/00002.png|8x9|80x48"),
    "picture in place of a mask": (noise, "dog/00002.png|the colour"),
    "mask that is a bomb": (bomb(MASK), "dog/00002.png|bomb"),
    "three hundred numbers": (three_hundred_objects, "dog/00000.png|picture"),
    "reference without object": (picture(FIRST, "L"), "dog/00000.png|no object"),
    "sequence of one frame": (one_frame, "dog|1 frames"),
    "list of ../..": (put(LIST, b"../..\n"), "val.txt|'../..'"),
    "list of an absolute path": (put(LIST, b"/etc\n"), "val.txt|'/etc'"),
    "list of a dot": (put(LIST, b".\n"), "val.txt|'.'"),
    "list with an escape": (put(LIST, b"/JPEGImages/480p/../x.jpg a\n"), "val.txt|'..'"),
    "list of nothing": (put(LIST, b"\n \n"), "val.txt|empty"),
    "list that is no text": (put(LIST, b"\xff\xfe\x00"), "val.txt|text"),
    "list of an unknown sequence": (put(LIST, b"yeti\n"), "yeti"),
    "list that is missing": (lambda root: (root / LIST).unlink(), "val.txt|no such list"),
    "list that links to itself": (replace_by_loop(LIST), "val.txt"),
}


@pytest.mark.parametrize("case", DATA)
def test_bad_data_gives_one_line_that_names_it(case, folder, capsys):
    spoil, words = DATA[case]
    spoil(folder)
    expect_one_line(["-m", "eval"], words, capsys)
    out = folder / "out"
    assert not list(out.rglob("*.finished.json"))
    assert {path.name for path in out.rglob(".*")} <= {".lock"}
    for path in out.rglob("*.png"):  # what was written is whole
        assert cv2.imread(str(path), cv2.IMREAD_UNCHANGED).shape[:2] == (48, 80)


def test_an_unreadable_file_is_named(folder, capsys):
    (folder / FRAME).chmod(0)
    if os.access(folder / FRAME, os.R_OK):
        pytest.skip("this user may read everything")
    expect_one_line(["-m", "eval"], "dog/00002.jpg|ermission", capsys)


@pytest.mark.parametrize("name", ["my dog", "Hündin", "dog's #1 & only", "犬"])
def test_unusual_file_names_are_accepted(name, folder, capsys):
    write_sequence(folder / "DAVIS", name, frames=4)
    write_list(folder / "DAVIS", "480p", "val", [name])
    assert run(["-m", "eval"], capsys)[0] == 0
    assert len(list((folder / "out" / name).iterdir())) == 4
    assert name.split("'")[0] in (folder / "out" / "report.html").read_text(encoding="utf-8")


class Trap:
    def __reduce__(self):
        return (open, ("executed", "w"))


def zip_of_something(path):
    def spoil(root):
        with zipfile.ZipFile(root / path, "w") as archive:
            archive.writestr("hello.txt", "hello")
    return spoil


def not_a_number(root):
    model = VideoMatch.load(root / "vm.pth")
    next(model.parameters()).data[0] = float("nan")
    model.save(root / "vm.pth")


def changed(change):
    def spoil(root):
        checkpoint = torch.load(root / "vm.pth")
        change(checkpoint)
        torch.save(checkpoint, root / "vm.pth")
    return spoil


def another_shape(checkpoint):
    name = next(iter(checkpoint["model"]))
    checkpoint["model"][name] = checkpoint["model"][name][:1]


CHECKPOINTS = {
    "missing": (lambda root: (root / "vm.pth").unlink(), "vm.pth|no such file"),
    "folder": (replace_by_folder("vm.pth"), "vm.pth"),
    "zip of something else": (zip_of_something("vm.pth"), "vm.pth|not a checkpoint"),
    "text": (put("vm.pth", b"hello"), "vm.pth|not a checkpoint"),
    "of zero bytes": (put("vm.pth", b""), "vm.pth|not a checkpoint"),
    "truncated": (cut("vm.pth", 4000), "vm.pth|not a checkpoint"),
    "pickle that runs code": (put("vm.pth", pickle.dumps(Trap())), "vm.pth|not a checkpoint"),
    "archive that runs code": (lambda root: torch.save({"config": Trap()}, root / "vm.pth"),
                               "vm.pth|not a checkpoint"),
    "weights that are not numbers": (not_a_number, "vm.pth|not finite"),
    "weights of another shape": (changed(another_shape), "vm.pth|not a checkpoint"),
    "some weights only": (changed(lambda checkpoint: checkpoint["model"].popitem()),
                          "vm.pth|not a checkpoint"),
    "no facts": (changed(lambda checkpoint: checkpoint.pop("facts")), "vm.pth|not a checkpoint"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_bad_checkpoint_is_named(case, folder, capsys):
    spoil, words = CHECKPOINTS[case]
    spoil(folder)
    expect_one_line(["-m", "eval"], words, capsys)
    assert not (folder / "executed").exists() and not (folder / "out").exists()


FLAGS = {  # of an evaluation
    "-d nowhere": "nowhere|--demo|davischallenge",
    "-d first.png": "first.png|no data set",
    "-q yeti": "yeti|--sequences",
    "-y 2017": "2017|val.txt",
    "-y 1999": "--year",
    "-o none.pth": "none.pth|no such file",
    "-o vm.pth -en vgg": "--encoder vgg|contradicts|mobilenet",
    "-en alexnet": "--encoder",
    "-o vm.pth --encoder_weights x.pth": "--encoder_weights|contradicts",
    "--encoder_weights none.pth": "none.pth|no such file",
    "--encoder_weights first.png": "first.png|not a file of PyTorch weights",
    "--encoder_weights vm.pth": "vm.pth|not weights of encoder 'mobilenet'",
    "-uf 0": "--upsample_factor|above 0",
    "-uf -1": "--upsample_factor|above 0",
    "-uf nan": "--upsample_factor|above 0",
    "-uf inf": "--upsample_factor|above 0",
    "-uf much": "--upsample_factor|much",
    "-k 0": "--top_k|at least 1",
    "-k 1.5": "--top_k",
    "--temperature -1": "--temperature|above 0",
    "--dilation -1": "--dilation|at least 0",
    "-p 1 1": "--input_image_shape|16",
    "-p 480": "--input_image_shape",
    "-p 400000 400000": "out of memory|--input_image_shape",
    "-g 0 0": "--segmentation_shape|16",
    "-fg 2": "--fg_thresh|[0, 1)",
    "-fg -0.1": "--fg_thresh|[0, 1)",
    "-fg nan": "--fg_thresh|[0, 1)",
    "-c gpu": "--cuda_device gpu|cpu",
    "-c 99": "--cuda_device 99|-c cpu",
    "--seed -1": "--seed|at least 0",
    "--precision int8": "--precision",
    "--method memory": "--method memory|trained",
    "--no-such-flag": "--no-such-flag|-h",
    "-j first.png": "first.png",
    "-j first.png/out": "first.png",
    "-j /proc/out": "/proc/out",
    "-m train -vs -0.1": "--validation_size",
    "-m train -vs 1": "--validation_size",
    "-m train -q ant": "two sequences",
    "-m train -b 0": "--batch_size",
    "-m train -l 0": "--learning_rate",
    "-m train -l nan": "--learning_rate",
    "-m train -w -1": "--weight_decay",
    "-m train -e 0": "--epochs",
    "-m train -i 0": "--iters",
    "-m train -r 0": "--val_report",
    "-m train -lf hinge": "--loss_function",
    "-m train --workers -1": "--workers",
    "-m train --patience 0": "--patience",
    "-m train -s first.png/vm.pth": "first.png",
    "-m train -s vm.state": "--model_save|.pth",
    "-m dream": "--mode",
    "-m segment": "--video",
    "-m segment --video clip": "--mask, --box, --page",
    "-m segment --video nowhere.mp4 --mask first.png": "nowhere.mp4|--video",
    "-m segment --video first.txt --mask first.png": "first.txt|video",
    "-m segment --video empty --mask first.png": "empty|no frames",
    "-m segment --video broken.gif --mask first.png": "broken.gif",
    "-m segment --video twins --mask first.png": "a.png|a second frame|a.jpg",
    "-m segment --video clip --mask none.png": "none.png|no such file",
    "-m segment --video clip --mask small.png": "--mask small.png|8x9|80x48",
    "-m segment --video clip --mask black.png": "no object",
    "-m segment --video clip --mask photo.png": "photo.png|no object",
    "-m segment --video clip --mask 9:first.png": "no frame 9|3 frames",
    "-m segment --video clip --mask first.png --mask_frame -1": "--mask_frame",
    "-m segment --video clip --box 1 1 9 9 --mask first.png": "--mask, --box|both",
    "-m segment --video clip --box 1 1 0 9": "--box",
    "-m segment --video clip --point 1": "--point|pairs",
    "-m segment --video clip --point 1 1 --negative_point 1": "--negative_point|pairs",
    "-m segment --video clip --negative_point 1 1": "--negative_point|--box or --point",
    "-m train --prompts --stills photos": "photos",
    "-m segment --video clip --box 1 1 9 9 --mask_frame 7": "no frame 7|3 frames",
    "-m segment --video clip --mask first.png --cutout #12": "--cutout|#00ff00",
}


@pytest.mark.parametrize("flags", FLAGS)
def test_bad_flags_are_named(flags, folder, capsys):
    (folder / "first.txt").write_text("hello")
    (folder / "broken.gif").write_bytes(b"GIF89a")
    (folder / "empty").mkdir()
    (folder / "twins").mkdir()
    for name in ("a.jpg", "a.png"):
        picture(f"twins/{name}", "RGB")(folder)
    picture("small.png", "L", (8, 9), 1)(folder)
    picture("black.png", "L")(folder)
    picture("photo.png", "RGB", colour=(9, 200, 30))(folder)
    before = sorted(folder.rglob("*"))
    expect_one_line(flags.split() if flags[:2] == "-m" else ["-m", "eval", *flags.split()],
                    FLAGS[flags], capsys)
    made = [path for path in folder.rglob("*") if path.is_file() and path not in before]
    assert made in ([], [folder / "out" / ".lock"])


def test_a_truncated_video_is_segmented_to_its_last_frame(folder, capsys, caplog):
    video = cv2.VideoWriter("clip.avi", cv2.VideoWriter_fourcc(*"MJPG"), 10, (80, 48))
    for i in range(8):
        video.write(draw_frame(i)[0])
    video.release()
    cut("clip.avi", (folder / "clip.avi").stat().st_size // 2)(folder)
    expect_one_line(["-m", "segment", "--video", "clip.avi", "--mask", "7:first.png"],
                    "--mask|no frame 7", capsys)
    code, printed = run(["-m", "segment", "--video", "clip.avi", "--mask", "first.png"], capsys)
    masks = list((folder / "out" / "masks").glob("*.png"))
    assert code == 0 and 0 < len(masks) < 8, printed
    assert "clip.avi: ends after" in caplog.text and "declares 8" in caplog.text


def test_a_broken_frame_in_a_worker_process_is_named(folder, capsys):
    for name in ("ant", "bee"):
        for frame in (folder / "DAVIS/JPEGImages/480p" / name).glob("0000[1-3].jpg"):
            cut(frame, 900)(folder)
    expect_one_line(["-m", "train", "-p", "64", "96", "-s", "new.pth", "--workers", "1",
                     "-o", "vm.pth"], ".jpg|can't be read", capsys)
