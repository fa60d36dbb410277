"""Tiers 1 and 3: damaged images, pixel by pixel, and evaluate.py --perturb from end to end."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
import evaluate
import utils
from conftest import IMAGES, png
from data import make_sample, Sample
from pictures import as_png, open_image
from policy import image_inputs
from runs import run
from siblings import VisionCache


HOW = ("blank", "noise", "rotate", "swap")
RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 128, 0), (0, 0, 255), (255, 255, 255)


def sample(name, *images):
    return Sample(name, "", "", "", list(images), "", [])


def pixels(source):
    return np.asarray(open_image(source))  # (height, width, 3)


def picture(rows):
    """The bytes of a picture with these rows of colours."""
    return as_png(Image.fromarray(np.array(rows, np.uint8)))


# ---------------------------------------------------------------------------------------------
# Pixels


def test_none_and_text_stay_as_they_are():
    samples = [sample("a", png("red")), sample("text")]
    assert evaluate.perturbed(samples, "none", 0) is samples
    for how in HOW:
        assert evaluate.perturbed(samples, how, 0)[1] == samples[1]


def test_blank_by_hand():
    done = evaluate.perturbed([sample("a", picture([[RED, GREEN, BLUE], [BLUE, RED, RED]]))], "blank", 0)
    assert pixels(done[0].images[0]).tolist() == [[[255] * 3] * 3] * 2


def test_rotate_by_hand():
    # a quarter anticlockwise: what was on the right is on top, what was on the left below
    #     R G                    G W
    #     B W        becomes     R B
    done = evaluate.perturbed([sample("a", picture([[RED, GREEN], [BLUE, WHITE]]))], "rotate", 0)
    assert pixels(done[0].images[0]).tolist() == np.array([[GREEN, WHITE], [RED, BLUE]]).tolist()


def test_rotate_keeps_width_and_height():
    """Left half red, right half blue, 40 x 10: afterwards blue above red, and still 40 x 10."""
    wide = picture([[RED] * 20 + [BLUE] * 20] * 10)
    turned = pixels(evaluate.perturbed([sample("a", wide)], "rotate", 0)[0].images[0])
    assert turned.shape == (10, 40, 3)
    assert (turned[:3] == BLUE).all() and (turned[-3:] == RED).all()


def test_noise_is_uniform():
    """56 x 56 x 3 = 9408 values of mean 127.5 and std 73.9: their mean is within 4 x 73.9 / 97."""
    noise = pixels(evaluate.perturbed([sample("a", png("red"))], "noise", 0)[0].images[0])
    assert noise.shape == (56, 56, 3)
    assert abs(noise.mean() - 127.5) < 3.1 and abs(noise.std() - 73.9) < 2
    assert set(noise.flatten().tolist()) == set(range(256))
    assert abs(np.corrcoef(noise[..., 0].flat, noise[..., 1].flat)[0, 1]) < 0.1  # not grey


def test_noise_depends_on_seed_id_and_place_alone():
    samples = [sample(name, png("red"), png("red")) for name in "abc"]
    done = {s.id: s.images for s in evaluate.perturbed(samples, "noise", 0)}
    assert len({image for images in done.values() for image in images}) == 6
    for some in (samples[::-1], samples[1::2], samples[:1]):  # another order; a rank's own share
        assert all(s.images == done[s.id] for s in evaluate.perturbed(some, "noise", 0))
    other = evaluate.perturbed(samples, "noise", 1)
    assert not {image for s in other for image in s.images} & {i for images in done.values() for i in images}


# ---------------------------------------------------------------------------------------------
# Swap: names in place of pictures, one colour each


COLOURS = {png(colour): colour for colour in ("red", "green", "blue", "yellow", "black")}
R, G, B, Y, K = COLOURS


def swapped(*rows, seed=0):
    """The colours that rows of images show after a swap."""
    samples = [sample(str(i), *row) for i, row in enumerate(rows)]
    done = evaluate.perturbed(samples, "swap", seed)
    return [[COLOURS[image] for image in s.images] for s in done]


@pytest.mark.parametrize("seed", range(20))
def test_swap_shows_each_picture_once_and_never_the_own(seed):
    got = swapped([R], [G], [], [B], [Y], seed=seed)
    assert got[2] == []  # no picture, none given
    assert sorted(map(tuple, got)) == [(), ("blue",), ("green",), ("red",), ("yellow",)]
    assert all(colour not in images for colour, images in zip(["red", "green", "", "blue", "yellow"], got))


@pytest.mark.parametrize("seed", range(20))
def test_swap_with_duplicates_goes_by_source(seed):
    """Four samples of five show red: each gets the only other picture, not another sample's red."""
    assert swapped([R], [R], [G], [R], [R], seed=seed) == [["green"], ["green"], ["red"], ["green"], ["green"]]


def test_swap_with_one_source_changes_nothing():
    assert swapped([R]) == [["red"]]
    assert swapped([R], [], [R]) == [["red"], [], ["red"]]


