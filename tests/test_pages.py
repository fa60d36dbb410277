"""What README.md, LESSON.md and results/README.md say, held to the tree and to the raw files in results/.

The tables of the experiments are test_results.py's, the reading order and the exercises test_lesson.py's.
"""

import importlib
import importlib.util
import json
import re
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import bench
import utils

ROOT = Path(__file__).parents[1]
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "LESSON.md", "results/README.md")}
README, LESSON, RESULTS = PAGES.values()


def section(title, page):
    """What stands below a heading of a page, up to the next one of its rank."""
    return page.split(f"\n## {title}\n")[1].split("\n## ")[0]


def words(page):
    """A page's text on one line."""
    return " ".join(page.split())


def without_blocks(page):
    """A page without what stands between fences."""
    return re.sub(r"^```.*?^```$", "", page, flags=re.S | re.M)


def raw(name):
    return json.loads((ROOT / "results" / name).read_text())


def same_picture(path, other):
    """Whether two figures show the same, but for what another build of a font renderer does to edges."""
    one, two = (np.asarray(Image.open(p).convert("L"), dtype=float) for p in (path, other))
    return one.shape == two.shape and (np.abs(one - two) > 96).sum() < 10


# ---------------------------------------------------------------------------------------------
# The pages themselves


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", PAGES)
def test_prose_fits_a_screen(name):
    """At most 130 columns; tables, commands and what a program printed excepted."""
    lines = without_blocks(PAGES[name]).splitlines()
    assert [line for line in lines if len(line) > 130 and not line.startswith("|")] == []


def test_nothing_is_said_twice():
    """No 200 characters in a row stand on two of the pages, however their lines are broken."""
    seen = {}
    for name, page in PAGES.items():
        text = words(page)
        found = {text[i : i + 200] for i in range(len(text) - 199)}
        for other, before in seen.items():
            assert not found & before, f"{name} and {other}: {min(found & before)}"
        seen[name] = found


def anchors(page):
    """The names that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """To a file of the tree, or to a heading of one of the pages."""
    links = re.findall(r"\]\(([^)\s]+)\)", PAGES[name])
    assert len(links) >= 10
    for link in links:
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(PAGES[str(target.relative_to(ROOT))]), link


def commands():
    """Every command of the pages, in blocks and in running text, continued lines joined, `&&` split."""
    for page in PAGES.values():
        blocks = re.findall(r"```bash\n(.*?)```", page, re.S)
        lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
        lines += [words(found) for found in re.findall(r"`((?:python|bash) [^`]+)`", page)]
        for line in lines:
            for part in line.split("&&"):
                found = shlex.split(part, comments=True)
                while found and re.match(r"[A-Z]+=", found[0]):
                    found = found[1:]
                if found:
                    yield found[: found.index(">")] if ">" in found else found


def test_commands_parse():
    """Each script is in the tree; each of its flags exists and has a value of its type."""
    scripts = set()
    for found in commands():
        assert found[0] in ("pip", "pytest", "python", "torchrun", "bash", "hf"), found
        script = next((w for w in found if w.endswith((".py", ".sh"))), None)
        if script is None:
            continue
        assert (ROOT / script).exists(), found
        scripts.add(script)
        rest = found[found.index(script) + 1 :]
        module = importlib.import_module(script[:-3]) if "/" not in script else None
        if hasattr(module, "Args"):
            utils.parse_args(module.Args, rest)
        else:
            flags = [word for word in rest if word.startswith("--")]
            assert all(f'"{flag}"' in (ROOT / script).read_text() for flag in flags), found
    assert {p.name for p in ROOT.glob("*.py")} - {f"{n}.py" for n in "utils signs policy decode siblings answers scoring pictures sources benchmarks".split()} <= scripts


def test_how_long_a_data_set_takes_to_read():
    """What results/README.md says is the benchmark's raw file, and what the README promises lies above it."""
    found, text = raw("data.json")["data"], words(RESULTS)
    one, two, table = (found[name] for name in ("data.jsonl, 1 rank(s)", "data.jsonl, 2 rank(s)", "data.parquet, 1 rank(s)"))
    for said in (f"{found['rows']:,} rows with JPEG pictures of 1000 x 700 ({found['megabytes_of_pictures']:,} MB, ",
                 f"in {one['seconds']} seconds on one core", f"take {two['seconds']} seconds, ",
                 f"the pictures {table['seconds']} on one core", f"takes {one['kB_in_memory_a_row']} kB of memory, or "
                 f"{table['kB_in_memory_a_row']} with its picture", f"would take {found['seconds_by_the_processor']} seconds"):
        assert said in text, said
    assert max(one["seconds"], table["seconds"]) < 36 and "10,000 rows with pictures take [half a minute]" in words(README)


