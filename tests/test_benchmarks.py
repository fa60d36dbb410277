"""Benchmarks: files with the published columns and types become rows that load, picture for picture, and are judged.

The columns are those of the hub's dataset cards; each file is written both by `datasets` and by plain pyarrow.
"""

import base64
import io
import json
import math
import re
import shutil
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

import benchmarks
import policy
import utils
from benchmarks import BENCHMARKS, choice, convert
from data import INSTRUCTION, load_samples
from reward import accuracy_reward, is_equal
from runs import fork, run
from test_house import ROOT
from test_pages import LESSON, section

TEXT = "string"


@pytest.fixture(scope="module")
def processor():
    return policy.load_processor(str(ROOT / "toy_model"))


def encoded(colour, kind="PNG", mode="RGB", size=(56, 56), **more):
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind, **more)
    return file.getvalue()


JPEG, PNG, CLEAR = encoded("red", "JPEG"), encoded("blue"), encoded((0, 200, 0, 90), mode="RGBA")
GREY, WEBP = encoded(77, mode="L"), encoded("yellow", "WEBP")
CUT = encoded("red", "JPEG", size=(300, 300))[:1000]  # with a whole header
MOVING = encoded("red", "GIF", save_all=True, append_images=[Image.new("RGB", (56, 56), "blue")])  # data.py refuses it


def features(columns):
    import datasets

    kinds = {"image": datasets.Image(), "images": datasets.Sequence(datasets.Image()),
             "list": datasets.Sequence(datasets.Value(TEXT))}

    def kind(name):
        if isinstance(name, dict):
            return {key: kind(value) for key, value in name.items()}
        return kinds.get(name) or datasets.Value(name)

    return datasets.Features(kind(columns))


def write(path, columns, rows, writer):
    """A parquet file with these columns, missing ones null, by `datasets` or by plain pyarrow."""
    import datasets

    def held(value):  # as the hub's Image column holds a picture
        value = [held(part) for part in value] if isinstance(value, list) else value
        return {"bytes": value, "path": None} if isinstance(value, bytes) else value

    schema = features(columns)
    rows = [{name: held(row.get(name)) for name in columns} for row in rows]
    if writer == "datasets":
        datasets.Dataset.from_list(rows, features=schema).to_parquet(path)
    else:
        table = pyarrow.Table.from_pylist(rows, schema=schema.arrow_schema.remove_metadata())
        pyarrow.parquet.write_table(table, path)
    return str(path)


