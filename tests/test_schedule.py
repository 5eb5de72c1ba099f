"""The learning rate: its shape, its ends, and that it is a function of the step alone."""

import itertools
import math

import pytest

from tnl.training.schedule import learning_rate
from tnl.training.settings import ScheduleSettings

PEAK = 3e-4
NAMES = ("cosine", "wsd", "constant", "inverse_sqrt")
CASES = [
    (name, warmup, total, decay)
    for name, warmup, total in itertools.product(NAMES, (0, 1, 7, 90, 99), (100, 137))
    for decay in ((None, 1, total - warmup) if name == "wsd" else (None,))
]


def curve(total: int = 100, peak: float = PEAK, **settings) -> list[float]:
    schedule = ScheduleSettings(**settings)
    return [learning_rate(schedule, peak, step, total) for step in range(total)]


@pytest.mark.parametrize(("name", "warmup", "total", "decay"), CASES)
def test_every_shape(name, warmup, total, decay):
    rates = curve(total, name=name, warmup_steps=warmup, decay_steps=decay, min_lr_ratio=0.1)
    assert all(math.isfinite(rate) and 0 < rate <= PEAK * (1 + 1e-12) for rate in rates)
    # The warm-up is a line from one step above 0, and reaches the peak at its last step.
    assert rates[:warmup] == pytest.approx([PEAK * (step + 1) / warmup for step in range(warmup)])
    after = rates[max(0, warmup - 1) :]
    assert max(after) == pytest.approx(PEAK) or (name, decay) == ("wsd", total)
    assert after == sorted(after, reverse=True)


@pytest.mark.parametrize(("name", "warmup", "total", "decay"), [case for case in CASES if case[3] != 1])
def test_no_jumps(name, warmup, total, decay):
    rates = curve(total, name=name, warmup_steps=warmup, decay_steps=decay)
    after = total - max(1, warmup)
    # The steepest of all: warm-up, half a cosine, a line over the decay, sqrt(1 / 2) at the second step.
    line = 1 / min(after, decay or total // 5)
    cosine = min(2.0, math.pi / 2 * 0.9) / max(1, after - 1)
    bound = {"cosine": cosine, "wsd": line, "constant": 0, "inverse_sqrt": 1 - math.sqrt(max(1, warmup) / (warmup + 1))}
    if warmup == 0:
        bound["inverse_sqrt"] = 1 - math.sqrt(1 / 2)
    largest = max(abs(b - a) for a, b in itertools.pairwise(rates[max(0, warmup - 1) :])) / PEAK
    assert largest <= bound[name] + 1e-9


@pytest.mark.parametrize("warmup", [0, 1, 30])
@pytest.mark.parametrize("ratio", [0.0, 0.05, 1.0])
def test_cosine_and_wsd_end_at_the_ratio(warmup, ratio):
    for name in ("cosine", "wsd"):
        rates = curve(name=name, warmup_steps=warmup, min_lr_ratio=ratio)
        assert rates[-1] == pytest.approx(PEAK * ratio)
        assert rates[warmup] == pytest.approx(PEAK)


def test_cosine_is_half_way_down_in_the_middle():
    rates = curve(101, name="cosine", min_lr_ratio=0.2)
    assert rates[50] == pytest.approx(PEAK * 0.6)
    assert rates[25] == pytest.approx(PEAK * (0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2))


def test_wsd_stays_until_its_decay():
    rates = curve(name="wsd", warmup_steps=10, decay_steps=25, min_lr_ratio=0.0)
    assert rates[9:75] == pytest.approx([PEAK] * 66)
    assert rates[75:] == pytest.approx([PEAK * left / 25 for left in range(24, -1, -1)])


def test_wsd_decays_over_a_fifth_by_default():
    assert curve(name="wsd", warmup_steps=10) == curve(name="wsd", warmup_steps=10, decay_steps=20)
    # A warm-up that leaves less than a fifth is followed by the decay at once.
    rates = curve(name="wsd", warmup_steps=90, min_lr_ratio=0.0)
    assert rates[89:] == pytest.approx([PEAK * left / 10 for left in range(10, -1, -1)])


def test_constant_stays():
    assert curve(name="constant", warmup_steps=3)[2:] == [PEAK] * 98
    assert curve(name="constant") == [PEAK] * 100


def test_inverse_sqrt():
    rates = curve(name="inverse_sqrt", warmup_steps=16)
    assert rates[15] == pytest.approx(PEAK)
    assert rates[63] == pytest.approx(PEAK / 2)
    assert curve(name="inverse_sqrt")[:4] == pytest.approx([PEAK / math.sqrt(n) for n in (1, 2, 3, 4)])


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_function_of_the_step_alone(name):
    schedule = ScheduleSettings(name=name, warmup_steps=5)
    forwards = [learning_rate(schedule, PEAK, step, 50) for step in range(50)]
    backwards = [learning_rate(schedule, PEAK, step, 50) for step in reversed(range(50))]
    assert [rate.hex() for rate in forwards] == [rate.hex() for rate in reversed(backwards)]
    assert schedule == ScheduleSettings(name=name, warmup_steps=5)
    doubled = [learning_rate(schedule, 2 * PEAK, step, 50) for step in range(50)]
    assert doubled == pytest.approx([2 * rate for rate in forwards])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "total"), [(0, 1), (0, 2), (1, 2), (4, 5)])
def test_tiny_runs(name, warmup, total):
    rates = curve(total, name=name, warmup_steps=warmup, min_lr_ratio=0.0)
    assert all(0 <= rate <= PEAK for rate in rates)
    assert max(rates) > 0 or (name, total) == ("wsd", 1)


@pytest.mark.parametrize("name", NAMES)
def test_beyond_the_last_step_it_is_never_negative_and_never_rises(name):
    schedule = ScheduleSettings(name=name, warmup_steps=5, min_lr_ratio=0.0)
    rates = [learning_rate(schedule, PEAK, step, 50) for step in range(49, 500)]
    assert min(rates) >= 0
    assert rates == sorted(rates, reverse=True)
