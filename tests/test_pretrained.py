"""results/pretrained: what a checkpoint has forgotten is measured rightly; on the toy, since tests have no other model."""

import copy
import importlib.util
import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import toy
from data import banned_ids, load_samples
from policy import Policy, collate, load_model, load_processor
from reward import accuracy_reward
from runs import run
from utils import UserError

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "results" / "pretrained"


def module(path):
    """A script of results/, imported."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


forgetting = module(FOLDER / "forgetting.py")
golden = module(ROOT / "results" / "provenance" / "golden.py")
lessons = module(FOLDER / "lessons.py")

TEXT = (FOLDER / "text.txt").read_text()
ROWS = [json.loads(line) for line in (FOLDER / "knowledge.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def toys():
    """The toy, a copy whose weights are a little elsewhere, their processor, and eight prompts with pictures."""
    model, processor = load_model(ROOT / "toy_model", torch.float32).eval(), load_processor(ROOT / "toy_model")
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in moved.parameters():
            weight += 0.1 * weight.std() * torch.randn(weight.shape, generator=generator) if weight.ndim > 1 else 0
    prompts = load_samples(ROOT / "toy_data" / "validation.jsonl", processor, 2048)[:8]
    return model, moved, processor, prompts


# ---------------------------------------------------------------------------------------------
# What is asked


def test_the_text_is_five_paragraphs_of_plain_english():
    """Without a character that a tokenizer might spell otherwise, and of the size that was meant."""
    assert TEXT.isascii() and len(TEXT.strip().split("\n\n")) == 5
    assert 400 <= len(TEXT.split()) <= 600


def test_the_questions_are_a_hundred_each_with_four_options():
    assert len(ROWS) == len({row["question"] for row in ROWS}) == 100
    for row in ROWS:
        assert list(row) == ["question", "options", "answer"]
        assert len(row["options"]) == len(set(row["options"])) == 4 and row["answer"] in row["options"], row
        for text in (row["question"], *row["options"]):  # a plain continuation: a space joins them
            assert text.isascii() and text == text.strip() and not text.endswith((".", "?", ":")), row


def test_the_right_option_stands_anywhere():
    """Who always says the option of one place gets a quarter."""
    places = [row["options"].index(row["answer"]) for row in ROWS]
    assert [places.count(place) for place in range(4)] == [25] * 4


# ---------------------------------------------------------------------------------------------
# Text and questions


def test_the_likelihood_of_a_text_is_minus_the_cross_entropy(toys):
    """Of every token but the first, and not of the placeholders, which are never sampled."""
    model, _, processor, _ = toys
    text = TEXT.split("\n\n")[0]
    ids = torch.tensor([processor.tokenizer(text)["input_ids"]])
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0]
    logits[:, banned_ids(processor)] = -math.inf
    wanted = -torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:]).item()
    got, tokens = forgetting.text_likelihood(Policy(model, processor), text)
    assert got == pytest.approx(wanted, abs=1e-5) and tokens == ids.shape[1] - 1


def test_log_likelihoods_come_in_the_order_of_the_pairs(toys):
    """Though rows are computed by length, some beside others: each is what it is alone."""
    policy = Policy(toys[0], toys[2])
    pairs = [([20, 21, 22], [23] * 7), ([20], [24, 25]), ([26] * 600, [27, 28, 29]), ([20, 21], [30])]
    together = forgetting.log_likelihoods(policy, pairs)
    assert [len(values) for values in together] == [7, 2, 3, 1]
    for values, pair in zip(together, pairs):
        assert values == pytest.approx(forgetting.log_likelihoods(policy, [pair])[0], abs=1e-5)


def test_the_option_that_is_chosen_is_the_likeliest_whole():
    """-3 is less than -2.5, though its mean is more; of equals the first."""
    assert forgetting.choice([[-1.0, -1.0, -1.0], [-2.5], [-2.0, -2.0], [-9.0]]) == 1
    assert forgetting.choice([[-4.0], [-1.0, -1.0], [-2.0], [-3.0]]) == 1


def test_knowledge_counts_the_questions_whose_right_option_is_the_likeliest(monkeypatch, toys):
    """Likelihoods from hand: the second option of each question, by its length in a sum of -1 a token."""
    rows = [{"question": "a", "options": ["w", "x", "y", "z"], "answer": "x"},
            {"question": "b", "options": ["w", "x", "y", "z"], "answer": "z"},
            {"question": "c", "options": ["w", "x", "y", "z"], "answer": "x"},
            {"question": "d", "options": ["w", "x", "y", "z"], "answer": "x"}]
    asked = []
    monkeypatch.setattr(forgetting, "log_likelihoods", lambda policy, pairs: asked.extend(pairs) or [
        [-1.0] * (1 if i % 4 == 1 else 2) for i in range(len(pairs))])
    policy = Policy(toys[0], toys[2])
    got = forgetting.knowledge(policy, rows)
    assert {**got, "interval_95": 0} == {"right": 3, "of": 4, "by_row": "1011", "interval_95": 0}
    assert got["interval_95"] == [0.3006, 0.9544]  # Wilson's, of 3 in 4
    said = [tuple(toys[2].tokenizer.decode(ids) for ids in pair) for pair in asked]
    assert said == [(row["question"], f" {option}") for row in rows for option in row["options"]]


# ---------------------------------------------------------------------------------------------
# Divergences


def test_divergences_by_hand():
    """KL of (1/2, 1/4, 1/4) from (1/4, 1/2, 1/4): ln 2 / 2 - ln 2 / 4; the other way round it is another's."""
    p, q, r = (torch.tensor([row]).log() for row in ([0.5, 0.25, 0.25], [0.25, 0.5, 0.25], [0.8, 0.1, 0.1]))
    assert forgetting.token_divergences(p, q).tolist() == pytest.approx([math.log(2) / 4])
    wanted = [0.5 * math.log(0.625) + 0.5 * math.log(2.5), 0.8 * math.log(1.6) + 0.2 * math.log(0.4)]
    assert forgetting.token_divergences(torch.cat([p, r]), torch.cat([r, p])).tolist() == pytest.approx(wanted)
    never = torch.tensor([[0.0, torch.finfo(torch.float32).min]])  # as a banned id is
    assert forgetting.token_divergences(never, never).tolist() == [0.0]


