"""Data sets on disk: resolutions, suffixes, lists, YouTube-VOS layout and your own folders."""

import codecs
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from conftest import SHAPE, draw_frame, write_list
from PIL import Image

import evaluate
import main
from davis import Davis, for_training
from media import images
from metrics import jaccard


def write(frames: Path, masks: Path, count=6, labelled=None, suffix="jpg", ids=(1, 2), later=0,
          step=1) -> None:
    """Frames 0, step, 2·step, ... and masks of some; the last id appears at frame `later`."""
    frames.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(count):
        image, mask = draw_frame(i, ids)
        Image.fromarray(image).save(frames / f"{i * step:05d}.{suffix}")
        if labelled is None or i in labelled:
            images.write_mask(masks / f"{i * step:05d}.png",
                              np.where((mask == ids[-1]) & (i < later), 0, mask))


def youtube(root: Path, **kwargs) -> Path:
    for name in kwargs.pop("names", ("0a1b", "2c3d")):
        write(root / "JPEGImages" / name, root / "Annotations" / name, **kwargs)
    return root


def names(dataset) -> list[str]:
    return [sequence.name for sequence in dataset]


@pytest.mark.parametrize("level", ["480p", "1080p", "Full-Resolution", "."])
@pytest.mark.parametrize("suffix", ["jpg", "JPG", "jpeg", "png", "bmp", "webp"])
def test_frames_of_any_format_are_found_at_any_depth(tmp_path, level, suffix):
    write(tmp_path / "JPEGImages" / level / "ant", tmp_path / "Annotations" / level / "ant",
          suffix=suffix)
    write_list(tmp_path, "2017", "val", ["ant"])
    (ant,) = Davis(tmp_path, "2017", "val")
    assert len(ant) == 6 and [path.suffix for path in ant.images] == [f".{suffix}"] * 6
    assert [path.name for path in ant.masks] == [f"{i:05d}.png" for i in range(6)]
    np.testing.assert_array_equal(ant.mask(4), draw_frame(4, (1, 2))[1])


def test_480p_is_preferred_to_other_resolutions(tmp_path):
    for level in ("1080p", "480p"):
        write(tmp_path / "JPEGImages" / level / "ant", tmp_path / "Annotations" / level / "ant")
    write_list(tmp_path, "2016", "val", ["ant"])
    assert Davis(tmp_path, "2016", "val").sequences[0].images[0].parts[-3] == "480p"


@pytest.mark.parametrize("encode", [
    lambda text: codecs.BOM_UTF8 + text.encode(), lambda text: text.encode("utf-16"),
    lambda text: text.replace("\n", "\r\n").encode()])
def test_windows_line_endings_in_lists_are_accepted(davis_2017, encode):
    path = davis_2017 / "ImageSets" / "2017" / "train.txt"
    path.write_bytes(encode("bee\nant\n"))
    assert names(Davis(davis_2017, "2017")) == ["bee", "ant"]


@pytest.mark.parametrize("year, set_name", [("2017", "test-dev"), (None, "test-dev"),
                                            ("2017", "mine"), (None, "train")])
def test_any_list_in_the_data_set_can_be_used(davis_2017, year, set_name):
    write_list(davis_2017, "2017", set_name, ["bee"])
    if set_name == "train":
        write_list(davis_2017, "2016", "train", ["bee"])
    assert names(Davis(davis_2017, year, set_name)) == ["bee"]


def test_a_missing_list_is_named_with_the_existing_ones(davis_2017):
    with pytest.raises(FileNotFoundError) as caught:
        Davis(davis_2017, "2017", "test-dev")
    assert "2017/test-dev.txt" in str(caught.value) and "2016/val.txt" in str(caught.value)


def test_junk_files_are_ignored(davis_2016):
    for kind in ("JPEGImages", "Annotations"):
        folder = davis_2016 / kind / "480p"
        suffix = "jpg" if kind == "JPEGImages" else "png"
        (folder / ".DS_Store").write_text("junk")
        for name in (f"._00000.{suffix}", "Thumbs.db", ".DS_Store", "notes.txt"):
            (folder / "ant" / name).write_text("junk")
    assert [len(sequence) for sequence in Davis(davis_2016)] == [6, 6, 6]


def test_frames_are_in_natural_order(tmp_path):
    write(tmp_path / "a" / "images", tmp_path / "a" / "masks", count=12)
    for kind in ("images", "masks"):
        for path in sorted((tmp_path / "a" / kind).iterdir()):
            path.rename(path.with_name(f"frame_{int(path.stem)}{path.suffix}"))
    (sequence,) = Davis(tmp_path)
    assert [path.stem for path in sequence.images] == [f"frame_{i}" for i in range(12)]
    for i in range(12):
        np.testing.assert_array_equal(sequence.mask(i), draw_frame(i, (1, 2))[1])
        assert sequence.frame_name(i) == f"frame_{i}"