def test_the_papers_data_are_named_as_they_are_released():
    """Each file that a command trains or measures on lies there in the release, whose files these are; and the
    README says how it is fetched."""
    release = {f"geometry3k/geometry3k_{split}_v0.jsonl" for split in ("rl", "validation", "test")}
    release |= {"mm_math/mm_math_rl_v0.jsonl", "mm_math/mm_math_validation_v0.jsonl", "mm_math/math_verse_test_v0.jsonl"}
    named = {word for found in commands() for word in found if word.endswith(".jsonl") and word.startswith(("geo", "mm_"))}
    assert release == named
    assert ["hf", "download", "ManTle/MAYE", "--repo-type", "dataset", "--local-dir", "."] in [*commands()]


def test_the_readme_has_the_two_commands():
    assert "pip install -r requirements.txt && torchrun --standalone --nproc_per_node 2 train_grpo.py\n" in README
    assert "pip install -r requirements.txt && pytest\n" in README


def pins(name):
    """The lines of a requirements file, without comments."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    return [line for line in lines if line]


def test_the_light_install_is_all_but_vllm():
    """No pin is written twice; the sizes on the README are pip's."""
    first, vllm = pins("requirements.txt")
    assert first == "-r requirements-light.txt" and vllm.startswith("vllm==")
    assert all(re.fullmatch(r"(?!vllm)\w+==[\d.]+", line) for line in pins("requirements-light.txt"))
    found, text = raw("install.json"), words(README)
    mac, linux = found["macOS, arm64"]["megabytes"], found["Linux, x86-64"]
    rest = linux["megabytes"] - linux["of them CUDA and triton"] - linux["of them torch"]
    assert f"A Mac (Apple silicon) downloads {round(mac, -1)} MB;" in text
    assert f"brings CUDA, {linux['megabytes'] / 1000:.1f} GB;" in text
    assert f"it is {rest + found['a CPU build of torch, megabytes']} MB." in text


def test_the_file_table_is_the_tree():
    """Every file of the top level stands in the table, and nothing else does."""
    table = section("The files", README)
    listed = re.findall(r"^\| `([\w./-]+)` \|(?: \d+)? \|", table, re.M)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout
    top = {p.split("/")[0] + ("/" if "/" in p else "") for p in tracked.split()}
    top -= {".gitignore", ".ci/", "LICENSE", "README.md"}
    assert sorted(listed) == sorted(top)
    sizes = dict(re.findall(r"^\| `([\w./-]+)` \| (\d+) \|", table, re.M))
    for name, lines in sizes.items():
        assert int(lines) == len((ROOT / name).read_text().splitlines()), name


def test_the_figure_of_the_data_flow(tmp_path):
    """It is what its script draws; its steps are those of the README, its files are in the tree."""
    spec = importlib.util.spec_from_file_location("dataflow", ROOT / "results" / "dataflow.py")
    dataflow = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(dataflow)
    dataflow.main(tmp_path / "drawn.png")
    assert same_picture(tmp_path / "drawn.png", ROOT / "results" / "dataflow.png")
    steps = [f"Step {numeral}, {words(name)}" for _, _, numeral, name, _ in dataflow.BANDS]
    assert steps == re.findall(r"^\d\. \*\*(Step [IV]+, [\w ]+)\.\*\*", README, re.M)
    for *_, files in dataflow.BANDS:
        assert all((ROOT / file.strip("()")).exists() for file in files), files


