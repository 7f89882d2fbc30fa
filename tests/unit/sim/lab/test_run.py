"""One run of the routing laboratory, and its oracle."""

from __future__ import annotations

import random

import numpy as np
import pytest

from dpshm.errors import SettingError
from dpshm.policies import NAMES
from dpshm.sim.batching import Batcher, SimRequest
from dpshm.sim.lab.information import NAMES as INFORMATION
from dpshm.sim.lab.oracle import first_token, soonest
from dpshm.sim.lab.plant import COST, Plant, RequestTime
from dpshm.sim.lab.rank import Job, Pace, SimRank
from dpshm.sim.lab.run import ORACLE, run
from dpshm.sim.step_cost import StepCost


def chat(count: int, rate: float, *, frontends: int = 8, seed: int = 1) -> list[Job]:
    """Requests at random times, of random lengths."""
    rng, now = random.Random(seed), 0.0
    jobs = []
    for _ in range(count):
        now += rng.expovariate(rate)
        prompt, output = int(rng.lognormvariate(6.9, 0.6)) + 1, int(rng.lognormvariate(4.0, 1.0)) + 1
        jobs.append(Job(now, rng.randrange(frontends), prompt, output, rng.randrange(40)))
    return jobs


@pytest.mark.parametrize("policy", [*NAMES, ORACLE])
@pytest.mark.parametrize("information", ["live", "broadcast"])
def test_every_request_is_served(policy: str, information: str):
    """Guards against requests that are lost or finish before they begin, under any policy."""
    jobs = chat(300, 60)
    outcome = run(Plant(), jobs, policy, information)
    assert sum(outcome.by_rank) == 300
    assert all(job.due_s < job.first_s <= job.done_s for job in jobs)
    assert all((job.first_s == job.done_s) == (job.output_tokens == 1) for job in jobs)
    assert outcome.output_tokens == sum(job.output_tokens for job in jobs)


@pytest.mark.parametrize("information", INFORMATION)
@pytest.mark.parametrize(
    "plant",
    [Plant(lockstep=True), Plant(slow=((2, 3.0),)), Plant(restart=(1, 0.5, 1.0)), Plant(clients=20)],
    ids=["lockstep", "slow", "restart", "closed"],
)
def test_every_kind_of_plant(plant: Plant, information: str):
    """Guards against a combination of options in which a run hangs, loses requests, or is not repeatable."""
    first, again = (run(plant, chat(150, 80), "least_work", information) for _ in range(2))
    assert len(first.ttft_s) == 150
    assert min(first.ttft_s) > 0
    assert np.array_equal(first.ttft_s, again.ttft_s)
    assert first.by_rank == again.by_rank


def test_one_request_takes_what_its_steps_take():
    """Guards against times that are off by a step: one prompt step and two decode steps, all alone."""
    job = Job(5.0, 0, 1000, 3)
    run(Plant(engines=1, frontends=1), [job], "least_loaded", "live")
    first_s = 5.0 + COST.seconds(1000, 1, 0)
    assert job.first_s == pytest.approx(first_s)
    assert job.done_s == pytest.approx(first_s + COST.seconds(0, 1, 1000) + COST.seconds(0, 1, 1001))


def test_a_front_end_reads_requests_one_after_another():
    """Guards against a decision before the prompt is read, and a short prompt that waits for those elsewhere."""
    plant = Plant(request_time=RequestTime(2e-3, 1e-6))
    long, behind, elsewhere = Job(1.0, 0, 30_000, 1), Job(1.0, 0, 1000, 1), Job(1.0, 1, 1000, 1)
    run(plant, [long, behind, elsewhere], "least_loaded", "live")
    steps_s = COST.seconds(1000, 1, 0)
    assert elsewhere.first_s == pytest.approx(1.0 + 3e-3 + steps_s)
    assert behind.first_s == pytest.approx(1.0 + 32e-3 + 3e-3 + steps_s)
    assert elsewhere.due_s == 1.0


def test_clients_of_a_closed_loop_wait_for_the_front_end_too():
    """Guards against requests of a closed loop that are decided before they are read, or never."""
    jobs = chat(60, 60)
    outcome = run(Plant(clients=12, request_time=RequestTime(0.05)), jobs, "least_loaded", "live")
    assert len(outcome.ttft_s) == 60
    assert min(outcome.ttft_s) > 0.05


def test_a_slow_engine_is_slow():
    """Guards against a factor that reaches only part of a step's time."""
    plain, slow = Job(0.0, 0, 1000, 3), Job(0.0, 0, 1000, 3)
    run(Plant(engines=1), [plain], "least_loaded", "live")
    run(Plant(engines=1, slow=((0, 2.0),)), [slow], "least_loaded", "live")
    assert slow.done_s == pytest.approx(2 * plain.done_s)


