"""Sums travel, means are made once."""

import pytest
import torch

from megatron_fec.metrics import HISTOGRAM_BINS, MetricSums


def pair(total: float, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(total), torch.tensor(count)


def example(shift: float = 0.0) -> MetricSums:
    return MetricSums.of(
        {"a": pair(3.0 + shift, 2), "b": pair(-1.0, 4)},
        {"eps": torch.tensor([0.2, 0.2, 0.3 + shift])},
    )


def test_means_by_hand() -> None:
    means = example().means()
    assert means["a"] == 1.5 and means["b"] == -0.25
    assert list(means) == ["a", "b", "eps_p10", "eps_p50", "eps_p90"]


def test_a_sum_is_divided_once() -> None:
    # the mean of the two means would be (1.5 + 10) / 2
    whole = example() + MetricSums.of({"a": pair(10.0, 1), "b": pair(0.0, 0)}, {"eps": torch.tensor([0.9])})
    assert whole.means()["a"] == pytest.approx(13 / 3)
    assert whole.means()["b"] == -0.25
    assert whole.histograms.sum() == 4


def test_nothing_counted_is_zero() -> None:
    empty = MetricSums.of({"a": pair(0.0, 0)}, {"eps": torch.zeros(0)})
    assert empty.means() == {"a": 0.0, "eps_p10": 0.0, "eps_p50": 0.0, "eps_p90": 0.0}


def test_quantiles_are_known_to_a_bin() -> None:
    values = torch.arange(100) / 100 + 0.001  # 0.001, 0.011, ..., 0.991
    means = MetricSums.of({"a": pair(0.0, 1)}, {"x": values}).means()
    for name, quantile in (("x_p10", 0.091), ("x_p50", 0.491), ("x_p90", 0.891)):
        assert means[name] == pytest.approx(quantile, abs=1 / HISTOGRAM_BINS)


def test_quantiles_of_a_constant_and_of_the_last_bin() -> None:
    means = MetricSums.of({"a": pair(0.0, 1)}, {"x": torch.full((5,), 0.2), "y": torch.ones(3)}).means()
    assert means["x_p10"] == means["x_p90"] == pytest.approx(0.2, abs=1 / HISTOGRAM_BINS)
    assert means["y_p50"] == pytest.approx(1.0, abs=1 / HISTOGRAM_BINS)


def test_flat_and_back() -> None:
    sums = example()
    assert sums.flat().dtype == torch.float64 and sums.flat().shape == (4 + HISTOGRAM_BINS,)
    doubled = sums.replaced(sums.flat() * 2)
    assert doubled.names == sums.names and doubled.histogram_names == sums.histogram_names
    assert torch.equal(doubled.sums, sums.sums * 2) and torch.equal(doubled.histograms, sums.histograms * 2)
    assert doubled.means() == sums.means()


def test_without_histograms() -> None:
    sums = MetricSums.of({"a": pair(0.5, 1)})
    assert sums.histograms.shape == (0, HISTOGRAM_BINS) and sums.means() == (sums + sums).means() == {
        "a": 0.5
    }


def test_sums_are_detached_and_exact() -> None:
    total = torch.tensor(1.0, requires_grad=True)
    big = 2**24 + 1  # not a float32
    sums = MetricSums.of({"a": (total, torch.tensor(big))})
    assert not sums.sums.requires_grad and sums.sums[0, 1] == big


def test_other_names_do_not_add() -> None:
    with pytest.raises(AssertionError):
        _ = example() + MetricSums.of({"a": pair(1.0, 1), "c": pair(1.0, 1)}, {"eps": torch.zeros(1)})
    with pytest.raises(AssertionError):
        _ = example() + MetricSums.of({"a": pair(1.0, 1), "b": pair(1.0, 1)}, {"other": torch.zeros(1)})


def test_with_pair_puts_one_more_in_front() -> None:
    loss = torch.tensor(6.0, requires_grad=True)
    sums = example().with_pair("loss", (loss, torch.tensor(4)))
    assert sums.names == ("loss", "a", "b") and not sums.sums.requires_grad
    assert list(sums.means().items())[:3] == [("loss", 1.5), ("a", 1.5), ("b", -0.25)]
    assert torch.equal(sums.histograms, example().histograms)
