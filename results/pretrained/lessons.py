"""What the graft of make.py is taught, as rows for train_sft.py: to see, then the toy's task.

    PYTHONPATH=. python results/pretrained/lessons.py --out runs/pretrained/lessons
"""

import utils  # first: from here on Ctrl-C is no traceback

import random
from dataclasses import dataclass
from pathlib import Path

import toy


@dataclass
class Args:
    out: str = "runs/pretrained/lessons"  # folder for see.jsonl, course.jsonl and their pictures
    see: int = 1920  # rows that teach to see
    course: int = 2400  # rows of the course: to see, and the task, in turn


def caption(scene, colour, rng):
    """What it learns to see by: the rows, and which object is the last."""
    rows, last = toy.grid_rows(scene), [thing for thing in scene if thing][-1][0]
    text = " ".join(f"row {n}: {' '.join(row)}." for n, row in enumerate(rows, 1))
    return "<image>What is in the picture, row by row, and what is the last colour?", text, last


def task(scene, colour, rng):
    """The toy's question, answered by one of its four habits with the shares of its base."""
    habits, _, shares = zip(*toy.HABITS.values())
    text, _, answer = rng.choices(habits, shares)[0](scene, colour, rng).rpartition(" \\boxed{")
    return toy.question(colour), text, answer.rstrip("}")


def write_lesson(folder, name, kinds, count, held_out):
    """`count` rows of these kinds in turn, on fresh scenes, none of them in `held_out`."""
    (folder / name).mkdir(parents=True, exist_ok=True)
    rng, rows = random.Random(name), []
    while len(rows) < count:
        problem = toy.make_problem(rng, rng.randrange(toy.ANSWERS), unusual=False)
        if problem not in held_out:
            asked, text, answer = kinds[len(rows) % len(kinds)](*problem, rng)
            image = f"{name}/{len(rows):04d}.png"
            toy.draw(problem[0], rng).save(folder / image)
            rows.append({"question": asked, "answer": answer, "image": image,
                         "solution": f"{text} \\boxed{{{answer}}}"})
    utils.write_jsonl(folder / f"{name}.jsonl", rows)


def main(args):
    held_out = {(s, c) for name in toy.SPLITS for _, s, c, _, _ in toy.make_split(name)}
    write_lesson(Path(args.out), "see", [caption], args.see, held_out)
    write_lesson(Path(args.out), "course", [caption, task], args.course, held_out)
    return {"out": args.out}


if __name__ == "__main__":
    utils.run_script(main, Args)
