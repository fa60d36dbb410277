"""Benchmarks: a published test set becomes JSON lines of ours, with its pictures beside them.

    python data.py --benchmark mathvista --out data                # as the hub has it, or a copy:
    python data.py --benchmark mathvista --out data copy.parquet   # .jsonl, a folder of shards
    python evaluate.py --data data/mathvista.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct

Each is a function, from a row as it is published to a question as its own prompt has it, an answer
that reward.py can judge, and pictures; and a line of the table at the end. Add yours there. Left
out: models that extract or judge an answer. A row that cannot be asked or judged is left out,
counted and named; a picture of another row never is. MAYE's release is JSON lines of this kind.
"""

import utils  # first: from here on Ctrl-C is no traceback

import ast
import functools
import re
from collections import Counter, namedtuple
from pathlib import Path

from tqdm import tqdm

import pictures
from data import IMAGE_MARK, text_of
from reward import BOX, is_equal
from sources import folder_of, read_rows
from utils import UserError, first_line, print0, rank

MARK = re.compile(r"<image[ _-]?(\d*)>", re.I)  # <image>, <image1>, <image 1>
LETTERED = re.compile(r"\(?([A-Z])(?:[).]|:\s)\s*(.+)", re.S)  # (A) 4, A. 4; a ratio A:B is not
WORDY = re.compile(r"<image|^[a-z]$|[a-z]{2}\s+[a-z]{2}", re.I)  # a mark, mere letter, or prose
LETTER = "Answer with the option's letter from the given choices."  # "directly" is ours to drop:
PHRASE = "Answer the question using a single word or phrase."  # our instruction asks for steps
MATHVISION = ('Please solve the problem step by step and put your answer in one "\\boxed{}". If it '
              'is a multiple choice question, only one letter is allowed in the "\\boxed{}".')


class LeftOut(Exception):
    """A row that cannot be asked, or that no rule can judge; the text says why."""


# ---------------------------------------------------------------------------------------------
# Options, answers, pictures and marks


def bare(options):
    """Options as texts, without the letters that they may have already."""
    if not isinstance(options, (list, tuple)):  # a text is one of characters
        raise TypeError("its options are no list")
    if None in options:
        raise LeftOut("an option is missing")
    options = [str(option).strip() for option in options]
    own = [LETTERED.fullmatch(option) for option in options]
    if not options or not all(own):
        return options
    if any(ord(match[1]) != 65 + i for i, match in enumerate(own)):
        raise LeftOut("the options have letters of their own, in another order")
    return [match[2] for match in own]


def listed(options, form="({}) {}"):
    """Options, one a line, with their letters."""
    return "\n".join(form.format(chr(65 + i), option) for i, option in enumerate(bare(options)))


def as_text(answer):
    return text_of({"answer": answer}, "answer").strip()


def picture(part):
    """A picture's bytes or path, or None; of a struct the bytes, where it has them."""
    if isinstance(part, dict):
        return picture(part.get("bytes")) or picture(part.get("path"))
    return pictures.source(part) or None


def choice(options, letter):
    """The reference of a multiple-choice question whose right option has this letter.

    The letter; or B. 45, which B, (B) 45 and 45 equal, where all of these do, and nothing that says
    another option does: with numbers and single words.
    """
    letter, options = letter.strip(" ().:").upper(), bare(options)
    right = ord(letter) - 65 if len(letter) == 1 else -1
    if not 0 <= right < len(options):  # such as "?", where a test set keeps its answers
        raise LeftOut("no option is given as the right one")
    text = options[right]
    if options.count(text) > 1:
        raise LeftOut("two options are the right one")
    both = f"{letter}. {text}"
    said = [letter, text, f"({letter}) {text}", f"({text})"]  # algebra differs in brackets
    others = [form for i, other in enumerate(options) if i != right
              for form in (chr(65 + i), other, f"{chr(65 + i)}. {other}")]
    fair = all(is_equal(x, both) for x in said) and not any(is_equal(x, both) for x in others)
    return both if fair and not WORDY.search(text) else letter