# ---------------------------------------------------------------------------------------------
# Numbers


def today(value):
    """A flag's value as it is written now: the toy's data were once written by name."""
    return re.sub(r"^toy:(\w+)$", r"toy_data/\1.jsonl", value) if isinstance(value, str) else value


def accuracies(result):
    """A run's on validation, before and after, and on test, as tables have them."""
    points = [point for split in ("validation", "test") for point in result[f"{split}_pass1_t0.6"].values()]
    return ["{:.1f} [{:.1f}, {:.1f}]".format(100 * p["accuracy"], *(100 * x for x in p["interval_95"])) for p in points]


def test_low_ranks_stand_in_results():
    for seed in (0, 1, 2):
        folder = ROOT / "results" / "lora" / f"seed_{seed}"
        args, result = (json.loads((folder / name).read_text()) for name in ("args.json", "result.json"))
        assert (args["seed"], args["lora_rank"], args["lr"]) == (seed, 8, 1e-3)
        assert f"| {seed} | {' | '.join(accuracies(result))} |\n" in RESULTS


def test_the_quick_start_stands_in_results():
    """Its table, cell by cell, and the mean gain, from results/quickstart."""
    gains = {"validation": [], "test": []}
    for seed in (0, 1, 2):
        folder = ROOT / "results" / "quickstart" / f"seed_{seed}"
        result = json.loads((folder / "result.json").read_text())
        rows = [r for r in utils.read_jsonl(folder / "eval.jsonl") if r["split"] == "validation"]
        args = json.loads((folder / "args.json").read_text())
        assert args["seed"] == seed
        cells = [str(seed), *accuracies(result)]
        for name, scale, digits in (("length", 1, 1), ("reflection_ratio", 100, 0)):
            cells += [f"{scale * row[name]:.{digits}f}" for row in (rows[0], rows[-1])]
        cells.append(f"{result['minutes']:.1f}")
        assert f"| {' | '.join(cells)} |\n" in README
        for split, points in gains.items():
            entry = result[f"{split}_pass1_t0.6"]
            points.append(100 * (entry["after"]["accuracy"] - entry["before"]["accuracy"]))
        if seed == 0:  # what the first command printed
            assert json.dumps(result) in README
    validation, test = (sum(points) / 3 for points in gains.values())
    assert f"Validation rises by {validation:.0f} points on average, test by {test:.0f}." in README
    defaults = importlib.import_module("train_grpo").Args
    assert {"seed", "out", "engine", "tis_cap"} == {  # the table is of the command as it is today
        name for name, value in args.items()
        if name != "script" and today(value) != today(getattr(defaults, name, value))}


def test_the_graders_figures_stand_in_results():
    found = raw("grader.json")
    speed = found["speed"]["microseconds"]
    ours, theirs = speed["ours, cold"], speed["math_verify"]
    audit, text = found["audit_of_211_answers_of_open_source_test_suites"], words(RESULTS)
    share = {}
    for name, kinds in (("numeric", "int decimal fraction sqrt pi degree percent unit"),
                        ("choices", "choice set interval"), ("symbolic", "symbolic")):
        rows = [audit[kind] for kind in kinds.split() if kind in audit]
        assert sum(row["false +"] for row in rows) == 0
        share[name] = f"{sum(r['right'] for r in rows)} of {sum(r['rows'] for r in rows)}"
    audits = [found[name]["all"] for name in found if name.startswith("audit")]
    table = re.findall(r"\| (\d+) of (\d+) \| (\d+) \|", RESULTS.split("\n## The grader")[1].split("\n## ")[0])
    assert table == [(str(row["right"]), str(row["rows"]), str(row["false +"])) for row in audits]
    for figure in (f"takes {ours['median']:.1f} microseconds (median), {ours['median_of_parsed']:.0f} where",
                   f"math_verify took {theirs['median']:.0f} and {theirs['median_of_parsed']:.0f}.",
                   f"{share['numeric']} numeric ones and {share['choices']} choices, sets and intervals",
                   f"weak point: {share['symbolic']}"):
        assert figure in text, figure
    mended, unseen = audits[1], audits[-1]
    assert mended["false +"] == 0
    assert (f"Of {mended['rows']} rows from public bug reports and attackers it judged {mended['right']} right and paid no wrong one, "
            f"its rules mended on them; of {unseen['rows']} that they never saw, {unseen['right']}, and paid {unseen['false +']} wrongly"
            ) in words(README)


