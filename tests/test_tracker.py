"""The tracker of one video: its masks, its state, and that the network holds none of it."""

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import SHAPE, draw_frame

import preprocess
from network.encoder import Encoder
from tracking.tracker import Tracker
from videomatch import METHODS, SHIPPED, VideoMatch


def frame(step, ids=(1,), scale=1):
    image, mask = (x.repeat(scale, 0).repeat(scale, 1) for x in draw_frame(step, ids))
    return preprocess.to_tensor(image), mask


def frame_without(step, object_id, ids, scale):
    """The image of a frame from which one of the objects is erased."""
    image, mask = draw_frame(step, ids)
    image[mask == object_id] = draw_frame(step + 1, ())[0][mask == object_id]
    return preprocess.to_tensor(image.repeat(scale, 0).repeat(scale, 1))


def intersection_over_union(a, b):
    return (a & b).sum() / (a | b).sum()


@pytest.fixture(params=METHODS)
def any_method(request):
    """The shipped network with each method."""
    model = VideoMatch.load(SHIPPED["mobilenet"]).eval()
    # a confidence low enough that the online update adds features
    model.method, model.confidence = request.param, 0.6
    return model


def test_propagates_a_mask_to_another_frame(model):
    tracker = Tracker(model, outlier_removal=False)
    tracker.step(*frame(0, scale=4))
    test, truth = frame(5, scale=4)
    predicted = tracker.step(test).mask
    assert predicted.dtype == np.uint8 and set(np.unique(predicted)) == {0, 1}
    assert intersection_over_union(predicted, truth) > 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vgg", "resnet"])
def test_large_encoders_with_random_weights_propagate_a_mask(name):
    torch.manual_seed(0)
    tracker = Tracker(VideoMatch(Encoder(name), top_k=20).eval())
    tracker.step(*frame(0, scale=4))
    test, truth = frame(2, scale=4)
    assert intersection_over_union(tracker.step(test).mask, truth) > 0.5


@pytest.mark.parametrize("ids", [(1,), (1, 2), (3, 200)])
def test_step_returns_mask_and_probabilities(model, ids):
    tracker = Tracker(model)
    image, mask = frame(0, ids)
    reference = tracker.step(image, mask)
    np.testing.assert_array_equal(reference.mask, mask)
    for channel, i in enumerate((0, *ids)):
        np.testing.assert_array_equal(reference.probabilities[channel].numpy(), mask == i)
    predicted = tracker.step(frame(1, ids)[0], shape=(30, 50))
    assert predicted.object_ids == tracker.object_ids == ids
    assert predicted.mask.shape == (30, 50) and set(np.unique(predicted.mask)) <= {0, *ids}
    assert predicted.probabilities.shape == (len(ids) + 1, 30, 50)
    torch.testing.assert_close(predicted.probabilities.sum(0), torch.ones(30, 50))


def test_confidence_is_the_mean_probability_over_the_mask(model):
    tracker = Tracker(model)
    assert tracker.step(*frame(0, (3, 7))).confidence() == {3: 1.0, 7: 1.0}
    step = tracker.step(frame(1, (3, 7))[0])
    for channel, i in enumerate((3, 7), start=1):
        inside = step.mask == i
        assert inside.any() and not inside.all()
        expected = step.probabilities.numpy()[channel][inside].mean()
        assert step.confidence()[i] == pytest.approx(expected, rel=1e-5)
    assert replace(step, mask=0 * step.mask).confidence() == {3: 0.0, 7: 0.0}


def test_an_object_missing_from_a_later_mask_is_predicted(model):
    tracker = Tracker(model, outlier_removal=False)
    tracker.step(*frame(0, (1, 2), scale=4))
    image, both = frame(2, (1, 2), scale=4)
    second = np.where(both == 2, 2, 0).astype(np.uint8)
    expected = tracker.copy().step(image).mask
    predicted = tracker.step(image, second).mask
    np.testing.assert_array_equal(predicted, np.where(second == 2, 2, expected * (expected == 1)))
    image, both = frame(4, (1, 2), scale=4)
    assert intersection_over_union(tracker.step(image).mask == 1, both == 1) > 0.5