def agreed(answer):
    """One reference for answers that are given as the text of a list: what all of them equal."""
    # a list of texts; one of numbers is an answer
    answers = ast.literal_eval(answer) if re.match(r"\[\s*['\"]", answer) else [answer]
    for reference in answers:
        if all(is_equal(other, reference) for other in answers):
            return reference
    raise LeftOut("several answers, which differ, are right")


def placed(question, images):
    """The question with a mark of ours for each of its own, and the pictures in that order.

    A mark with a number names a picture, perhaps twice; one without, the next. Pictures that are
    there (not None) and that no mark names stand first, where the marks have numbers or are none.
    """
    order = []

    def ours(mark):
        number = int(mark[1] or len(order) + 1) - 1
        if images[number : number + 1] in ([], [None]) or not mark[1] and number in order:
            raise LeftOut("a mark has no picture")
        order.append(number)
        return IMAGE_MARK

    text = MARK.sub(ours, question)
    first = [i for i, p in enumerate(images) if p is not None and i not in order]
    if first and "" in MARK.findall(question):  # which of them is meant?
        raise LeftOut("a picture has no mark")
    return IMAGE_MARK * len(first) + text, [images[i] for i in first + order]


# ---------------------------------------------------------------------------------------------
# Benchmarks: a row as published -> question, answer, pictures. A KeyError names a missing column


def geometry3k(row):
    return row["problem"], row["answer"], row["images"] or [None]


def mathvista(row):
    """`query` is the hint on the form of the answer, the question, its unit, and the choices."""
    answer = as_text(row["answer"])
    if row["question_type"] == "multi_choice" or row.get("choices"):
        options = [as_text(option) for option in row["choices"]]
        right = chr(65 + options.index(answer)) if answer in options else ""
        answer = choice(row["choices"], right)
    return row["query"], answer, [{"bytes": row["decoded_image"], "path": row.get("image")}]


def mathverse(row):
    """`query_cot` asks for reasoning first; the choices are in it, or in the picture alone."""
    answer = as_text(row["answer"])
    options = dict(re.findall(r"^([A-H]):(.+)", row["question_for_eval"] or "", re.M))
    if answer.upper() in options and "".join(options) == "ABCDEFGH"[:len(options)]:
        answer = choice(list(options.values()), answer)
    return row["query_cot"], answer, [row["image"]]


def mathvision(row):
    question, answer, options = row["question"], row["answer"], row["options"]
    if options:
        if "".join(bare(options)) != "ABCDEFGH"[:len(options)]:  # else they are in the picture
            question = f"{question}\n{listed(options)}"
        answer = choice(options, answer)
    # one picture holds all that the marks name
    question = re.sub(r"<image([2-9]|\d\d)>", r"[image \1]", question)
    image = {"bytes": row["decoded_image"], "path": row.get("image")}
    return f"{MATHVISION}\n{question}", answer, [image]


def mmmu(row):
    """Options are the text of a list, and may be marks; the answers of its test set are "?"."""
    options = ast.literal_eval(row["options"] or "[]")
    if row["question_type"] == "multiple-choice" or options:
        question, answer = f"{listed(options)}\n\n{LETTER}", choice(options, row["answer"])
    else:
        question, answer = PHRASE, agreed(row["answer"])
    images = [row["image_1"], *(row.get(f"image_{n}") for n in range(2, 8))]
    return row["question"] + f"\n\n{question}", answer, images


def mm_math(row):
    found = {"".join(box).strip() for box in BOX.findall(row["solution"])}
    if len(found) != 1:
        raise LeftOut("several boxed answers" if found else "no boxed answer")
    return row["question"], found.pop(), [row["file_name"]]


def tagged(row):
    """The R1 world's: <answer> tags, perhaps after a chain of thought."""
    found = re.findall(r"<answer>(.*?)</answer>", row["solution"], re.S)
    if not found:
        raise LeftOut("no answer in <answer> tags")
    return row["problem"], found[-1], [row["image"]]


def open_r1(row):
    question, answer, (image,) = tagged(row)
    return question, answer, [image] if picture(image) else []  # it may ask by text alone


def ai2d(row):
    options = row["options"]
    question = row["question"] + f"\n{listed(options, '{}. {}')}\n{LETTER}"
    return question, choice(options, chr(65 + int(row["answer"]))), [row["image"]]


