"""Tier 1: the mathematics, on numbers small enough to be worked by hand in the comments.

Where a well-known wrong version is a line long, it stands beside the right one and must disagree: a
test that the bug would pass too is no test.
"""

import itertools
import json
import math
import pickle
from collections import Counter
from dataclasses import dataclass, replace
from functools import partial
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from PIL import Image

import doctor
import evaluate
import report
import rollout
import toy
import train_grpo
import train_sft
import utils
from conftest import branching, IMAGES
from data import Sample
from pictures import open_image
from policy import collate, split_rows
from siblings import split_groups
from utils import UserError

NAN = math.nan


def close(got, want, tolerance=1e-6):
    got = torch.as_tensor(got, dtype=torch.float64)
    return torch.allclose(got, torch.tensor(want, dtype=torch.float64), rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------
# Advantages


def test_grpo_advantages_by_hand():
    # 1 0 0 1: mean 1/2, centred +-1/2, sum of squares 1, unbiased variance 1/3, std 0.57735;
    # 0.5 / (0.57735 + 0.0001) = 0.86588. A second group has its own mean: 3 1 1 1 has mean 3/2,
    # centred 3/2 and -1/2, sum of squares 3, std 1; 1.5 / 1.0001 = 1.49985
    got = train_grpo.grpo_advantages(torch.tensor([[1.0, 0, 0, 1], [3.0, 1, 1, 1]]))
    half, high = 0.86588, 1.49985
    assert close(got, [[half, -half, -half, half], [high, -high / 3, -high / 3, -high / 3]], 1e-5)
    biased = torch.tensor([1.0, 0, 0, 1]).std(correction=0)  # 1/2, which would give 0.9998
    assert not close(0.5 / (biased + 1e-4), half, 1e-2)


def test_dr_grpo_and_rloo_advantages_by_hand():
    # 1 0 0 1: mean 1/2, and that is all dr_grpo takes away. The others' mean is 1/3 for a 1 and 2/3
    # for a 0: rloo gives 2/3 and -2/3. With one of four unscored, 1 0 0: mean 1/3, the others' 0, 1/2
    rewards = torch.tensor([[1.0, 0, 0, 1], [1.0, 0, math.nan, 0], [1.0, 1, 1, 1]])
    third = 1 / 3
    assert close(train_grpo.dr_grpo_advantages(rewards),
                 [[0.5, -0.5, -0.5, 0.5], [2 * third, -third, 0, -third], [0, 0, 0, 0]])
    got = train_grpo.rloo_advantages(rewards)
    assert close(got, [[2 * third, -2 * third, -2 * third, 2 * third], [1, -0.5, 0, -0.5], [0] * 4])
    alone = train_grpo.rloo_advantages(torch.tensor([[1.0, math.nan, math.nan]]))
    assert (alone == 0).all()  # nothing to be compared with


@pytest.mark.parametrize("seed", range(5))
def test_advantages_equal_the_papers_formulas(seed):
    """In float64, with numpy's own mean and std, answer by answer."""
    rewards = torch.randn(5, 4, dtype=torch.float64, generator=torch.manual_seed(seed))
    for row, grpo, dr, rloo in zip(rewards, train_grpo.grpo_advantages(rewards),
                                   train_grpo.dr_grpo_advantages(rewards),
                                   train_grpo.rloo_advantages(rewards)):
        for i, r in enumerate(row):
            others = torch.cat([row[:i], row[i + 1 :]])
            assert abs(dr[i] - (r - row.mean())) < 1e-12
            assert abs(rloo[i] - (r - others.mean())) < 1e-12
            assert abs(grpo[i] - (r - row.mean()) / (row.std() + 1e-4)) < 1e-12


def test_equal_rewards_give_exactly_zero():
    """0.1 is no binary fraction: its float32 mean over 7 answers is off, and / 1e-4 shows it."""
    rewards = torch.full((1, 7), 0.1)
    textbook = (rewards - rewards.sum(1) / 7) / (rewards.std(1) + 1e-4)
    assert (textbook != 0).any()  # the usual formula leaves a residue
    assert (train_grpo.grpo_advantages(rewards) == 0).all()


def test_unscored_answers_take_no_part_in_their_group():
    # 1 and 0 are scored: mean 1/2, sum of squares 1/2, std of two 0.70711; 0.5 / 0.70721 = 0.70701.
    # One scored answer, and none, have nothing to be compared with.
    rewards = torch.tensor([[1.0, 0, NAN], [1.0, NAN, NAN], [NAN, NAN, NAN]])
    got = train_grpo.grpo_advantages(rewards)
    assert close(got, [[0.70701, -0.70701, 0], [0, 0, 0], [0, 0, 0]], 1e-5)
    as_wrong = train_grpo.grpo_advantages(torch.tensor([[1.0, 0, 0]]))  # "unscored" read as 0
    assert not close(as_wrong[0, 0], 0.70701, 1e-2)


def test_advantages_scale_and_shift():
    """A constant added to all rewards changes nothing; a factor, nothing but the epsilon."""
    rewards = torch.tensor([[0.2, 0.9, 0.4, 0.4]])
    advantages = train_grpo.grpo_advantages(rewards)
    assert close(train_grpo.grpo_advantages(rewards + 3), advantages.tolist(), 1e-4)
    assert close(train_grpo.grpo_advantages(rewards * 10), advantages.tolist(), 1e-3)
    assert abs(advantages.sum()) < 1e-6


def test_reinforce_advantages_by_hand():
    # the whole batch is one population: 1 0 0 0 has mean 1/4, centred 3/4 and -1/4, sum of squares
    # 3/4, unbiased variance 1/4, std 1/2; 0.75 / 0.5001 = 1.4997, -0.25 / 0.5001 = -0.4999
    got = train_grpo.reinforce_advantages(torch.tensor([1.0, 0, NAN, 0, 0]))
    assert close(got, [1.4997, -0.4999, 0, -0.4999, -0.4999], 1e-4)
    alone = train_grpo.reinforce_advantages(torch.tensor([1.0]))  # std of one number is NaN
    assert alone.tolist() == [0]
    assert train_grpo.reinforce_advantages(torch.full((7,), 0.1)).tolist() == [0] * 7
    assert train_grpo.reinforce_advantages(torch.tensor([NAN, NAN])).tolist() == [0, 0]


def test_set_advantages_keeps_groups_together(qwen, one_rank):
    """Samples come prompt by prompt; an advantage must land on the answer it was computed from."""
    rewards = [1.0, 0.0, 0.0, 0.0, 5.0, None]  # three prompts, two answers each
    samples = [replace(qwen.samples[i // 2], reward=r) for i, r in enumerate(rewards)]
    train_grpo.set_advantages(samples, 2, "grpo")
    # 0.5 / (0.70711 + 0.0001) = 0.70701; a pair of zeros; a single scored answer
    assert close([s.advantage for s in samples], [0.70701, -0.70701, 0, 0, 0, 0], 1e-5)
    train_grpo.set_advantages(samples, 2, "reinforce++")
    # 1 0 0 0 5: mean 6/5, squares 0.04 + 3 * 1.44 + 14.44 = 18.8, variance 4.7, std 2.16795
    want = [-0.2, -1.2, -1.2, -1.2, 3.8]
    assert close([s.advantage for s in samples], [w / 2.16805 for w in want] + [0], 1e-5)


def test_a_rank_normalises_over_all_ranks_and_keeps_its_own(qwen, monkeypatch):
    """The batch above on two ranks: 1 0 0 are rank 0's, 0 5 and what was not scored are rank 1's."""
    monkeypatch.setattr(train_grpo, "world_size", lambda: 2)
    monkeypatch.setattr(train_grpo, "rank", lambda: 1)
    monkeypatch.setattr(utils, "gather", lambda rewards: [1.0, 0.0, 0.0, *rewards])
    samples = [replace(qwen.samples[0], reward=r) for r in (0.0, 5.0, None)]
    train_grpo.set_advantages(samples, 1, "reinforce++")
    assert close([s.advantage for s in samples], [-1.2 / 2.16805, 3.8 / 2.16805, 0], 1e-5)


# ---------------------------------------------------------------------------------------------
# The loss


def test_clipped_loss_by_hand():
    """All four corners of PPO's clip, with unequal bounds so that a swap of the two shows."""
    #   ratio  advantage  unclipped  clipped to [0.8, 1.3]   smaller   loss
    #   1.5    +1         +1.5       +1.3                    +1.3      -1.3   stopped above
    #   1.5    -1         -1.5       -1.3                    -1.5      +1.5   a wrong answer grew
    #   0.5    +1         +0.5       +0.8                    +0.5      -0.5   a right answer shrank
    #   0.5    -1         -0.5       -0.8                    -0.8      +0.8   stopped below
    #   0.5    -2         -1.0       -1.6                    -1.6      +1.6   stopped below
    log_ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5], [0.5]]).log().requires_grad_()
    advantages = torch.tensor([[1.0], [-1], [1], [-1], [-2]])
    mask = torch.ones(5, 1, dtype=torch.bool)
    losses = train_grpo.clipped_loss(log_ratio, advantages, 0.2, 0.3)
    assert close(losses, [[-1.3], [1.5], [-0.5], [0.8], [1.6]])
    assert train_grpo.count_clipped(log_ratio, advantages, mask, 0.2, 0.3) == (2, 1)
    losses.sum().backward()
    # d(-ratio A)/d(log p) = -ratio A where not stopped, and exactly 0 where stopped
    assert close(log_ratio.grad, [[0.0], [1.5], [-0.5], [0.0], [0.0]])


@pytest.mark.parametrize("kind", ["token", "sequence", "dr_grpo", "gspo", "cispo"])
def test_policy_loss_ignores_what_is_masked(kind):
    """Padding may hold anything, even an advantage and a ratio that would be clipped."""
    new = torch.tensor([[-1.0, 3.0, -3.0]], requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    old, advantages = torch.tensor([[-1.0, 0, 0]]), torch.ones(1, 1)
    losses, log_ratio = train_grpo.policy_loss(new, old, advantages, mask, kind, 0.2, 0.3)
    (losses * train_grpo.token_weights(mask, kind)).sum().backward()
    assert losses.tolist() == [[1 if kind == "cispo" else -1, 0, 0]]
    assert new.grad.tolist() == [[-1, 0, 0]]
    assert train_grpo.count_clipped(log_ratio, advantages, mask, 0.2, 0.2) == (0, 0)


@pytest.mark.parametrize("kind", ["token", "sequence", "dr_grpo", "gspo", "cispo"])
def test_the_first_update_is_plain_policy_gradient(kind):
    """With old = new.detach() the ratio is 1 and the gradient is -A grad log p: REINFORCE."""
    new = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    mask = torch.ones(1, 2, dtype=torch.bool)
    advantages = torch.tensor([[0.7]])
    losses, _ = train_grpo.policy_loss(new, new.detach(), advantages, mask, kind, 0.2, 0.3)
    losses.sum().backward()
    assert close(new.grad, [[-0.7, -0.7]])


def test_sequence_ratio_by_hand():
    """GSPO: ratios 2 and 1/8 over two tokens are one of exp((ln 2 - ln 8) / 2) = 1/2 for both."""
    log_ratio = torch.tensor([[2.0, 1 / 8, 7.0], [3.0, 9.0, 9.0]]).log().requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, False]])
    got = train_grpo.sequence_log_ratio(log_ratio, mask)
    assert close(got.exp()[mask], [0.5, 0.5, 3.0])
    # a completion's loss, -ratio A with A = -1: every token carries half of 0.5
    losses = train_grpo.clipped_loss(got, torch.tensor([[-1.0], [0.0]]), 0.9, 0.9)
    weighed = losses * train_grpo.token_weights(mask, "gspo")
    weighed.sum().backward()
    assert close(weighed.sum(), 0.5) and close(log_ratio.grad, [[0.25, 0.25, 0], [0, 0, 0]])