# Of each benchmark its columns, and rows; of a row what is published, its pictures in the order of the marks, parts of
# the question in their order, right answers, and wrong ones; or why it is left out
MMMU_IMAGES = {f"image_{n}": "image" for n in range(1, 8)}
PUBLISHED = {
    "geometry3k": (
        {"images": "images", "problem": TEXT, "answer": TEXT, "id": "int64", "choices": "list", "ground_truth": TEXT}, [
        ({"images": [PNG], "problem": "<image>Find x.", "answer": "4 \\sqrt { 2 }", "id": 7,
          "choices": ["4", "4 \\sqrt { 2 }", "5", "6"], "ground_truth": "B"},
         [PNG], ["<image>Find x."], ["4\\sqrt{2}"], ["4", "B"]),
        ({"images": [CLEAR, JPEG], "problem": "<image>and <image>Find y.", "answer": "20", "id": 8},
         [CLEAR, JPEG], ["<image>and <image>Find y."], ["20"], ["21"]),
        ({"images": [PNG], "problem": "<image>Find <image> z.", "answer": "20", "id": 9}, "a mark has no picture")]),
    "mathvista": (
        {"pid": TEXT, "question": TEXT, "image": TEXT, "decoded_image": "image", "choices": "list", "unit": TEXT,
         "precision": "float64", "answer": TEXT, "question_type": TEXT, "answer_type": TEXT, "query": TEXT,
         "metadata": {"category": TEXT, "context": TEXT, "grade": TEXT, "img_height": "int64", "img_width": "int64",
                  "language": TEXT, "skills": "list", "source": TEXT, "split": TEXT, "task": TEXT}}, [
        ({"pid": "1", "question": "When?", "image": "images/1.jpg", "decoded_image": JPEG, "precision": 1.0,
          "answer": "1.2", "question_type": "free_form", "answer_type": "float",
          "query": "Hint: one decimal place, e.g., 1.2, at the end.\nQuestion: When? (Unit: s)", "unit": "s",
          "metadata": {"task": "figure question answering", "source": "FunctionQA", "img_height": 56, "skills": ["a"]}},
         [JPEG], ["<image>Hint: one decimal", "Question: When? (Unit: s)"], ["1.2", "1.20"], ["1.3", "12"]),
        ({"pid": "2", "question": "x?", "image": "images/2.jpg", "decoded_image": PNG, "choices": ["145°", "110°"],
          "answer": "145°", "question_type": "multi_choice", "answer_type": "text",
          "query": "Hint: the option letter.\nQuestion: x?\nChoices:\n(A) 145°\n(B) 110°"},
         [PNG], ["Choices:\n(A) 145°\n(B) 110°"], ["A", "(A) 145°", "145°", "145"], ["B", "110°", "(B) 110°"]),
        ({"pid": "3", "question": "Is it?", "image": "images/3.jpg", "decoded_image": GREY, "choices": ["yes", "no"],
          "answer": "no", "question_type": "multi_choice", "answer_type": "text",
          "query": "Question: Is it?\nChoices:\n(A) yes\n(B) no"},
         [GREY], ["(B) no"], ["B", "no", "No"], ["A", "yes"]),
        ({"pid": "4", "decoded_image": PNG, "image": "images/4.jpg", "answer": "[0, 2]", "query": "Question: Which?",
          "question_type": "free_form", "answer_type": "list"}, [PNG], ["Which?"], ["[0, 2]", "[0,2]"], ["[2, 0]"]),
        ({"pid": "5", "decoded_image": PNG, "image": "images/5.jpg", "answer": "", "query": "Question: Which?",
          "question_type": "free_form", "answer_type": "integer"}, "no answer is published"),
        ({"pid": "6", "decoded_image": PNG, "image": "images/6.jpg", "answer": "4", "choices": ["4", "5", "4"],
          "query": "Question: Which?", "question_type": "multi_choice"}, "two options are the right one"),
        ({"pid": "7", "decoded_image": CUT, "image": "images/7.jpg", "answer": "4",
          "query": "Question: Which?", "question_type": "free_form"}, "a picture cannot be read"),
        ({"pid": "10", "decoded_image": MOVING, "image": "images/10.jpg", "answer": "4",
          "query": "Question: Which?", "question_type": "free_form"}, "a picture cannot be read"),
        ({"pid": "8", "decoded_image": PNG, "image": "images/8.jpg", "answer": "4", "choices": ["5"],
          "query": "Question: Which?", "question_type": "multi_choice"}, "no option is given as the right one"),
        ({"pid": "9", "decoded_image": PNG, "image": "images/9.jpg", "answer": "?", "query": "Question: Which?",
          "question_type": "free_form", "answer_type": "integer"}, "no answer is published")]),
    "mathverse": (
        {"sample_index": TEXT, "problem_index": TEXT, "problem_version": TEXT, "question": TEXT, "image": "image",
         "answer": TEXT, "question_type": TEXT, "query_wo": TEXT, "query_cot": TEXT, "question_for_eval": TEXT,
         "metadata": {"split": TEXT, "source": TEXT, "subject": TEXT, "subfield": TEXT}}, [
        ({"sample_index": "1", "problem_index": "1", "problem_version": "Text Dominant", "image": PNG,
          "question": "AB?\nChoices:\nA:2\nB:3", "answer": "B", "question_type": "multi-choice", "query_wo": "directly",
          "query_cot": "Please first conduct reasoning.\nQuestion: AB?\nChoices:\nA:2\nB:3",
          "question_for_eval": "AB?\nChoices:\nA:2\nB:3",
          "metadata": {"split": "testmini", "source": "GEOS", "subject": "Plane Geometry", "subfield": "Length"}},
         [PNG], ["<image>Please first", "Choices:\nA:2\nB:3"], ["B", "B:3", "\\text{B}", "3"], ["A", "A:2", "2"]),
        ({"sample_index": "2", "image": JPEG, "question": "", "answer": "(-2, 1]", "question_type": "free-form",
          "query_cot": "According to the question shown in the image, answer.", "question_for_eval": "Range?"},
         [JPEG], ["shown in the image"], ["(-2, 1]"], ["(-2, 1)"]),
        ({"sample_index": "3", "image": JPEG, "answer": "C ", "question_type": "multi-choice", "query_cot": "CD?",
          "question_for_eval": "CD?\nA:2\nC:3"}, [JPEG], ["CD?"], ["C"], ["A", "B", "3"])]),
    "mathvision": (
        {"id": TEXT, "question": TEXT, "options": "list", "image": TEXT, "decoded_image": "image", "answer": TEXT,
         "solution": TEXT, "level": "int64", "subject": TEXT}, [
        ({"id": "1", "question": "How many?\n<image1>", "options": [], "image": "images/1.jpg", "decoded_image": JPEG,
          "answer": "7", "level": 2, "subject": "counting"},
         [JPEG], ["one \"\\boxed{}\"", "How many?\n<image>"], ["7"], ["8"]),
        ({"id": "2", "question": "Which of\n<image1>\nand <image2>?", "options": list("ABCDE"), "image": "images/2.jpg",
          "decoded_image": PNG, "answer": "E", "level": 1, "subject": "logic"},
         [PNG], ["Which of\n<image>\nand [image 2]?"], ["E", "(E)"], ["D", "B"]),
        ({"id": "3", "question": "Area?", "options": ["$6$", "$4\\pi$", "8", "9", "10"], "image": "images/3.jpg",
          "decoded_image": WEBP, "answer": "B", "level": 5, "subject": "metric geometry - area"},
         [WEBP], ["<image>Please", "Area?\n(A) $6$\n(B) $4\\pi$\n(C) 8"],
         ["B", "4\\pi", "(B) $4\\pi$"], ["A", "4", "6"])]),
    "mmmu": (
        {"id": TEXT, "question": TEXT, "options": TEXT, "explanation": TEXT, **MMMU_IMAGES, "img_type": TEXT,
         "answer": TEXT, "topic_difficulty": TEXT, "question_type": TEXT, "subfield": TEXT}, [
        ({"id": "validation_Art_1", "question": "See <image 2>, then <image 1>.",
          "options": "['12 kg', '13 kg', 'all of it']",
          "image_1": PNG, "image_2": JPEG, "answer": "B", "question_type": "multiple-choice"},
         [JPEG, PNG], ["See <image>, then <image>.", "(A) 12 kg\n(B) 13 kg\n(C) all of it", "option's letter"],
         ["B", "13 kg", "13", "B. 13 kg"], ["A", "12 kg", "C"]),
        ({"id": "validation_Art_2", "question": "Which one continues <image 1>?",
          "options": "['<image 2>', '<image 3>']",
          "image_1": PNG, "image_2": JPEG, "image_3": CLEAR, "answer": "B",
          "question_type": "multiple-choice"},
         [PNG, JPEG, CLEAR], ["continues <image>?", "(A) <image>\n(B) <image>"], ["B", "(B)"], ["A"]),
        ({"id": "validation_Math_3", "question": "Look: <image 1> and <image 1>. How much?", "options": "[]",
          "image_1": GREY, "image_2": PNG, "answer": "['24/7', '3.429']", "question_type": "open"},
         [PNG, GREY, GREY], ["<image>Look: <image> and <image>.", "single word or phrase"],
         ["24/7", "3.429"], ["3.5", "24"]),
        ({"id": "validation_Math_4", "question": "<image 1> What?", "options": "[]", "image_1": PNG,
          "answer": "['red', 'blue']", "question_type": "open"}, "several answers, which differ, are right"),
        ({"id": "test_Math_5", "question": "<image 1> What?", "options": "['1', '2']", "image_1": PNG,
          "answer": "?", "question_type": "multiple-choice"}, "no option is given as the right one"),
        ({"id": "validation_Math_6", "question": "<image 1> <image 2> What?", "options": "[]", "image_1": PNG,
          "answer": "4", "question_type": "open"}, "a mark has no picture")]),
    "clevr": (
        {"image": "image", "problem": TEXT, "solution": TEXT}, [
        ({"image": CLEAR, "problem": "How many items?", "solution": "<answer> 3 </answer>"},
         [CLEAR], ["<image>How many"], ["3"], ["4"]),
        ({"image": PNG, "problem": "How many?", "solution": "many"}, "no answer in <answer> tags")]),
    "geoqa": (
        {"image": "image", "problem": TEXT, "solution": TEXT}, [
        ({"image": PNG, "problem": "Find ∠1.", "solution": "<answer> 145° </answer>"}, [PNG], ["∠1"],
         ["145°", "145^\\circ", "145"], ["35°"])]),
    "open_r1": (
        {"image": "image", "problem": TEXT, "solution": TEXT, "original_question": TEXT, "original_answer": TEXT}, [
        ({"image": JPEG, "problem": "Find x.\nChoices:\nA. 2\nB. 4", "original_question": "x", "original_answer": "B",
          "solution": "<think>It is 2 + 2.</think>\n\n<answer>B</answer>"}, [JPEG], ["A. 2\nB. 4"], ["B"], ["A"]),
        ({"image": None, "problem": "What is 2 + 2?", "solution": "<think>Sum.</think><answer>4</answer>"},
         [], ["What is 2 + 2?"], ["4"], ["5"])]),
    "ai2d": (
        {"question": TEXT, "options": "list", "answer": TEXT, "image": "image"}, [
        ({"question": "Who eats?", "options": ["fox", "hare", "the old owl", "2"], "answer": "1", "image": PNG},
         [PNG], ["Who eats?\nA. fox\nB. hare\nC. the old owl\nD. 2\nAnswer"], ["B", "hare", "B. hare"], ["A", "fox"])]),
    "mmstar": (
        {"index": "int64", "question": TEXT, "image": "image", "answer": TEXT, "category": TEXT, "l2_category": TEXT,
         "meta_info": {"source": TEXT, "split": TEXT, "image_path": TEXT}}, [
        ({"index": 0, "question": "Which?\nOptions: A: one, B: two", "image": JPEG, "answer": "A",
          "category": "math", "l2_category": "geometry",
          "meta_info": {"source": "MMBench", "split": "val", "image_path": "images/0.jpg"}},
         [JPEG], ["Options: A: one, B: two\nAnswer"], ["A", "A: one"], ["B", "B: two"])]),
}