def mmstar(row):
    return row["question"] + f"\n{LETTER}", row["answer"], [row["image"]]


# where it is published ("": where no loader finds it), its function, the column of its ids, those
# that are kept beside (of the struct `metadata` too), and how it scores
Benchmark = namedtuple("Benchmark", "source read id keep scores")
R1 = "a training set; R1-V compares what stands in <answer> tags, by math_verify or as text"
JUDGED = "Published figures mostly come from a judge; ours may be up to 5 points lower."
BENCHMARKS = {
    "geometry3k": Benchmark(
        "hiyouga/geometry3k:test", geometry3k, "id", "",
        "the original asks for one of four choices, this release for the value"),
    "mathvista": Benchmark(
        "AI4Math/MathVista:testmini", mathvista, "pid",
        "question_type answer_type precision unit source task grade",
        "a model extracts the answer; then the option with that letter or the nearest text, or the "
        f"number rounded to the row's precision, is compared as text. {JUDGED}"),
    "mathverse": Benchmark(
        "AI4Math/MathVerse:testmini:testmini", mathverse, "sample_index",
        "problem_index problem_version question_type subject subfield",
        f"a model extracts the answer, and a model judges it. {JUDGED}"),
    "mathvision": Benchmark(
        "MathLLMs/MathVision:test", mathvision, "id", "level subject",
        "by rule: the letter, or the value of its option, is compared as LaTeX"),
    "mmmu": Benchmark(
        "lmms-lab/MMMU:validation", mmmu, "id",
        "question_type subfield topic_difficulty img_type",
        "by rule: the last letter named, else the option whose text occurs, else one at random; an "
        "open answer is right where the text or number occurs among those of the response"),
    "mm_math": Benchmark(
        "", mm_math, "", "solution year difficult knowledge",
        "by rule: the boxed answers are compared; and GPT-4V looks for the first wrong step"),
    "clevr": Benchmark("leonardPKU/clevr_cogen_a_train:train", tagged, "", "", R1),
    "geoqa": Benchmark("leonardPKU/GEOQA_R1V_Train_8K:train", tagged, "", "", R1),
    "open_r1": Benchmark(
        "lmms-lab/multimodal-open-r1-8k-verified:train", open_r1, "", "solution", R1),
    "ai2d": Benchmark(
        "lmms-lab/ai2d:test", ai2d, "", "", "by rule: the response is the letter (lmms-eval)"),
    "mmstar": Benchmark(
        "Lin-Chen/MMStar:val", mmstar, "index", "category l2_category",
        "by rule: the response begins with the letter; averaged by category"),
}


# ---------------------------------------------------------------------------------------------
# Conversion