@pytest.mark.parametrize("seed", range(20))
def test_swap_of_rows_with_two_pictures(seed):
    """Two pictures and none of its own among them; where there is no other, they stay."""
    first, second, third = swapped([R, G], [B, Y], [K], seed=seed)
    assert len(first) == 2 and not set(first) & {"red", "green"}
    assert len(second) == 2 and not set(second) & {"blue", "yellow"}
    assert third != ["black"]
    assert swapped([R, G], [B], seed=seed)[0] == ["blue", "blue"]
    assert swapped([R, G], seed=seed) == [["red", "green"]]


def test_swap_depends_on_the_seed():
    rows = [[image] for image in COLOURS]
    assert swapped(*rows, seed=3) == swapped(*rows, seed=3)
    assert len({str(swapped(*rows, seed=seed)) for seed in range(10)}) > 3


def test_swap_takes_the_size_of_the_original():
    wide, high = picture([[RED] * 40] * 10), picture([[BLUE] * 10] * 30)
    first, second = evaluate.perturbed([sample("a", wide), sample("b", high)], "swap", 0)
    assert pixels(first.images[0]).shape == (10, 40, 3) and (pixels(first.images[0]) == BLUE).all()
    assert pixels(second.images[0]).shape == (30, 10, 3) and (pixels(second.images[0]) == RED).all()


# ---------------------------------------------------------------------------------------------
# Prompts, processors and caches


@pytest.mark.parametrize("how", HOW)
def test_the_given_samples_stay_as_they_are(qwen, how):
    before = [replace(s, images=[*s.images]) for s in qwen.samples]
    first, second = (evaluate.perturbed(qwen.samples, how, 5) for _ in range(2))
    assert qwen.samples == before and first == second
    for old, new in zip(before, first):
        assert replace(new, images=old.images) == old  # all but the images
        assert all(isinstance(image, bytes) for image in new.images)


@pytest.mark.parametrize("how", HOW)
def test_grids_and_prompts_still_fit(tiny, tmp_path, how):
    """Odd sizes, every mode, an EXIF turn, two images: what the processor sees has the same grid."""
    rng = random.Random(how)
    sizes = [(rng.randint(1, 300), rng.randint(2, 300)) for _ in range(12)]
    sizes = [size for size in sizes if max(size) < 100 * min(size)] + [(29, 57), (200, 27), (1, 90)]
    rows = [{"id": str(size), "question": "<image>What?", "answer": "1",
             "images": [as_png(Image.new("RGB", size, "green"))]} for size in sizes]
    samples = tiny.samples + [make_sample(row, tmp_path, row["id"], tiny.processor) for row in rows]
    grids = set()
    for old, new in zip(samples, evaluate.perturbed(samples, how, 0), strict=True):
        for before, after in zip(old.images, new.images, strict=True):
            assert open_image(before).size == open_image(after).size
            before, after = (image_inputs(tiny.processor, x)["image_grid_thw"]
                             for x in (before, after))
            assert torch.equal(before, after)
            grids.add(tuple(after[0].tolist()))
        row = {"id": new.id, "question": new.question, "answer": new.answer, "images": new.images}
        assert make_sample(row, tmp_path, new.id, tiny.processor).prompt_ids == old.prompt_ids
    assert len(grids) > 5 and len(samples) > len(IMAGES) + 12


def test_bytes_are_keys_of_the_vision_cache(qwen):
    """Each damaged image has features of its own; equal bytes are one entry, and a path another."""
    cache = VisionCache(qwen.processor, 100)
    old = qwen.samples[0].images[0]
    white, again = (evaluate.perturbed(qwen.samples[:1], "blank", seed)[0].images[0] for seed in (0, 1))
    noise = evaluate.perturbed(qwen.samples[:1], "noise", 0)[0].images[0]
    found = [cache.computed(qwen.model.base_model, image)[1][0] for image in (old, white, again, noise)]
    assert list(cache.kept) == [old, white, noise]
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[0], found[1]) and not torch.allclose(found[1], found[3])


# ---------------------------------------------------------------------------------------------
# The command


def test_evaluate_says_how_it_damaged_the_images(data, tmp_path):
    words = ["evaluate.py", "--data", data / "validation.jsonl", "--limit", 16, "--settings",
             "pass1_t0.01", "--out", tmp_path / "blank", "--perturb", "blank"]
    result, _ = run(*words)
    rows = utils.read_jsonl(tmp_path / "blank" / "eval.jsonl")
    assert result["perturb"] == "blank"
    assert result == json.loads((tmp_path / "blank" / "result.json").read_text())
    assert [(row["perturb"], row["split"], row["n"]) for row in rows] == [
        ("blank", str(data / "validation.jsonl"), 16)]
    # over white pictures nothing has any colour: the answer to "how many red?" is the same each time
    done = utils.read_jsonl(tmp_path / "blank" / "samples" / "pass1_t0.01.jsonl")
    answers = {(s["question"], s["completion_text"]) for s in done}
    assert len(answers) == len({question for question, _ in answers})
