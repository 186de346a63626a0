"""The adaptive threshold: the paper's rule, and what it does on scores that the paper did not foresee."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from gradshield_fast.bulk import FALSE_SHARE, bulk, outside
from gradshield_fast.errors import InputError
from gradshield_fast.mixture import GROUPS, MIN_STD, Groups, _em, fit_mixture
from gradshield_fast.threshold import fit_threshold

LN_2PI = math.log(2 * math.pi)


def groups(seed: int, *parts: tuple[int, float, float]) -> np.ndarray:
    """Gaussian samples, one (count, mean, std) after the other."""
    rng = np.random.default_rng(seed)
    return np.concatenate([rng.normal(mean, std, count) for count, mean, std in parts])


def density(x: np.ndarray, part: dict[str, float]) -> np.ndarray:
    """Weighted normal density, in nats."""
    z = (x - part["mean"]) / part["std"]
    return math.log(part["weight"]) - math.log(part["std"]) - 0.5 * LN_2PI - 0.5 * z**2


def said(cut, text: str) -> bool:
    return any(text in warning for warning in cut.warnings)


class TestRule:
    def test_two_groups_are_split_by_the_paper_rule(self):
        x = groups(0, (270, -1, 1), (30, 8, 1))
        cut = fit_threshold(x)
        assert (cut.kind, cut.n, cut.warnings) == ("two_gaussians", 300, ())
        assert cut.alpha == pytest.approx(1.5 * math.log(300))
        assert np.array_equal(cut.removes(x), x > 4)
        low, high = cut.components
        label = density(x, high) > density(x, low)
        assert cut.value == min(x[label].max(), x[~label].max())

    def test_log_likelihoods_are_totals_in_nats_of_the_scores_themselves(self):
        x = 1e-3 * groups(1, (200, -1, 1), (50, 5, 2))
        cut = fit_threshold(x)
        one = float(-0.5 * len(x) * (1 + LN_2PI) - len(x) * math.log(x.std()))
        two = float(np.logaddexp(*(density(x, part) for part in cut.components)).sum())
        assert cut.log_likelihoods == pytest.approx((one, two), rel=1e-9)

    def test_one_group_is_cut_at_two_sigma(self):
        x = groups(2, (500, 3, 2))
        cut = fit_threshold(x)
        assert cut.kind == "one_gaussian"
        assert cut.value == pytest.approx(x.mean() + 2 * x.std(), rel=1e-12)
        assert cut.components == ({"weight": 1.0, "mean": pytest.approx(x.mean()), "std": pytest.approx(x.std())},)
        assert said(cut, "no second group")

    @pytest.mark.parametrize(("alpha", "kind"), [(1e9, "one_gaussian"), (-1e9, "two_gaussians")])
    def test_alpha_decides(self, alpha, kind):
        x = groups(3, (90, 0, 1), (30, 3, 1))
        cut = fit_threshold(x, alpha=alpha)
        assert (cut.kind, cut.alpha) == (kind, alpha)

    def test_alpha_is_exactly_the_price(self):
        x = groups(4, (90, 0, 1), (30, 4, 1))
        one, two = fit_threshold(x).log_likelihoods
        assert fit_threshold(x, alpha=two - one - 1e-6).kind == "two_gaussians"
        assert fit_threshold(x, alpha=two - one + 1e-6).kind == "one_gaussian"

    def test_equal_to_the_cut_is_kept(self):
        x = groups(5, (90, 0, 1), (10, 9, 1))
        cut = fit_threshold(x)
        assert cut.value in x
        assert not cut.removes([cut.value])[0]
        assert cut.removes([np.nextafter(cut.value, np.inf)])[0]

    def test_integers_lists_and_float32_are_scores_too(self):
        x = np.round(groups(6, (90, 0, 10), (10, 90, 10))).astype(np.int64)
        assert fit_threshold(x).value == fit_threshold(x.tolist()).value == fit_threshold(x.astype(np.float32)).value

    def test_frozen_and_plain(self):
        cut = fit_threshold(groups(7, (20, 0, 1)))
        with pytest.raises(dataclasses.FrozenInstanceError):
            cut.value = 0.0  # pyright: ignore[reportAttributeAccessIssue]
        as_json = json.loads(json.dumps(cut.to_dict(), allow_nan=False))
        assert as_json["value"] == cut.value
        assert as_json["kind"] == cut.kind


class TestSanity:
    @pytest.mark.parametrize("level", [0.0, -3.5, 1e300, 5e-324])
    @pytest.mark.parametrize("n", [1, 9, 200])
    def test_constant_scores_lose_nothing(self, level, n):
        cut = fit_threshold(np.full(n, level))
        assert (cut.kind, cut.value) == ("one_gaussian", level)
        assert not cut.removes(np.full(n, level)).any()
        assert said(cut, "equal")
        json.dumps(cut.to_dict(), allow_nan=False)

    def test_the_rounding_of_float32_is_not_a_second_group(self):
        x = np.full(100, 0.1, np.float32)
        x[::3] = np.nextafter(x[0], np.float32(1))
        assert not fit_threshold(x).removes(x).any()

    @pytest.mark.parametrize("n", range(2, 10))
    def test_few_scores_use_one_gaussian_and_say_so(self, n):
        cut = fit_threshold([0.0] * (n - 1) + [100.0])
        assert cut.kind == "one_gaussian"
        assert said(cut, f"only {n} scores")
        assert math.isnan(cut.log_likelihoods[1])
        assert cut.to_dict()["log_likelihoods"][1] is None

    def test_heavy_tails_lose_only_their_tail_and_are_called_so(self):
        x = np.random.default_rng(8).standard_t(2, 5000)
        cut = fit_threshold(x)
        assert said(cut, "heavy tails")
        assert 0 < cut.removes(x).mean() < 0.05

    def test_a_wide_second_group_is_not_taken_for_tails(self):
        x = groups(18, (240, 3, 16), (69, 75, 70))
        cut = fit_threshold(x)
        assert cut.components[1]["std"] > 0.8 * (cut.components[1]["mean"] - cut.components[0]["mean"])
        assert not said(cut, "heavy tails")

    def test_cauchy_and_one_giant_outlier(self):
        x = np.random.default_rng(9).standard_cauchy(5000)
        assert 0 < fit_threshold(x).removes(x).mean() < 0.05
        x = np.append(groups(9, (99, 0, 1)), 1e6)
        cut = fit_threshold(x)
        assert cut.removes(x).sum() == 1
        assert said(cut, "holds 1 of 100")

    @pytest.mark.parametrize("scale", [1e-310, 1e-300, 1e300, 2e307])
    def test_extreme_magnitudes(self, scale):
        x = scale * np.append(groups(10, (90, 0, 1)), groups(11, (10, 6, 0.5)))
        cut = fit_threshold(x)
        assert math.isfinite(cut.value)
        assert cut.removes(x).sum() == 10

    def test_two_sigma_beyond_the_largest_float_stays_finite(self):
        x = np.finfo(np.float64).max * np.linspace(0.9, 1.0, 9) ** 40
        assert math.isfinite(fit_threshold(x, alpha=1e9).value)

    @pytest.mark.parametrize("shift", [-100, -4, 4, 100])
    def test_where_zero_lies_does_not_matter_to_the_cut(self, shift):
        x = groups(12, (180, -1, 1), (20, 9, 1))
        assert np.array_equal(fit_threshold(x + shift).removes(x + shift), fit_threshold(x).removes(x))

    def test_a_cut_below_zero_is_reported(self):
        assert said(fit_threshold(groups(13, (180, -60, 1), (20, -9, 1))), "below zero: 20 of the removed")
        assert not said(fit_threshold(groups(13, (180, -60, 1), (20, 9, 1))), "below zero")

    def test_smaller_lower_component_is_reported(self):
        x = groups(14, (50, -9, 1), (200, 1, 1))
        cut = fit_threshold(x)
        assert said(cut, "lower component is the smaller one (weight 0.20): 200 of 250 rows")

    def test_overlap_is_reported(self):
        assert said(fit_threshold(np.linspace(0, 1, 1000)), "overlap")

    def test_wide_upper_component_wins_the_far_lower_tail_without_harm(self):
        x = np.append(groups(15, (300, 0, 0.3), (100, 8, 4)), -12.0)
        cut = fit_threshold(x)
        assert said(cut, "lowest scores fit the wide upper component")
        assert not cut.removes([-12.0])[0]

    def test_wide_lower_component_wins_the_far_upper_tail_with_a_warning(self):
        x = groups(16, (2700, 0, 5), (300, 8, 0.5))
        cut = fit_threshold(x)
        assert said(cut, "set the threshold by hand")
        assert cut.value > 8

    def test_one_class_only_loses_about_two_percent(self):
        x = groups(17, (2000, -40, 7))
        cut = fit_threshold(x)
        assert cut.kind == "one_gaussian"
        assert 0.01 < cut.removes(x).mean() < 0.04

    def test_ties_between_equal_solutions_do_not_hang_on_rounding(self):
        x = np.repeat([0.0, 1.0, 2.0], 40)
        assert fit_threshold(x * 0.1).removes(x * 0.1).sum() == fit_threshold(x * 7e5).removes(x * 7e5).sum()


class TestBadInput:
    @pytest.mark.parametrize(
        ("scores", "text"),
        [
            ([], "no scores"),
            ([1.0, math.nan, 2.0, math.inf], r"2 that are not, at position 1 \(nan\), 3 \(inf\)\."),
            ([-math.inf] * 9, r"0 \(-inf\), .*4 \(-inf\), \.\.\."),
            ([[1.0, 2.0]], r"float64 of shape \(1, 2\)"),
            (3.0, r"shape \(\)"),
            (["a", "b"], "real numbers"),
            ([True, False], "bool"),
            ([1j, 2j], "complex128"),
        ],
    )
    def test_refused_by_name(self, scores, text):
        with pytest.raises(InputError, match=text) as error:
            fit_threshold(scores)
        assert "\n" not in str(error.value)

    @pytest.mark.parametrize("alpha", [math.nan, math.inf])
    def test_alpha_must_be_finite(self, alpha):
        with pytest.raises(InputError, match="alpha"):
            fit_threshold([1.0, 2.0], alpha=alpha)

    def test_a_nan_is_never_called_safe(self):
        with pytest.raises(InputError, match="position 1"):
            fit_threshold([1.0, 2.0]).removes([0.0, math.nan])


class TestMixture:
    @pytest.mark.parametrize(
        "x",
        [
            groups(20, (300, 0, 1), (40, 5, 1)),
            groups(21, (300, 0, 1), (40, 2, 3)),
            groups(22, (500, 0, 1)),
            np.random.default_rng(23).standard_t(3, 800),
            np.random.default_rng(24).uniform(size=400),
            groups(25, (200, 0, 1), (50, 8, 1), (10, 30, 1)),
        ],
        ids=["far", "wide", "one", "t3", "uniform", "three"],
    )
    def test_at_least_as_likely_as_scikit_learn_with_many_starts(self, x):
        mixture = pytest.importorskip("sklearn.mixture").GaussianMixture
        z = np.sort((x - x.mean()) / x.std())
        rival = mixture(2, n_init=10, tol=1e-8, max_iter=1000, random_state=0).fit(z[:, None])
        if np.sqrt(rival.covariances_.min()) < MIN_STD:
            pytest.skip("the rival's component is narrower than ours may be")
        assert fit_mixture(z).log_likelihood >= rival.score(z[:, None]) * len(z) - 1e-2

    def test_groups_lose_nothing_that_matters(self):
        z = np.sort(groups(26, (60_000, 0, 1), (500, 6, 0.2)))
        z = (z - z.mean()) / z.std()
        exact = _em(Groups.of(z), fit_mixture(z), MIN_STD, steps=2000, gain=1e-7)
        assert fit_mixture(z).log_likelihood == pytest.approx(exact.log_likelihood, abs=1e-2)

    def test_groups_keep_count_mean_and_variance(self):
        z = np.sort(np.random.default_rng(27).standard_cauchy(50_000))
        g = Groups.of(z).coarser()
        assert g.count.size <= GROUPS
        assert g.count.sum() == z.size
        assert (g.count > 0).all()
        assert g.count @ g.mean == pytest.approx(z.sum(), rel=1e-9)
        assert g.count @ (g.mean**2 + g.spread) == pytest.approx((z**2).sum(), rel=1e-9)

    def test_every_step_of_the_bounded_em_raises_the_likelihood(self):
        z = np.sort(np.append(groups(28, (50, 0, 1)), 9.0))
        z = (z - z.mean()) / z.std()
        g, start = Groups.of(z), (np.arange(z.size) > 40).astype(float)
        trace = [_em(g, start, MIN_STD, steps=k, gain=-math.inf).log_likelihood for k in range(1, 40)]
        assert all(b >= a - 1e-9 for a, b in itertools.pairwise(trace))

    def test_plain_gaussians_are_rarely_called_two_groups(self):
        rng = np.random.default_rng(29)
        for n, at_most in ((20, 0.3), (50, 0.15), (200, 0.05)):
            hits = [fit_threshold(rng.normal(size=n)).kind == "two_gaussians" for _ in range(60)]
            assert np.mean(hits) <= at_most


finite = st.floats(-1e6, 1e6, allow_nan=False, width=32)
score_lists = st.one_of(
    st.lists(finite, min_size=1, max_size=60),
    st.builds(
        lambda seed, n, m, far, wide: groups(seed, (n, 0, 1), (m, far, wide)).tolist(),
        st.integers(0, 10**6),
        st.integers(1, 80),
        st.integers(1, 40),
        st.floats(0, 12),
        st.floats(0.2, 5),
    ),
)


class TestProperties:
    @settings(max_examples=150, deadline=None)
    @given(score_lists)
    def test_finite_and_consistent(self, scores):
        cut = fit_threshold(scores)
        x = np.asarray(scores, dtype=np.float64)
        assert math.isfinite(cut.value)
        assert cut.n == len(scores)
        assert np.array_equal(cut.removes(x), x > cut.value)
        assert not cut.removes([x.min()])[0], "the lowest score is never removed"
        assert sum(part["weight"] for part in cut.components) == pytest.approx(1)
        assert [p["mean"] for p in cut.components] == sorted(p["mean"] for p in cut.components)
        json.dumps(cut.to_dict(), allow_nan=False)

    @settings(max_examples=100, deadline=None)
    @given(score_lists, st.randoms(use_true_random=False))
    def test_order_does_not_matter(self, scores, random):
        other = list(scores)
        random.shuffle(other)
        assert fit_threshold(other) == fit_threshold(scores) or math.isnan(fit_threshold(scores).log_likelihoods[1])
        assert fit_threshold(other).value == fit_threshold(scores).value

    @settings(max_examples=150, deadline=None)
    @given(score_lists, st.floats(1e-3, 1e3), st.floats(-1e3, 1e3))
    def test_shift_and_scale(self, scores, scale, shift):
        x = np.asarray(scores, dtype=np.float64)
        shift *= x.std() * scale
        # Shifting by far more than the spread, or scores that differ by little more than rounding, lose the digits.
        assume(x.std() > 1e-6 * np.abs(x).max())
        cut, moved = fit_threshold(x), fit_threshold(scale * x + shift)
        one, two = cut.log_likelihoods
        assume(math.isnan(two) or abs(two - one - cut.alpha) > 1e-2)  # else rounding may choose the branch
        assert moved.kind == cut.kind
        near = 1e-6 * scale * x.std() + 1e-9 * abs(shift)
        assert moved.value == pytest.approx(scale * cut.value + shift, abs=near)

    @settings(max_examples=50, deadline=None)
    @given(score_lists, st.integers(0, 2**31))
    def test_same_seed_same_bits(self, scores, seed):
        first, second = (fit_threshold(scores, random_state=seed) for _ in range(2))
        assert repr(first) == repr(second)


class TestSeparated:
    def test_two_groups_apart_are_split_as_the_paper_does(self):
        scores = groups(1, (300, 0, 1), (30, 12, 1))
        both = [fit_threshold(scores, rule=rule) for rule in ("paper", "separated")]
        assert both[0].kind == both[1].kind == "two_gaussians"
        assert both[0].value == both[1].value
        assert both[1].to_dict()["rule"] == "separated"

    def test_a_small_group_below_does_not_take_the_rest_away(self):
        scores = groups(2, (30, -12, 1), (300, 0, 1))
        assert fit_threshold(scores).removes(scores).mean() > 0.5
        assert fit_threshold(scores, rule="separated").removes(scores).mean() < 0.02

    def test_heavy_tails_and_skew_are_no_second_group(self):
        rng = np.random.default_rng(3)
        for scores in (rng.standard_t(4, 400), rng.gamma(3.0, size=400)):
            cut = fit_threshold(scores, rule="separated")
            assert cut.kind == "bulk"
            assert cut.removes(scores).mean() < 0.05

    def test_a_clean_normal_corpus_mostly_loses_nothing(self):
        some = np.random.default_rng(5).normal(size=(100, 200))
        gone = [fit_threshold(x, rule="separated").removes(x).any() for x in some]
        assert np.mean(gone) < 0.2  # 0.05 for a known bulk; its width is estimated

    def test_a_few_far_scores_are_found_without_a_second_group(self):
        scores = np.concatenate([groups(6, (300, 0, 1)), [7.0, 8.0, 9.0]])
        gone = fit_threshold(scores, rule="separated").removes(scores)
        assert gone[300:].all()
        assert gone[:300].sum() <= 1

    def test_the_step_up_procedure_itself(self):
        scores = np.sort(np.random.default_rng(7).standard_t(3, 250))
        middle, width = bulk(scores, np.ones(250))
        first = outside(scores, np.ones(250), middle, width)
        p = np.array([0.5 * math.erfc((x - middle) / width / math.sqrt(2)) for x in scores])[::-1]
        passing = np.flatnonzero(p <= FALSE_SHARE * np.arange(1, 251) / 250)
        assert 250 - first == passing[-1] + 1
        assert middle == np.median(scores)

    def test_counts_stand_for_repeats(self):
        scores = np.sort(np.random.default_rng(8).standard_t(2, 120))
        count = (np.arange(120) % 3 + 1).astype(np.float64)
        each = np.repeat(scores, count.astype(int))
        assert bulk(scores, count) == bulk(each, np.ones(each.size))
        first = outside(scores, count, *bulk(scores, count))
        assert scores[first] == each[outside(each, np.ones(each.size), *bulk(scores, count))]

    @pytest.mark.parametrize("scale", [1e-300, 1e-8, 1e300])
    def test_scale_does_not_matter(self, scale):
        scores = np.random.default_rng(9).standard_t(3, 200)
        want = fit_threshold(scores, rule="separated").removes(scores)
        assert want.any()
        assert (fit_threshold(scores * scale, rule="separated").removes(scores * scale) == want).all()

    def test_mostly_equal_scores_are_measured_by_their_deviation(self):
        scores = np.array([0.0] * 60 + [1.0] * 3 + [50.0])
        assert fit_threshold(scores, rule="separated").removes(scores).sum() == 1

    def test_other_rules_are_refused(self):
        with pytest.raises(InputError, match="rule must be one of paper, separated, outliers; got 'otsu'"):
            fit_threshold([1.0, 2.0], rule="otsu")


def test_a_million_scores_take_seconds():
    x = groups(30, (900_000, -1, 1), (100_000, 4, 1))
    start = time.perf_counter()
    cut = fit_threshold(x)
    assert time.perf_counter() - start < 10  # measured: 0.5 s on one core
    assert cut.kind == "two_gaussians"
    assert cut.removes(x).mean() == pytest.approx(0.1, abs=0.002)


def test_importing_does_not_import_torch():
    code = "import sys, gradshield_fast.threshold; sys.exit('torch' in sys.modules or 'sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
