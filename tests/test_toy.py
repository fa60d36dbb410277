"""The toy's own promises that cost nothing to check: what a base is shown, and pictures without content."""

import random

import pytest
from PIL import Image

import toy
import utils


def shown_to_a_base(monkeypatch, tmp_path, without):
    """200 responses of each course of `--build`, as text, in place of the training."""
    texts = []

    def look(policy, processor, stream, steps, lr):
        ids = [next(stream).completion_ids for _ in range(200)]
        texts.append([processor.tokenizer.decode(row, skip_special_tokens=True) for row in ids])

    monkeypatch.setattr(toy, "teach", look)
    toy.build(toy.Args(model=str(tmp_path / "base"), without=without))
    return texts


def test_a_base_without_a_habit_is_never_shown_it(monkeypatch, tmp_path):
    """No course holds it; the others keep their shares among themselves."""
    see, habits, shares = shown_to_a_base(monkeypatch, tmp_path, "Let me see")
    assert not any("wait" in text or "Let me see" in text for text in see + habits + shares)
    quick = sum(text.startswith("Quick look") for text in shares) / 200
    assert quick == pytest.approx(0.38 / (0.32 + 0.38 + 0.12), abs=0.1)
    _, habits, shares = shown_to_a_base(monkeypatch, tmp_path, "")
    assert sum(text.startswith("Let me see") for text in habits) == pytest.approx(0.6 * 200, abs=25)
    assert any("wait, re-check" in text for text in shares)


def test_an_unknown_habit_is_refused(tmp_path):
    with pytest.raises(utils.UserError, match="--without 'wait' is no habit"):
        toy.build(toy.Args(model=str(tmp_path / "base"), without="wait"))
    assert not (tmp_path / "base").exists()


def test_blank_data_differs_in_its_pictures_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(toy, "SPLITS", {"train": 8, "validation": 4, "test": 4})
    toy.write_data(tmp_path / "real")
    toy.write_data(tmp_path / "blank", blank=True)
    for name in toy.SPLITS:
        real, blank = (utils.read_jsonl(tmp_path / f / f"{name}.jsonl") for f in ("real", "blank"))
        assert real == blank and len(real) == toy.SPLITS[name]
    for path in (tmp_path / "real" / "images").iterdir():
        white = Image.open(tmp_path / "blank" / "images" / path.name)
        assert white.size == Image.open(path).size and white.getcolors() == [(84 * 84, (255, 255, 255))]


def test_reading_rows_by_hand():
    """Two reds in rows 1 and 3; a doubted row is read once wrongly, then once more."""
    scene = (("red", "circle"), None, None, None, ("blue", "square"), None, None, None, ("red", "square"))
    assert toy.row_by_row(scene, "red", random.Random(0), slip=0) == (
        "Row by row. row 1: red - - makes 1. row 2: - blue - makes 1. row 3: - - red makes 2. \\boxed{2}")
    text = toy.read_rows("Let me see.", toy.grid_rows(scene), "red", 1, ["red", "blue", "-"])
    assert text == ("Let me see. row 1: red - - makes 1. row 2: red blue - makes 2. wait, re-check row 2: "
                    "- blue - makes 1. row 3: - - red makes 2. \\boxed{2}")