def test_an_empty_later_mask_means_that_no_object_is_visible(model):
    tracker = Tracker(model)
    tracker.step(*frame(0, (1, 2), scale=4))
    image, both = frame(1, (1, 2), scale=4)
    assert not tracker.step(image, 0 * both).mask.any()
    image, both = frame(2, (1, 2), scale=4)
    predicted = tracker.step(image).mask
    assert tracker.object_ids == (1, 2) and predicted.shape == both.shape


def test_a_removed_object_stays_removed_and_the_other_is_tracked(any_method):
    tracker = Tracker(any_method, outlier_removal=False)
    tracker.step(*frame(0, (1, 2), scale=2))
    tracker.step(frame(1, (1, 2), scale=2)[0])
    both = tracker.copy()
    tracker.remove(1)
    assert tracker.object_ids == (2,) and both.object_ids == (1, 2)
    for i in range(2, 4):
        image, truth = frame(i, (1, 2), scale=2)
        step = tracker.step(image)
        assert not (step.mask == 1).any() and step.object_ids == (2,)
        assert intersection_over_union(step.mask == 2, truth == 2) > 0.5
        torch.testing.assert_close(step.probabilities.sum(0), torch.ones(truth.shape))
    image, truth = frame(2, (1, 2), scale=2)
    assert intersection_over_union(both.step(image).mask == 1, truth == 1) > 0.5


def test_a_removed_object_returns_with_a_later_mask(any_method):
    tracker = Tracker(any_method, outlier_removal=False)
    tracker.step(*frame(0, (1, 2), scale=2))
    tracker.remove(1)
    tracker.step(frame_without(1, 1, (1, 2), scale=2))
    tracker.step(*frame(2, (1, 2), scale=2))
    assert set(tracker.object_ids) == {1, 2}
    image, truth = frame(3, (1, 2), scale=2)
    predicted = tracker.step(image).mask
    for i in (1, 2):
        assert intersection_over_union(predicted == i, truth == i) > 0.5


def test_after_the_last_object_is_removed_masks_are_empty(any_method):
    tracker = Tracker(any_method)
    tracker.step(*frame(0, scale=2))
    with pytest.raises(ValueError, match=r"object_id: expected one of \[1\], got 2"):
        tracker.remove(2)
    tracker.remove(1)
    restored = Tracker(any_method)
    restored.load_state(tracker.state())
    for one in (tracker, restored):
        image, mask = frame(1, scale=2)
        step = one.step(image, shape=(30, 50))
        assert step.object_ids == one.object_ids == () and not step.mask.any()
        assert step.mask.shape == (30, 50) and (step.probabilities == 1).all()
        assert not one.step(image, 0 * mask).mask.any()
        assert one.step(image, mask).object_ids == (1,)
        assert one.step(image).mask.any()


def test_an_absent_object_is_not_predicted_and_may_return(any_method):
    tracker = Tracker(any_method, outlier_removal=False)
    tracker.step(*frame(0, (1, 2), scale=2))
    image, both = frame(1, (1, 2), scale=2)
    for mask in (None, 0 * both, np.where(both == 2, 2, 0)):
        one = tracker.copy()
        predicted = one.step(image, mask, absent=(1,)).mask
        assert not (predicted == 1).any() and one.object_ids == (1, 2)
        assert intersection_over_union(predicted == 2, both == 2) > 0.5
    tracker.step(frame_without(2, 1, (1, 2), scale=2), absent={1})
    image, both = frame(3, (1, 2), scale=2)
    assert intersection_over_union(tracker.step(image).mask == 1, both == 1) > 0.5