def test_cispo_by_hand():
    """A ratio of 2 is clipped to 1.3 and weighs log p = -3: -1.3 * 1 * -3 = 3.9, gradient -1.3."""
    new = torch.tensor([[-3.0, -1.0]], requires_grad=True)
    old = new.detach() - torch.tensor([[2.0, 0.5]]).log()
    mask = torch.ones(1, 2, dtype=torch.bool)
    losses, _ = train_grpo.policy_loss(new, old, torch.ones(1, 1), mask, "cispo", 0.2, 0.3)
    losses.sum().backward()
    assert close(losses, [[3.9, 0.8]]) and close(new.grad, [[-1.3, -0.8]])  # PPO's would be 0 first


def test_what_a_token_counts_by_hand():
    # completions of 1 and 3 tokens, losses 1 and 2 a token, 8 new tokens at most:
    # by token (1 + 6) / 4; by completion (1 + 2) / 2; dr_grpo (1 + 6) / (2 * 8)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    losses = torch.tensor([[1.0, 0, 0], [2, 2, 2]])
    for kind, want in (("token", 7 / 4), ("cispo", 7 / 4), ("sequence", 3 / 2), ("gspo", 3 / 2),
                       ("dr_grpo", 7 / 16)):
        total = (losses * train_grpo.token_weights(mask, kind)).sum()
        assert close(total / train_grpo.loss_divisor(kind, 4, 2, 8), want), kind


def paper_loss(kind, new, old, advantages, lengths, low, high, longest):
    """Each paper's own formula, completion by completion and token by token, in float64."""
    total = 0.0
    for row, was, advantage, length in zip(new, old, advantages, lengths):
        ratios = (row - was)[:length].exp()
        if kind == "gspo":  # arXiv 2507.18071, equations 5 and 7: one ratio, a geometric mean
            ratio = ratios.prod() ** (1 / length)
            gains = [torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)]
        elif kind == "cispo":  # arXiv 2506.13585, equation 4
            gains = [r.clamp(1 - low, 1 + high).detach() * advantage * p
                     for r, p in zip(ratios, row[:length])]
        else:
            gains = [torch.min(r * advantage, r.clamp(1 - low, 1 + high) * advantage)
                     for r in ratios]
        gain = sum(gains)
        total = total - (gain / length if kind == "sequence" else gain)
    return total / {"token": sum(lengths), "cispo": sum(lengths), "sequence": len(lengths),
                    "gspo": len(lengths), "dr_grpo": len(lengths) * longest}[kind]


@pytest.mark.parametrize("kind", ["token", "sequence", "dr_grpo", "gspo", "cispo"])
@pytest.mark.parametrize("seed", range(5))
def test_losses_and_gradients_equal_the_papers_formulas(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 8, (6,), generator=generator).tolist()
    mask = torch.arange(8) < torch.tensor(lengths)[:, None]
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    old, advantages = -draw(6, 8).abs(), draw(6)
    new = (old + 0.4 * draw(6, 8)).requires_grad_()
    losses, _ = train_grpo.policy_loss(new, old, advantages[:, None], mask, kind, 0.2, 0.3)
    ours = ((losses * train_grpo.token_weights(mask, kind)).sum()
            / train_grpo.loss_divisor(kind, sum(lengths), 6, 8))
    theirs = paper_loss(kind, new, old, advantages, lengths, 0.2, 0.3, 8)
    ours_grad, = torch.autograd.grad(ours, new)
    theirs_grad, = torch.autograd.grad(theirs, new)
    assert abs(ours - theirs) < 1e-6 and (ours_grad - theirs_grad).abs().max() < 1e-6
    assert theirs_grad.abs().max() > 1e-2


