"""The toy's training prompts with golden reasoning of four kinds, all of it right.

    habit     the base's own best habit, as toy_data/train.jsonl has it
    columns   as thorough, but foreign: column by column, other words, the columns' counts added up
    places    foreign and terse, as a textbook's solution: where the objects asked for are
    answers   the answer alone

Neither foreign kind was ever written by the base: it reads rows, keeps a running count, and never
says where something is. The pictures are toy_data's own.

    PYTHONPATH=. python results/provenance/golden.py --out runs/provenance/golden
"""

import utils  # first: from here on Ctrl-C is no traceback

import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import toy


@dataclass
class Args:
    out: str = "runs/provenance/golden"  # folder for habit.jsonl ..., the other splits and images/
    train: int = 512  # prompts, the first of toy_data's: answers come in turn, so any multiple of 6
    held_out: int = 512  # prompts of validation and of test


def habit(scene, colour):
    return toy.row_by_row(scene, colour, random.Random(0), slip=0)


def columns(scene, colour):
    text, counts = "We go down.", []
    for name, column in zip(("Left", "Centre", "Right"), zip(*toy.grid_rows(scene))):
        counts.append(column.count(colour))
        text += f" {name}: {' '.join(column)}, so {counts[-1]}."
    total = sum(counts)
    return f"{text} In all {' + '.join(map(str, counts))} = {total}. \\boxed{{{total}}}"


def places(scene, colour):
    found = [f"({i // toy.GRID + 1}, {i % toy.GRID + 1})"
             for i, thing in enumerate(scene) if thing and thing[0] == colour]
    where = f"{colour} is at {', '.join(found)}" if found else f"nothing is {colour}"
    return f"In the picture {where}, so the answer is {len(found)}. \\boxed{{{len(found)}}}"


def answers(scene, colour):
    return f"\\boxed{{{sum(thing is not None and thing[0] == colour for thing in scene)}}}"


KINDS = {kind.__name__: kind for kind in (habit, columns, places, answers)}


def first(split, count):
    return utils.read_jsonl(Path(toy.HERE) / "toy_data" / f"{split}.jsonl")[:count]


def main(args):
    out = Path(args.out)
    shutil.copytree(Path(toy.HERE) / "toy_data" / "images", out / "images", dirs_exist_ok=True)
    for split in ("validation", "test"):
        utils.write_jsonl(out / f"{split}.jsonl", first(split, args.held_out))
    rows = first("train", args.train)
    scenes = [(scene, colour) for _, scene, colour, _, _ in toy.make_split("train")]
    for kind, golden in KINDS.items():
        utils.write_jsonl(out / f"{kind}.jsonl", [row | {"solution": golden(*problem)}
                                                  for row, problem in zip(rows, scenes)])
    return {"out": args.out, "rows": len(rows)}


if __name__ == "__main__":
    utils.run_script(main, Args)
