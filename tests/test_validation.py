"""Arguments of the library: accepted in any sensible form, or refused by name."""

import numpy as np
import pytest
import torch
from conftest import draw_frame

import metrics
import preprocess
from masks.validation import binary_mask, id_mask
from media.prompts import Prompts
from tracking import prompting
from tracking.tracker import Tracker

IMAGE, MASK = draw_frame(0, (1, 2))
ONE = MASK == 1

BAD_MASKS = {  # and words of the message
    "probabilities": (ONE * 0.9, "float64"),
    "whole floats": (ONE.astype(np.float32), "float32"),
    "above 255": (np.where(ONE, 257, 0), "257"),
    "below 0": (np.where(ONE, 1, -1), "-1"),
    "three dimensions": (MASK[None], "1, 48, 80"),
    "empty": (MASK[:0], "0, 80"),
    "void": (np.where(ONE, 255, MASK), "not labelled"),
    "objects": (MASK.astype(object), "object"),
}


@pytest.mark.parametrize("kind", BAD_MASKS)
def test_an_invalid_mask_is_refused_by_name(kind, model):
    mask, words = BAD_MASKS[kind]
    with pytest.raises(ValueError, match=f"^mask: .*{words}"):
        Tracker(model).step(preprocess.to_tensor(IMAGE), mask)


@pytest.mark.parametrize("as_given", [
    MASK.astype(np.int64), MASK.astype(np.uint16), torch.from_numpy(MASK), MASK[:, ::-1][:, ::-1],
    MASK.tolist()])
def test_any_integer_type_gives_the_same_ids(as_given):
    found = id_mask(as_given)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, MASK)


def test_a_bool_mask_is_object_1(model):
    step = Tracker(model).step(preprocess.to_tensor(IMAGE), ONE)
    assert step.object_ids == (1,)
    np.testing.assert_array_equal(step.mask, ONE)


@pytest.mark.parametrize("image, words", [
    (torch.from_numpy(IMAGE).permute(2, 0, 1), "uint8"),
    (torch.from_numpy(IMAGE).permute(2, 0, 1).float(), "normalised"),
    (torch.full((3, 48, 80), torch.nan), "nan"),
    (torch.zeros(48, 80, 3), "48, 80, 3"),
    (torch.zeros(1, 3, 48, 80), "1, 3, 48, 80"),
    (None, "NoneType")])
def test_an_image_that_the_network_cannot_take_is_refused_by_name(image, words, model):
    with pytest.raises(ValueError, match=f"^image: .*{words}"):
        Tracker(model).step(image, MASK)


@pytest.mark.parametrize("image, mask, words", [
    (torch.zeros(3, 48, 80), torch.zeros(48, 80).long(), r"^image: .*\(B, 3, H, W\)"),
    (torch.zeros(1, 3, 48, 80), torch.zeros(1, 48, 80).long(), r"^mask: .*\(H, W\)"),
    (torch.zeros(1, 3, 48, 80), torch.zeros(48, 80), "^mask: .*float32")])
def test_refer_names_the_invalid_argument(image, mask, words, model):
    with pytest.raises(ValueError, match=words):
        model.add_reference(None, image, mask, [1])


@pytest.mark.parametrize("image, words", [
    (IMAGE / 255, "float64"), (IMAGE[..., 0], "48, 80"), (IMAGE.transpose(2, 0, 1), "3, 48, 80")])
def test_to_tensor_takes_frames_as_they_are_read(image, words):
    with pytest.raises(ValueError, match=f"^image: .*{words}"):
        preprocess.to_tensor(image)


@pytest.mark.parametrize("measure", [metrics.jaccard, metrics.boundary_f])
@pytest.mark.parametrize("one, other, words", [
    (ONE * 0.9, ONE, "^prediction: .*float64"), (ONE, ONE * 0.9, "^truth: .*float64"),
    (MASK, ONE, "^prediction: .*2"), (ONE, ONE[:-1], "^prediction, truth: .*47, 80"),
    (ONE[None], ONE, "^prediction: .*1, 48, 80")])
def test_measures_name_the_invalid_argument(measure, one, other, words):
    with pytest.raises(ValueError, match=words):
        measure(one, other)


def test_scores_depend_only_on_ids():
    for prediction, truth, words in ((ONE * 0.9, MASK, "^prediction"), (MASK, ONE * 0.9, "^truth"),
                                     (MASK, MASK[:-1], "^prediction, truth")):
        with pytest.raises(ValueError, match=words):
            metrics.score_frame(prediction, truth, [1])
    assert metrics.score_frame(MASK.astype(int), torch.from_numpy(MASK), [1, 2]) == [(1, 1)] * 2
    with pytest.raises(ValueError, match="^values"):
        metrics.statistics([])


@pytest.mark.parametrize("value", [2, 255, -1])
def test_a_mask_of_one_object_holds_0_and_1(value):
    with pytest.raises(ValueError, match=f"^truth: .*{value}"):
        binary_mask(np.where(ONE, value, 0), "truth")


@pytest.mark.parametrize("shown, words", [
    (Prompts(boxes=[(1, 2, 3)]), "--box: expected x y width height"),
    (Prompts(points=[(1, 2, 3)]), "--point: expected x y"),
    (Prompts(points=[(1, 2)], negative_points=[7]), "--negative_point: expected x y"),
    (Prompts(mask=MASK), "mask: expected bool, got uint8"),
    (Prompts(mask=ONE[:-1]), "mask of 80x48")])
def test_malformed_prompts_are_refused(shown, words, model):
    with pytest.raises(ValueError, match=words):
        prompting.predict_mask(model, IMAGE, shown)


def test_prompts_take_frames_as_they_are_read(model):
    with pytest.raises(ValueError, match="^image: .*float32"):
        prompting.predict_mask(model, IMAGE.astype(np.float32), Prompts(points=[(3, 4)]))