@pytest.mark.parametrize("frames, masks", [
    ("{}/images", "{}/masks"), ("{}/JPEGImages", "{}/Annotations"), ("images/{}", "masks/{}"),
    ("JPEGImages/{}", "Annotations/{}"), ("JPEGImages/480p/{}", "Annotations/480p/{}")])
def test_plain_folders_of_frames_and_masks_are_read(tmp_path, frames, masks):
    for name in ("clip10", "clip2"):
        write(tmp_path / frames.format(name), tmp_path / masks.format(name))
    dataset = Davis(tmp_path)
    assert names(dataset) == ["clip2", "clip10"]
    assert [len(sequence.labelled) for sequence in dataset] == [6, 6]
    assert set(dataset.sequences[0].mask(0).flat) == {0, 1, 2}  # though the year says 2016


def test_a_folder_may_be_one_sequence(tmp_path):
    write(tmp_path / "cat" / "images", tmp_path / "cat" / "masks")
    (cat,) = Davis(tmp_path / "cat")
    assert cat.name == "cat" and len(cat) == 6


def test_a_set_may_be_a_folder(tmp_path):
    youtube(tmp_path / "train", names=["a"])
    youtube(tmp_path / "valid", names=["b"])
    for set_name, expected in (("train", "a"), ("val", "b"), ("valid", "b")):
        assert names(Davis(tmp_path, set=set_name)) == [expected]


def test_sequences_with_only_a_first_mask_are_segmented(tmp_path):
    """YouTube-VOS, MOSE and LVOS publish such sets for their servers; no frame is scored."""
    for sequence in Davis(youtube(tmp_path, labelled=[0])):
        assert sequence.labelled == (0,) and sequence.scored == ()
        assert sequence.first_frames == {1: 0, 2: 0} and list(sequence.reference_masks()) == [0]
        assert sequence.output_frames == tuple(range(6))


@pytest.mark.parametrize("complete", [True, False])
def test_only_the_new_object_of_a_later_mask_is_a_reference(tmp_path, complete):
    """Of a later mask only the new object is a reference."""
    root = youtube(tmp_path, labelled=None if complete else [0, 3], later=3, names=["a"])
    (sequence,) = Davis(root)
    assert sequence.first_frames == {1: 0, 2: 3}
    given = sequence.reference_masks()
    assert [np.unique(given[i]).tolist() for i in given] == [[0, 1], [0, 2]] and 3 in given
    assert sequence.scored == ((1, 2, 3, 4) if complete else ())
    if complete:
        assert [sequence.scored_objects(i) for i in (1, 3, 4)] == [[1], [1], [1, 2]]
        assert sequence.scored_objects() == [1, 2]


def test_in_davis_the_first_mask_defines_the_objects(tmp_path):
    write(tmp_path / "JPEGImages/480p/a", tmp_path / "Annotations/480p/a", later=3)
    write_list(tmp_path, "2017", "val", ["a"])
    (sequence,) = Davis(tmp_path, "2017", "val")
    assert sequence.first_frames == {1: 0} and list(sequence.reference_masks()) == [0]


@pytest.mark.parametrize("marked", [False, True])
def test_masks_are_written_for_the_frames_a_server_expects(tmp_path, marked):
    root = youtube(tmp_path, count=11, labelled=[0, 5], later=5, names=["a", "b"])
    videos = {"a": {"objects": {"1": {"category": "ant", "frames": ["00000", "00005", "00010"]},
                                "2": {"category": "bee", "frames": ["00005", "00010"]}}}}
    (root / "meta.json").write_bytes((codecs.BOM_UTF8 if marked else b"")
                                     + json.dumps({"videos": videos}).encode())
    a, b = Davis(root)
    assert a.output_frames == (0, 5, 10) and b.output_frames == tuple(range(11))


@pytest.mark.parametrize("content", ['{"videos":{}}', "{}", "[]", '{"videos": {"a": {}}}',
                                     '{"videos": {"a": {"objects": []}}}',
                                     '{"videos": {"a": {"objects": {"1": "person"}}}}',
                                     '{"videos": {"a": {"objects": {"1": {"frame_range": '
                                     '{"start": "00001", "end": "00004"}}}}}}'])
def test_a_meta_file_may_lack_frames(tmp_path, content):
    (youtube(tmp_path, names=["a"]) / "meta.json").write_text(content)
    assert Davis(tmp_path).sequences[0].output_frames == tuple(range(6))


