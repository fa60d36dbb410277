"""What shows that an exercise of LESSON.md is solved; each check fails until it is.

    pytest tests/exercises/checks.py -k leave_one_out

Plain pytest does not collect this file. The patches beside it are solutions: tests/test_exercises.py
applies each to a copy of the tree, and shows that its check fails before and passes after.
"""

import inspect
import math
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

import evaluate
import toy
import train_grpo
import utils
from conftest import load_tiny
from data import Sample, tokenise
from policy import Policy

ROOT = Path(__file__).parents[2]
NAN = math.nan


def close(found, wanted, tolerance=1e-6):
    return torch.allclose(found.double(), torch.tensor(wanted).double(), atol=tolerance, rtol=0)


def test_short(tmp_path):
    """Its numbers; and with a weight of 8, ten large steps make the answers shorter."""
    import short

    lengths = [48, 96, 0]
    samples = [Sample("a", "", "", "", [], "", [], completion_ids=[9] * n) for n in lengths]
    assert short.short_reward(samples) == [0.5, 0.0, 1.0]
    command = [sys.executable, ROOT / "train_grpo.py", "--max_steps", "10", "--lr", "2e-4", "--batch_size", "16",
               "--mini_batch_size", "16", "--validation_data", "", "--test_data", "", "--out", tmp_path / "run",
               "--rewards", f"accuracy:1.0,{ROOT / 'short.py'}:short_reward:8"]
    subprocess.run(command, cwd=ROOT, check=True)
    lengths = [row["length"] for row in utils.read_jsonl(tmp_path / "run" / "metrics.jsonl")]
    assert lengths[-1] < lengths[0] - 3


def test_majority():
    """One vote an answer; who commits to none has no vote; of equals, the first."""
    def answers(*pairs):
        return [Sample("a", "", "", "", [], "", [], completion_ids=[9], completion_text=text,
                             rewards={"accuracy": float(right)}) for text, right in pairs]

    two, three, none = ("\\boxed{2}", True), ("\\boxed{3}", False), ("I cannot tell", False)
    done = (answers(two, three, two) + answers(three, two, three)
            + answers(none, none, two) + answers(none, none, none) + answers(three, two, none))
    assert evaluate.summarize(done, 3)["maj@3"] == 2 / 5  # right, outvoted, right, silent, a tie
    assert evaluate.SETTINGS["pass8_t0.6"] == (8, 0.6, 1.0)


def test_leave_one_out():
    """A half and a zero beside a one; an answer that could not be scored; nobody to compare with."""
    rewards = torch.tensor([[1.0, 0.5, 0.0, 0.0], [1.0, 0.0, NAN, NAN], [1.0, NAN, NAN, NAN]])
    want = [[1 - 0.5 / 3, 0.5 - 1 / 3, -0.5, -0.5], [1, -1, 0, 0], [0, 0, 0, 0]]
    assert close(train_grpo.leave_one_out(rewards), want)
    random = torch.rand(20, 6, generator=torch.manual_seed(0))
    assert close(train_grpo.leave_one_out(random), train_grpo.rloo_advantages(random).tolist())