def test_threshold(model):
    start = Tracker(model, outlier_removal=False)
    start.step(*frame(0))
    test = frame(1)[0]
    predicted = model.predict(start.memory, model.encode(test[None]), tuple(test.shape[1:]))
    foreground = predicted[1].detach().numpy()
    for threshold in (0.2, 0.5, 0.9):
        tracker = Tracker(model, threshold, outlier_removal=False)
        tracker.step(*frame(0))
        np.testing.assert_array_equal(tracker.step(test).mask == 1,
                                      1 - (1 - foreground) > threshold)


def test_the_first_frame_requires_a_mask_with_an_object(model):
    with pytest.raises(ValueError, match="mask: the first frame needs one"):
        Tracker(model).step(frame(0)[0])
    with pytest.raises(ValueError, match="no object"):
        Tracker(model).step(frame(0)[0], np.zeros(SHAPE, np.uint8))


def moving_spot(model, monkeypatch, places, size=8, **options):
    """Track a square whose predicted probability is 1 at given places, in frames of 60x200.

    Args:
        places: for each frame the x of the left edges of all squares; the first one's are in the
            reference mask.
        size: side of a square, in pixels.

    Returns:
        For each frame after the first, the left edges of the squares in its mask.
    """
    shape = (60, 200)

    def draw(lefts):
        mask = np.zeros(shape, np.uint8)
        for x in lefts:
            mask[20:20 + size, x:x + size] = 1
        return mask

    masks = iter([draw(lefts) for lefts in places[1:]])

    def predict(state, features, shape):
        mask = torch.from_numpy(next(masks)).float()
        return torch.stack([1 - mask, mask])

    tracker = Tracker(model, **options)
    tracker.step(torch.zeros(3, *shape), draw(places[0]))
    monkeypatch.setattr(model, "predict", predict)
    results = [tracker.step(torch.zeros(3, *shape)).mask for _ in places[1:]]
    return [sorted({int(x) // size * size for x in np.nonzero(r)[1]}) for r in results]


def test_outliers_are_removed_and_the_object_is_tracked(model, monkeypatch):
    model.dilation = 20
    predicted = moving_spot(model, monkeypatch, [(0,), (8, 160), (24, 160), (40,)])
    assert predicted == [[8], [24], [40]]


def test_outliers_stay_without_outlier_removal(model, monkeypatch):
    model.dilation = 20
    predicted = moving_spot(model, monkeypatch, [(0,), (8, 160)], outlier_removal=False)
    assert predicted == [[8, 160]]


def test_a_vanished_object_may_reappear_anywhere(model, monkeypatch):
    model.dilation = 20
    predicted = moving_spot(model, monkeypatch, [(0,), (), (), (160,), (168, 0)])
    assert predicted == [[], [], [160], [168]]


def test_an_object_that_jumped_too_far_is_predicted_one_frame_later(model, monkeypatch):
    model.dilation = 20
    assert moving_spot(model, monkeypatch, [(0,), (160,), (160,)]) == [[], [160]]


@pytest.mark.parametrize("scale", [1, 3])
def test_the_dilation_is_in_pixels_of_the_network_input(scale, model, monkeypatch):
    """The mask may be larger: here a square moves by 15 pixels of the input."""
    def predict(state, features, shape):
        mask = torch.zeros(shape)
        mask[20 * scale:28 * scale, 23 * scale:31 * scale] = 1
        return torch.stack([1 - mask, mask])

    first = np.zeros((60, 200), np.uint8)
    first[20:28, :8] = 1
    monkeypatch.setattr(model, "predict", predict)
    for model.dilation, area in ((14, 0), (23, 64)):
        tracker = Tracker(model)
        tracker.step(torch.zeros(3, 60, 200), first)
        mask = tracker.step(torch.zeros(3, 60, 200), shape=(60 * scale, 200 * scale)).mask
        assert mask.sum() == area * scale ** 2


def test_masks_belong_to_the_caller(model):
    """Changing one, as for writing it as 0 and 255, does not change what is tracked."""
    untouched, changed = Tracker(model), Tracker(model)
    image, mask = frame(0, scale=4)
    untouched.step(image, mask)
    for result in (changed.step(image, mask).mask, mask):
        result[result > 0] = 255
    for step in (1, 2):
        image = frame(step, scale=4)[0]
        result = changed.step(image).mask
        np.testing.assert_array_equal(result, untouched.step(image).mask)
        assert result.any()
        result[result > 0] = 255


def test_a_tracker_that_has_seen_no_frame_can_be_saved(model):
    tracker = Tracker(model)
    tracker.load_state(Tracker(model).state())
    assert tracker.previous is None and tracker.step(*frame(0)).mask.any()


def test_method_memory_requires_frames_of_one_size():
    model = VideoMatch(Encoder("mobilenet"), 2.0, top_k=3, refined=True).eval()
    mask = np.zeros((64, 96), np.uint8)
    mask[20:40, 30:60] = 1
    tracker = Tracker(model)
    tracker.step(torch.randn(3, 64, 96), mask)
    with pytest.raises(ValueError, match=r"size of the reference frame.*\(6, 6\)"):
        tracker.step(torch.randn(3, 96, 96))
    with pytest.raises(ValueError, match="size of the reference frame"):
        tracker.step(torch.randn(3, 96, 96), np.ones((96, 96), np.uint8))
    model.method, tracker = "matching", Tracker(model)
    tracker.step(torch.randn(3, 64, 96), mask)
    assert tracker.step(torch.randn(3, 96, 96)).mask.shape == (96, 96)


def clip(ids, start=0, later=None):
    """Six frames of 96x160, the first with a mask; the mask of frame `later` adds the last object.

    Yields:
        Image and mask of each frame; None for a frame without a mask.
    """
    for i in range(6):
        image, mask = frame(start + i, ids, scale=2)
        labelled = np.where(mask == ids[-1], 0, mask) if later and i < later else mask
        yield image, labelled if i in (0, later) else None


def track(tracker, frames):
    """Track (image, mask) pairs; returns all masks and all probabilities."""
    steps = [tracker.step(image, mask) for image, mask in frames]
    return [step.mask for step in steps], [step.probabilities for step in steps]


def assert_same(actual, expected):
    """Compare two results of `track`."""
    for masks in zip(actual[0], expected[0], strict=True):
        np.testing.assert_array_equal(*masks)
    assert all(torch.equal(*pair) for pair in zip(actual[1], expected[1], strict=True))


def attributes(model):
    """All attributes of a module and its submodules other than weights, by name."""
    return {f"{name}.{key}": copy.copy(value) for name, module in model.named_modules()
            for key, value in vars(module).items()
            if key not in ("_modules", "_parameters", "_buffers")}


def test_tracking_does_not_change_the_network(any_method):
    model = any_method
    before, weights = attributes(model), copy.deepcopy(model.state_dict())
    children = {name: id(module) for name, module in model.named_modules()}
    track(Tracker(model), clip((1, 2), later=3))
    assert attributes(model) == before
    assert {name: id(module) for name, module in model.named_modules()} == children
    assert model.state_dict().keys() == weights.keys()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_videos_tracked_at_the_same_time_are_independent(any_method):
    clips = [list(clip((1, 2), later=2)), list(clip((3, 200), start=4))]
    one_by_one = [track(Tracker(any_method), frames) for frames in clips]
    assert any((a != b).any() for a, b in zip(one_by_one[0][0], one_by_one[1][0]))
    trackers = [Tracker(any_method) for _ in clips]
    interleaved = [([], []), ([], [])]
    for frames in zip(*clips):
        for tracker, (all_masks, all_probabilities), pair in zip(trackers, interleaved, frames):
            masks, probabilities = track(tracker, [pair])
            all_masks.extend(masks)
            all_probabilities.extend(probabilities)
    with ThreadPoolExecutor(2) as pool:
        in_threads = list(pool.map(lambda frames: track(Tracker(any_method), frames), clips))
    for results in (interleaved, in_threads):
        for actual, expected in zip(results, one_by_one, strict=True):
            assert_same(actual, expected)


def test_a_copy_continues_from_the_frame_it_was_taken_at(any_method):
    frames = list(clip((1, 2), later=4))
    tracker = Tracker(any_method, threshold=0.4)
    track(tracker, frames[:3])
    kept = tracker.copy()
    expected = track(tracker, frames[3:])
    assert kept.object_ids == (1,) and tracker.object_ids == (1, 2)
    # a copy of the copy tracks other frames first, which must not affect the one it came from
    track(kept.copy(), clip((1,), start=3))
    assert_same(track(kept, frames[3:]), expected)


def test_a_copy_shares_its_tensors(any_method):
    tracker = Tracker(any_method)
    track(tracker, clip((1, 2)))
    own, of_copy = ({t.data_ptr() for t in tensors(t.state())} for t in (tracker, tracker.copy()))
    assert own and own == of_copy


def tensors(value):
    """Yield all tensors in nested lists, tuples and dicts."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors(item)


@pytest.mark.slow
def test_the_state_does_not_grow_with_the_video(any_method):
    tracker, sizes = Tracker(any_method), []
    tracker.step(*frame(0))
    for i in range(36):
        tracker.step(frame(1 + i % 3)[0])
        sizes.append(sum({t.data_ptr(): t.untyped_storage().nbytes()
                          for t in tensors(tracker.state())}.values()))
    assert max(sizes[26:]) <= max(sizes[:26])


@pytest.mark.slow
@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_state_can_be_saved_and_loaded(any_method, at):
    frames = list(clip((1, 2), later=4))
    tracker = Tracker(any_method)
    track(tracker, frames[:at])
    file = io.BytesIO()
    torch.save(tracker.state(), file)
    expected = track(tracker, frames[at:])
    file.seek(0)
    restored = Tracker(any_method)
    restored.load_state(torch.load(file, weights_only=True))
    assert_same(track(restored, frames[at:]), expected)
    assert restored.object_ids == tracker.object_ids and restored.shares == tracker.shares


def test_an_invalid_state_is_rejected(any_method):
    tracker = Tracker(any_method)
    track(tracker, clip((1, 2)))
    state = tracker.state()
    for broken in ({}, {"kind": "Popen"}, dict(list(state["memory"].items())[1:])):
        with pytest.raises((KeyError, TypeError)):
            Tracker(any_method).load_state({**state, "memory": broken})


def test_the_state_consists_of_tensors_whose_shapes_do_not_depend_on_the_frames(shipped):
    shapes = []
    for start, ids in ((0, (1, 2)), (3, (3, 200))):
        tracker = Tracker(shipped)
        for image, mask in clip(ids, start):
            tracker.step(image, mask)
            shapes.append([tuple(x.shape) for x in tracker.memory])
            assert all(type(x) is torch.Tensor for x in tracker.memory)
    assert all(shape == shapes[0] for shape in shapes)


def test_shapes_of_the_state_do_not_depend_on_later_masks(shipped):
    image, mask = frame(0, (1, 2), scale=2)
    shapes = []
    for later in (mask, np.where(mask == 1, 1, 0), 0 * mask):
        tracker = Tracker(shipped)
        tracker.step(image, mask)
        tracker.step(image, later.astype(np.uint8))
        shapes.append([tuple(x.shape) for x in tracker.memory])
    assert shapes[0] == shapes[1] == shapes[2]


def test_a_step_does_not_modify_the_state_before_it(shipped):
    tracker = Tracker(shipped)
    frames = list(clip((1, 2), later=5))
    track(tracker, frames[:3])
    state, clones = tracker.memory, [x.clone() for x in tracker.memory]
    track(tracker, frames[3:])
    assert all(torch.equal(x, clone) for x, clone in zip(state, clones, strict=True))
