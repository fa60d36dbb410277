"""The house rules of the README and the design, enforced."""

import ast
import importlib
import json
import re
import shlex
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

import bench
import utils

ROOT = Path(__file__).parents[1]
STAGES = ["reward", "rollout", "train_sft", "train_grpo", "evaluate", "report", "utils",
          "toy"]
# Lines, blank ones included. Raised from the first design, since what was cut instead was worth more:
# reward (300: each rule is a way in which real responses write answers; without them nearly a third of
# an adversarial set of unboxed ones was misread; reward files with helpers of their own), rollout (450: the vLLM
# engine, the doctor, the rehearsal, the cache that answers to a prompt share), utils (450: every picture of a row used or
# refused, whole-or-nothing files, checkpoints tried before step 1; 330 of them shared prefixes and frozen features;
# an optional tracker: too many subjects for one room, and the next thing to be divided),
# toy (300: the check of what the base was promised to be; which habits a trained model picks), report (400:
# nine tables, three figures and a page, on folders that may be broken; intervals over seeds and prompts at once).
BUDGETS = {"reward": 520, "rollout": 840, "train_sft": 290, "train_grpo": 690, "evaluate": 350,
           "report": 805, "utils": 1640, "toy": 520}
README = (ROOT / "README.md").read_text()


def section(title):
    """What stands below a heading of the README, up to the next one."""
    return README.split(f"## {title}\n")[1].split("\n## ")[0]


def source(stage):
    return (ROOT / f"{stage}.py").read_text()


@pytest.mark.parametrize("stage", STAGES)
def test_budgets(stage):
    """Lines with comments, 100 columns, main at most 150 lines, any other function 60."""
    lines = source(stage).splitlines()
    assert len(lines) <= BUDGETS[stage], f"{stage}.py has {len(lines)} lines"
    assert [i for i, line in enumerate(lines, 1) if len(line) > 100] == []
    for node in ast.walk(ast.parse(source(stage))):
        if isinstance(node, ast.FunctionDef):
            length = node.end_lineno - node.lineno + 1
            assert length <= (150 if node.name == "main" else 60), f"{node.name} has {length} lines"


@pytest.mark.parametrize("stage", STAGES)
def test_one_statement_a_line_and_nothing_swallowed(stage):
    """No two statements on a line, no bare except, no `pass` in an except."""
    statements = [n for n in ast.walk(ast.parse(source(stage))) if isinstance(n, ast.stmt)]
    begins = [n.lineno for n in statements]
    assert len(begins) == len(set(begins))
    for node in ast.walk(ast.parse(source(stage))):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None and not isinstance(node.body[0], ast.Pass), node.lineno


@pytest.mark.parametrize("stage", [s for s in STAGES if "class Args" in source(s)])
def test_every_flag_is_documented_and_read(stage):
    """A flag that nobody reads is a lie; so is one without a line of help."""
    text = source(stage)
    module = importlib.import_module(stage)
    docs = re.findall(r"^    (\w+):.*?  # (.+)$", text.split("class Args")[1].split("\n\n\n")[0], re.M)
    names = list(module.Args.__dataclass_fields__)
    assert [name for name, _ in docs] == names
    everywhere = "".join(source(s) for s in STAGES)
    for name in names:
        assert re.search(rf"\bargs\.{name}\b", everywhere), f"args.{name} is never read"


def test_stages_import_nothing_but_the_card_at_import_time():
    """Other stages, vllm, matplotlib and trackers are imported where they are used."""
    third = {"torch", "numpy", "PIL", "transformers", "tqdm", "tokenizers", "utils"}
    for stage in STAGES:
        for node in ast.parse(source(stage)).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in third or top in sys.stdlib_module_names, f"{stage}.py imports {name}"


@pytest.mark.parametrize("stage, low, high", [
    ("train_grpo", 0.25, 0.40), ("train_sft", 0.10, 0.32),  # each flag's help is a comment
    *((s, 0.10, 0.25) for s in STAGES if not s.startswith("train"))])