def expressed(name):
    return [row for row in PUBLISHED[name][1] if isinstance(row[1], list)]


def responses(answer):
    """How models give an answer."""
    yield f"Let me see. 1 + 1 = 2, so \\boxed{{{answer}}}"
    yield f"<think>It could be A or 17.</think>\nIt is \\boxed{{{answer}}}."
    if len(answer) == 1:
        for form in ("The answer is {}", "The answer is ({}).", "Answer: {}", "**Answer: {}**"):
            yield form.format(answer)


def check(samples, rows):
    """Of each row: every picture with its bytes, as many marks, the text in its order, and the verdicts."""
    assert len(samples) == len(rows)
    for sample, (_, images, parts, right, wrong) in zip(samples, rows):
        assert [open(path, "rb").read() for path in sample.images] == images
        assert sample.question.count("<image>") == len(images)
        assert sample.prompt_ids.count(sample.image_token) >= len(images)
        assert "(A) A" not in sample.question  # options that are drawn are not listed
        places = [sample.question.index(part) for part in parts]
        assert places == sorted(places)
        for answer in (*right, *wrong):
            verdicts = {text: accuracy_reward(text, sample.answer) for text in responses(answer)}
            assert set(verdicts.values()) == {float(answer in right)}, (sample.answer, verdicts)


def load(path, processor):
    samples = load_samples(path, processor, 10**6)
    for sample in samples:
        sample.image_token = processor.image_token_id
    return samples


