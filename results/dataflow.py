"""Draws dataflow.png: how a row of JSON becomes an update of the weights, step by step, and which file does it.

    python results/dataflow.py              # into results/dataflow.png
    python results/dataflow.py other.png

The row is one of the toy's, the four answers are the base's own (`rollout.py --n 4`, seed 0); the picture is drawn
anew, with letters on its colours.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon, Rectangle

WIDTH, HEIGHT = 90, 82  # in tenths of an inch: shown 900 pixels wide, ten points are fourteen pixels
BANDS = [  # bottom, top, numeral, the step's name, the files that do it
    (63.5, 81, "I", "data flow", ["data.py"]),
    (43, 62, "II", "response\ncollection", ["rollout.py", "(doctor.py)"]),
    (21.5, 41.5, "III", "trajectory", ["reward.py", "scoring.py", "train_grpo.py"]),
    (1, 20, "IV", "policy\nupdate", ["policy.py", "(siblings.py)", "train_grpo.py"]),
]
ANSWERS = [  # as the base gave them: what is shown of it, tokens, reward
    ("Row by row. row 1:\nyellow green yellow\nmakes 2. ...\n\\boxed{4}", 37, 1),
    ("At a glance\nI see 3 yellow.\n\\boxed{3}", 14, 0),
    ("At a glance\nI see 2 yellow.\n\\boxed{2}", 14, 0),
    ("Let me see. ... wait,\nre-check row 3:\nred - - makes 4.\n\\boxed{4}", 51, 1),
]
SCENE = "yc gt ys yc ys -- rc -- --".split()  # colour and shape of each cell, in reading order
COLOURS = {"y": "#F0E442", "g": "#009E73", "r": "#D55E00"}  # Okabe and Ito's
BLUE, INK = "#0072B2", "#222222"


def box(axis, x, y, width, height, text, size=8.5, face="white", align="center", **style):
    """A rounded box with its lower left corner at (x, y); its text is centred, or stands at the left."""
    axis.add_patch(FancyBboxPatch((x, y), width, height, "round,pad=0,rounding_size=0.8", fc=face, ec=INK, lw=1))
    left = x + (width / 2 if align == "center" else 1)
    axis.text(left, y + height / 2, text, size=size, ha=align, va="center", linespacing=1.35, **{"color": INK} | style)


def arrow(axis, *points):
    """A line through the points, with a head at the last one."""
    for start, end in zip(points, points[1:]):
        head = "-|>" if end == points[-1] else "-"
        axis.annotate("", end, start, arrowprops={"arrowstyle": head, "lw": 1.4, "color": INK,
                                                  "shrinkA": 0, "shrinkB": 0, "mutation_scale": 12})


def picture(axis, left, bottom, cell):
    """The grid of shapes; a letter says each colour, for print and for the colour-blind."""
    axis.add_patch(Rectangle((left, bottom), 3 * cell, 3 * cell, fc="white", ec=INK, lw=1))
    for i, (colour, shape) in enumerate(SCENE):
        if colour == "-":
            continue
        x, y, r = left + (i % 3 + 0.5) * cell, bottom + (2.5 - i // 3) * cell, 0.38 * cell
        patch = {"c": Circle((x, y), r), "s": Rectangle((x - r, y - r), 2 * r, 2 * r),
                 "t": Polygon([(x, y + r), (x - r, y - r), (x + r, y - r)])}[shape]
        patch.set(fc=COLOURS[colour], ec=INK, lw=0.8)
        axis.add_patch(patch)
        axis.text(x, y - 0.1 * cell * (shape == "t"), colour, size=8.5, ha="center", va="center", color="black")


def draw(axis):
    for i, (bottom, top, numeral, name, files) in enumerate(BANDS):
        axis.add_patch(Rectangle((0.3, bottom), 86, top - bottom, fc=("#F1F5F9", "#E3E9F0")[i % 2], ec="none"))
        axis.text(1.5, top - 1.2, numeral, size=17, weight="bold", va="top", color=BLUE)
        axis.text(1.5, top - 5, name, size=9.5, weight="bold", va="top", color=INK, linespacing=1.1)
        axis.text(1.5, bottom + 1.2, "\n".join(files), size=8.5, family="monospace", va="bottom", color=INK)

    # Step I
    axis.text(16, 79.1, "a row of JSON and its picture, both checked", size=8.5, va="center", color=INK)
    box(axis, 16, 65.3, 32.5, 12, '{"question": "<image>How many yellow\n    objects are in the picture?",\n'
        ' "answer": "4",\n "image": "images/....png"}', 8.5, family="monospace", align="left")
    picture(axis, 49.5, 65.3, 4)
    arrow(axis, (62, 71.3), (65.5, 71.3))
    box(axis, 65.5, 65.3, 19, 12, "a Sample:\nquestion, answer, images,\nprompt_ids, 9 of them\nplaceholders: one for\n"
        "every merged patch")
    arrow(axis, (75, 65.3), (75, 60))

    # Steps II and III: a column an answer, and what compares them
    box(axis, 16, 56, 68.5, 4, "the sampler (embedded, or vLLM) answers G times from its own copy of the weights; "
        "here G = 4")
    box(axis, 16, 30.4, 68.5, 3.2, "compared with its siblings: A = (r − mean of the group) / std of the group",
        face="#F1F5F9")
    rewards = [reward for _, _, reward in ANSWERS]
    mean = sum(rewards) / len(rewards)
    std = (sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1)) ** 0.5
    for k, (text, tokens, reward) in enumerate(ANSWERS):
        left, middle = 16 + 17.5 * k, 24 + 17.5 * k
        box(axis, left, 44.2, 16, 10, f"{text}\n{tokens} tokens", 8)
        face, ink = (BLUE, "white") if reward else ("white", INK)
        box(axis, left + 2, 36.4, 12, 3.6, f"reward r = {reward}", face=face, color=ink)
        sign = "▲" if reward else "▼"  # to be made likelier, or less likely
        box(axis, left + 1, 23, 14, 4, f"A = {(reward - mean) / std:+.2f}  {sign}".replace("-", "−"), 9.5)
        for top, bottom in ((56, 54.2), (44.2, 40), (36.4, 33.6), (30.4, 27), (23, 17.8)):
            arrow(axis, (middle, top), (middle, bottom))

    # Step IV
    box(axis, 16, 13.8, 68.5, 4, "the policy: pixels and tokens in, the log-probability of every completion token out")
    arrow(axis, (36.5, 13.8), (36.5, 10.7))
    box(axis, 16, 2.8, 41, 7.9, "minimise  $-\\min\\,(\\rho A,\\ \\mathrm{clip}(\\rho,\\,1-\\varepsilon_{low},\\,"
        "1+\\varepsilon_{high})\\,A)$\nsummed over tokens, divided by their count on all ranks", 9)
    arrow(axis, (57, 6.8), (62, 6.8))
    box(axis, 62, 2.8, 22.5, 7.9, "AdamW, N updates;\nthen the sampler takes\nover the weights (sync)", 9)
    arrow(axis, (84.5, 6.8), (88, 6.8), (88, 58), (84.5, 58))
    axis.text(89.2, 32, "new weights", size=8.5, rotation=90, ha="center", va="center", color=INK)


def main(path):
    figure = Figure(figsize=(WIDTH / 10, HEIGHT / 10), dpi=200)
    axis = figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axis.axis("off")
    draw(axis)
    figure.savefig(path, metadata={"Software": None})  # the same bytes each time


if __name__ == "__main__":
    main(*(sys.argv[1:] or [Path(__file__).with_suffix(".png")]))