def test_distributions_are_those_that_were_sampled_from(toys):
    """At the tokens that were drawn they are the engine's own log-probabilities; a placeholder has none."""
    model, _, processor, prompts = toys
    done = forgetting.HFEngine(model, processor, 8).generate(prompts, 1, 1.0, 1.0, 24, 0)
    batch = collate(done, processor)
    found = forgetting.distributions(model, batch, banned_ids(processor))
    ids = batch["completion_ids"][batch["mask"]]
    said = torch.tensor([p for s in done for p in s.sampler_logprobs])
    assert len({len(s.completion_ids) for s in done}) > 1
    torch.testing.assert_close(found.gather(-1, ids[:, None]).squeeze(-1), said, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))
    assert found[:, banned_ids(processor)].exp().max() == 0


def test_a_model_has_not_moved_from_itself(toys):
    model, _, processor, prompts = toys
    got = forgetting.divergence(model, copy.deepcopy(model), processor, prompts, 24, 0)
    assert abs(got["answer"]["mean"]) < 1e-6 and got["prompts"] == 8


def test_a_divergence_is_summed_over_an_answer_and_averaged_over_prompts(toys):
    """Against logits of each answer by itself: of the first model's answers, in the first model's eyes."""
    model, moved, processor, prompts = toys
    for p, q in ((model, moved), (moved, model)):
        done = forgetting.HFEngine(p, processor, 8).generate(prompts, 1, 1.0, 1.0, 24, 3)
        sums, means = [], []
        for s in done:
            inputs, count = collate([s], processor)["inputs"], len(s.completion_ids)
            with torch.no_grad():
                logits = [m(**inputs).logits[0, -count - 1 : -1].double() for m in (p, q)]
            for rows in logits:
                rows[:, banned_ids(processor)] = -1e30
            at = torch.distributions.kl_divergence(*(torch.distributions.Categorical(logits=rows) for rows in logits))
            sums.append(at.sum())
            means.append(at.mean())
        got = forgetting.divergence(p, q, processor, prompts, 24, 3)
        for name, values in (("answer", sums), ("token", means)):
            values = torch.stack(values)
            wanted = {"mean": values.mean().item(), "standard_error": values.std().item() / 8**0.5}
            assert got[name] == pytest.approx(wanted, rel=1e-3) and wanted["mean"] > 0.01
        assert got["length"] == sum(len(s.completion_ids) for s in done) / 8
        assert got["truncated"] == sum(s.finish_reason == "length" for s in done) / 8