@pytest.mark.parametrize("writer", ["datasets", "pyarrow"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_a_benchmark_as_it_is_published(name, writer, processor, tmp_path, capsys):
    """Columns, types, awkward rows: through the loader to the verdict, and nothing lost without a word."""
    columns, rows = PUBLISHED[name]
    source = write(tmp_path / "copy.parquet", columns, [row[0] for row in rows], writer)
    result = convert(name, source, tmp_path / "out")
    kept = expressed(name)
    check(load(result["path"], processor), kept)
    left = [row[1] for row in rows if isinstance(row[1], str)]
    assert result["left_out"] == {reason: left.count(reason) for reason in left}
    said = capsys.readouterr().err
    assert result["rows"] == len(kept)
    assert all(f"Left out {left.count(reason)} rows, since {reason}: {name}_" in said for reason in left)
    assert result["images"] == len({image for row in kept for image in row[1]})
    assert f"{name} itself: {BENCHMARKS[name].scores.rstrip('.')}. Here: by rule" in said
    assert INSTRUCTION not in said and "the instruction (--instruction) after the question" in said
    ends = {path.suffix for path in (tmp_path / "out" / "images").iterdir()}
    assert ends == {{JPEG: ".jpg", WEBP: ".webp"}.get(image, ".png") for row in kept for image in row[1]}


def test_what_is_kept_beside(tmp_path):
    """Harmless metadata, of the struct too, by which results can be split; nothing that looks like a picture's name."""
    columns, rows = PUBLISHED["mathvista"]
    convert("mathvista", write(tmp_path / "a.parquet", columns, [rows[0][0]], "datasets"), tmp_path)
    row, = utils.read_jsonl(tmp_path / "mathvista.jsonl")
    image = row.pop("image")
    assert row.pop("question").startswith("<image>Hint") and image.startswith("images/") and image.endswith(".jpg")
    assert row == {"id": "mathvista_1", "answer": "1.2", "question_type": "free_form", "answer_type": "float",
                   "unit": "s", "precision": 1.0, "source": "FunctionQA", "task": "figure question answering"}
    row = rows[3][0] | {"precision": math.nan, "decoded_image": base64.b64encode(PNG).decode(), "unit": None}
    (tmp_path / "copy.jsonl").write_text(json.dumps(row))
    convert("mathvista", str(tmp_path / "copy.jsonl"), tmp_path / "nan")
    assert "precision" not in utils.read_jsonl(tmp_path / "nan" / "mathvista.jsonl")[0]


def test_the_command_line(tmp_path):
    """A folder of shards in, by its split or as a whole; evaluate.py takes what comes out, in JSON as everywhere.
    What a rank that writes finds wrong, both say."""
    columns, rows = PUBLISHED["mathvista"]
    (tmp_path / "copy" / "data").mkdir(parents=True)
    for n in (0, 1):
        write(str(tmp_path / "copy" / "data" / f"testmini-0000{n}-of-00002.parquet"), columns, [rows[n][0]], "datasets")
    data, out = tmp_path / "out" / "mathvista.jsonl", tmp_path / "out"
    result, _ = run("data.py", "--benchmark", "mathvista", "--out", out, f"{tmp_path / 'copy'}:testmini",
                    ranks=2)  # of which one writes
    assert (result["path"], result["rows"], result["images"], result["left_out"]) == (str(data), 2, 2, {})
    codes, _, err = fork("data.py", "--benchmark", "mathvista", "--out", out, f"{tmp_path / 'copy'}:testmini", ranks=2)
    assert codes == [2, 2] and err.count("mathvista.jsonl is there already") == 1
    whole = convert("mathvista", [str(tmp_path / "copy")], tmp_path / "whole")["path"]
    assert utils.read_jsonl(data) == utils.read_jsonl(Path(whole))
    found, _ = run("evaluate.py", "--model", "toy_model", "--data", data, "--engine", "hf",
                   "--settings", "pass1_t0.01", "--max_new_tokens", 4, "--out", tmp_path / "run")
    assert "accuracy" in str(found)


@pytest.mark.parametrize("split", ["", ":test"])
def test_shards_with_paths(split, processor, tmp_path):
    """They begin from the folder that is given, with or without its split, or from that of a single file."""
    (row, _, *rest), = expressed("ai2d")
    for folder in ("data", "pictures"):
        (tmp_path / folder).mkdir()
    (tmp_path / "pictures" / "a.jpg").write_bytes(JPEG)
    rows = [dict.fromkeys(PUBLISHED["ai2d"][0]) | row | {"image": {"bytes": None, "path": "pictures/a.jpg"}}]
    source = write(str(tmp_path / "data" / "test-00000-of-00001.parquet"), PUBLISHED["ai2d"][0], rows, "pyarrow")
    result = convert("ai2d", f"{tmp_path}{split}", tmp_path / "out")
    check(load(result["path"], processor), [(None, [JPEG], *rest)])
    refused("ai2d", source, tmp_path / "file", f"image pictures/a.jpg does not exist in {tmp_path / 'data'}")


def test_json_lines_with_paths(processor, tmp_path):
    """A copy that was written out, with paths from its own folder, or pictures in base 64."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "1.jpg").write_bytes(JPEG)
    (row, _, *rest), (other, _, *more), _ = expressed("mathverse")
    rows = [row | {"image": "pictures/1.jpg"}, other | {"image": base64.b64encode(PNG).decode()}]
    utils.write_jsonl(tmp_path / "copy.jsonl", rows)
    result = convert("mathverse", str(tmp_path / "copy.jsonl"), tmp_path / "out")
    check(load(result["path"], processor), [(None, [JPEG], *rest), (None, [PNG], *more)])
    utils.write_jsonl(tmp_path / "copy.jsonl", [row | {"image": "../1.jpg"}])
    refused("mathverse", str(tmp_path / "copy.jsonl"), tmp_path / "again", "line 1: image ../1.jpg lies outside")


@pytest.mark.parametrize("inside", ["", "images/", "Image/MM_Math/"])
def test_mm_math_from_its_json_lines(inside, processor, tmp_path, capsys):
    """Pictures by name, wherever the archive was unzipped; the boxed answer is the reference, the solution golden."""
    folder = tmp_path / "mm_math"
    (folder / inside).mkdir(parents=True)
    (folder / inside / "a.png").write_bytes(PNG)
    (folder / inside / "b.jpg").write_bytes(JPEG)
    rows = [{"question": "Find $x$.", "file_name": "a.png", "solution": "As $x=1+2$, $x=\\boxed{3}$.", "year": "seven",
             "difficult": "easy", "knowledge": "Function"},
            {"question": "BC?", "file_name": "b.jpg", "solution": "\\boxed{6cm}", "year": "nine", "difficult": "hard"},
            {"question": "Both?", "file_name": "b.jpg", "solution": "\\boxed{1}, \\boxed{2}"},
            {"question": "Prove.", "file_name": "b.jpg", "solution": "Clear."}]
    utils.write_jsonl(folder / "MM_Math.jsonl", rows)
    result = convert("mm_math", str(folder / "MM_Math.jsonl"), str(tmp_path / "out"))
    assert result["left_out"] == {"several boxed answers": 1, "no boxed answer": 1}
    samples = load(result["path"], processor)
    check(samples, [(None, [PNG], ["Find $x$."], ["3"], ["4"]),
                    (None, [JPEG], ["BC?"], ["6", "6 cm", "6cm"], ["6 m", "7"])])
    assert samples[0].solution == rows[0]["solution"] and samples[0].id == "mm_math_1"


def test_two_files_of_one_name_are_no_guess(tmp_path):
    """A name that the source's folder has is that file; else one file alone may have it."""
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.png").write_bytes(PNG)
    (tmp_path / "a.png").write_bytes(JPEG)
    row = {"question": "x?", "file_name": "a.png", "solution": "\\boxed{3}"}
    utils.write_jsonl(tmp_path / "MM_Math.jsonl", [row])
    convert("mm_math", [str(tmp_path / "MM_Math.jsonl")], tmp_path / "out")
    assert [path.read_bytes() for path in (tmp_path / "out" / "images").iterdir()] == [JPEG]
    (tmp_path / "a.png").unlink()
    benchmarks.files.cache_clear()
    with pytest.raises(utils.UserError, match="line 1: image a.png does not exist"):
        convert("mm_math", [str(tmp_path / "MM_Math.jsonl")], tmp_path / "again")


OPTIONS = [["40", "45"], ["Yes", "No"], ["12 apples", "12 oranges", "13"], ["3\\sqrt{2}", "3", "\\sqrt{18}"],
           ["$45^{\\circ}$", "$50^{\\circ}$"], list("ABCDE"), ["B", "A", "C"], ["<image 1>", "<image 2>"],
           ["the demand rises", "the demand falls"], ["0.5", "1/2", "2"], ["x^2+1", "x^2-1"], ["(1, 2)", "(2, 1)"],
           ["1:2", "2:1"], ["$20", "$30"], ["25%", "0.25"], ["1,000", "1000"], ["blue", "red"], ["6:30", "7:30"],
           ["27 cm", "27 m"], ["[0, 5)", "(0, 5)"], ["", "none"], ["A", "both A and B"], list("12345678")]


@pytest.mark.parametrize("options", OPTIONS, ids=" ".join)
def test_a_choice_is_right_by_its_letter_and_no_other(options):
    """For each option as the right one; in every way that a response has, and by its text where it names no other."""
    for i, option in enumerate(options):
        reference, letters = choice(options, chr(65 + i)), [chr(65 + j) for j in range(len(options))]
        assert reference in (letters[i], f"{letters[i]}. {option}") and "<image" not in reference
        for letter, other in zip(letters, options):
            right = float(letter == letters[i])
            named = other if len(other) == 1 and other.isalpha() else letter  # "A. B" names two options, and is none
            answers = {letter: right, f"({letter})": right} | ({f"{letter}. {other}": right * (named == letter)} if other else {})
            for answer, wanted in answers.items():
                for response in (f"\\boxed{{{answer}}}", f"The answer is {answer}"):
                    assert accuracy_reward(response, reference) == wanted, (response, reference)
            if len(other) > 1 and letter != letters[i]:
                assert accuracy_reward(f"\\boxed{{{other}}}", reference) == 0.0, (other, reference)


def test_the_text_of_an_option_is_enough_where_that_is_fair():
    said = {options[0]: choice(options, "A") for options in OPTIONS}
    assert {text for text, reference in said.items() if reference != "A"} == {
        "40", "Yes", "$45^{\\circ}$", "(1, 2)", "1:2", "$20", "blue", "6:30", "27 cm", "[0, 5)", "1", "x^2+1"}
    assert all(is_equal(text, reference) for text, reference in said.items() if reference != "A")


# ---------------------------------------------------------------------------------------------
# Mistakes, each a sentence that names benchmark, place and what to do


def some_rows(name, tmp_path, change=lambda row: row, columns=None):
    """The rows of a benchmark that can be expressed, changed, as JSON lines would have them."""
    rows = [change(dict.fromkeys(PUBLISHED[name][0]) | row[0]) for row in expressed(name)]
    return write(tmp_path / "copy.parquet", columns or PUBLISHED[name][0], rows, "pyarrow")


def refused(name, source, out, *words):
    with pytest.raises(utils.UserError) as caught:
        convert(name, source, out)
    sentence = str(caught.value)
    assert all(word in sentence for word in words), sentence
    assert "\n" not in sentence and sentence.endswith(".") and sentence.count(";") >= 1, sentence
    assert not list(out.glob("*.jsonl")) or "there already" in sentence


def test_mistakes_are_sentences(tmp_path):
    out, source = tmp_path / "out", some_rows("geometry3k", tmp_path)
    refused("mathvita", source, out, "--benchmark mathvita is none of", "mathvista", "MAYE")
    refused("geometry3k", [source, "b.parquet"], out, "--benchmark geometry3k reads one source", "b.parquet")
    refused("mm_math", [], out, "hf download THU-KEG/MM_Math")
    refused("mathvista", source, out, "row 1", "mathvista has a column 'question_type'", "this row has images")
    refused("clevr", source, out, "copy.parquet, row 1", "clevr has a column 'solution'")
    refused("geometry3k", str(tmp_path / "none.parquet"), out, "none.parquet")
    refused("geometry3k", [], out, "hiyouga/geometry3k: no such folder", "HF_HUB_OFFLINE is set")
    convert("geometry3k", source, out)
    refused("geometry3k", source, out, "geometry3k.jsonl is there already")


def test_a_copy_that_is_unlike_the_published_one(tmp_path):
    """An id twice, options of another kind, no answer anywhere, a picture in a column of its own."""
    source = some_rows("mathvision", tmp_path, lambda row: row | {"id": "1"})
    refused("mathvision", source, tmp_path / "a", "row 2", "id mathvision_1", "one split")
    source = some_rows("mmmu", tmp_path, lambda row: row | {"options": "(A) 1 (B) 2"})
    refused("mmmu", source, tmp_path / "b", "row 1", "not as mmmu is published")
    source = some_rows("mathvision", tmp_path, lambda row: row | {"answer": None, "options": []})
    refused("mathvision", source, tmp_path / "c", "no row of 3 can be used", "answers are published")
    columns = PUBLISHED["mathvision"][0] | {"diagram": "image"}
    source = some_rows("mathvision", tmp_path, lambda row: row | {"diagram": GREY}, columns)
    refused("mathvision", source, tmp_path / "d", "row 1", '"diagram" holds a picture', "lost")
    source = some_rows("mathvista", tmp_path, lambda row: row | {"decoded_image": None})
    refused("mathvista", source, tmp_path / "e", "row 1", "images/1.jpg does not exist")


NO, OF_PATH = {"bytes": None, "path": None}, {"bytes": None, "path": "images/1.jpg"}


@pytest.mark.parametrize("name", ["mathvista", "mathvision"])
@pytest.mark.parametrize("decoded, image, kept", [
    (NO, "images/1.jpg", JPEG), (None, "images/1.jpg", JPEG), (OF_PATH, "images/1.jpg", JPEG), (OF_PATH, None, JPEG),
    ({"bytes": PNG, "path": "1.jpg"}, "images/1.jpg", PNG), (PNG, "images/none.jpg", PNG), (PNG, None, PNG),
    (NO, GREY, GREY), (NO, None, "no picture is published"), (None, "", "no picture is published"),
    (PNG, GREY, '"image" holds a picture'), (OF_PATH, "images/2.jpg", '"image" holds'),
    (NO, "images/none.jpg", "images/none.jpg does not exist")])
def test_the_picture_or_its_name(name, decoded, image, kept, tmp_path):
    """A struct of nulls is no picture; a name beside the bytes is read with them, another picture is not."""
    out, (row, *_) = tmp_path / "out", expressed(name)[0]
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.jpg").write_bytes(JPEG)
    (tmp_path / "images" / "2.jpg").write_bytes(PNG)
    rows = [row | {"decoded_image": decoded, "image": image}]
    rows += [row | {"id": "99", "pid": "99"}] * (kept == "no picture is published")  # so that one can be used
    reached = converted(name, rows, tmp_path)
    if isinstance(kept, bytes):
        assert [path.read_bytes() for path in (out / "images").iterdir()] == [kept]
    else:
        assert kept in reached, reached


def converted(name, rows, folder):
    """What a conversion of these rows, as JSON lines or parquet would have them, says: why not, or what is left out."""
    def text(value):  # bytes where JSON has none
        if isinstance(value, dict):
            return {key: text(part) for key, part in value.items()}
        if isinstance(value, list):
            return [text(part) for part in value]
        return base64.b64encode(value).decode() if isinstance(value, bytes) else value

    utils.write_jsonl(folder / "copy.jsonl", [text(row) for row in rows])
    try:
        return str(convert(name, str(folder / "copy.jsonl"), folder / "out")["left_out"])
    except utils.UserError as error:
        return str(error)


@pytest.mark.parametrize("more", [
    {"images": [PNG, GREY]}, {"views": [PNG, GREY]}, {"images": "zzz.png"}, {"images": ["zzz.png"]}, {"images": GREY},
    {"images": [PNG, PNG]}, {"decoded_image": "zzz.png"}, {"views": {"left": PNG, "right": GREY}}, {"view": "zzz.png"},
    {"views": [{"bytes": GREY, "path": "zzz.png"}]}], ids=str)
def test_a_picture_beside_that_is_not_read(more, tmp_path):
    """Each picture of a row is read, or the row is refused by the column's name: one of two is not enough."""
    row = {"image": PNG, "problem": "How many?", "solution": "<answer>3</answer>"}
    (tmp_path / "zzz.png").write_bytes(GREY)
    reached, (column,) = converted("clevr", [row | more], tmp_path), more
    assert f'line 1: the field "{column}" holds' in reached, reached
    assert converted("clevr", [row | {column: value} for value in (None, [PNG])], tmp_path) == "{}"  # all is read


@pytest.mark.parametrize("name, column", [
    ("clevr", "image"), ("mathverse", "image"), ("geoqa", "image"), ("ai2d", "image"), ("mmstar", "image"),
    ("mm_math", "file_name"), ("geometry3k", "images"), ("mmmu", "image_1")])
def test_without_its_picture_a_row_is_left_out(name, column, tmp_path, capsys):
    """Whatever says that there is none; the training set that may ask by text alone is tested above."""
    row = {"question": "x?", "solution": "\\boxed{3}", "file_name": base64.b64encode(PNG).decode()}
    row = row if name == "mm_math" else expressed(name)[0][0] | {"problem": "Find x.", "question": "Find x."}
    values = [None, NO, "", base64.b64encode(PNG).decode()]
    values = values if name != "geometry3k" else [None, [NO], [], values[3:]]
    utils.write_jsonl(tmp_path / "copy.jsonl", [row | {
        column: value, "image_2": None, "id": n, "sample_index": n, "index": n} for n, value in enumerate(values)])
    result = convert(name, str(tmp_path / "copy.jsonl"), tmp_path / "out")
    assert (result["rows"], result["left_out"]) == (1, {"no picture is published": 3})
    assert "Left out 3 rows, since no picture is published: " in capsys.readouterr().err


A, B, C = b"a", b"b", b"c"


@pytest.mark.parametrize("question, images, expected", [
    ("Find x.", [A, B], ("<image><image>Find x.", [A, B])),
    ("Find x.", [A, None, B], ("<image><image>Find x.", [A, B])),
    ("Find <image> x.", [A, B], "a picture has no mark"), ("<image><image>", [A, B, C], "a picture has no mark"),
    ("Find <image> x.", [A, None, B], "a picture has no mark"), ("<image><image>", [A], "a mark has no picture"),
    ("<image> and <image>", [A, B], ("<image> and <image>", [A, B])), ("Find <image 2>", [A], "a mark has no picture"),
    ("Find <image 2>.", [A, B], ("<image>Find <image>.", [A, B])), ("<image_2>", [A, B, C], ("<image>" * 3, [A, C, B])),
    ("<image 2><image 1><image 2>", [A, B], ("<image>" * 3, [B, A, B])),
    ("Find <image 0>", [A], "a mark has no picture"),
    ("<image 2> or <image>?", [A, B], "a mark has no picture"), ("<image 2>", [A, None], "a mark has no picture"),
    ("<image 2><image><image 1>", [A, B], "a mark has no picture"),
    ("<image 1><image>", [A, B], ("<image>" * 2, [A, B])),
    ("<Image-2>, <IMAGE 1>", [A, B], ("<image>, <image>", [B, A])),
    ("<image 3>", [A, None, C], ("<image>" * 2, [A, C]))])
def test_marks_and_pictures(question, images, expected):
    """None is lost, doubled or moved without a number that says so; data.py refuses the same by itself."""
    if isinstance(expected, tuple):
        assert benchmarks.placed(question, images) == expected
    else:
        with pytest.raises(benchmarks.LeftOut, match=expected):
            benchmarks.placed(question, images)


@pytest.mark.parametrize("options, letter, expected", [
    ([4, 5], "B", "B. 5"), ([4.5, 5], "A", "A. 4.5"), (["A. fox", "B. hare"], "B", "B. hare"),
    (["(A) 4", "(B) 5"], "A", "A. 4"), (["A: the fox", "B: the hare"], "b", "B"), (["4 ", " 5"], " b ", "B. 5"),
    (["4", "5"], "(B)", "B. 5"), (["4", "5"], "B.", "B. 5"), (["A:B", "B:A"], "A", "A"), (("4", "5"), "B", "B. 5"),
    (["B. hare", "A. fox"], "A", "letters of their own"), (["4", None], "A", "an option is missing"),
    (["4", " 4"], "A", "two options are the right one"), (["(A) 4", "(B) 4"], "A", "two options are the right one"),
    (["4", "5"], "C", "no option"), (["4", "5"], "AB", "no option"), (["4", "5"], "", "no option"),
    ("45", "A", TypeError), ({"4", "5"}, "A", TypeError), (None, "A", TypeError), (["4", "5"], 1, AttributeError)])
def test_options_as_they_come(options, letter, expected):
    """Numbers, blanks, letters of their own, other ways of writing them change neither option nor answer."""
    if isinstance(expected, type):
        with pytest.raises(expected):
            choice(options, letter)
    elif len(expected) > 8:
        with pytest.raises(benchmarks.LeftOut, match=expected):
            choice(options, letter)
    else:
        assert choice(options, letter) == expected
        lines = benchmarks.listed(options).split("\n")
        assert [line[:4] for line in lines] == ["(A) ", "(B) "] and lines[ord(expected[0]) - 65].endswith(expected[3:])
        assert not any(re.match(r"\(.\) \(?[A-Z][.):] ", line) for line in lines)
    assert benchmarks.listed(["A:B", "B:A"]) == "(A) A:B\n(B) B:A"  # ratios


@pytest.mark.parametrize("name, change, expected", [
    ("mathvista", {"answer": 0, "question_type": "free_form"}, "0"), ("mathverse", {"answer": 0}, "0"),
    ("geometry3k", {"answer": 4.5}, "4.5"), ("ai2d", {"answer": 1}, "B. hare"),
    ("mathverse", {"answer": " b "}, "B. 3"),
    ("mathvista", {"choices": [145, 110], "answer": "110", "question_type": "multi_choice"}, "B. 110"),
    ("mathvista", {"choices": ["145", "110"], "answer": 145, "question_type": "multiple"}, "A. 145"),
    ("mathvista", {"choices": ["None", "1"], "answer": None, "question_type": "multi_choice"}, "no option"),
    ("mathvista", {"choices": "145", "answer": "1", "question_type": "multi_choice"}, "not as mathvista is published"),
    ("mmmu", {"question_type": "multi-choice"}, "B. 13 kg"), ("mmmu", {"options": "'abc'"}, "not as mmmu is published"),
    ("mmmu", {"options": "{'a', 'b'}"}, "not as mmmu is published"), ("mmmu", {"question": None}, "not as mmmu is"),
    ("ai2d", {"question": None}, "not as ai2d is published"), ("mmstar", {"question": None}, "not as mmstar is"),
    ("mathvision", {"options": list("ABCD"), "answer": "d"}, "D"), ("geometry3k", {"answer": True}, 'field "answer"'),
    ("mathvision", {"options": ["<image1>", "<image2>"], "answer": "B"}, "B"),
    ("clevr", {"image": [PNG, GREY]}, "not as clevr is published")])
def test_an_answer_is_none_other(name, change, expected, tmp_path):
    """Numbers, 0 among them, are answers; what is of another kind is refused or left out by name."""
    rows = [expressed(name)[0][0] | change]
    rows += [expressed(name)[0][0] | {"pid": "99"}] * (expected == "no option")
    reached = converted(name, rows, tmp_path)
    found = utils.read_jsonl(tmp_path / "out" / f"{name}.jsonl")
    if len(expected) < 9:
        assert [row["answer"] for row in found] == [expected] and "(A) A" not in found[0]["question"], reached
    else:
        assert expected in reached, reached


def test_a_conversion_needs_no_other_rank(tmp_path, monkeypatch):
    """data.py lets rank 0 of several convert alone: a collective would wait for the others for ever."""
    import torch.distributed

    def waits(*_, **__):
        raise AssertionError("a collective")

    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("all_gather_object", "broadcast_object_list", "barrier", "all_reduce", "init_process_group"):
        monkeypatch.setattr(torch.distributed, name, waits)
    with pytest.raises(AssertionError, match="a collective"):
        utils.gather([1])
    assert convert("mmmu", some_rows("mmmu", tmp_path), tmp_path / "out")["rows"] == 3


def test_without_a_folder_it_is_named_like_the_benchmark(tmp_path, monkeypatch):
    source = some_rows("clevr", tmp_path)
    monkeypatch.chdir(tmp_path)
    assert convert("clevr", [source], "")["path"] == "clevr/clevr.jsonl" and (tmp_path / "clevr" / "images").is_dir()


def test_nothing_is_half_written(tmp_path, monkeypatch):
    """The pictures first, the rows last: a conversion that ends before that begins anew, over the same pictures."""
    source, out = some_rows("mmmu", tmp_path), tmp_path / "out"

    def full(*_):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_jsonl", full)
        with pytest.raises(OSError):
            convert("mmmu", source, out)
    first = sorted(path.name for path in out.rglob("*"))
    assert len(first) == 5 and not any(name.endswith((".jsonl", ".part")) for name in first)
    assert convert("mmmu", source, out)["images"] == 4  # one is in several rows, and one file
    assert sorted(path.name for path in out.rglob("*")) == sorted([*first, "mmmu.jsonl"])
    shutil.move(out, tmp_path / "moved")  # paths are of the folder
    rows = utils.read_jsonl(tmp_path / "moved" / "mmmu.jsonl")
    assert all((tmp_path / "moved" / image).is_file() for row in rows for image in row["images"])


def test_the_table_is_whole():
    """Every benchmark is tested, has a split where it has a hub id, and keeps columns that are published."""
    assert set(PUBLISHED) | {"mm_math"} == set(BENCHMARKS)
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.source.count("/") == bool(benchmark.source) and (":" in benchmark.source or name == "mm_math")
        columns, _ = PUBLISHED.get(name, (dict.fromkeys(["solution", "year", "difficult", "knowledge"]), None))
        assert {*benchmark.keep.split(), *benchmark.id.split()} <= {*columns, *columns.get("metadata", ())}, name


def test_the_lesson_has_every_benchmark():
    """Its table, row for row; and the benchmark of its own that it adds works."""
    listed = re.findall(r"^\| (\w+) \| (?:`|a zip file: `)([\w/:.-]+)` \|", section("Benchmarks", LESSON), re.M)
    assert listed == [(name, b.source or "THU-KEG/MM_Math") for name, b in BENCHMARKS.items()]


def test_a_benchmark_of_ones_own(processor, tmp_path, monkeypatch):
    """The lesson's five lines."""
    code = next(block for block in re.findall(r"```python\n(.*?)```", LESSON, re.S) if "BENCHMARKS[" in block)
    monkeypatch.setattr(benchmarks, "BENCHMARKS", dict(BENCHMARKS))
    exec(code, dict(vars(benchmarks)))
    row = {"task": "White moves.", "moves": ["Qh5", "Ra1"], "best": "B", "board": PNG, "id": "1", "level": "easy"}
    columns = dict.fromkeys(row, TEXT) | {"moves": "list", "board": "image"}
    result = convert("chess", write(tmp_path / "a.parquet", columns, [row], "pyarrow"), tmp_path)
    check(load(result["path"], processor), [(None, [PNG], ["White moves.\n(A) Qh5\n(B) Ra1\nAnswer"], ["B"], ["A"])])
