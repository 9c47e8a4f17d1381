"""`-m segment`: equal masks from a video and a folder, masks in any frame, cut-outs."""


import cv2
import numpy as np
import pytest
from conftest import draw_frame
from PIL import Image

import main
from masks.read import read_mask
from media import figures, images, video
from network.encoder import Encoder
from outputs import writers
from tracking import pipeline
from videomatch import SHIPPED, VideoMatch

FRAMES = 9


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """An mp4 of a bright square that moves right."""
    path = tmp_path_factory.mktemp("clip") / "my clip.mp4"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), 12, (160, 96))
    for i in range(FRAMES):
        writer.write(np.ascontiguousarray(draw_frame(i)[0][..., ::-1].repeat(2, 0).repeat(2, 1)))
    writer.release()
    return path


@pytest.fixture(scope="module")
def clip_folder(clip_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("frames")
    for i, frame in enumerate(video.open_clip(clip_file).frames()):
        images.write_image(folder / f"{i:05d}.png", frame)
    return folder


def truth(step, ids=(1,)):
    return draw_frame(step, ids)[1].repeat(2, 0).repeat(2, 1)


def write(path, mask):
    images.write_mask(path, mask)
    return str(path)


def masks_in(folder):
    return [read_mask(path) for path in sorted((folder / "masks").iterdir())]


def overlap(a, b):
    return (a & b).sum() / (a | b).sum()


def test_frames_are_resized_to_about_one_size():
    for shape, size, expected in [((240, 432), 480, (480, 864)), ((360, 480), 480, (480, 640)),
                                  ((1080, 1920), 480, (480, 853)), ((90, 50), 480, (180, 100)),
                                  ((480, 854), 480, (480, 854)), ((90, 50), 0, (90, 50))]:
        assert images.working_shape(shape, size) == expected
    image = np.random.default_rng(0).integers(0, 255, (4, 6, 3), dtype=np.uint8)
    means = image.reshape(2, 2, 3, 2, 3).mean((1, 3))
    assert np.abs(images.scaled(image, 2) - means).max() <= 0.5
    assert images.scaled(image, 4) is image
    # between two pixels, a quarter of the way from the nearer one
    larger = images.scaled(image, 8).astype(float)
    np.testing.assert_allclose(larger[0, 1:3], np.tensordot([[.75, .25], [.25, .75]], image[0, :2],
                                                            1), atol=0.6)


@pytest.mark.slow
def test_video_and_folder_give_the_same_masks(clip_file, clip_folder, tmp_path):
    mask = write(tmp_path / "first.png", truth(0))
    for source, out in ((clip_file, "a"), (clip_folder, "b")):
        assert main.main(["-m", "segment", "--video", str(source), "--mask", mask,
                          "-j", str(tmp_path / out), "-p", "192", "320"]) == 0
    first, second = (masks_in(tmp_path / out) for out in "ab")
    assert len(first) == len(second) == FRAMES
    for i, (a, b) in enumerate(zip(first, second)):
        np.testing.assert_array_equal(a, b)
        assert overlap(a, truth(i)) > 0.6
    overlay = cv2.VideoCapture(str(tmp_path / "a" / "overlay.mp4"))
    assert overlay.get(cv2.CAP_PROP_FRAME_COUNT) == FRAMES
    assert overlay.get(cv2.CAP_PROP_FPS) == pytest.approx(12)


def test_a_mask_in_the_middle_is_propagated_in_both_directions(clip_file, tmp_path):
    mask = write(tmp_path / "middle.png", truth(5))
    assert main.main(["-m", "segment", "--video", str(clip_file), "--mask", mask, "--mask_frame",
                      "5", "-j", str(tmp_path / "out"), "-p", "192", "320"]) == 0
    found = masks_in(tmp_path / "out")
    np.testing.assert_array_equal(found[5], truth(5))
    assert all(overlap(mask, truth(i)) > 0.6 for i, mask in enumerate(found))


@pytest.mark.slow
def test_an_object_of_a_later_mask_is_tracked_from_there(tmp_path):
    masks = []
    for i in range(FRAMES):
        image, mask = (x.repeat(4, 0).repeat(4, 1) for x in draw_frame(i, (1, 2)))
        images.write_image(tmp_path / "clip" / f"{i:05d}.png", image)
        masks.append(mask)
    first = np.where(masks[0] == 1, 1, 0).astype(np.uint8)
    model, clip = VideoMatch.load(SHIPPED["mobilenet"]), video.open_clip(tmp_path / "clip")
    seen = []
    pipeline.drain(pipeline.track(model, clip, {0: first, 4: masks[4]}, pipeline.Options()),
                  writers.clip_sinks(tmp_path, clip), on_frame=seen.append)
    found = masks_in(tmp_path)
    assert all(set(np.unique(mask)) <= {0, 1} for mask in found[:4])
    np.testing.assert_array_equal(found[4], masks[4])
    assert all(overlap(found[i] == 2, masks[i] == 2) > 0.6 for i in range(5, FRAMES))
    assert seen[-1].step.object_ids == (1, 2)
    assert [frame.step.object_ids for frame in seen[:4]] == [(1,)] * 4


@pytest.mark.slow
@pytest.mark.parametrize("word, after", [("absent", True), ("gone", False)])
def test_a_later_mask_may_mark_an_object_as_absent(word, after, tmp_path):
    masks = []
    for i in range(7):
        image, mask = (x.repeat(4, 0).repeat(4, 1) for x in draw_frame(i, (1, 2)))
        if i == 2:  # hidden there
            image[mask == 2] = 20
            mask[mask == 2] = 0
        images.write_image(tmp_path / "clip" / f"{i + 5:05d}.png", image)
        masks.append(mask)
    first, last = (write(tmp_path / f"mask{i}.png", masks[i]) for i in (0, 6))
    run = ["-m", "segment", "--video", str(tmp_path / "clip"), "-j", str(tmp_path / "out")]
    assert main.main([*run, "--mask", f"5:{first}", f"7:{word}=2", f"11:{last}"]) == 0
    found = masks_in(tmp_path / "out")
    assert overlap(found[1] == 2, masks[1] == 2) > 0.6 and not (found[2] == 2).any()
    assert ((found[3] == 2).any(), (found[4] == 2).any()) == (after, after)
    np.testing.assert_array_equal(found[6], masks[6])  # the next mask that shows it brings it back
    assert all(overlap(mask == 1, right == 1) > 0.6 for mask, right in zip(found, masks))
    other = "gone" if word == "absent" else "absent"
    assert main.main([*run, "--mask", f"5:{first}", f"7:{other}=2", f"11:{last}"]) == 0
    assert (masks_in(tmp_path / "out")[4] == 2).any() != after, "other marks, other masks"


class Counting(video.Folder):
    """A clip that records which frames were read."""

    def __init__(self, path):
        super().__init__(path)
        self.read = []

    def _read(self, start):
        for index, image in enumerate(super()._read(start), start):
            self.read.append(index)
            yield image


@pytest.mark.slow
@pytest.mark.parametrize("cutout", [None, "transparent", "blur"])
@pytest.mark.parametrize("first", [0, 5])
def test_each_frame_is_decoded_once(first, cutout, model, clip_folder, tmp_path):
    clip = Counting(clip_folder)
    frames = pipeline.track(model, clip, {first: truth(first), 7: truth(7)}, pipeline.Options())
    assert pipeline.drain(frames, writers.clip_sinks(tmp_path, clip, cutout)) == FRAMES
    assert sorted(clip.read) == list(range(FRAMES))


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 1, 5, 8])
def test_a_video_has_its_frames_in_clip_order(first, model, clip_folder, tmp_path):
    clip = video.open_clip(clip_folder)

    def draw(frame):  # a grey for each
        return np.full_like(frame.image, 20 * frame.index + 20)

    with writers.VideoSink(tmp_path / "film.mp4", clip, draw) as film:
        met = [film.write(frame) or frame.index for frame in
               pipeline.track(model, clip, {first: truth(first)}, pipeline.Options())]
    assert met == [*range(first - 1, -1, -1), *range(first, FRAMES)]
    greys = [frame.mean() for frame in video.open_clip(tmp_path / "film.mp4").frames()]
    np.testing.assert_allclose(greys, [20 * i + 20 for i in range(FRAMES)], atol=5)