def test_kl_estimates_by_hand():
    # r = reference / policy. k3: 2 - 1 - ln 2 = 0.306853; 1/2 - 1 + ln 2 = 0.193147; 1 - 1 - 0 = 0.
    # k2: (ln 2)^2 / 2 = 0.240227 both ways. k1: -ln 2 and ln 2
    policy = torch.tensor([[0.25, 0.5, 0.3, 0.1]]).log()
    reference = torch.tensor([[0.5, 0.25, 0.3, 0.9]]).log()
    mask = torch.tensor([[True, True, True, False]])
    for kind, want in (("k3", [0.306853, 0.193147, 0, 0]), ("k2", [0.240227, 0.240227, 0, 0]),
                       ("k1", [-0.693147, 0.693147, 0, 0])):
        assert close(train_grpo.kl_estimate(policy, reference, mask, kind), [want]), kind
    other_way = train_grpo.kl_estimate(reference, policy, torch.ones_like(mask), "k3")
    assert not close(other_way[0, :2], [0.306853, 0.193147], 0.1)


def test_which_estimates_are_unbiased():
    """k1 and k3 are, in value: sum p (r - 1 - log r) = sum p log(p / q). As a loss, k2 is: its
    gradient under the policy is that of the divergence, and k1's is 0."""
    q = torch.tensor([[0.2, 0.3, 0.5]])
    logits = torch.tensor([[0.7, 0.2, 0.1]]).log().requires_grad_()
    p = logits.softmax(-1)
    mask = torch.ones(1, 3, dtype=torch.bool)
    divergence = (p * (p / q).log()).sum()
    right, = torch.autograd.grad(divergence, logits, retain_graph=True)
    means, slopes = {}, {}
    for kind in ("k1", "k2", "k3"):
        estimate = train_grpo.kl_estimate(p.log(), q.log(), mask, kind)
        means[kind] = (p * estimate).sum().item()
        loss = (p.detach() * estimate).sum()  # samples are data: no gradient through their number
        slopes[kind], = torch.autograd.grad(loss, logits, retain_graph=True)
    assert close(means["k1"], divergence.item()) and close(means["k3"], divergence.item())
    assert not close(means["k2"], divergence.item(), 0.01)
    assert close(slopes["k2"], right.tolist()) and close(slopes["k1"], [[0, 0, 0]])
    assert not close(slopes["k3"], right.tolist(), 0.01)


def test_divergence_in_the_reward_by_hand():
    # log-ratios of 0.5 and -0.1 a token: k1 sums to 0.4, and 0.1 of it is taken from a reward of 1
    scored, unscored = SimpleNamespace(reward=1.0), SimpleNamespace(reward=None)
    old = {id(scored): [-1.0, -2.0], id(unscored): [-1.0]}
    ref = {id(scored): [-1.5, -1.9], id(unscored): [-9.0]}
    train_grpo.subtract_divergence([scored, unscored], old, ref, 0.1)
    assert scored.reward == pytest.approx(0.96) and unscored.reward is None


# ---------------------------------------------------------------------------------------------
# Dynamic sampling


def scripted(script):
    """An `answer` that gives each prompt the accuracies that the script holds for its next turn."""
    asked = []

    def answer(prompts, seed):
        asked.append((seed, list(prompts)))
        return [SimpleNamespace(prompt=p, rewards={"accuracy": a}, reward=a)
                for p in prompts for a in script(p, len(asked))]
    return answer, asked


def test_dead_groups_make_way_for_other_prompts():
    """Of four groups two are dead; after one round one still is, and the bound leaves it there."""
    answer, asked = scripted(lambda p, turn: (1.0, 1.0) if p in ("a", "b") or turn == 2 and
                             p == asked[1][1][0] else (1.0, 0.0))
    pool = list("uvwxyz")
    args = train_grpo.Args(group_size=2, refills=1, seed=3)
    got = train_grpo.collect(answer, ["a", "k", "b", "l"], pool, args, 7)
    assert [seed for seed, _ in asked] == ["3 7", "3 7 1"] and len(asked[1][1]) == 2
    assert set(asked[1][1]) <= set(pool) and len(set(asked[1][1])) == 2
    assert [s.prompt for s in got[2:4] + got[6:]] == ["k", "k", "l", "l"]  # the living stay in place
    assert [s.prompt for s in got[:2] + got[4:6]] == [p for p in asked[1][1] for _ in range(2)]
    assert train_grpo.is_alike(got[:2]) and not train_grpo.is_alike(got[4:6])


def test_no_refill_where_none_is_asked_for_or_needed():
    for refills, accuracies in ((0, (1.0, 1.0)), (5, (1.0, 0.0))):
        answer, asked = scripted(lambda p, turn: accuracies)
        train_grpo.collect(answer, ["a"], ["b"], train_grpo.Args(group_size=2, refills=refills), 1)
        assert len(asked) == 1
    answer, asked = scripted(lambda p, turn: (0.0, 0.0))  # hopeless: the bound ends it
    train_grpo.collect(answer, ["a"], ["b"], train_grpo.Args(group_size=2, refills=3), 1)
    assert len(asked) == 4


def test_alike_is_judged_by_accuracy():
    """A language bonus that differs does not make a group in which all are wrong worth its place."""
    group = [SimpleNamespace(rewards={"accuracy": 0.0, "language": x}, reward=x) for x in (0, -0.1)]
    assert train_grpo.is_alike(group)
    assert not train_grpo.is_alike([SimpleNamespace(rewards={}, reward=x) for x in (0, -0.1)])


@pytest.mark.parametrize("accuracies, rewards, alike", [
    ((1, None, 1), (1, None, 1), True), ((1, None, 0), (1, 0.5, 0), False),
    ((None, None), (0.5, 0.5), True), ((None, None), (0.5, 0.2), False), ((None, None), (None, None), True)])
def test_an_answer_that_was_not_scored_makes_no_group_alive(accuracies, rewards, alike):
    """None beside a 1 is no difference to learn from, as its advantages say; nor is None beside None."""
    group = [SimpleNamespace(rewards={"accuracy": a}, reward=r) for a, r in zip(accuracies, rewards)]
    assert train_grpo.is_alike(group) == alike
    values = torch.tensor([[NAN if r is None else float(r) for r in rewards]])
    assert train_grpo.grpo_advantages(values).any().item() != alike


def test_a_mean_of_nothing_is_no_nought():
    """A reward that scored no answer of a step is not logged as 0; one that scored one is its score."""
    def logged(*accuracies):
        samples = [Sample("a", "", "", "", [], "", [], completion_ids=[9], rewards={"accuracy": a, "format": 1.0},
                                reward=1.0) for a in accuracies]
        sums = train_grpo.rollout_sums(samples, 2)
        for name in ("update_tokens", "divisor", "loss", "entropy", "sampler_ratio", "sampler_ratio_squared"):
            sums[name] += 0
        return train_grpo.step_metrics(sums, [1.0], {}, 1e-4)

    assert "reward/accuracy" not in logged(None, None) and logged(None, None)["reward/format"] == 1
    assert logged(None, 1.0)["reward/accuracy"] == 1


