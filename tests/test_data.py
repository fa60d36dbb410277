"""Tier 3: data sets, good and bad. Every mistake is one sentence that names file, line and remedy."""

import json

import pytest
from PIL import Image

import utils

GOOD = {"question": "<image>How many?", "answer": "3", "id": "a", "image": "images/a.png"}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (84, 84), "red").save(tmp_path / "images" / "a.png")
    (tmp_path / "images" / "text.png").write_text("not an image")
    whole = (tmp_path / "images" / "a.png").read_bytes()
    (tmp_path / "images" / "cut.png").write_bytes(whole[: len(whole) // 2])
    Image.new("RGB", (500, 2), "red").save(tmp_path / "images" / "line.png")
    return tmp_path


@pytest.fixture(scope="module")
def processor():
    return utils.load_processor("toy_model")


def load(folder, lines, processor, longest=512):
    path = folder / "data.jsonl"
    path.write_text("".join(x if isinstance(x, str) else json.dumps(x) + "\n" for x in lines))
    return utils.load_samples(path, processor, longest)


MISTAKES = [  # (rows, what the sentence must hold)
    ([GOOD, "{broken\n"], "data.jsonl, line 2: not valid JSON"),
    ([GOOD, "[1, 2]\n"], "data.jsonl, line 2: not a JSON object"),
    ([{"answer": "3"}], 'line 1: field "question" is missing, empty or no text'),
    ([{"question": "How many?"}], 'line 1: field "answer" is missing, empty or no text'),
    ([{"question": "How many?", "answer": " "}], 'field "answer" is missing, empty or no text'),
    ([GOOD | {"image": "images/b.png"}], "line 1: image images/b.png does not exist"),
    ([GOOD | {"image": "../a.png"}], "line 1: image ../a.png lies outside"),
    ([GOOD | {"image": "/etc/hostname"}], "line 1: image /etc/hostname lies outside"),
    ([GOOD | {"image": "images"}], "line 1: image images does not exist"),
    ([GOOD | {"image": "images/text.png"}], "line 1: image images/text.png cannot be read"),
    ([GOOD | {"image": "images/cut.png"}], "line 1: image images/cut.png cannot be read"),
    ([GOOD | {"image": 3}], "line 1: an image is given as 3; give its path"),
    ([GOOD | {"image": "a\0b"}], "line 1: an image is given as 'a\\x00b'"),
    ([GOOD | {"images": "images/a.png"}], "line 1: images must be a list of paths"),
    ([GOOD | {"answer": False}], 'field "answer" is missing, empty or no text'),
    ([GOOD | {"answer": float("nan")}], 'field "answer" is missing, empty or no text'),
    ([GOOD | {"image": "images/line.png"}], "line 1: the processor refuses the row"),
    ([GOOD | {"question": "<image><|im_start|>?"}], "holds the model's mark <|im_start|>"),
    ([GOOD | {"question": "How many?"}], "line 1: 0 <image> marks in the question for 1 images"),
    ([GOOD | {"question": "<image><image>?"}], "line 1: 2 <image> marks in the question for 1 images"),
    ([GOOD | {"question": "<image>a<|im_end|>"}], "holds the model's mark <|im_end|>"),
    ([GOOD, GOOD], "two rows have the same id"),
    (["\n"], "holds no rows"),
]


@pytest.mark.parametrize("lines, sentence", MISTAKES)
def test_mistakes_in_the_data(folder, processor, lines, sentence):
    with pytest.raises(utils.UserError) as error:
        load(folder, lines, processor)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_file(folder, processor):
    with pytest.raises(utils.UserError, match="none.jsonl: no such file; give the path"):
        utils.load_samples(folder / "none.jsonl", processor, 512)


def test_a_link_out_of_the_folder_is_refused(folder, processor):
    """A path that looks inside but leads outside is outside."""
    (folder / "images" / "link.png").symlink_to("/etc/hostname")
    with pytest.raises(utils.UserError, match="lies outside"):
        load(folder, [GOOD | {"image": "images/link.png"}], processor)


def test_long_prompts_are_dropped_and_said(folder, processor, capsys):
    long = GOOD | {"id": "long", "question": "<image>" + "How many? " * 50}
    kept = load(folder, [GOOD, long], processor, longest=60)
    assert [s.id for s in kept] == ["a"]
    assert "left out 1 of 2 prompts that are longer than 60 tokens: long" in capsys.readouterr().err
    with pytest.raises(utils.UserError, match="every prompt is longer than --max_prompt_tokens 5, "):
        load(folder, [GOOD], processor, longest=5)


def test_rows_of_every_kind_become_samples(folder, processor):
    """One image, several with text between, none; ids and numbers as text; blank lines skipped."""
    two = {"question": "<image>and<image>: same?", "answer": 0, "images": ["images/a.png"] * 2}
    text = {"question": "1 + 1 = ?", "answer": "2", "id": 7, "solution": "\\boxed{2}"}
    one, pair, plain = load(folder, [GOOD, "\n", two, text], processor)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    assert one.prompt_text.startswith(f"<|im_start|>user\n{mark}How many?\n{utils.INSTRUCTION}")
    assert one.prompt_text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    assert pair.prompt_text.count(mark) == 2 and f"{mark}and{mark}" in pair.prompt_text
    assert (pair.answer, pair.id) == ("0", f"{folder / 'data.jsonl'}, line 3")
    assert (plain.images, plain.id, plain.solution) == ([], "7", "\\boxed{2}")
    pads = [s.prompt_ids.count(processor.image_token_id) for s in (one, pair, plain)]
    assert pads == [9, 18, 0]  # 84 x 84 pixels: 3 x 3 merged patches


def test_grey_of_16_bits_keeps_its_grey(folder):
    """Pillow's own conversion clips I;16 at 255: nearly everything turns white."""
    Image.new("I;16", (84, 84), 40_000).save(folder / "images" / "deep.png")
    assert utils.open_image(folder / "images" / "deep.png").getpixel((0, 0)) == (156,) * 3


def test_parquet_as_hiyouga_has_it(folder, processor):
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed: parquet is not tested")
    import pyarrow.parquet

    image = {"bytes": (folder / "images" / "a.png").read_bytes(), "path": None}
    table = pyarrow.Table.from_pylist([{"images": [image], "problem": "<image>How many?", "answer": "3"}])
    pyarrow.parquet.write_table(table, folder / "data.parquet")
    (sample,) = utils.load_samples(folder / "data.parquet", processor, 512)
    assert sample.answer == "3" and sample.prompt_ids.count(processor.image_token_id) == 9
    batch = utils.collate([sample], processor)
    assert batch["inputs"]["pixel_values"].shape[0] == 36


@pytest.mark.parametrize("path", ["nowhere", "tests/nowhere", "/nowhere/at/all", "../nowhere"])
def test_a_mistyped_folder_is_not_looked_up_on_the_hub(path):
    with pytest.raises(utils.UserError, match="--model .*: no such folder; give one"):
        utils.load_processor(path)


def test_a_folder_without_a_processor_or_model(folder, tmp_path):
    with pytest.raises(utils.UserError, match="--model .*: cannot be loaded"):
        utils.load_processor(str(folder))
    with pytest.raises(utils.UserError, match="--model .*: cannot be loaded"):
        utils.load_model(str(folder))