def test_a_sink_that_fails_ends_the_run_with_its_error(model, clip_folder):
    class Full(pipeline.Sink):
        def write(self, frame):
            raise OSError(28, "full", f"{frame.index}.png")

    clip = Counting(clip_folder)
    with pytest.raises(OSError, match="0.png"):
        pipeline.drain(pipeline.track(model, clip, {0: truth(0)}, pipeline.Options()), [Full()])


@pytest.mark.parametrize("how, expected", [("transparent", None), ("blur", None),
                                           ("#00ff00", (0, 255, 0))])
def test_cutouts_are_written_in_every_format(how, expected, model, clip_folder, tmp_path):
    clip = video.open_clip(clip_folder)
    (tmp_path / "masks").mkdir()
    for i in range(FRAMES):
        images.write_mask(tmp_path / "masks" / f"{i:05d}.png", truth(i))
    kept = pipeline.TrackerCheckpoint(tmp_path / "masks", clip).mark_all_done()
    frames = pipeline.track(model, clip, {0: truth(0)}, pipeline.Options(), kept)
    pipeline.drain(frames, writers.clip_sinks(tmp_path, clip, how), kept)
    frame, mask = next(clip.frames(3)), truth(3) > 0
    if how == "transparent":
        picture = np.array(Image.open(tmp_path / "cutout" / "00003.png"))
        np.testing.assert_array_equal(picture[..., 3] >= 128, mask)
        assert not picture[picture[..., 3] == 0].any()  # nothing hides under what is clear
        np.testing.assert_array_equal(picture[mask][:, :3], frame[mask])
        return
    picture = list(video.open_clip(tmp_path / "cutout.mp4").frames())[3].astype(int)
    assert np.abs(picture[mask] - frame[mask]).mean() < 12  # the codec's
    if expected:
        assert np.abs(picture[~mask] - expected).mean() < 12
    else:
        assert picture[~mask].std() < 0.7 * frame[~mask].std()