def test_refills_do_not_depend_on_the_number_of_ranks(monkeypatch):
    prompts, pool, args = list("abcdefgh"), list(range(40)), train_grpo.Args(group_size=2, refills=2)
    found = []
    for ranks in (1, 2, 4):
        slots = {}
        for r in range(ranks):
            monkeypatch.setenv("RANK", str(r))
            monkeypatch.setenv("WORLD_SIZE", str(ranks))
            answer, _ = scripted(lambda p, turn: (1.0, 1.0) if p in ("b", "d", "g") or turn == 2
                                 else (1.0, 0.0))
            got = train_grpo.collect(answer, prompts[r::ranks], pool, args, 5)
            slots |= {r + i * ranks: s.prompt for i, s in enumerate(got[::2])}
        found.append([slots[i] for i in range(8)])
    assert found[0] == found[1] == found[2]
    assert [found[0][i] for i in (0, 2, 4, 5, 7)] == list("acefh")
    assert len({found[0][i] for i in (1, 3, 6)} - set(pool)) == 0


# ---------------------------------------------------------------------------------------------
# Scores


def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer():
    assert evaluate.pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the one right answer
    naive = 1 - (1 - 1 / 4) ** 2  # 0.4375: draws with replacement, biased
    assert naive != 0.5
    for n, c, k in itertools.product(range(1, 6), range(6), range(1, 6)):
        if c > n or k > n:
            with pytest.raises(AssertionError):
                evaluate.pass_at_k(n, c, k)
            continue
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        assert evaluate.pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_wilson_interval_by_hand():
    # 5 of 10: z^2 = 3.8416, centre (0.5 + 0.19208) / 1.38416 = 0.5,
    # half 1.96 / 1.38416 * sqrt(0.025 + 0.009604) = 1.416021 * 0.186022 = 0.263411
    assert close(evaluate.wilson_interval(0.5, 10), [0.236589, 0.763411], 1e-5)
    # 0 of 10: up to z^2 / (n + z^2) = 3.8416 / 13.8416 = 0.277540; the normal one would be [0, 0]
    assert close(evaluate.wilson_interval(0.0, 10), [0, 0.277540], 1e-5)
    assert close(evaluate.wilson_interval(1.0, 10), [0.722460, 1], 1e-5)
    low, high = evaluate.wilson_interval(0.5, 1000)  # 100 times the data, a tenth of the width
    assert (high - low) == pytest.approx((0.763411 - 0.236589) / 10, rel=0.2)