def test_a_broken_meta_file_is_named(tmp_path):
    (youtube(tmp_path) / "meta.json").write_text("{")
    with pytest.raises(ValueError, match="meta.json.*YouTube-VOS"):
        Davis(tmp_path)


def test_frames_without_a_mask_are_reported(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (sequence,) = Davis(youtube(tmp_path, labelled=[1, 3, 4, 5], names=["a"]))
    assert sequence.labelled == (1, 3, 4, 5) and sequence.scored == (3, 4)
    assert sequence.masks[0] is None
    assert "without a mask" in caplog.text and ": a" in caplog.text


def spoil_short(root):
    for kind in ("JPEGImages", "Annotations"):
        for path in sorted((root / kind / "480p" / "bee").iterdir())[2:]:
            path.unlink()


def spoil_empty(root):
    Image.new("L", SHAPE[::-1]).save(root / "Annotations" / "480p" / "bee" / "00000.png")


def spoil_no_mask(root):
    for path in (root / "Annotations" / "480p" / "bee").iterdir():
        path.unlink()


@pytest.mark.parametrize("spoil, words", [
    (spoil_short, ["480p/bee: 2 frames", "at least 3"]),
    (spoil_empty, ["Annotations/480p/bee/00000.png: the first mask holds no object"]),
    (spoil_no_mask, ["480p/bee: no mask"])])
def test_unusable_sequences_are_skipped_and_named(davis_2016, spoil, words, caplog):
    spoil(davis_2016)
    assert names(Davis(davis_2016)) == ["ant", "cat"]
    assert all(word in caplog.text for word in ["skipped", *words])
    with pytest.raises(ValueError) as caught:
        Davis(davis_2016, names=["bee"])
    assert all(word in str(caught.value) for word in ["no usable sequence", *words])


def test_a_listed_sequence_without_its_first_mask_is_named(davis_2016):
    """Scores from a later start would not be comparable with published ones."""
    mask = davis_2016 / "Annotations" / "480p" / "bee" / "00000.png"
    mask.unlink()
    with pytest.raises(ValueError, match=f"{mask}: no such mask.*first frame of sequence bee"):
        Davis(davis_2016)
    assert names(Davis(davis_2016, names=["ant", "cat"])) == ["ant", "cat"]


def test_a_mask_without_its_frame_is_named(davis_2016):
    images.write_mask(davis_2016 / "Annotations/480p/bee/00009.png", np.ones(SHAPE, np.uint8))
    with pytest.raises(FileNotFoundError, match="bee/00009.jpg: no such frame.*bee/00009.png"):
        Davis(davis_2016)


def test_two_frames_with_the_same_name_are_refused(davis_2016):
    Image.new("RGB", SHAPE[::-1]).save(davis_2016 / "JPEGImages/480p/bee/00002.png")
    with pytest.raises(ValueError, match="bee/00002.*a second file of that name"):
        Davis(davis_2016)


def test_sequences_with_a_single_mask_are_not_trained_on(tmp_path, caplog):
    youtube(tmp_path, names=["a"], labelled=[0])
    youtube(tmp_path, names=["b"], labelled=[0, 2])
    sequences = Davis(tmp_path).sequences
    assert names(for_training(sequences)) == ["b"]
    assert "not trained on: a" in caplog.text
    with pytest.raises(ValueError, match="nothing to train on"):
        for_training(sequences[:1])


def test_a_sequence_is_a_clip(tmp_path):
    (sequence,) = Davis(youtube(tmp_path, names=["a"], suffix="png"))
    assert (sequence.count, sequence.shape, sequence.fps) == (6, SHAPE, 24.0)
    frames = [draw_frame(i, (1, 2))[0] for i in range(6)]
    np.testing.assert_array_equal(list(sequence.frames(2)), frames[2:])
    np.testing.assert_array_equal(list(sequence.frames(1, 4)), frames[1:4])
    np.testing.assert_array_equal(list(sequence.backwards(3)), frames[2::-1])
    assert [sequence.frame_name(i) for i in range(2)] == ["00000", "00001"]


# -- through the command line

def run(root, *flags) -> int:
    return main.main(["-m", "eval", "-c", "cpu", "-d", str(root), "-p", "96", "160", *flags])


@pytest.mark.slow
def test_youtube_vos_is_segmented_and_written_as_its_server_expects(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO)
    root = youtube(tmp_path / "set", count=11, labelled=[0, 5], later=5, names=["a"])
    youtube(root, count=4, labelled=[0], names=["b"])
    videos = {"a": {"objects": {"1": {"frames": ["00000", "00005", "00010"]},
                                "2": {"frames": ["00005", "00010"]}}}}
    (root / "meta.json").write_text(json.dumps({"videos": videos}))
    assert run(root, "-j", str(tmp_path / "out")) == 0
    written = {name: sorted(path.name for path in (tmp_path / "out" / name).iterdir())
               for name in ("a", "b")}
    assert written == {"a": ["00000.png", "00005.png", "00010.png"],
                       "b": [f"{i:05d}.png" for i in range(4)]}
    found = {}
    for path in sorted((tmp_path / "out" / "a").iterdir()):
        image = Image.open(path)
        assert image.mode == "P" and image.size == SHAPE[::-1]
        assert image.getpalette()[3:9] == [128, 0, 0, 0, 128, 0]
        found[path.stem] = np.array(image)
    assert not (found["00000"] == 2).any()
    assert jaccard(found["00005"] == 2, draw_frame(5, (1, 2))[1] == 2) == 1  # as given
    assert "segmented and not scored" in caplog.text
    assert not list((tmp_path / "out").glob("*results*.csv"))
    assert run(root, "-j", str(tmp_path / "out")) == 0
    assert "2 sequences were already finished" in caplog.text


@pytest.mark.slow
def test_sequences_with_ground_truth_are_scored_and_the_rest_segmented(tmp_path, capsys):
    youtube(tmp_path, names=["a"], labelled=[0])
    youtube(tmp_path, names=["b"], later=2)
    youtube(tmp_path, names=["c"], labelled=[0, 2, 4])
    assert run(tmp_path, "-j", str(tmp_path / "out")) == 0
    rows = [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:6]]
    assert rows == ["b_1", "b_2", "c_1", "c_2", "all"]
    assert len(list((tmp_path / "out" / "a").iterdir())) == 6
    assert (tmp_path / "out" / "report.html").is_file()