def test_by_the_chain_rule_it_is_the_divergence_of_whole_answers(toys):
    """Answers of at most two tokens can be counted out, some 376 x 376; 600 draws meet that within four errors."""
    model, moved, processor, prompts = toys
    banned, ends = banned_ids(processor), forgetting.HFEngine(model, processor, 8).eos.tolist()
    going = [i for i in range(model.config.text_config.vocab_size) if i not in (*banned, *ends)]
    both = [replace(prompts[0], completion_ids=[i, 20]) for i in going]  # at 20 stands what follows i
    whole = []
    for m in (model, moved):
        found = torch.cat([forgetting.distributions(m, collate(both[i : i + 64], processor), banned).double()
                           for i in range(0, len(both), 64)])
        first, second = found[0], found[1::2]
        whole.append(torch.cat([(first[going, None] + second).flatten(), first[ends]]))
    assert whole[0].exp().sum() == pytest.approx(1, abs=1e-4)
    wanted = (whole[0].exp() * (whole[0] - whole[1])).sum().item()
    draws = [replace(prompts[0], id=str(i)) for i in range(600)]
    got = forgetting.divergence(model, moved, processor, draws, 2, 0)["answer"]
    assert abs(got["mean"] - wanted) < 4 * got["standard_error"] < wanted


# ---------------------------------------------------------------------------------------------
# The script


SCRIPT = ("results/pretrained/forgetting.py", "--data", "toy_data/validation.jsonl", "--limit", "3", "--max_new_tokens", "8")


def test_the_script_writes_what_it_prints(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(FOLDER))
    out = tmp_path / "new" / "forgotten.json"
    result, _ = run(*SCRIPT, "--out", out)
    assert json.loads(out.read_text()) == result
    assert list(result) == ["model", "start", "data", "log_likelihood", "tokens", "knowledge", "kl_from_start",
                            "kl_to_start", "seconds"]
    assert result["knowledge"]["of"] == 100 and result["log_likelihood"] < 0
    for name in ("kl_from_start", "kl_to_start"):
        assert abs(result[name]["answer"]["mean"]) < 1e-6 and result[name]["prompts"] == 3


def test_a_start_with_another_vocabulary_is_refused(tmp_path):
    """Their distributions would be over unlike ids."""
    processor = load_processor(ROOT / "toy_model")
    processor.tokenizer.add_tokens(["another"])
    processor.save_pretrained(tmp_path)
    shutil.copy(ROOT / "toy_model" / "config.json", tmp_path)
    with pytest.raises(UserError, match="--start .*: its vocabulary is not that of --model toy_model"):
        forgetting.main(forgetting.Args(start=str(tmp_path)))


def test_one_prompt_has_no_error(data):
    with pytest.raises(UserError, match="one prompt has no standard error"):
        forgetting.main(forgetting.Args(data=str(data / "test.jsonl"), limit=1))


# ---------------------------------------------------------------------------------------------
# What it is taught, and what the arms are trained on


SCENE = (("red", "circle"), None, ("blue", "square"),
         None, None, ("red", "square"),
         ("red", "triangle"), ("green", "square"), None)


def test_golden_reasoning_by_hand():
    """Four kinds for one picture, and for a colour that it does not show."""
    assert golden.habit(SCENE, "red") == ("Row by row. row 1: red - blue makes 1. row 2: - - red makes 2. "
                                          "row 3: red green - makes 3. \\boxed{3}")
    assert golden.columns(SCENE, "red") == ("We go down. Left: red - red, so 2. Centre: - - green, so 0. "
                                            "Right: blue red -, so 1. In all 2 + 0 + 1 = 3. \\boxed{3}")
    assert golden.places(SCENE, "red") == ("In the picture red is at (1, 1), (2, 3), (3, 1), so the answer is 3. \\boxed{3}")
    assert golden.places(SCENE, "yellow") == "In the picture nothing is yellow, so the answer is 0. \\boxed{0}"
    assert golden.answers(SCENE, "red") == "\\boxed{3}" and golden.answers(SCENE, "yellow") == "\\boxed{0}"