def test_in_lockstep_all_wait_for_the_slowest():
    """Guards against ranks that finish a common step at different times."""
    long, short = Job(0.0, 0, 4000, 2), Job(1e-9, 0, 10, 2)
    run(Plant(engines=2, frontends=1, lockstep=True), [long, short], "round_robin", "live")
    assert {long.rank, short.rank} == {0, 1}
    assert long.first_s < short.first_s  # the short one came into a step that had begun
    alone = Job(0.0, 0, 10, 2)
    run(Plant(engines=2, frontends=1), [Job(0.0, 0, 4000, 2), alone], "round_robin", "live")
    assert alone.first_s < long.first_s


def test_a_restart_serves_the_lost_requests_elsewhere():
    """Guards against requests that stay with an engine that lost them, and against one that is used while away."""
    jobs = chat(400, 60)
    run(Plant(engines=2, restart=(0, 2.0, 2.0)), jobs, "least_loaded", "live")
    assert all(job.done_s > 0 for job in jobs)
    assert all(job.rank == 1 for job in jobs if 2.0 < job.due_s < 4.0)
    assert any(job.rank == 0 for job in jobs if job.due_s > 4.0)


def test_a_closed_loop_has_so_many_requests_and_no_more():
    """Guards against clients that send before they have their answer."""
    jobs = chat(300, 1)
    run(Plant(clients=12), jobs, "least_loaded", "live")
    changes = sorted([(job.due_s, 1) for job in jobs] + [(job.done_s, -1) for job in jobs])
    under_way = np.cumsum([change for _, change in changes])
    assert under_way.max() == 12


def test_a_prefix_cache_saves_what_it_saves():
    """Guards against hits that are counted and computed all the same."""
    blocks = (1, 2, 3, 4)
    first, second = Job(0.0, 0, 2048, 1, 7, blocks), Job(10.0, 0, 2048, 1, 7, blocks)
    outcome = run(Plant(engines=1, frontends=1), [first, second], "least_work", "live")
    assert (first.hit_tokens, second.hit_tokens) == (0, 2047)
    assert outcome.prefix_hit_rate == pytest.approx(2047 / 4096)
    assert second.first_s - 10.0 == pytest.approx(COST.seconds(1, 1, 2047))


def test_a_request_that_never_fits_is_refused():
    """Guards against a run that waits for it for ever."""
    outcome = run(Plant(cost=StepCost(kv_tokens=1000)), [Job(0, 0, 900, 200), Job(0, 0, 9, 9)], "vllm", "live")
    assert outcome.refused == 1
    assert len(outcome.ttft_s) == 1


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        ({"slow": ((8, 2.0),)}, "there is no rank 8: choose 0 to 7"),
        ({"slow": ((1, 0.0),)}, "rank 1 cannot be 0 times as slow"),
        ({"restart": (-1, 1.0, 1.0)}, "there is no rank -1"),
        ({"spells": ((1, 2.0, 3.0, 4.0), (9, 1.0, 1.0, 1.0))}, "there is no rank 9"),
        ({"noise": -0.1}, "noise is -0.1"),
        ({"engines": 1, "restart": (0, 1.0, 1.0)}, "use two or more"),
    ],
)
def test_a_plant_that_cannot_be(plant, message):
    """Guards against an option that is ignored or fails far from where it was given."""
    with pytest.raises(SettingError, match=message):
        Plant(**plant)


@pytest.mark.slow
def test_least_work_learns_what_it_needs():
    """Guards against an estimate that is of no use: with learnt step times it comes close to the clairvoyant."""
    plant = Plant(slow=((3, 2.0),))
    ttft = {p: run(plant, chat(1500, 55), p, "live").ttft_s.mean() for p in ("least_work", "least_loaded", ORACLE)}
    # The clairvoyant looks at the first token of the request alone, `least_work` also at what comes after.
    assert ttft["least_work"] < 1.08 * ttft[ORACLE]
    assert ttft["least_work"] < 0.9 * ttft["least_loaded"]


@pytest.mark.slow
def test_ranks_in_lockstep_stay_balanced():
    """Guards against ranks that learn from common steps that their own requests cost nothing."""
    plant = Plant(lockstep=True)
    found = {p: run(plant, chat(1500, 26), p, "live") for p in ("least_work", "least_loaded")}
    assert found["least_work"].imbalance < 4 * found["least_loaded"].imbalance
    assert found["least_work"].ttft_s.mean() < 1.02 * found["least_loaded"].ttft_s.mean()


def even(count: int, rate: float) -> list[Job]:
    """Equal requests at equal distances, dealt out to eight front-ends."""
    rng = random.Random(3)
    return [Job(i / rate, rng.randrange(8), 1000, 60) for i in range(count)]


@pytest.mark.slow
def test_equal_ranks_get_equal_shares():
    """Guards against ranks that differ by nothing but what each has learnt of noisy steps, and get unequal shares:
    the fullest is then slow, and all that was won by counting work is lost.
    """
    ranks = run(Plant(noise=0.3), even(8000, 60), "least_work", "live").by_rank
    assert max(abs(count - 1000) for count in ranks) <= 0.05 * 1000