@pytest.mark.parametrize("flags, message", [
    ([], "--video: expected a video"),
    (["--video", "nowhere.mp4", "--mask", "m.png"], "nowhere.mp4: no such file"),
    (["--video", "CLIP"], "--mask, --box, --page: expected one of them"),
    (["--video", "CLIP", "--mask", "m.png", "--box", "1", "1", "9", "9"], "got both"),
    (["--video", "CLIP", "--point", "1", "1", "9"], "--point: expected pairs of numbers"),
    (["--video", "CLIP", "--point", "1", "1", "--negative_point", "9"],
     "--negative_point: expected pairs"),
    (["--video", "CLIP", "--negative_point", "9", "9"], "--negative_point: expected a --box"),
    (["--video", "CLIP", "--box", "1", "1", "9", "9", "--negative_point", "9", "9",
      "--not_point", "1", "1"], "--negative_point: expected a --box or --point of the same object"),
    (["--video", "CLIP", "--mask", "MASK", "--negative_point", "9", "9"],
     "--negative_point: expected a --box"),
    (["--video", "CLIP", "-o", "BARE", "--box", "1", "1", "9", "9"], "-m train --prompts"),
    (["--video", "CLIP", "--mask", "m.png"], "m.png: no such file"),
    (["--video", "CLIP", "--mask", "99:MASK"], "there is no frame 99"),
    (["--video", "CLIP", "--mask", "SMALL"], "expected 160x96"),
    (["--video", "CLIP", "--mask", "3:gone=1"], "--mask: expected a mask file"),
    (["--video", "CLIP", "--mask", "MASK", "gone=1"], "expected a frame number, N:gone=1"),
    (["--video", "CLIP", "--mask", "MASK", "3:gone=2"], "object in a mask of an earlier frame"),
    (["--video", "CLIP", "--mask", "MASK", "0:gone=1"], "none contains 1"),
    (["--video", "CLIP", "--mask", "MASK", "4:MASK", "4:absent=1"], "contains object 1"),
    (["--video", "CLIP", "--mask", "MASK", "99:absent=1"], "there is no frame 99"),
    (["--video", "CLIP", "--mask", "EMPTY"], "holds no object"),
    (["--video", "MASK", "--mask", "MASK"], "mask.txt"),
    (["--video", "CLIP", "--box", "1", "1", "9", "9", "--mask_frame", "99"], "ends before it"),
    (["--video", "CLIP", "--mask", "MASK", "--cutout", "pink"], "--cutout: expected transparent"),
])
def test_bad_input_gives_one_line(flags, message, clip_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(figures, "has_browser", lambda: False)
    files = {"CLIP": str(clip_file), "MASK": write(tmp_path / "mask.png", truth(0)),
             "SMALL": write(tmp_path / "small.png", draw_frame(0)[1]),
             "EMPTY": write(tmp_path / "empty.png", 0 * truth(0)),
             "BARE": str(tmp_path / "bare.pth")}
    VideoMatch(Encoder("mobilenet")).save(files["BARE"])
    if flags[:2] == ["--video", "MASK"]:
        (tmp_path / "mask.txt").write_text("no video")
        flags = ["--video", "mask.txt", *flags[2:]]
    for name, path in files.items():
        flags = [flag.replace(name, path) for flag in flags]
    assert main.main(["-m", "segment", *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("main.py: error:") and message in error