def test_median(one_rank):
    """Of 0 0 0 1 the median is 0: only the right answer is moved. By the flag, too."""
    rewards = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0, 0.2, 0.4, 0.9, None, 1.0, 0.0, 1.0, 0.0]
    samples = [Sample(str(i // 4), "", "", "", [], "", [], reward=r) for i, r in enumerate(rewards)]
    args = utils.parse_args(train_grpo.Args, ["--advantage", "median"])
    train_grpo.set_advantages(samples, 4, args.advantage)
    want = [0, 0, 0, 1, 0, 0, -1, 0, -0.2, 0, 0.5, 0, 0.5, -0.5, 0.5, -0.5]  # half and half: between the two
    found = [round(s.advantage, 4) for s in samples]
    assert found == want, f"rewards {rewards}: advantages {found}, not {want}"


def test_silent_bug(one_rank):
    """The signs of the advantages of three prompts, worked out by hand."""
    rewards = [1.0, 1.0, 0.0, 0.0, 1.0, 0.0]  # three prompts: solved twice, not at all, once
    samples = [Sample(str(i // 2), "", "", "", [], "", [], reward=r) for i, r in enumerate(rewards)]
    for kind in ("grpo", "dr_grpo", "rloo"):
        train_grpo.set_advantages(samples, 2, kind)
        signs = [(s.advantage > 0) - (s.advantage < 0) for s in samples]
        assert signs == [0, 0, 0, 0, 1, -1], f"{kind}: somebody is pushed the wrong way"


def test_dual_clip():
    """At most 3 times its advantage for an answer that was wrong; nothing changes for the others."""
    #   ratio  advantage  clipped loss   with the second clip at 3
    #   10     -1         10             3     the bound
    #   1.5    -1         1.5            1.5   below it
    #   10     -0.5       5              1.5   it grows with the advantage
    #   10     +1         -1.2           -1.2  a right answer
    log_ratio = torch.tensor([[10], [1.5], [10], [10]]).log()
    advantages = torch.tensor([[-1.0], [-1.0], [-0.5], [1.0]])
    mask = torch.ones(4, 1, dtype=torch.bool)
    losses, _ = train_grpo.policy_loss(log_ratio, 0 * log_ratio, advantages, mask, "token", 0.2, 0.2, 3.0)
    assert close(losses, [[3.0], [1.5], [1.5], [-1.2]])
    plain, _ = train_grpo.policy_loss(log_ratio, 0 * log_ratio, advantages, mask, "token", 0.2, 0.2, 0.0)
    assert close(plain, [[10.0], [1.5], [5.0], [-1.2]])
    assert train_grpo.Args().dual_clip == 0 and "args.dual_clip" in inspect.getsource(train_grpo.update)


def test_kl():
    """Exact, by summing over what could be drawn. k3's low variance has a price: look at its gradient."""
    from kl import moments

    logits, reference = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.5, 0.3, 0.2]).log()
    given = logits.clone().requires_grad_()
    p = given.softmax(0)
    divergence = (p * (p / reference.exp()).log()).sum()  # 0.7 ln 1.4 + 0.2 ln 2/3 + 0.1 ln 1/2
    slope, = torch.autograd.grad(divergence, given)
    found = {kind: moments(logits, reference, kind) for kind in ("k1", "k2", "k3")}
    for kind, unbiased, right_slope in (("k1", True, False), ("k2", False, True), ("k3", True, False)):
        mean, std, gradient = found[kind]
        assert (abs(mean - divergence.item()) < 1e-6) == unbiased, kind
        assert close(gradient, slope.tolist()) == right_slope, kind
        print(f"{kind}  mean {mean:.4f} of {divergence:.4f}  std {std:.4f}  gradient {gradient.tolist()}")
    assert close(found["k1"][2], [0, 0, 0])  # as a loss, k1 teaches nothing: it belongs into the reward
    assert found["k3"][1] < found["k1"][1] / 2
    assert close(torch.stack([torch.as_tensor(found[kind][1]) for kind in found]), [0.3911, 0.0543, 0.0759], 1e-3)
    assert close(found["k3"][2], [0.2, -0.1, -0.1])  # p - q: the slope of KL(reference || policy)


def test_distinct():
    """Different answers a group, over all ranks: 2, 1 and 0 of three groups, on two ranks, make 1."""
    def answered(name, *texts):
        return [Sample(name, "", "", "", [], "", [], completion_ids=[9], completion_text=text,
                             rewards={"accuracy": 0.0}, reward=0.0) for text in texts]

    here = answered("a", "\\boxed{2}", "1 + 2, so \\boxed{3}") + answered("b", "\\boxed{2}", "again \\boxed{2}")
    there = answered("c", "I cannot tell", "I do not know")
    sums = Counter(train_grpo.rollout_sums(here, 2)) + Counter(train_grpo.rollout_sums(there, 2))
    logged = dict.fromkeys(("update_tokens", "divisor", "loss", "entropy", "groups_all_alike", "sampler_ratio",
                            "sampler_ratio_squared", "truncated", "unscored"), 0) | dict(sums)
    assert train_grpo.step_metrics(logged, [1.0], {}, 1e-4)["distinct_answers"] == 1


def test_first_row(tmp_path, monkeypatch):
    """The answers again, from the pixels in the middles of the first three cells."""
    monkeypatch.setattr(toy, "SPLITS", {"train": 24, "validation": 8, "test": 8})
    args = utils.parse_args(toy.Args, ["--data", str(tmp_path), "--first_row"])
    toy.main(args)
    counts = set()
    for row in utils.read_jsonl(tmp_path / "train.jsonl"):
        colour = next(c for c in toy.COLOURS if f"many {c} " in row["question"])
        picture = Image.open(tmp_path / row["image"])
        seen = [picture.getpixel((toy.CELL * i + toy.CELL // 2, toy.CELL // 2)) for i in range(toy.GRID)]
        assert row["answer"] == str(seen.count(toy.COLOURS[colour]))
        assert row["solution"].endswith(f"\\boxed{{{row['answer']}}}") and "row 2" not in row["solution"]
        assert "in the first row?" in row["question"]
        counts.add(row["answer"])
    assert len(counts) > 2
    toy.write_data(tmp_path / "usual")
    assert "in the picture?" in utils.read_jsonl(tmp_path / "usual" / "train.jsonl")[0]["question"]


def test_looks(data_path):
    """By each answer's own forwards, with and without its picture; then on the toy, golden reasoning and glances."""
    from looks import looks

    toys = load_tiny(ROOT / "toy_model", ROOT / "toy_data" / "validation.jsonl")
    processor, tokens = toys.processor, toys.processor.tokenizer
    policy = Policy(toys.model, processor)

    def told(sample, text):
        return replace(sample, completion_ids=[*tokenise(tokens, text), tokens.eos_token_id])

    nasty = [told(s, f"I see {s.answer}.") for s in load_tiny(ROOT / "toy_model", data_path).samples]
    for s, found in zip(nasty, looks(policy, nasty), strict=True):  # one has two pictures, one has none
        pair = [s, *evaluate.perturbed([s], "blank", 0)]
        (seen, blind), _ = policy(policy.batch(pair), 1.0)
        assert close(torch.tensor(found), (seen - blind).tolist(), 1e-4), f"{s.id}: {found}"

    rows = toys.samples[1:24]
    golden = [told(s, s.solution) for s in rows]
    colours = [next(c for c in toy.COLOURS if f"many {c} " in s.question) for s in rows]
    glances = [told(s, f"At a glance I see {s.answer} {c}. \\boxed{{{s.answer}}}") for s, c in zip(rows, colours)]
    by_word = {}
    for s, found in zip(golden, looks(policy, golden)):
        for i, gap in zip(s.completion_ids, found):
            by_word.setdefault(tokens.decode([i]).strip(), []).append(gap)
    table = {word: sum(gaps) / len(gaps) for word, gaps in by_word.items()}
    print(*(f"{word:12}{table[word]:8.3f} nats" for word in sorted(table, key=table.get, reverse=True)), sep="\n")
    assert all((gap > 2) == (word in toy.COLOURS) for word, gap in table.items()), table
    totals = [sum(map(sum, looks(policy, done))) / len(done) for done in (golden, glances)]
    print(f"an answer  {totals[0]:.1f} nats by golden reasoning, {totals[1]:.1f} by a glance")
    assert totals[0] > 10 and abs(totals[1]) < 1