def test_golden_files_are_right_for_their_rows(tmp_path):
    """Every solution ends in its row's answer; the questions are the toy's, and habit's file is the toy's own."""
    golden.main(golden.Args(out=str(tmp_path), train=512, held_out=12))
    assert (tmp_path / "habit.jsonl").read_text() == (ROOT / "toy_data" / "train.jsonl").read_text()
    processor = load_processor(ROOT / "toy_model")
    for kind in golden.KINDS:
        samples = load_samples(tmp_path / f"{kind}.jsonl", processor, 512)
        assert len(samples) == 512 and all(accuracy_reward(s.solution, s.answer) == 1 for s in samples)
        assert max(len(processor.tokenizer(s.solution).input_ids) for s in samples) < 96  # the trainers' default
    assert len(load_samples(tmp_path / "test.jsonl", processor, 512)) == 12


def test_lessons_by_hand_and_fresh(tmp_path):
    """A caption; every row ends in its answer, and all four habits are shown."""
    _, text, last = lessons.caption(SCENE, "red", None)
    assert text == "row 1: red - blue. row 2: - - red. row 3: red green -." and last == "green"
    lessons.main(lessons.Args(out=str(tmp_path), see=30, course=60))
    seen = load_samples(tmp_path / "see.jsonl", load_processor(ROOT / "toy_model"), 512)
    course = load_samples(tmp_path / "course.jsonl", load_processor(ROOT / "toy_model"), 512)
    assert (len(seen), len(course)) == (30, 60)
    assert all(accuracy_reward(s.solution, s.answer) == 1 for s in seen + course)
    assert [s.question.count("How many") for s in course] == [0, 1] * 30
    assert {next(h for h in toy.HABITS if s.solution.startswith(h)) for s in course[1::2]} == set(toy.HABITS)


def test_a_held_out_scene_is_never_taught(tmp_path, monkeypatch):
    """Where all scenes but one are held out, that one is taught."""
    drawn = iter([(SCENE, "red"), (SCENE, "blue"), (SCENE, "green")])
    monkeypatch.setattr(toy, "make_problem", lambda *_, **__: next(drawn))
    lessons.write_lesson(tmp_path, "one", [lessons.task], 1, {(SCENE, "red"), (SCENE, "blue")})
    [row] = [json.loads(line) for line in (tmp_path / "one.jsonl").read_text().splitlines()]
    assert row["question"] == toy.question("green")


# ---------------------------------------------------------------------------------------------
# Equal trials


def test_the_best_rate_of_equal_trials(tmp_path):
    """Means 0.5, 0.75, 0.75 and another arm's 1: the smaller of two alike, as a number; none while a trial is missing."""
    trials = {"own_1e-4_10": 0.0, "own_1e-4_11": 1.0, "own_9e-5_10": 0.75, "own_9e-5_11": 0.75, "own_2e-3_10": 0.75,
              "own_2e-3_11": 0.75, "grpo_1e-5_10": 1.0, "grpo_1e-5_11": 1.0}
    for name, accuracy in trials.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "result.json").write_text(json.dumps({"validation_pass1_t0.6": {"after": {"accuracy": accuracy}}}))

    def best(arm, count):
        return subprocess.run([sys.executable, ROOT / "results" / "best_rate.py", tmp_path, arm, str(count)],
                              capture_output=True, text=True)

    assert best("own", 6).stdout == "9e-5\n" and best("grpo", 2).stdout == "1e-5\n"
    for seed, count in ((11, 5), (10, 6)):  # a rate with one trial, then a rate without any
        (tmp_path / f"own_2e-3_{seed}" / "result.json").unlink()
        done = best("own", count)
        assert (done.returncode, done.stdout) == (1, "") and f"own has not its {count} trials yet" in done.stderr