@pytest.mark.slow
def test_a_rank_half_as_fast_is_seen_in_noise():
    """Guards against a slow rank that is taken for one of its equals."""
    plant = Plant(noise=0.3, slow=((3, 2.0),))
    shares, means_s = dict.fromkeys(("least_work", "least_loaded"), 0), {}
    for policy in shares:
        found = [run(plant, chat(3000, 55, seed=seed), policy, "live") for seed in range(1, 6)]
        shares[policy] = sum(outcome.by_rank[3] for outcome in found)  # of one seed it varies by a quarter
        means_s[policy] = [outcome.ttft_s.mean() for outcome in found]
    assert shares["least_work"] < 0.5 * shares["least_loaded"]
    for one, other in zip(means_s["least_work"], means_s["least_loaded"], strict=True):
        assert one < 0.9 * other


@pytest.mark.slow
def test_a_rank_that_slows_down_and_recovers():
    """Guards against a rank that is slow for a while and keeps its share, and one that gets no requests
    once it is known to be slow, so that it never learns that it has recovered.
    """
    jobs = even(5500, 50)
    run(Plant(noise=0.2, spells=((3, 2.0, 25.0, 30.0),)), jobs, "least_work", "live")

    def share(from_s: float, until_s: float) -> float:
        during = [job.rank for job in jobs if from_s <= job.due_s < until_s]
        return 8 * during.count(3) / len(during)

    assert share(5, 25) == pytest.approx(1.0, abs=0.15)
    assert share(30, 55) < 0.5
    assert share(70, 110) == pytest.approx(1.0, abs=0.15)


def test_noise_is_repeatable_and_unbiased():
    """Guards against noise that changes what is compared, or that makes every rank's steps long at once."""
    paces = [Pace(0.5, (), seed) for seed in (0, 0, 1)]
    drawn = [[pace.factor(0.0) for _ in range(4000)] for pace in paces]
    assert drawn[0] == drawn[1] != drawn[2]
    assert np.mean(drawn[0]) == pytest.approx(1.0, abs=0.03)
    assert np.std(drawn[0]) == pytest.approx(0.5, abs=0.05)
    spell = Pace(0.0, ((1.0, 2.0, 3.0),), 0)
    assert [spell.factor(t) for t in (0.9, 1.0, 1.9, 2.0)] == [1.0, 3.0, 3.0, 1.0]


def busy_ranks(count: int) -> list[SimRank]:
    """Ranks in the middle of a step, with more work behind it."""
    rng, ranks = random.Random(count), []
    for i in range(count):
        rank = SimRank(StepCost(), 1)
        for _ in range(rng.randrange(1, 9)):
            rank.send(Job(0.0, 0, rng.randrange(1, 5000), rng.randrange(1, 50)))
        rank.busy_until_s = rank.begin(0.0).seconds
        for _ in range(i % 3):
            rank.send(Job(0.0, 0, rng.randrange(1, 5000), 5))
        ranks.append(rank)
    return ranks


def test_the_oracle_finds_the_soonest():
    """Guards against a bound that prunes the best rank away: the oracle would be no oracle."""
    ranks, order = busy_ranks(9), list(range(9))
    for tokens in (1, 500, 3000, 9000):
        job = Job(0.001, 0, tokens, 5)
        times = [first_token(rank, job, 0.001) for rank in ranks]
        assert soonest(ranks, order, job, 0.001) == times.index(min(times))


def test_the_oracle_is_right():
    """Guards against a prediction on a copy that differs from what then happens, or that changes the original."""
    rank = busy_ranks(3)[2]
    job = Job(0.001, 0, 700, 5)
    expected = first_token(rank, job, 0.001)
    assert first_token(rank, job, 0.001) == expected
    rank.send(job)
    now_s = rank.busy_until_s
    while job.first_s < 0:
        rank.end(now_s, rank.step.seconds)
        now_s += rank.begin(now_s).seconds
    assert job.first_s == pytest.approx(expected)


def test_a_copy_of_a_batcher_goes_on_alike():
    """Guards against copies that share requests with the original, or forget one."""
    rng = random.Random(7)
    batcher = Batcher(StepCost(kv_tokens=4000, max_step_tokens=512))
    for i in range(30):
        batcher.add(SimRequest(i, rng.randrange(1, 1500), rng.randrange(1, 60)))
    for _ in range(25):
        batcher.finish(batcher.plan())
    copy = batcher.copy()
    histories = []
    for each in (copy, batcher):
        history = []
        while each.unfinished:
            done = each.finish(each.plan())
            history.append(([r.key for r in done.first_tokens], [r.key for r in done.completed], each.kv_used))
        histories.append(history)
    assert histories[0] == histories[1]
    assert batcher.preemptions == copy.preemptions > 0