def convert(name, sources, out):
    """Write `out`/NAME.jsonl, its pictures first; return what was done, ready for JSON.

    `sources` holds what `read_rows` takes, or nothing: then it is where the benchmark is published.
    `out` "" is a folder of the benchmark's name. Pictures keep their bytes, and equal ones are one
    file.
    """
    sources = [sources] if isinstance(sources, str) else sources
    out, seen, left, rows = Path(out or name), set(), {}, []
    path = out / f"{name}.jsonl"
    if name not in BENCHMARKS:
        raise UserError(f"--benchmark {name} is none of {', '.join(BENCHMARKS)}; the release of "
                        "MAYE is read as it is, other data by --columns.")
    if path.exists() or len(sources) > 1:
        raise UserError(f"{path} is there already; remove it, or give another --out."
                        if path.exists() else f"--benchmark {name} reads one source; give one of "
                        f"{', '.join(sources)}.")
    source = "".join(sources) or BENCHMARKS[name].source
    if not source:
        raise UserError(f"--benchmark {name} is published as a zip file beside JSON lines; run `hf "
                        "download THU-KEG/MM_Math --repo-type dataset --local-dir mm_math`, unzip "
                        "it there, and give mm_math/MM_Math.jsonl as well.")
    folder = str(folder_of(source))
    for place, row in tqdm(read_rows(source), name, disable=rank() > 0 or None):
        row_id = row.get(BENCHMARKS[name].id)
        row_id = f"{name}_{len(seen) + 1 if row_id is None else row_id}"
        if row_id in seen:
            raise UserError(f"{place}: an earlier row has the id {row_id}; give one split alone.")
        seen.add(row_id)
        try:
            rows.append({"id": row_id} | record(name, row, folder, out))
        except LeftOut as reason:
            left.setdefault(str(reason), []).append(row_id)
        except KeyError as missing:
            raise UserError(f"{place}: {name} has a column {missing}, this row has {', '.join(row)}"
                            "; give a copy of what is published, or other data by --columns.")
        except UserError as error:
            raise UserError(f"{place}: {error}") from None
        except (TypeError, ValueError, SyntaxError, AttributeError) as error:
            raise UserError(f"{place}: the row is not as {name} is published "
                            f"({first_line(error)}); give a copy of that.")
    for reason, ids in left.items():
        print0(f"Left out {len(ids)} rows, since {reason}: {', '.join(ids[:5])}"
               f"{' ...' * (len(ids) > 5)}")
    if not rows:
        raise UserError(f"{source}: no row of {len(seen)} can be used for {name}; give the split "
                        "whose answers are published.")
    utils.write_jsonl(path, rows)  # from here on it is there, and whole
    images = {image for row in rows for image in (row.get("images") or [row.get("image")]) if image}
    scores = (f"{name} itself: {BENCHMARKS[name].scores.rstrip('.')}. Here: by rule alone "
              "(reward.py), with the instruction (--instruction) after the question.")
    print0(f"{path}: {len(rows)} rows, {len(images)} pictures. {scores}")
    return {"path": str(path), "rows": len(rows), "images": len(images),
            "left_out": {reason: len(ids) for reason, ids in left.items()}, "scores": scores}


def record(name, row, folder, out):
    """A row of ours, its pictures written; LeftOut, or what a row of another kind raises."""
    question, answer, found = BENCHMARKS[name].read(row)
    given = [picture(part) for part in found or []]
    known = Counter(given)  # each as often as it is read, and what else stands beside its bytes
    for part, image in zip(found or [], given):
        beside = map(pictures.source, pictures.leaves(part) if isinstance(image, bytes) else [])
        known.update(leaf for leaf in beside if not isinstance(leaf, bytes))
    rest = {n: [*(Counter(map(pictures.source, pictures.leaves(row[n]))) - known).elements()]
            for n in row}
    pictures.refuse_lost_images(rest, (), (), given, folder)
    if lost := [n for n in pictures.PICTURES if rest.get(n)]:  # there, names pass for metadata
        raise UserError(f'the field "{lost[0]}" holds {rest[lost[0]][0]!a:.40}, which is not read; '
                        "remove it.")
    if given and not any(given):
        raise LeftOut("no picture is published")
    answer = as_text(answer)
    if not is_equal(answer, answer):  # it says nothing, and so equals nothing
        raise LeftOut("no answer is published")
    question, given = placed(question or "", given)
    if not MARK.sub("", question).strip():
        raise LeftOut("no question")
    names = [written(image, folder, out) for image in given]
    images = {"images": names} if len(names) > 1 else {"image": names[0]} if names else {}
    nested = row.get("metadata") if isinstance(row.get("metadata"), dict) else {}
    kept = {k: (nested | row).get(k) for k in BENCHMARKS[name].keep.split()}
    # NaN, which JSON cannot say, is unlike itself
    kept = {k: v for k, v in kept.items() if isinstance(v, (str, int, float)) and v == v}
    return {"question": question, "answer": answer} | images | kept


def written(image, folder, out):
    """Write a picture, bytes or a path in `folder`, under a name of its bytes; give that name."""
    if isinstance(image, str):
        # a mere name may be that of a file further inside, where there is one alone
        found = [] if Path(folder, image).is_file() else files(folder).get(image, [])
        image = str(found[0].relative_to(folder)) if len(found) == 1 else image
        image = Path(pictures.located(image, folder)).read_bytes()
    if isinstance(pictures.size_or_problem(image), str):
        raise LeftOut("a picture cannot be read")
    return pictures.stored(image, out)


@functools.cache
def files(folder):
    """The files of a folder by name: an archive may have been unzipped into a folder of its own."""
    found = {}
    for path in Path(folder).rglob("*.*"):
        found.setdefault(path.name, []).append(path)
    return found