def test_an_object_is_scored_from_its_second_frame_on(tmp_path):
    """Only the first object is predicted, perfectly; the second counts from its second frame."""
    (sequence,) = Davis(youtube(tmp_path / "set", names=["b"], later=2))
    for i in range(6):
        images.write_mask(tmp_path / "found" / "b" / f"{i:05d}.png",
                          np.where(sequence.mask(i) == 2, 0, sequence.mask(i)))
    score = evaluate.score_folder(tmp_path / "found", [sequence], 1)["b"]
    assert score.j == {1: [1.0] * 4, 2: [0.0] * 2}  # frames 1 to 4, and 3 and 4


@pytest.mark.parametrize("code", [
    lambda mask: Image.fromarray((mask > 0).astype(np.uint8)),
    lambda mask: Image.fromarray((mask > 0).astype(np.uint8) * 255),
    lambda mask: Image.fromarray(mask > 0),
    lambda mask: Image.fromarray((mask > 0).astype(np.uint8) * 255).convert("RGBA")])
@pytest.mark.parametrize("year", ["2016", "2017"])
def test_different_encodings_of_a_mask_score_equally(davis_2016, tmp_path, code, year):
    write_list(davis_2016, "2017", "train", ["ant"])
    (ant,) = Davis(davis_2016, year, names=["ant"])
    (tmp_path / "ant").mkdir()
    for i in range(6):
        code(ant.mask(i)).save(tmp_path / "ant" / f"{i:05d}.png")
    assert evaluate.score_folder(tmp_path, [ant], 1)["ant"].j == {1: [1.0] * 4}


def test_predictions_in_davis_colours_are_scored(davis_2017, tmp_path):
    (dog,) = Davis(davis_2017, "2017", "val")
    (tmp_path / "dog").mkdir()
    for i, path in enumerate(dog.masks):
        images.write_mask(tmp_path / "ids.png", dog.mask(i))
        Image.open(tmp_path / "ids.png").convert("RGB").save(tmp_path / "dog" / path.name)
    assert evaluate.score_folder(tmp_path, [dog], 1)["dog"].j == {1: [1.0] * 4, 2: [1.0] * 4}


def test_void_in_frames_without_objects_stays_void(davis_2017, tmp_path):
    """A prediction of only background scores 1 there."""
    folder = davis_2017 / "Annotations/480p/dog"
    for i, path in enumerate(sorted(folder.iterdir())):
        mask = np.array(Image.open(path))
        mask[mask == 2] = 255
        if i > 2:
            mask[mask == 1] = 0
        Image.fromarray(mask).save(path)
    (dog,) = Davis(davis_2017, "2017", "val")
    (tmp_path / "dog").mkdir()
    for i, path in enumerate(dog.masks):
        assert set(np.unique(dog.mask(i))) == ({0, 1} if i < 3 else {0})
        Image.fromarray(dog.mask(i)).save(tmp_path / "dog" / path.name)
    assert evaluate.score_folder(tmp_path, [dog], 1)["dog"].j == {1: [1.0] * 4}
