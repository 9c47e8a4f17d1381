"""Export and tracking without PyTorch: same masks, no import of torch, damaged exports."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, content, draw_frame, held, overlap, truth
from PIL import Image

import lite
import main
import preprocess
from datasets import demo
from lite_runtime import export, quantize
from media.prompts import Prompts
from network import views
from network.decoder import antialiased, pooling
from system import version
from tracking import prompting
from tracking.tracker import Tracker
from videomatch import SHIPPED, VideoMatch

# packages that requirements.txt has and requirements-lite.txt lacks
ABSENT = ("torch", "torchvision", "matplotlib", "starlette", "uvicorn", "onnx")
# runs a script in a Python that can't import these packages
WITHOUT = f"""
import runpy, sys
class Absent:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
del sys.argv[0]
sys.path.insert(0, sys.argv[0].rpartition("/")[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="module")
def exact():
    """The shipped checkpoint in float32."""
    return VideoMatch.load(SHIPPED["mobilenet"]).for_inference("fp32")


@pytest.fixture(scope="module")
def exported(exact, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    export.export(exact, folder)
    return folder


@pytest.fixture
def first(tmp_path):
    """The mask of the first frame of `clip`."""
    Image.fromarray(truth(0)).save(tmp_path / "first.png")
    return tmp_path / "first.png"


def run(*arguments):
    """Run lite.py in a process without PyTorch."""
    return subprocess.run([sys.executable, "-c", WITHOUT, str(ROOT / "lite.py"),
                           *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_a_clip_is_segmented_without_torch(clip, first, exported, tmp_path):
    done = run(clip, first, "-j", tmp_path / "out", "-o", exported, "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "12 frames" in done.stdout and (tmp_path / "out/overlay.mp4").is_file()
    for step in range(12):
        predicted = np.array(Image.open(tmp_path / f"out/masks/{step:05d}.png"))
        assert overlap(predicted == 1, truth(step) == 1) > 0.8, step


@pytest.mark.slow
def test_a_shorter_clip_replaces_all_earlier_masks(clip, first, exported, tmp_path, capsys):
    out, shorter = tmp_path / "out", tmp_path / "shorter"
    arguments = [str(first), "-j", str(out), "-o", str(exported), "--threads", "1"]
    shorter.mkdir()
    for step in range(3):
        shutil.copy(clip / f"{step:05d}.png", shorter)
    by_hand = out / "masks" / "99999.png"
    by_hand.parent.mkdir(parents=True)
    shutil.copy(first, by_hand)
    for own in (out / "overlay.mp4", out / "masks" / "00000.png"):
        own.write_bytes(b"the user's")
        assert lite.main([str(shorter), *arguments]) == 2
        assert own.read_bytes() == b"the user's" and f"{own}: lite.py" in capsys.readouterr().err
        own.unlink()
        (out / "manifest.json").unlink(missing_ok=True)
    assert lite.main([str(shorter), *arguments]) == 0
    assert by_hand.is_file()  # without a manifest, files in the folder may be the user's
    assert lite.main([str(shorter), *arguments]) == 0
    names = ["00000.png", "00001.png", "00002.png"]
    assert sorted(path.name for path in (out / "masks").iterdir()) == names
    made = json.loads((out / "manifest.json").read_text())
    assert made["versions"] == f"videomatch {version.__version__}"
    (out / "manifest.json").write_text(json.dumps({"flags": "default"}))
    before = content(out)
    assert lite.main([str(shorter), *arguments]) == 2
    assert "manifest.json: these are not results of lite.py" in capsys.readouterr().err
    assert content(out) == before


@pytest.mark.slow
def test_a_folder_that_another_run_writes_to_is_refused(clip, first, exported, tmp_path, capsys):
    with held(tmp_path / "out") as other:
        before = content(tmp_path / "out")
        for arguments in ([str(first)], ["--box", "14", "10", "44", "36"]):
            assert lite.main([str(clip), *arguments, "-j", str(tmp_path / "out"),
                              "-o", str(exported)]) == 2
            assert (f"out: another run is writing there (process {other.pid}"
                    in capsys.readouterr().err)
        assert content(tmp_path / "out") == before


PROMPTS = [Prompts([(14, 10, 44, 36)]), Prompts(points=[(36, 28)]),
           Prompts([(14, 10, 44, 36)], [(36, 28), (20, 20)], [(80, 20)], truth(0) == 1)]


@pytest.mark.slow
@pytest.mark.parametrize("prompts", PROMPTS, ids=["box", "point", "all"])
def test_prompts_give_the_masks_of_pytorch(prompts, exact, exported):
    network, image = lite.load(exported, 1), draw_frame(0)[0].repeat(2, 0).repeat(2, 1)
    expected, logits = (prompting.predict_logits(model, image, prompts)
                        for model in (exact, network))
    predicted = np.isfinite(expected)  # logits are -inf outside of the crop around the prompts
    np.testing.assert_array_equal(predicted, np.isfinite(logits))
    np.testing.assert_allclose(expected[predicted], logits[predicted], atol=2e-3)
    assert overlap(logits > 0, truth(0) == 1) > 0.5


@pytest.mark.slow
def test_a_clip_is_segmented_from_a_box_without_torch(clip, exported, tmp_path):
    done = run(clip, "--box", 14, 10, 44, 36, "-j", tmp_path / "out", "-o", exported)
    assert done.returncode == 0, done.stderr
    prompted = np.array(Image.open(tmp_path / "out/mask_00000.png"))
    assert overlap(prompted == 1, truth(0) == 1) > 0.5
    np.testing.assert_array_equal(np.array(Image.open(tmp_path / "out/masks/00000.png")), prompted)


@pytest.mark.slow
@pytest.mark.parametrize("more, message", [
    ([], "expected a mask of the first frame, or else --box or --point"),
    (["FIRST", "--box", 1, 2, 3, 4], "expected a mask of the first frame, or else"),
    (["--point", 1, 2, 3], "--point, --negative_point: expected pairs of numbers"),
    (["--box", 0, 0, 999, 3], "--box 0 0 999 3: expected a part of the frame")])
def test_invalid_prompts_get_one_line(more, message, clip, first, exported, tmp_path, capsys):
    more = [str(first) if value == "FIRST" else str(value) for value in more]
    assert lite.main([str(clip), *more, "-j", str(tmp_path / "out"), "-o", str(exported)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_requirements_of_lite_are_those_without_torch():
    def names(file):
        return set(re.findall(r"^([\w-]+)", (ROOT / file).read_text(), re.MULTILINE))

    required = names("requirements-lite.txt")
    assert "torch" not in required
    assert required - names("requirements.txt") == {"onnxruntime", "opencv-python-headless"}
    assert set(ABSENT) - {"onnx"} == names("requirements.txt") - required - {"opencv-python"}


def track_both(exact, exported, frames, masks, shape=None):
    """Track (H, W, 3) frames with and without PyTorch; yields pairs of steps.

    Args:
        masks: user masks by frame index.
    """
    network = lite.load(exported, 1)
    tracker, lite_tracker = Tracker(exact), Tracker(network)
    for i, image in enumerate(frames):
        yield (tracker.step(preprocess.to_tensor(image), masks.get(i), shape),
               lite_tracker.step(network.normalized(image), masks.get(i), shape))


@pytest.mark.slow
@pytest.mark.parametrize("name, rows", [("stroll", 0), ("meeting", 180)])
def test_masks_equal_those_of_pytorch(name, rows, exact, exported):
    drawn = list(demo.draw(demo.SCENES["val"][name], frames=9))
    frames = [lite.images.scaled(image, rows) for image, _ in drawn]
    overlaps = []
    for expected, actual in track_both(exact, exported, frames, {0: drawn[0][1]}):
        assert actual.object_ids == expected.object_ids
        overlaps += [overlap(actual.mask == i, expected.mask == i) for i in actual.object_ids]
        np.testing.assert_allclose(actual.probabilities.sum(0), 1, atol=1e-5)
    assert np.mean(overlaps) >= 0.999 and min(overlaps) >= 0.99


@pytest.mark.slow
def test_later_masks_and_new_objects_equal_those_of_pytorch(exact, exported):
    """A second reference frame adds an object, and in a third one the first object is missing."""
    frames, masks = zip(*(draw_frame(step, (1, 2)) for step in range(8)))
    frames = [image.repeat(2, 0).repeat(2, 1) for image in frames]
    masks = [mask.repeat(2, 0).repeat(2, 1) for mask in masks]
    user_masks = {0: np.where(masks[0] == 1, 1, 0), 3: masks[3],
                  6: np.where(masks[6] == 2, 2, 0)}
    for expected, actual in track_both(exact, exported, frames, user_masks, (70, 110)):
        assert actual.object_ids == expected.object_ids
        difference = np.abs(actual.probabilities - expected.probabilities.numpy())
        assert difference.max() < 0.02 and difference.mean() < 1e-4


def test_removed_and_returning_objects_equal_those_of_pytorch(exact, exported):
    """Of three objects one is removed, then another; a later mask adds both again."""
    frames, masks = zip(*(draw_frame(step, (1, 2)) for step in range(9)))
    masks = [np.where((mask == 2) & (np.arange(80) % 40 < 20), 3, mask) for mask in masks]
    network = lite.load(exported, 1)
    one, other = Tracker(exact), Tracker(network)
    for i, image in enumerate(frames):
        mask = masks[i] if i in (0, 7) else None
        expected = one.step(preprocess.to_tensor(image), mask)
        actual = other.step(network.normalized(image), mask)
        assert actual.object_ids == expected.object_ids
        difference = np.abs(actual.probabilities - expected.probabilities.numpy())
        assert difference.max() < 0.02 and difference.mean() < 1e-4
        if i in (2, 5):
            for tracker in (one, other):
                tracker.remove(1 if i == 2 else 3)
    assert set(one.object_ids) == {1, 2, 3}


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(16, 16), (17, 200), (48, 33)])
def test_frames_of_few_locations(shape, exact, exported):
    random = np.random.default_rng(0)
    frames = list(random.integers(0, 255, (4, *shape, 3), dtype=np.uint8))
    mask = np.zeros(shape, np.uint8)
    mask[2:9, 3:12] = 1
    for expected, actual in track_both(exact, exported, frames, {0: mask}):
        difference = np.abs(actual.probabilities - expected.probabilities.numpy())
        # in noise all locations are about as similar, so rounding decides which ones are read
        assert difference.max() < 0.1 and difference.mean() < 1e-3


def test_larger_frames_have_the_same_memory(exact, exported):
    """Sizes of the memory that the frame determines must not be those of the traced frame."""
    image = np.random.default_rng(0).integers(0, 255, (288, 448, 3), dtype=np.uint8)
    mask = np.zeros((288, 448), np.uint8)
    mask[40:250, 60:400] = 1  # more locations than groups
    network = lite.load(exported, 1)
    found = network.add_reference(None, network.normalized(image)[None], mask, [1])
    with torch.no_grad():
        expected = exact.add_reference(None, preprocess.to_tensor(image)[None], mask, [1])
    assert expected.memory_valid.shape[1] >= 8
    for name, value in expected._asdict().items():
        assert found._asdict()[name].shape == tuple(value.shape), name
    assert (found.reference_valid == expected.reference_valid.numpy()).all()


def test_a_frame_of_another_size_is_refused(exported):
    network = lite.load(exported, 1)
    tracker = Tracker(network)
    with pytest.raises(ValueError, match="the first frame needs one"):
        tracker.step(np.zeros((3, 48, 80), np.float32))
    image, mask = draw_frame(0)
    tracker.step(network.normalized(image), mask)
    with pytest.raises(ValueError, match="size of the reference frame"):
        tracker.step(np.zeros((3, 90, 80), np.float32))
    with pytest.raises(ValueError, match="size of the reference frame"):
        network.predict(tracker.memory, network.encode(np.zeros((1, 3, 90, 80), np.float32)),
                        (90, 80))
    with pytest.raises(ValueError, match="size of the reference frame"):
        tracker.step(np.zeros((3, 90, 80), np.float32), np.ones((90, 80), np.uint8))


@pytest.mark.slow
def test_a_copied_tracker_is_independent(exported):
    """Frames that a copy tracks do not affect the tracker it was taken from."""
    network = lite.load(exported, 1)
    tracker = Tracker(network)
    frames = [network.normalized(draw_frame(step)[0]) for step in range(8)]
    tracker.step(frames[0], draw_frame(0)[1])
    copied = tracker.copy()
    of_copy, own = ([one.step(frame).probabilities for frame in frames[1:]]
                    for one in (copied, tracker))
    np.testing.assert_array_equal(of_copy, own)


def damaged(folder, what, tmp_path):
    """A copy of an export that is damaged in the way `what`."""
    folder = Path(shutil.copytree(folder, tmp_path / "damaged"))
    description = folder / lite.DESCRIPTION
    if what == "truncated":
        path = folder / "step.onnx"
        path.write_bytes(path.read_bytes()[:-1000])
    elif what == "missing":
        (folder / "step.onnx").unlink()
    elif what == "version":
        description.write_text(json.dumps(json.loads(description.read_text()) | {"format": 99}))
    elif what == "no json":
        description.write_text("format: 1")
    elif what == "other json":
        description.write_text(json.dumps({"format": lite.FORMAT}))
    return folder


@pytest.mark.parametrize("what, message", [
    ("truncated", r"step\.onnx: damaged"), ("missing", r"step\.onnx: no such file"),
    ("version", f"format 99, expected {lite.FORMAT}: export again"), ("no json", "not an export"),
    ("other json", "not an export")])
def test_a_damaged_export_gets_one_line(what, message, clip, first, exported, tmp_path, capsys):
    folder = damaged(exported, what, tmp_path)
    assert lite.main([str(clip), str(first), "-j", str(tmp_path / "out"), "-o", str(folder)]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and re.search(message, error[0])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("change, message", [
    ({"-o": "nowhere"}, "nowhere.*no such file, expected an export"),
    ({"--size": "3"}, "--size"), ({"--threads": "-1"}, "--threads"),
    ({"mask": (20, 20)}, "mask of 20x20 pixels, expected 160x96"),
    ({"mask": 0}, "holds no object"), ({"-j": "clip"}, "is an input")])
def test_invalid_arguments_get_one_line(change, message, clip, first, exported, tmp_path,
                                           capsys):
    if "mask" in change:
        empty = np.zeros(change["mask"] or (96, 160), np.uint8)
        empty[3:9, 3:9] = bool(change["mask"])
        Image.fromarray(empty).save(first)
    arguments = {"-j": tmp_path / "out", "-o": exported, "--threads": 1} | {
        flag: value for flag, value in change.items() if flag != "mask"}
    source = clip
    if arguments["-j"] == "clip":  # a results folder whose masks/ is the clip
        source = Path(shutil.copytree(clip, tmp_path / "out/masks"))
        arguments["-j"] = tmp_path / "out"
    flags = [str(part) for pair in arguments.items() for part in pair]
    assert lite.main([str(source), str(first), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, error[-1]) and error[-1].startswith("lite.py: error: ")


@pytest.mark.parametrize("error, message", [
    (MemoryError(), "out of memory"), (Exception("Failed to allocate memory for 9"), "--size"),
    (OSError(28, "No space left on device", "masks"), "masks: No space left"),
    (ValueError("a size"), "a size")])
def test_errors_are_explained(error, message):
    assert message in lite.explained(error)
    assert lite.explained(TypeError("ours")) is None


def test_a_missing_package_is_named():
    with pytest.raises(ValueError, match="surely_absent is missing: pip install surely_absent"):
        lite.package("surely_absent")


@pytest.mark.slow
def test_an_export_of_main_can_be_loaded(tmp_path, capsys):
    assert main.main(["-m", "export", "--export_dir", str(tmp_path / "lite")]) == 0
    assert "MB" in capsys.readouterr().out
    lite.load(tmp_path / "lite")
    description = json.loads((tmp_path / "lite" / lite.DESCRIPTION).read_text())
    assert description["config"]["encoder"] == "mobilenet"


@pytest.mark.slow
def test_an_8_bit_export_is_small_and_tracks_the_object(tmp_path):
    folder = tmp_path / "lite8"
    assert main.main(["-m", "export", "--export_dir", str(folder), "--eight_bit"]) == 0
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 6e6  # 3.4 million weights
    network = lite.load(folder, 1)
    tracker = Tracker(network)
    for step in range(4):
        image = draw_frame(step)[0].repeat(2, 0).repeat(2, 1)
        mask = tracker.step(network.normalized(image), None if step else truth(0)).mask
        assert overlap(mask == 1, truth(step) == 1) > 0.8, step


@pytest.mark.slow
def test_an_8_bit_export_that_differs_too_much_is_refused(exact, tmp_path, monkeypatch):
    quantized = quantize.quantized

    def reversed_scales(values, axis):
        whole, scales = quantized(values, axis)
        return whole, scales[::-1].copy()

    monkeypatch.setattr(quantize, "quantized", reversed_scales)
    with pytest.raises(ValueError, match="weights of 8 bits.*differ"):
        export.export(exact, tmp_path, bits=8)
    with pytest.raises(FileNotFoundError):
        lite.load(tmp_path)


def test_the_docs_have_the_contract_of_the_export(exported):
    assert (exported / export.CONTRACT).read_text() in (ROOT / "docs/lite.md").read_text()


def test_exported_pooling_works_on_older_onnxruntime(exported):
    """Versions before 1.29 count padding where a side is odd."""
    pools = [{a.name: a.i for a in node.attribute} for path in exported.glob("*.onnx")
             for node in onnx.load(path).graph.node if node.op_type == "AveragePool"]
    assert any(pool.get("ceil_mode") for pool in pools)
    assert not any(pool.get("ceil_mode") and pool.get("count_include_pad") for pool in pools)


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_are_quantized_per_channel(axis):
    values = np.float32([np.zeros(40), np.random.default_rng(0).normal(0, 100, 40)])
    values = values if axis == 0 else values.T
    whole, scales = quantize.quantized(values, axis)
    assert whole.dtype == np.int8
    restored = whole * (scales[:, None] if axis == 0 else scales)
    assert np.abs(restored - values).max() <= scales.max() / 2 * 1.001
    assert not restored.take(0, axis).any() and abs(int(np.abs(whole).max())) == 127


def test_a_checkpoint_without_memory_cannot_be_exported(model, tmp_path, capsys):
    model.save(tmp_path / "vm.pth")
    assert main.main(["-m", "export", "-o", str(tmp_path / "vm.pth"),
                      "--export_dir", str(tmp_path / "lite")]) == 2
    assert "--method memory" in capsys.readouterr().err


@pytest.mark.parametrize("before, after", [((480, 854), (144, 256)), ((90, 70), (128, 96)),
                                           ((90, 70), (40, 90))])
def test_antialiased_resizing_agrees_with_pytorch(before, after):
    mask = np.random.default_rng(0).integers(0, 3, before, dtype=np.uint8)
    planes = np.float32([mask == 0, mask == 2])
    expected = F.interpolate(torch.from_numpy(planes)[None], size=after, mode="bilinear",
                             align_corners=False, antialias=True)[0]
    np.testing.assert_allclose(views.shares_of(mask, after, [2]), expected.numpy(), atol=1e-5)
    rows, columns = (antialiased(*sides) for sides in zip(before, after))
    torch.testing.assert_close(rows @ torch.from_numpy(planes) @ columns.T, expected, atol=1e-5,
                               rtol=0)


@pytest.mark.parametrize("shape, grid", [((48, 80), (3, 5)), ((90, 61), (7, 4)), ((9, 9), (9, 9)),
                                          ((854, 480), (53, 30))])
def test_labels_agree_with_nearest_interpolation(shape, grid):
    mask = np.zeros(shape, np.uint8)
    mask[2:shape[0] // 2, 1:shape[1] // 3] = 1
    mask[-1, -1], mask[shape[0] // 2:, :2] = 5, 3
    whole = torch.from_numpy(mask)[None, None].float()
    expected = F.interpolate(whole, size=grid, mode="nearest-exact")[0, 0].long()
    for i in (1, 3, 5):  # too small to contain the centre of a location
        if not (expected == i).any():
            expected.view(-1)[F.adaptive_avg_pool2d((whole == i).float(), grid).argmax()] = i
    labels = torch.tensor([0, 1, -1, -1, -1, 2])[expected]
    np.testing.assert_array_equal(views.labels_of(mask, grid, [1, 5]), labels.numpy())


@pytest.mark.parametrize("before, after", [(9, 5), (10, 5), (7, 3), (5, 5), (1, 1)])
def test_adaptive_pooling_equals_a_matrix_product(before, after):
    x = torch.rand(1, 1, before, 1)
    torch.testing.assert_close(pooling(before, after) @ x, F.adaptive_avg_pool2d(x, (after, 1)))


def test_dilation_and_subsampling_of_locations():
    locations = np.random.default_rng(0).random((9, 12)) > 0.95
    dilated = F.max_pool2d(torch.from_numpy(locations)[None].float(), 5, 1, 2)[0] > 0
    np.testing.assert_array_equal(views.dilated(locations), dilated.numpy())
    assert views.thinned(dilated.numpy(), 7).sum() == min(7, int(dilated.sum()))


@pytest.mark.slow
def test_a_video_is_tracked_by_the_graphs_alone(exact, exported):
    """All that a program in another language needs: an empty state and the graphs."""
    network, frames = lite.load(exported, 1), [draw_frame(step) for step in range(8)]
    expected = Tracker(exact, outlier_removal=False)
    image = network.normalized(frames[0][0])[None]
    state = network.add_reference(None, image, frames[0][1], [1])
    expected.step(torch.from_numpy(image[0]), frames[0][1])
    for number, (image, _) in enumerate(frames[1:], start=2):
        image = network.normalized(image)[None]
        features = network.encode(image)
        probabilities = network.predict(state, features, image.shape[2:])
        state = network.remember(state, features, probabilities, number % 5 == 0)
        of_pytorch = expected.step(torch.from_numpy(image[0])).probabilities.numpy()
        np.testing.assert_allclose(probabilities, of_pytorch, atol=2e-3)
    for name, value, expected_value in zip(state._fields, state, expected.memory):
        expected_value = expected_value.detach().numpy()
        assert value.shape == expected_value.shape, name
        for part in ("reference", "memory"):  # the content of empty rows does not matter
            if name in (f"{part}_keys", f"{part}_values", f"{part}_rows"):
                valid = getattr(state, f"{part}_valid") > 0
                value, expected_value = value[valid], expected_value[valid]
        np.testing.assert_allclose(value, expected_value, atol=2e-3, err_msg=name)