def test_share_of_comment_lines(stage, low, high):
    """Lines that bear a comment, over lines that bear code."""
    path = ROOT / f"{stage}.py"
    with open(path, "rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    commented = {t.start[0] for t in tokens if t.type == tokenize.COMMENT}
    skip = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
            tokenize.ENCODING, tokenize.ENDMARKER}
    code = {t.start[0] for t in tokens if t.type not in skip}
    share = len(commented) / len(code)
    assert low <= share <= high, f"{stage}.py: {share:.0%} comment lines"


# ---------------------------------------------------------------------------------------------
# The README


def commands():
    """Every command of the README's shell blocks, continued lines joined, `&&` split."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", README, re.S):
        for line in block.replace("\\\n", " ").splitlines():
            for part in line.split("&&"):
                words = shlex.split(part, comments=True)
                if words:
                    yield words


def test_readme_commands_parse():
    """Each flag of each command exists and has a value of its type; each script is in the tree."""
    scripts = 0
    for words in commands():
        assert words[0] in ("pip", "pytest", "python", "torchrun", "bash", "git", "cd", "source"), words
        script = next((w for w in words if w.endswith(".py")), None)
        if words[0] not in ("python", "torchrun"):
            continue
        assert (ROOT / script).exists(), words
        scripts += 1
        module = importlib.import_module(Path(script).stem)
        rest = words[words.index(script) + 1 :]
        if hasattr(module, "Args"):
            utils.parse_args(module.Args, rest)
    assert scripts >= 8


def test_readme_has_the_two_commands():
    assert "pip install -r requirements.txt && torchrun --standalone --nproc_per_node 2 train_grpo.py\n" in README
    assert "pip install -r requirements.txt && pytest\n" in README


def test_readme_numbers_stand_in_results():
    """The quick start's table, cell by cell, and the mean gain, from results/quickstart."""
    gains = {"validation": [], "test": []}
    for seed in (0, 1, 2):
        folder = ROOT / "results" / "quickstart" / f"seed_{seed}"
        result = json.loads((folder / "result.json").read_text())
        rows = [r for r in utils.read_jsonl(folder / "eval.jsonl") if r["split"] == "validation"]
        assert json.loads((folder / "args.json").read_text())["seed"] == seed
        cells = [str(seed)]
        for split in ("validation", "test"):
            for point in result[f"{split}_pass1_t0.6"].values():
                low, high = point["interval_95"]
                cells.append(f"{100 * point['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        for name, scale, digits in (("length", 1, 1), ("reflection_ratio", 100, 0)):
            cells += [f"{scale * row[name]:.{digits}f}" for row in (rows[0], rows[-1])]
        cells.append(f"{result['minutes']:.1f}")
        assert f"| {' | '.join(cells)} |\n" in README
        for split, points in gains.items():
            entry = result[f"{split}_pass1_t0.6"]
            points.append(100 * (entry["after"]["accuracy"] - entry["before"]["accuracy"]))
    validation, test = (sum(points) / 3 for points in gains.values())
    assert f"Validation rises by {validation:.0f} points on average, test by {test:.0f}." in README
    defaults = importlib.import_module("train_grpo").Args
    assert {"seed", "out", "engine", "tis_cap"} == {  # the table is of the command as it is today
        name for name, value in json.loads((folder / "args.json").read_text()).items()
        if name != "script" and value != getattr(defaults, name, value)}


def test_readme_grader_figures_stand_in_results():
    found = json.loads((ROOT / "results" / "grader.json").read_text())
    speed = found["speed"]["microseconds"]
    ours, theirs = speed["ours, cold"], speed["math_verify"]
    audit, words = found["audit_of_211_answers_of_open_source_test_suites"], README.replace("\n", " ")
    share = {}
    for name, kinds in (("numeric", "int decimal fraction sqrt pi degree percent unit"),
                        ("choices", "choice set interval"), ("symbolic", "symbolic")):
        rows = [audit[kind] for kind in kinds.split() if kind in audit]
        assert sum(row["false +"] for row in rows) == 0
        share[name] = f"{sum(r['right'] for r in rows)} of {sum(r['rows'] for r in rows)}"
    pairs = found["audit_of_591_geometry3k_choice_pairs"]["all"]
    for figure in (f"takes {ours['median']:.1f} microseconds (median), {ours['median_of_parsed']:.0f} where",
                   f"took {theirs['median']:.0f} and {theirs['median_of_parsed']:.0f} (",
                   f"{share['numeric']} numeric ones and {share['choices']} choices, sets and intervals",
                   f"weak point: {share['symbolic']}", f"{pairs['right']} of {pairs['rows']}."):
        assert figure in words, figure


def test_readme_rollout_figures_stand_in_results():
    speed = json.loads((ROOT / "results" / "rollout.json").read_text())["rollout"]["tokens_per_second"]
    words = README.replace("\n", " ")
    assert f"gives {speed['HFEngine']:,} completion tokens/s" in words
    assert f"`generate` {speed['generate']:,} (" in words


def test_readme_doctor_stands_in_results():
    assert (ROOT / "results" / "doctor.txt").read_text() in README
    gaps = json.loads((ROOT / "results" / "tied_head.json").read_text())["sampler_gap"]
    assert f"difference grew from {gaps[0]:.0e} to {gaps[-1]:.1e} nats in ten steps" in README.replace("\n", " ")


def test_readme_ranks_figures_stand_in_results():
    speed = json.loads((ROOT / "results" / "ranks.json").read_text())["ranks"]["samples_per_second"]
    assert f"{speed['1']} samples a second on one rank and {speed['2']} on two" in README.replace("\n", " ")


def test_readme_step_figures_stand_in_results():
    found = json.loads((ROOT / "results" / "step.json").read_text())["step"]
    words = README.replace("\n", " ")
    assert bench.step_table(found) in README
    short, long = (found[name]["contestants"]["TRL"]["ours_times_faster"] for name in ("short", "long"))
    assert f"that is {short:.1f} times on the short shape and {long:.1f} times on the long one" in words
    ours = found["short"]["contestants"]["ours"]
    floor = ours["share_of_matrix_peak"] * sum(ours["seconds_by_phase"].values())
    assert f"products ({found['matrix_gflops']} GFLOP/s), is {floor:.2f} s" in words


def test_readme_growth_figures_stand_in_results():
    table = json.loads((ROOT / "results" / "growth.json").read_text())["growth"]["table"]
    words = README.replace("\n", " ")
    for rows, text in zip(table.values(), ("a group of {}", "{} completion tokens", "{} image tokens")):
        first, last = rows[0], rows[-1]
        times = [row["plain"]["update"] / row["ours"]["update"] for row in (first, last)]
        assert f"{times[0]:.1f} times faster with {text.format(first['value'])}" in words
        assert f"{times[1]:.1f} with {last['value']:,}" in words


def test_readme_report_figures_stand_in_results():
    found = json.loads((ROOT / "results" / "report.json").read_text())["report"]
    assert f"{found['completions']:,} completions take {found['seconds']} seconds" in README.replace("\n", " ")


def test_readme_memory_table_is_the_formulas():
    for name, cells in bench.memory().items():
        assert f"| {name.replace(', ', ' | ')} | {' | '.join(map(str, cells))} |\n" in README


def test_readme_file_table_is_the_tree():
    """Every file of the top level stands in the table, and nothing else does."""
    listed = set(re.findall(r"^\| `([\w./]+)` \|(?: \d+)? \|", README, re.M))
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    top = {p.split("/")[0] + ("/" if "/" in p else "") for p in tracked.split()}
    top -= {".gitignore", ".ci/", "LICENSE", "README.md"}
    assert listed == top
    sizes = dict(re.findall(r"^\| `([\w./]+)` \| (\d+) \|", README, re.M))
    for name, lines in sizes.items():
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name