def test_the_samplers_figures_stand_in_results():
    found, text = raw("rollout.json")["rollout"], words(RESULTS)
    speed = found["tokens_per_second"]
    assert f"gives {speed['HFEngine']:,} completion tokens/s on the toy ({found['prompts']} prompts, G = " in text
    assert f"`generate` {speed['generate']:,} (" in text


def test_the_speedruns_entries_are_what_was_timed():
    """Each line of the table; all three seeds of an entry at 95 % or more, or it says that it is none."""
    page = (ROOT / "results" / "speedrun.md").read_text()
    lines = (ROOT / "results" / "speedrun.jsonl").read_text().splitlines()
    assert len(lines) == len(re.findall(r"^\| \d\.\d\d \|", page, re.M)) > 1
    for found in map(json.loads, lines):
        assert found["minutes"] == round(sorted(found["seconds"])[1] / 60, 2)
        shares = ", ".join(f"{100 * x:.1f}" if x >= 0.95 else f"**{100 * x:.1f}**" for x in found["validation"])
        flags = f"`{found['flags']}`" if found["flags"] else ""
        row, = re.findall(rf"^\| {found['minutes']:.2f} \| .*$", page, re.M)
        assert row.startswith(f"| {found['minutes']:.2f} | {shares} | {flags} | {found['commit']} |".replace("|  |", "| |"))
        assert ("no entry" in row) == (min(found["validation"]) < 0.95)


def test_the_doctors_table_stands_in_results():
    assert (ROOT / "results" / "doctor.txt").read_text() in RESULTS
    gaps = raw("tied_head.json")["sampler_gap"]
    assert f"difference grew from {gaps[0]:.0e} to {gaps[-1]:.1e} nats in ten steps" in words(RESULTS)


def test_the_ranks_figures_stand_in_results():
    speed = raw("ranks.json")["ranks"]["samples_per_second"]
    assert f"{speed['1']} samples a second on one rank and {speed['2']} on two" in words(RESULTS)


def test_the_steps_figures_stand_in_results():
    found, text = raw("step.json")["step"], words(RESULTS)
    assert bench.step_table(found) in RESULTS
    short, long = (found[name]["contestants"] for name in ("short", "long"))
    times = [shape["TRL"]["ours_times_faster"] for shape in (short, long)]
    assert f"that is {times[0]:.1f} times on the short shape and {times[1]:.1f} times on the long one" in text
    first = [shape["ours, new images"]["samples_per_second"] / shape["TRL"]["samples_per_second"]
             for shape in (short, long)]
    assert f"({first[0]:.1f} and {first[1]:.1f} in a first epoch)" in text
    floor = short["ours"]["share_of_matrix_peak"] * sum(short["ours"]["seconds_by_phase"].values())
    assert f"products ({found['matrix_gflops']} GFLOP/s), is {floor:.2f} s" in text
    operations = re.search(r"in ([\d,]+) operations", (ROOT / "results" / "profile.txt").read_text())[1]
    assert f"A rollout is {round(int(operations.replace(',', '')), -3):,} operations" in text


def test_the_figures_of_growth_stand_in_results():
    table, text = raw("growth.json")["growth"]["table"], words(RESULTS)
    for rows, what in zip(table.values(), ("a group of {}", "{} completion tokens", "{} image tokens")):
        first, last = rows[0], rows[-1]
        times = [row["plain"]["update"] / row["ours"]["update"] for row in (first, last)]
        assert f"{times[0]:.1f} times faster with {what.format(first['value'])}" in text
        assert f"{times[1]:.1f} with {last['value']:,}" in text


def test_the_reports_figures_stand_in_results():
    found = raw("report.json")["report"]
    assert f"{found['completions']:,} completions take {found['seconds']} seconds" in words(RESULTS)
