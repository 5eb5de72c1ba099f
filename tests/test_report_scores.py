"""The figure of the benchmarks of a run."""

import numpy as np

from tnl.tools import report_scores
from tnl.tools.report_scores import Series, draw_scores


def test_the_figure_says_what_its_axis_and_bands_are(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(report_scores, "save_figure", lambda figure, path: drawn.append(figure))
    draw_scores({"Copy": Series(np.arange(2.0), np.ones(2), np.full(2, np.nan))}, "a run", tmp_path / "scores.png")
    (figure,) = drawn
    assert figure.get_supxlabel() == "training tokens; bands are standard errors"
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == ["Copy"]