def test_summarize_by_hand(qwen):
    """Three prompts, two answers each: the accuracy is over answers, the interval over prompts."""
    right, lengths = [1, 1, 0, 1, 0, 0], [1, 2, 3, 4, 5, 9]
    done = [replace(qwen.samples[i // 2], rewards={"accuracy": float(r)}, completion_ids=[0] * n,
                    completion_text="wait", finish_reason="length" if n == 9 else "stop")
            for i, (r, n) in enumerate(zip(right, lengths))]
    got = evaluate.summarize(done, 2)
    assert (got["n"], got["completions"]) == (3, 6)
    assert got["accuracy"] == 3 / 6  # 2 + 1 + 0 of 6
    assert got["pass@2"] == pytest.approx(2 / 3)  # prompts 1 and 2 were solved at least once
    assert got["accuracy_interval"] == evaluate.wilson_interval(0.5, 3)
    assert got["length"] == 24 / 6 and got["truncated"] == 1 / 6
    # of the sorted lengths those at int(5 q): 0, 1, 2, 3, 4
    assert list(got["length_quantiles"].values()) == [1, 2, 3, 4, 5]
    assert got["reflection_ratio"] == 1


def test_a_prompt_that_cannot_be_scored_is_neither_solved_nor_missed(qwen):
    """Of three prompts the second has no score for one of its answers: 2 are counted, 3 of their 4 answers
    right, both solved. Lengths and reflection are of all six answers."""
    scores = [1.0, 0.0, 1.0, None, 1.0, 1.0]
    done = [replace(qwen.samples[i // 2], rewards={"accuracy": a}, completion_ids=[0] * (i + 1),
                    completion_text="wait" * (a is None), finish_reason="stop") for i, a in enumerate(scores)]
    got = evaluate.summarize(done, 2)
    assert (got["n"], got["unscored"], got["completions"], got["right"]) == (2, 1, 6, [1, 2])
    assert (got["accuracy"], got["pass@2"]) == (3 / 4, 1)
    assert got["accuracy_interval"] == evaluate.wilson_interval(3 / 4, 2)
    assert got["length"] == 21 / 6 and got["reflection_ratio"] == 1 / 6
    assert got["reflection_ratio_in_correct_answers"] == 0 and got["correct_ratio_in_reflection_texts"] is None
    assert got["correct_ratio_in_no_reflection_texts"] == 4 / 5
    buggy = [s.rewards["accuracy"] == 1.0 for s in done]  # what was not scored is wrong
    assert sum(buggy) / 6 == pytest.approx(2 / 3)
    unscored = [replace(s, rewards={"accuracy": None}) for s in done]
    with pytest.raises(utils.RunError, match="none of 3 prompts can be scored"):
        evaluate.summarize(unscored, 2)


def test_reflection_metrics_of_unscored_answers_by_hand():
    """wait, right; wait, unscored; nothing, wrong; nothing, unscored. The ratios that ask for right or wrong
    are over two answers, the first over four, the words over all."""
    texts, right = ["wait", "wait wait", "3", "4"], [True, None, False, None]
    got = evaluate.reflection_metrics(texts, right)
    assert got["reflection_ratio"] == 2 / 4 and got["words"]["wait"] == 3
    assert [got[name] for name in report.RATIOS[1:]] == [1, 0, 1, 0]
    nobody = evaluate.reflection_metrics(texts, [None] * 4)
    assert nobody["reflection_ratio"] == 2 / 4 and nobody["words"] == got["words"]
    assert [nobody[name] for name in report.RATIOS[1:]] == [None] * 4


def test_reflection_metrics_by_hand():
    """Five ratios on seven texts; reflecting: 4, right: 3, both: 2, so wrong and reflecting: 2."""
    texts = ["Wait, let me re-check: \\boxed{3}", "wait wait yet 4", "so I get 5",
             "we await the end", "I recheck and VERIFY", "let me try again", "nothing"]
    right = [True, True, True, False, False, False, False]
    got = evaluate.reflection_metrics(texts, right)
    assert got["reflection_ratio"] == 4 / 7
    assert got["reflection_ratio_in_correct_answers"] == 2 / 3
    assert got["reflection_ratio_in_incorrect_answers"] == 2 / 4
    assert got["correct_ratio_in_reflection_texts"] == 2 / 4
    assert got["correct_ratio_in_no_reflection_texts"] == 1 / 3
    found = {word: count for word, count in got["words"].items() if count}
    assert found == {"wait": 3, "re-check": 1, "yet": 1, "recheck": 1, "verify": 1, "try again": 1}
    assert len(got["words"]) == 15


def test_reflection_words_end_at_word_boundaries():
    """The paper's own rule finds "wait" in "await", "yet" in "eyeteeth" and "verify" in
    "verifying"."""
    texts = ["await eyeteeth verifying waiting"]
    strict = evaluate.reflection_metrics(texts, [True])
    paper = evaluate.reflection_metrics(texts, [True], substring=True)
    assert strict["reflection_ratio"] == 0 and paper["reflection_ratio"] == 1
    assert (strict["words"]["wait"], paper["words"]["wait"], paper["words"]["yet"]) == (0, 2, 1)


def test_reflection_ratios_without_a_denominator_are_none():
    got = evaluate.reflection_metrics([], [])
    assert {v for k, v in got.items() if k != "words"} == {None}
    got = evaluate.reflection_metrics(["wait"], [True])  # none wrong, none without reflection
    assert got["reflection_ratio_in_incorrect_answers"] is None
    assert got["correct_ratio_in_no_reflection_texts"] is None
    assert got["correct_ratio_in_reflection_texts"] == 1
    with pytest.raises(ValueError):
        evaluate.reflection_metrics(["wait", "yet"], [True])


# ---------------------------------------------------------------------------------------------
# Sampling

HALVES = torch.tensor([[0.5, 0.3, 0.2]]).log()  # logits of probabilities 0.5, 0.3, 0.2


def pick(logits, *numbers, temperature=1.0, top_p=1.0):
    """Token ids and probabilities for one row of logits under several uniform numbers."""
    numbers = torch.tensor(numbers, dtype=torch.float64)
    rows = logits.expand(len(numbers), -1)
    ids, logprobs = rollout.sample_tokens(rows, numbers, temperature, top_p)
    return ids.tolist(), logprobs.exp().tolist()


def test_sampling_inverts_the_cumulative_distribution():
    # borders at 0.5 and 0.8
    ids, probs = pick(HALVES, 0.0, 0.49, 0.51, 0.79, 0.81, 0.999)
    assert ids == [0, 0, 1, 1, 2, 2]
    assert close(probs, [0.5, 0.5, 0.3, 0.3, 0.2, 0.2])


def test_sampling_temperature():
    # T = 1/2 squares: 0.25, 0.09, 0.04 over 0.38 = 0.657895, 0.236842, 0.105263; borders there
    ids, probs = pick(HALVES, 0.65, 0.67, 0.89, 0.90, temperature=0.5)
    assert ids == [0, 1, 1, 2]
    assert close(probs, [0.657895, 0.236842, 0.236842, 0.105263])
    ids, probs = pick(HALVES, 0.999, temperature=0.01)  # 0.6^100 is 7e-23: as good as greedy
    assert ids == [0] and close(probs, [1.0])


def test_sampling_top_p():
    # top_p 0.7 keeps 0.5 and 0.3 (the mass before the second, 0.5, is below 0.7), renormalised by
    # 0.8: 0.625 and 0.375. top_p 0.001 keeps the first alone.
    ids, probs = pick(HALVES, 0.62, 0.63, 0.999, top_p=0.7)
    assert ids == [0, 1, 1] and close(probs, [0.625, 0.375, 0.375])
    shuffled = HALVES[:, [2, 0, 1]]  # ids must come back from the sorted order
    ids, probs = pick(shuffled, 0.62, 0.63, 0.999, top_p=0.7)
    assert ids == [1, 2, 2] and close(probs, [0.625, 0.375, 0.375])
    assert pick(HALVES, 0.0, 0.999, top_p=0.001) == ([0, 0], [1.0, 1.0])


def test_sampling_greedy():
    ids, probs = pick(HALVES[:, [1, 0, 2]], 0.0, 0.999, temperature=0)
    assert ids == [1, 1] and probs == [1, 1]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_tokens_without_mass_are_never_picked(top_p):
    """A banned id is -inf. At the ends of [0, 1) and between equal sums it must be stepped over."""
    ban, ends = -math.inf, (0.0, 1 - 2**-53)
    logits = torch.tensor([[ban, 0, ban, 0, ban]])  # cumulative 0, 0.5, 0.5, 1, 1
    ids, probs = pick(logits, ends[0], 0.5, ends[1], top_p=top_p)
    assert ids == [1, 3, 3] and close(probs, [0.5, 0.5, 0.5])
    total = 1 + torch.arange(-9.0, 9, dtype=torch.float64) * 2**-53  # sums of probabilities end near 1
    assert (total * ends[1] < total).all()  # so the largest number below 1 lands below each
    from_left = torch.searchsorted(torch.tensor([0, 0.5, 0.5, 1, 1]), torch.tensor([0.0, 0.5]))
    assert from_left.tolist() == [0, 1]  # right=False would have picked the banned id 0


def test_a_large_vocabulary_loses_no_mass():
    """At 150,000 tokens a float32 running sum ends near, not at, 1: the last token must be in
    range."""
    logits = torch.randn(1, 150_000, generator=torch.Generator().manual_seed(0)) * 3
    numbers = torch.linspace(0, 1 - 2**-53, 50, dtype=torch.float64)
    ids, probs = pick(logits, *numbers.tolist())
    exact = logits[0].double().softmax(-1)
    assert all(0 <= i < 150_000 for i in ids)
    borders = exact.cumsum(-1)
    want = torch.searchsorted(borders, numbers.clamp(max=float(borders[-1]) - 1e-9), right=True)
    off = (borders[ids] - borders[want]).abs().max()
    assert off < 1e-6  # at most a token's width away in probability
    assert close(probs, exact[ids].tolist(), 1e-7)


def chi_square(counts, probabilities):
    draws = sum(counts)
    return sum((c - draws * p) ** 2 / (draws * p) for c, p in zip(counts, probabilities))


def test_sampled_frequencies():
    """4,000 draws with our own random numbers; chi-square, 3 degrees of freedom, 16.27 at p =
    0.001."""
    logits = torch.tensor([[1.0, 0.0, -1.0, 0.5]])
    numbers = torch.cat([rollout.uniforms("s", f"id{i}", i % 8, 10) for i in range(400)])
    ids, _ = pick(logits, *numbers.tolist(), temperature=0.7)
    counts = [Counter(ids)[t] for t in range(4)]
    assert chi_square(counts, (logits[0] / 0.7).softmax(-1).tolist()) < 16.27
    assert chi_square(counts, logits[0].softmax(-1).tolist()) > 16.27  # the temperature forgotten


def test_uniforms_belong_to_seed_prompt_and_index():
    numbers = rollout.uniforms(0, "prompt", 0, 5)
    torch.manual_seed(1)
    torch.rand(3)
    assert torch.equal(rollout.uniforms(0, "prompt", 0, 5), numbers)  # no global state
    assert torch.equal(rollout.uniforms(0, "prompt", 0, 9)[:5], numbers)  # a prefix stays
    others = [(1, "prompt", 0), (0, "prompts", 0), (0, "prompt", 1), ("0 1", "prompt", 0)]
    assert all(not torch.equal(rollout.uniforms(*key, 5), numbers) for key in others)
    # "1|1" must not be confused with index 11 or the like
    keys = [("1", "1", 1), ("11", "", 1), ("1", "", 11), ("", "1", 11), ("1", "11", 1)]
    assert len({tuple(rollout.uniforms(*key, 3).tolist()) for key in keys}) == len(keys)
    assert numbers.dtype == torch.float64 and (0 <= numbers).all() and (numbers < 1).all()


# ---------------------------------------------------------------------------------------------
# Schedules and batches


def test_learning_rate_by_hand():
    # peak 2, warm-up 2 of 6 steps: 1, 2, then 1 + cos(pi k / 4): 1.707107, 1, 0.292893, 0
    got = [train_sft.learning_rate_at(step, 6, 2.0, 2) for step in range(1, 7)]
    assert close(got, [1, 2, 1.707107, 1, 0.292893, 0])
    assert train_sft.learning_rate_at(1, 1, 2.0, 0) == pytest.approx(0)
    assert train_sft.learning_rate_at(3, 3, 2.0, 3) == 2  # all warm-up: no division by zero
    assert train_sft.learning_rate_at(2, 3, 2.0, 8) == 0.5  # stopped inside the warm-up


@pytest.mark.parametrize("trainer", [train_sft, train_grpo])
def test_epoch_batches(trainer):
    """10 prompts by 3: three batches, no prompt twice, one left out, the same for the same seed."""
    def batches(seed, epoch):
        return trainer.epoch_batches(list("abcdefghij"), 3, seed, epoch)

    flat = [x for b in batches(0, 0) for x in b]
    assert [len(b) for b in batches(0, 0)] == [3, 3, 3] and len(set(flat)) == 9
    assert flat != sorted(flat)
    assert batches(0, 0) == batches(0, 0)
    orders = [batches(0, 1), batches(1, 0), batches(1, 1)]
    assert batches(0, 0) not in orders and orders[0] != orders[1]
    seen = {x for epoch in range(20) for b in batches(0, epoch) for x in b}
    assert seen == set("abcdefghij")  # the one left out is not always the same


def lengths(parts):
    return [[len(s.completion_ids) for s in part] for part in parts]


def test_micro_batches_by_rows(qwen):
    """Prompts of 10 tokens: rows are as wide as the longest, so that 3 rows of 13 are 39 tokens."""
    samples = [replace(qwen.samples[0], id=str(i), prompt_ids=[9] * 10, completion_ids=[9] * n)
               for i, n in enumerate([5, 1, 4, 2, 3])]
    assert lengths(split_rows(samples, 39)) == [[1, 2, 3], [4, 5]]
    assert lengths(split_rows(samples, 38)) == [[1, 2], [3, 4], [5]]
    assert lengths(split_rows(samples, 3)) == [[1], [2], [3], [4], [5]]  # more than allowed
    assert split_rows([], 39) == []


def test_micro_batches_with_shared_prompts(qwen):
    """Prompts of 10 tokens count once for siblings: "b" with 1, 2 and 3 is 16 tokens, "c" 15, "a" 22."""
    groups = {"a": [8, 4], "b": [1, 3, 2], "c": [5]}
    samples = [replace(qwen.samples[0], id=name, prompt_ids=[9] * 10, completion_ids=[9] * n)
               for name, sizes in groups.items() for n in sizes]
    assert lengths(split_groups(samples, 31)) == [[1, 2, 3, 5], [4, 8]]
    assert lengths(split_groups(samples, 30)) == [[1, 2, 3], [5], [4, 8]]  # no group is cut
    assert lengths(split_groups(samples, 15)) == [[1, 2], [3], [5], [4], [8]]
    assert lengths(split_groups(samples, 1)) == [[1], [2], [3], [5], [4], [8]]
    assert lengths(split_groups(samples, 1000)) == [[1, 2, 3, 5, 4, 8]]
    assert split_groups([], 1000) == []


def test_ranks_make_equally_many_passes(qwen, one_rank, monkeypatch):
    policy = branching(qwen.model, qwen.processor)
    samples = [replace(qwen.samples[0], completion_ids=[9])]
    assert policy.micro_batches(samples, 1000) == [samples]
    assert policy.micro_batches([], 1000) == [[]]  # one pass, of nothing
    monkeypatch.setattr(utils, "gather", lambda mine: [*mine, 3])  # another rank needs three
    assert policy.micro_batches(samples, 1000) == [samples, [], []]


def test_golden_responses_end_in_a_trained_eos(qwen):
    """The response is the data's own words and EOS; a model that never sees EOS never stops."""
    eos = qwen.processor.tokenizer.eos_token_id
    done = train_sft.with_golden_responses(qwen.samples, qwen.processor, 30, eos)
    for sample, source in zip(done, qwen.samples, strict=True):
        assert sample.completion_ids[-1] == eos and sample.completion_ids.count(eos) == 1
        assert qwen.processor.tokenizer.decode(sample.completion_ids[:-1]) == source.solution
        assert source.completion_ids == []  # the given samples are left alone
    batch = collate(done, qwen.processor)
    ends = batch["mask"].sum(1) - 1
    assert (batch["completion_ids"].gather(1, ends[:, None]) == eos).all()  # EOS is under the mask


def test_golden_responses_that_cannot_be_trained_are_refused(qwen):
    sample = replace(qwen.samples[0], solution="abc")
    count = len(qwen.processor.tokenizer("abc")["input_ids"])
    train_sft.with_golden_responses([sample], qwen.processor, count + 1, 2)  # words and EOS just fit
    with pytest.raises(UserError, match=f"has {count} tokens"):
        train_sft.with_golden_responses([sample], qwen.processor, count, 2)
    for nothing in ("", " \n"):
        with pytest.raises(UserError, match="data.jsonl, line 1: .*is empty"):
            train_sft.with_golden_responses([replace(sample, solution=nothing)], qwen.processor, 30, 2)


# ---------------------------------------------------------------------------------------------
# Flags


@dataclass
class Flags:
    count: int = 3  # how many, at 100 % of the time
    rate: float = 1e-4  # how fast
    name: str = ""  # of what
    train_vision: bool = False  # whether to look
    train_language: bool = True  # whether to speak
    kind: Literal["auto", "hf"] = "auto"  # which


def test_parse_args():
    assert utils.parse_args(Flags, []) == Flags()
    words = "--count 7 --rate 1e-3 --name x --train_vision --no-train_language --kind hf"
    assert utils.parse_args(Flags, words.split()) == Flags(7, 1e-3, "x", True, False, "hf")


@pytest.mark.parametrize("wrong", ["--unknown 1", "--coun 3", "--count 1.5", "--kind vllm",
                                   "--train_vision yes", "extra", "--name"])
def test_parse_args_refuses(wrong, capsys):
    """Also abbreviations: `--coun` today is another flag tomorrow."""
    with pytest.raises(SystemExit) as end:
        utils.parse_args(Flags, wrong.split())
    assert end.value.code == 2 and "error" in capsys.readouterr().err


def test_help_shows_every_flag_with_its_default_and_comment(capsys):
    with pytest.raises(SystemExit) as end:
        utils.parse_args(Flags, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and "how many, at 100 % of the time (default: 3)" in text
    assert "--no-train_vision" in text and "(default: 0.0001)" in text


@dataclass
class Bounded:
    """The forms in which help says what a flag may be."""

    share: float = 0.5  # of what there is, in (0, 1]
    heat: float = 1.0  # in [0.01, 100]; 0: none
    word: str = "a"  # the name
    end: str = "b"  # the other one; empty: none


@pytest.mark.parametrize("flag, good, bad, bound", [
    ("share", "1e-9 1", "0 1.1 -0.0 nan inf 1e400", "above 0 and at most 1"),
    ("heat", "0 -0.0 0.01 100", "0.009 101 -1 nan", "0, or at least 0.01 and at most 100"),
    ("word", "b", " ", "must not be empty"), ("end", "b  ", "", "")])
def test_help_says_what_a_flag_may_be_and_is_held_to_it(flag, good, bad, bound, capsys):
    for value in good.split(" "):
        assert getattr(utils.parse_args(Bounded, [f"--{flag}={value}"]), flag) == getattr(Bounded, flag).__class__(value)
    for value in bad.split(" ") if bad else ():
        with pytest.raises(SystemExit) as end:
            utils.parse_args(Bounded, [f"--{flag}={value}"])
        said = capsys.readouterr().err
        assert end.value.code == 2 and f"--{flag} " in said and bound in said and said.count("\n") == 1


def test_flags_that_were_given_are_known():
    args = utils.parse_args(Flags, "--count 3 --rate=1e-4 --no-train_vision".split())
    assert args == Flags() and args.given == {"count", "rate", "no-train_vision"}
    assert utils.parse_args(Flags, []).given == set()


@pytest.mark.parametrize("module", [evaluate, rollout, toy, train_grpo, train_sft])
def test_every_stage_documents_its_flags(module, capsys):
    with pytest.raises(SystemExit):
        utils.parse_args(module.Args, ["--help"])
    assert "--" in capsys.readouterr().out
    assert utils.parse_args(module.Args, []) == module.Args()


# ---------------------------------------------------------------------------------------------
# Images


@pytest.mark.parametrize("name", IMAGES)
def test_open_image(name, data_path):
    """Every picture is red on its left half; what was transparent has become white, not black."""
    mode, width, height, ending = IMAGES[name]
    path = data_path.parent / "images" / f"{name}.{ending}"
    image = open_image(path)
    assert image.mode == "RGB"
    first, last = image.getpixel((0, 0)), image.getpixel((image.width - 1, image.height - 1))
    if name == "rotated":  # a quarter turn clockwise: left is up, and the sides are exchanged
        assert image.size == (height, width)
        assert image.getpixel((image.width - 1, 0))[1] < 100  # red along the upper edge
        assert image.getpixel((0, image.height - 1))[1] > 200
    else:
        assert image.size == (width, height)
    # grey is 0.299 * 200 + 0.587 * 30 + 0.114 * 30 = 81
    red = (81, 81, 81) if mode == "L" else (200, 30, 30)
    assert all(abs(a - b) < 12 for a, b in zip(first, red)), first  # JPEG is not exact
    assert min(last) > 240, last
    assert open_image(path.read_bytes()).tobytes() == image.tobytes()


def test_plain_conversion_is_wrong_for_transparent_images(data_path):
    """What `convert("RGB")` alone does: the invisible colour under the transparency comes to
    light."""
    picture = Image.new("RGBA", (2, 2), (0, 0, 0, 0))
    path = data_path.parent / "clear.png"
    picture.save(path)
    assert Image.open(path).convert("RGB").getpixel((0, 0)) == (0, 0, 0)
    assert open_image(path).getpixel((0, 0)) == (255, 255, 255)


# ---------------------------------------------------------------------------------------------
# Files


def test_a_crash_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    path = tmp_path / "sub" / "file.json"
    utils.write_text(path, "old")
    assert path.read_text() == "old"

    def crash(*_):
        raise OSError("the machine stops here")

    with monkeypatch.context() as patch:  # before the new file has its name
        patch.setattr(utils.os, "replace", crash)
        with pytest.raises(OSError):
            utils.write_text(path, "new and longer")
    assert path.read_text() == "old"
    utils.write_text(path, "new and longer")
    assert path.read_text() == "new and longer"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]  # no half-written file stays


def test_jsonl_with_a_torn_last_line(tmp_path):
    """A process killed inside a write leaves half a line; what came before it must still be
    read."""
    path = tmp_path / "metrics.jsonl"
    assert utils.read_jsonl(path) == []
    rows = [{"step": 1, "text": "two\nlines, \u00fc \u2028"}, {"step": 2, "text": ""}]
    for row in rows:
        utils.append_jsonl(path, row)
    assert utils.read_jsonl(path) == rows
    whole = path.read_bytes()
    with pytest.raises(ValueError):
        [json.loads(line) for line in whole[:-3].splitlines()]
    path.write_bytes(whole[:-3])
    assert utils.read_jsonl(path) == rows[:1]
    path.write_bytes(whole[:-1])  # only the line's end is missing: not known to be whole
    assert utils.read_jsonl(path) == rows[:1]


def test_cut_logs_forgets_what_came_after_the_checkpoint(tmp_path):
    for step in (1, 2, 3):
        utils.append_jsonl(tmp_path / "metrics.jsonl", {"generation_step": step})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"generation_')
    utils.cut_logs(tmp_path, 2)
    utils.append_jsonl(tmp_path / "metrics.jsonl", {"generation_step": 3})
    assert [r["generation_step"] for r in utils.read_jsonl(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    assert not (tmp_path / "eval.jsonl").exists()


def test_step_metrics_are_means_over_tokens_and_completions(qwen):
    """Rewards are means over scored answers, lengths over all answers, the loss over tokens."""
    rewards, lengths = [1.0, 0.0, 0.5, None], [2, 4, 6, 8]  # two prompts, two answers each
    samples = [replace(qwen.samples[i // 2], reward=r, rewards={"accuracy": r},
                       completion_ids=[9] * n, advantage=[1.0, -1.0, 0.0, 0.0][i],
                       finish_reason="length" if n == 8 else "stop")
               for i, (r, n) in enumerate(zip(rewards, lengths))]
    sums = train_grpo.rollout_sums(samples, 2)
    sums |= {"update_tokens": 40, "divisor": 40, "loss": 8.0, "entropy": 80.0}  # two passes over the 20 tokens
    sums |= {"sampler_gap": 4.0, "sampler_ratio": 40.0, "sampler_ratio_squared": 80.0,
             "sampler_gap_clipped": 2.0, "tis_masked": 10}
    got = train_grpo.step_metrics(sums, [1.0, 3.0], {"rollout": 0.5}, 1e-4)
    assert got["reward"] == got["reward/accuracy"] == 0.5  # 1.5 of 3, not of 4
    assert (got["length"], got["truncated"], got["unscored"]) == (5, 0.25, 0.25)
    assert got["groups_all_alike"] == 0.5
    assert (got["loss"], got["entropy"], got["grad_norm"]) == (0.2, 2.0, 2.0)
    assert "kl" not in got and got["seconds_rollout"] == 0.5
    assert (got["sampler_gap"], got["sampler_gap_clipped"], got["sampler_ratio"]) == (0.1, 0.05, 1)
    assert got["tis_masked"] == 0.25
    assert got["sampler_effective_size"] == 0.5  # 40^2 / (40 * 80): as if half the tokens counted


def test_importance_weights_by_hand():
    # the trainer gives 0.6, 0.1 and 0.9 to tokens that the sampler drew with 0.5, 0.2 and 0.1:
    # 0.6 / 0.5 = 1.2; 0.1 / 0.2 = 0.5; 0.9 / 0.1 = 9, held at 2. No gradient flows through a weight
    trainer, mask = torch.tensor([[0.6, 0.1, 0.9]]).log().requires_grad_(), torch.ones(1, 3, dtype=torch.bool)
    sampler = torch.tensor([[0.5, 0.2, 0.1]]).log()
    weights = train_grpo.importance_weights(trainer, sampler, mask, 2.0, "token")
    assert close(weights, [[1.2, 0.5, 2.0]]) and not weights.requires_grad
    flipped = train_grpo.importance_weights(sampler, trainer, mask, 2.0, "token")
    assert not close(flipped, [[1.2, 0.5, 2.0]])  # the classic slip: sampler over trainer


def test_masking_weights_by_hand():
    # IcePop with a cap of 2 keeps ratios in [0.5, 2]: of 0.6 / 0.5 = 1.2, 0.2 / 0.5 = 0.4 and 0.9 / 0.1 = 9 the first
    trainer, mask = torch.tensor([[0.6, 0.2, 0.9]]).log().requires_grad_(), torch.ones(1, 3, dtype=torch.bool)
    sampler = torch.tensor([[0.5, 0.5, 0.1]]).log()
    weights = train_grpo.importance_weights(trainer, sampler, mask, 2.0, "mask")
    assert close(weights, [[1.2, 0.0, 0.0]]) and not weights.requires_grad
    ratio = (trainer - sampler).exp()
    assert not close(torch.where(ratio > 2, 0.0, ratio), weights.tolist())  # masked above alone: 0.4 still counts
    assert not close(torch.where((ratio < 0.5) | (ratio > 2), 0.0, 1.0), weights.tolist())  # a mask, and no weight


def test_sequence_masking_by_hand():
    # ratios 1.2, 0.5 and 2.5, together 1.5: a completion that counts 1.5 on each token, although one token's ratio is
    # above the cap; and 1.5, 1.5 beside padding, together 2.25, above it: none of its tokens counts
    ratios = torch.tensor([[1.2, 0.5, 2.5], [1.5, 1.5, 1.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    sampler = torch.tensor([[-0.7, -1.0, -2.0], [-0.4, -3.0, -9.0]])
    trainer = torch.where(mask, sampler + ratios.log(), -50.0).requires_grad_()  # padding has no meaning
    weights = train_grpo.importance_weights(trainer, sampler, mask, 2.0, "sequence_mask")
    assert close(weights, [[1.5] * 3, [0.0] * 3]) and not weights.requires_grad
    gaps = (trainer - sampler) * mask
    mean = (gaps.sum(1, keepdim=True) / mask.sum(1, keepdim=True)).exp()  # GSPO's, which keeps the second: 1.5
    assert not close(torch.where(mean > 2, 0.0, mean).expand(2, 3), weights.tolist())
    lost = (trainer - sampler).sum(1, keepdim=True).exp()  # padding counted: the second is next to 0 and kept
    assert lost[1] < 1e-9


@pytest.mark.parametrize("kind, held", [("token", 2.0), ("mask", 0.0), ("sequence_mask", 0.0)])
@pytest.mark.parametrize("gap", [1000.0, -1000.0, math.inf])
def test_importance_weights_do_not_overflow(kind, held, gap):
    """A token 1,000 nats apart, either way: its weight is a number, and so are loss and gradient."""
    trainer = torch.tensor([[-0.5, -0.5 + gap]], requires_grad=True)
    mask, sampler = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[-0.5, -0.5]])
    weights = train_grpo.importance_weights(trainer, sampler, mask, 2.0, kind)
    assert close(weights, [[1.0 if kind != "sequence_mask" else (0.0, held)[gap > 0], (0.0, held)[gap > 0]]])
    new = torch.tensor([[-0.4, -0.6]], requires_grad=True)
    (new * weights).sum().backward()
    assert (new * weights).isfinite().all() and new.grad.isfinite().all()
    if gap > 0:
        ratio = (trainer - sampler).exp()
        assert (ratio * (ratio <= 2)).isnan().any()  # the usual way to write a mask: infinity times 0


def test_a_row_of_padding_weighs_nothing_it_should_not():
    """A rank that has run out repeats a sample under an empty mask."""
    mask, logprobs = torch.zeros(1, 3, dtype=torch.bool), torch.tensor([[-1.0, math.nan, -9.0]])
    for kind in ("token", "mask", "sequence_mask"):
        assert close(train_grpo.importance_weights(logprobs, torch.zeros(1, 3), mask, 2.0, kind), [[1.0] * 3])


def test_what_an_evaluation_sends_around_is_what_was_answered(one_rank, monkeypatch):
    """Not the pictures of a parquet row, which every rank has; the samples that come back have them all the same."""
    samples = [Sample(str(i), "q", "5", "", [bytes([i]) * 500_000], "prompt", [9] * 400) for i in range(3)]

    def generate(prompts, n, *_):
        return [replace(s, completion_ids=[7] * (k + 1), completion_text=f"\\boxed{{{5 + k}}}", finish_reason="stop",
                        sampler_logprobs=[-1.0] * (k + 1)) for s in prompts for k in range(n)]

    sent, gather = [], utils.gather
    monkeypatch.setattr(utils, "gather", lambda items: sent.append(pickle.dumps(items)) or gather(items)[::-1])
    metrics, done = evaluate.evaluate(SimpleNamespace(generate=generate), samples, "pass8_t1", 96, 0)
    assert max(map(len, sent)) < 10_000 < sum(len(s.images[0]) for s in samples)
    want = generate(samples, 8)
    assert [s.record() | {"rewards": 0} for s in done] == [
        s.record() | {"rewards": 0, "reward": w.reward} for s, w in zip(want, done)]
    assert [s.images for s in done] == [s.images for s in want]
    assert [s.rewards["accuracy"] for s in done] == [1.0, *[0.0] * 7] * 3
    assert (metrics["right"], metrics["length"], metrics["n"]) == ([1, 1, 1], 4.5, 3)


def strays(gaps):
    """What the guard makes of one step with these differences, in nats, one a token."""
    sums = Counter({"completions": 1, "groups": 1, "update_tokens": len(gaps)})
    sums.update(train_grpo.gap_sums(torch.tensor(gaps)))
    doctor.stop_if_sampler_strays(train_grpo.step_metrics(sums, [1.0], {}, 1e-4))


@pytest.mark.parametrize("gaps, stops", [
    ([0.0] * 50, False), ([0.05, -0.05] * 50, False), ([0.0] * 99 + [-500.0], False),
    ([0.0] * 9471 + [5.5], False), ([0.0] * 9471 + [12.0], False), ([0.0] * 9471 + [500.0], False),
    ([1.0, -1.0] * 50, True), ([0.0, 0.3] * 50, True), ([0.0, -2.0] * 50, True),
    ([0.11] * 50, True), ([-0.11] * 50, True), ([0.09] * 50, False)])
def test_a_sampler_that_strays_ends_the_run(gaps, stops):
    """Many tokens that are off by a little, or half of them by much; never one of many."""
    if stops:
        with pytest.raises(utils.RunError, match="strayed from the policy.*not taken over"):
            strays(gaps)
    else:
        strays(gaps)


@pytest.mark.parametrize("gap", [math.nan, math.inf, -math.inf])
def test_a_difference_that_is_no_number_ends_the_run(gap):
    with pytest.raises(utils.RunError, match="strayed from the policy.*NaN in them"):
        strays([0.0] * 1000 + [gap])


def test_a_step_without_a_token_to_train_on_does_not_stray():
    """All completions were cut off and masked: nothing was compared, so nothing disagreed."""
    strays([])


def test_what_differs_is_summed_by_hand():
    # 0.5, -2 and 0 nats: 2.5 in all, 1.5 where a token counts at most 1; ratios 1.6487, 0.1353, 1
    sums = train_grpo.gap_sums(torch.tensor([0.5, -2.0, 0.0]))
    assert sums == pytest.approx({"sampler_gap": 2.5, "sampler_gap_clipped": 1.5,
                                  "sampler_ratio": 2.7841, "sampler_ratio_squared": 3.7366}, rel=1e-4)
    for value in train_grpo.gap_sums(torch.full((1000,), 60.0)).values():
        assert math.isfinite(value)  # JSON has no Infinity; e^120 is none of float32's numbers


@pytest.mark.parametrize("count", [1, 2, 3, 100, 101, 9472, 1_000_001])
def test_the_99th_percentile_is_torchs(count):
    values = torch.rand(count, generator=torch.Generator().manual_seed(count))
    assert train_grpo.percentile_99(values) == values.quantile(0.99).item()


def test_the_99th_percentile_of_none_and_of_more_than_torch_takes():
    assert train_grpo.percentile_99(torch.zeros(0)) == 0
    many = torch.zeros(2**24 + 1)
    many[: 2**18] = 1.0  # 1.6 % of them
    with pytest.raises(RuntimeError, match="too large"):
        many.quantile(0.99)
    assert train_grpo.percentile_99(many) == 1.0
