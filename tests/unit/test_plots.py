"""What the figures contain: data, bands, labels. Not pixels."""

from __future__ import annotations

import inspect

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from helpers.results import made_up_results
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from rich.console import Console

from sae_afa_plugin import plots
from sae_afa_plugin.metrics import summarize
from sae_afa_plugin.report import render_report
from sae_afa_plugin.results import AFAResults
from sae_afa_plugin.tables import results_table

NAMES = ["first", "second", "third"]


def results_of(names=NAMES, n=400, constant=False, seed=0, l0=lambda i, n: np.full(n, 8 * (i + 1))):
    """Made-up tokens: each SAE has norms of its own."""
    random = np.random.default_rng(seed)
    tokens, summary = [], {}
    for i, name in enumerate(names):
        norm_z = (
            np.full(n, 24.0) if constant else 20.0 * (i + 1) * np.exp(0.1 * random.normal(size=n))
        )
        norm_f = norm_z * (0.6 + 0.1 * i + 0.05 * random.random(n))
        table = pd.DataFrame(
            {
                "sae": name,
                "sequence": np.arange(n) // 20,
                "position": np.arange(n) % 20 + 1,
                "token_id": 7,
                "norm_z": norm_z,
                "norm_f": norm_f,
                "norm_z_centered": norm_z,
                "norm_f_centered": norm_f,
                "over_activated": norm_f > norm_z,
                "epsilon_lbo": 1e-5 * (i + 1) * np.exp(random.normal(size=n)),
                "epsilon_lbo_recon": 1e-5,
                "interference": 0.01 * random.normal(size=n),
                "nmse": 0.02 * (i + 1) * np.exp(0.3 * random.normal(size=n)),
                "cosine": 0.9,
                "l2_ratio": 0.95,
                "share_features": (0.6 + 0.1 * i) ** 2,
                "share_interference": 0.9 - (0.6 + 0.1 * i) ** 2,
                "share_unexplained": 0.3,
                "share_shrinkage": -0.2,
                "l0": l0(i, n),
            }
        )
        tokens.append(table)
        summary[name] = {
            "architecture": "topk" if i % 2 == 0 else "topafa",
            "tokens": n,
            **summarize(table),
            "max_abs_cos": 0.3 + 0.1 * i,
            "welch_bound": 0.04,
            "core_ce_loss_score": 0.9 + 0.02 * i,
        }
    return AFAResults(
        pd.DataFrame.from_dict(summary, orient="index"),
        pd.concat(tokens, ignore_index=True),
        pd.DataFrame({"sequence": [0], "position": [0], "token_id": [0], "token": ["a"]}),
    )


def tokens_of(results, name):
    return results.tokens[results.tokens["sae"] == name]


def slope(line):
    x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
    return float(y[-1] / x[-1])


# --- ||z|| against ||f|| ---


def test_dots_are_the_norms_of_the_tokens():
    results = results_of()
    (ax,) = plots.zf_plot(results).axes
    for name, cloud in zip(NAMES, ax.collections, strict=True):
        rows = tokens_of(results, name)
        np.testing.assert_allclose(cloud.get_offsets(), rows[["norm_z", "norm_f"]].to_numpy())
        assert to_hex(cloud.get_facecolor()[0]) == plots.colours(NAMES)[name].lower()
    assert [text.get_text() for text in ax.artists[0].get_texts()] == NAMES
    assert "‖z‖" in ax.get_xlabel()
    assert "‖f‖" in ax.get_ylabel()


def test_the_diagonal_and_the_bands_of_the_definition():
    (ax,) = plots.zf_plot(results_of()).axes
    expected = [1.0]
    for e in (0.25, 0.5):
        expected += [np.sqrt(1 / (1 + e)), np.sqrt(1 / (1 - e))]
    expected.append(np.sqrt(1 / 2))  # e = 1 has no upper edge
    assert [slope(line) for line in ax.lines] == pytest.approx(expected)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "‖f‖ = ‖z‖", "e = 0.25", "e = 0.5", "e = 1 (no upper edge)",
    ]  # fmt: skip
    styles = [line.get_linestyle() + str(line._dash_pattern) for line in ax.lines]
    assert len(set(styles)) == 4  # each band is told apart without colour


def test_many_tokens_become_densities_that_count_them_all():
    results = results_of()
    (ax,) = plots.zf_plot(results, dots_up_to=100).axes
    meshes = ax.collections
    assert len(meshes) == 3
    for name, mesh in zip(NAMES, meshes, strict=True):
        shades = mesh.get_array()  # root of the share of the fullest cell
        counts = np.ma.filled(shades, 0.0) ** 2
        fullest = 1 / counts[counts > 0].min()  # the emptiest cell has one token
        assert round(float(counts.sum() * fullest)) == len(tokens_of(results, name))


def test_wide_ranges_are_drawn_on_logarithmic_axes():
    results = results_of()
    results.tokens.loc[results.tokens["sae"] == "third", ["norm_z", "norm_f"]] *= 30
    (ax,) = plots.zf_plot(results).axes
    assert ax.get_xscale() == ax.get_yscale() == "log"
    (ax,) = plots.zf_plot(results_of()).axes
    assert ax.get_xscale() == ax.get_yscale() == "linear"


def test_a_few_outliers_do_not_squeeze_the_rest():
    results = results_of(n=4000)
    results.tokens.loc[0, "norm_f"] = 1e6
    (ax,) = plots.zf_plot(results).axes
    assert ax.get_ylim()[1] < 200


def test_equal_norms_stand_in_lanes_with_the_bands_at_their_heights():
    results = results_of(constant=True)
    (ax,) = plots.zf_plot(results).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == NAMES
    assert "same for every token" in ax.get_title(loc="left")
    heights = {
        round(float(line.get_ydata()[0]), 6) for line in ax.lines if len(set(line.get_ydata())) == 1
    }
    for ratio in (1, np.sqrt(1 / 1.25), np.sqrt(1 / 0.75), np.sqrt(0.5)):
        assert round(24 * ratio, 6) in heights
    for lane, (name, body) in enumerate(zip(NAMES, ax.collections, strict=True)):
        x, y = body.get_paths()[0].vertices.T
        assert abs(x.mean() - lane) < 0.1
        assert tokens_of(results, name)["norm_f"].between(y.min() - 0.2, y.max() + 0.2).all()


# --- distributions ---


def test_half_violins_of_nmse_to_the_left_and_epsilon_to_the_right():
    results = results_of()
    left, right = plots.violin_plot(results).axes
    for ax, column, side in ((left, "nmse", -1), (right, "epsilon_lbo", 1)):
        for at, (name, body) in enumerate(zip(NAMES, ax.collections, strict=True)):
            x, y = body.get_paths()[0].vertices.T
            assert (side * (x - at) >= -1e-9).all()
            values = np.log10(tokens_of(results, name)[column])
            assert y.min() <= values.min() + 0.1
            assert y.max() >= values.max() - 0.1
        medians = [line.get_ydata()[0] for line in ax.lines]
        expected = [np.log10(tokens_of(results, name)[column].median()) for name in NAMES]
        assert medians == pytest.approx(expected, abs=0.02)
        marked = {text.get_text(): round(text.xy[0] - 0.22 * side) for text in ax.texts}
        assert marked == {"best": 0, "worst": 2}
    assert "NMSE" in left.get_ylabel()
    assert "ε LBO" in right.get_ylabel()


def test_axes_of_logarithms_are_labelled_with_the_quantity():
    left, _ = plots.violin_plot(results_of()).axes
    figure = left.get_figure()
    figure.draw_without_rendering()
    low, high = left.get_ylim()
    shown = [
        (tick, label.get_text())
        for tick, label in zip(left.get_yticks(), left.get_yticklabels(), strict=True)
        if low <= tick <= high
    ]
    assert shown
    for tick, text in shown:
        assert float(text.replace(",", "")) == pytest.approx(10**tick, rel=0.01)


def test_active_features_over_tokens_by_norm_and_by_position():
    random = np.random.default_rng(1)
    results = results_of(l0=lambda i, n: random.integers(5, 50, n) * (i + 1))
    over, by_norm, by_position = plots.l0_plot(results).axes
    for at, name in enumerate(NAMES):
        rows = tokens_of(results, name)
        assert over.lines[at].get_ydata()[0] == pytest.approx(
            np.log10(rows["l0"].median()), abs=0.02
        )
        line = by_position.lines[at]
        expected = rows.groupby("position")["l0"].median()
        np.testing.assert_array_equal(line.get_xdata(), expected.index)
        np.testing.assert_allclose(10 ** np.asarray(line.get_ydata()), expected, rtol=0.1)
        assert len(by_norm.lines[at].get_xdata()) == 20
    assert "‖z‖" in by_norm.get_xlabel()
    assert "position" in by_position.get_xlabel()


def test_what_cannot_be_drawn_is_said_in_the_figure():
    results = results_of(constant=True)
    results.tokens["position"] = 127
    _, by_norm, by_position = plots.l0_plot(results).axes
    assert by_norm.texts[0].get_text() == "‖z‖ is the same\nfor every token"
    assert by_position.texts[0].get_text() == "only one position\nwas evaluated"


def test_interference_between_the_coherence_and_its_bound():
    results = results_of()
    (ax,) = plots.coherence_plot(results).axes
    figure = ax.get_figure()
    figure.draw_without_rendering()
    ticks = dict(zip(ax.get_yticks(), [t.get_text() for t in ax.get_yticklabels()], strict=True))
    assert "0" in ticks.values()
    # the axis is an arsinh: two labelled ticks give its unit
    (tick, label) = next((t, text) for t, text in ticks.items() if text == "0.1")
    unit = next(
        u for u in 10.0 ** np.arange(-6, 1) if abs(np.arcsinh(float(label) / u) - tick) < 1e-6
    )
    drawn = [
        round(float(unit * np.sinh(segment[0, 1])), 6)
        for lines in ax.collections[3:]
        for segment in lines.get_segments()
    ]
    expected = []
    for mu in results.summary["max_abs_cos"]:
        expected += [-mu, mu, 0.04]
    assert drawn == pytest.approx(expected, abs=1e-6)
    for body, name in zip(ax.collections[:3], NAMES, strict=True):
        y = unit * np.sinh(body.get_paths()[0].vertices[:, 1])
        values = tokens_of(results, name)["interference"]
        assert y.min() <= np.quantile(values, 0.01)
        assert y.max() >= np.quantile(values, 0.99)


def test_undefined_values_are_left_out():
    results = results_of()
    results.tokens.loc[results.tokens["sae"] == "second", "interference"] = np.nan
    results.tokens.loc[:50, "nmse"] = np.nan
    plots.coherence_plot(results)
    plots.violin_plot(results)


# --- several architectures ---


def frontier(**columns):
    return pd.DataFrame(
        {
            "architecture": ["topk", "topk", "topk", "topafa"],
            "l0_mean": [64.0, 32.0, 34.0, 100.0],
            "nmse_mean": [0.05, 0.10, 0.12, 0.06],
            "group": ["k64", "k32", "k32", "afa"],
            **columns,
        },
        index=["a", "b", "c", "d"],
    )


def test_seeds_of_one_setting_are_one_point_with_error_bars():
    (ax,) = plots.frontier_plot(frontier()).axes
    containers = {container.get_label(): container for container in ax.containers}
    line, _, bars = containers["topk"]
    np.testing.assert_allclose(line.get_xdata(orig=False), [33, 64])
    np.testing.assert_allclose(line.get_ydata(orig=False), [0.11, 0.05])
    (low, high) = bars[1].get_segments()[0][:, 1]
    assert high - low == pytest.approx(2 * np.std([0.10, 0.12], ddof=1))
    assert containers["topafa"][0].get_xdata(orig=False).tolist() == [100]
    assert ax.get_xscale() == ax.get_yscale() == "log"


def test_the_best_point_is_marked():
    (ax,) = plots.frontier_plot(frontier()).axes
    (best,) = [text for text in ax.texts if text.get_text() == "best"]
    assert best.xy == (64, 0.05)


def test_cross_entropy_instead_of_nmse():
    table = frontier(core_ce_loss_score=[0.98, 0.9, 0.9, 0.99])
    (ax,) = plots.frontier_plot(table, ce_recovered=True).axes
    (best,) = [text for text in ax.texts if text.get_text() == "best"]
    assert best.xy == pytest.approx((100, 0.01))
    assert ax.get_ylabel() == "1 - CE recovered"


def test_any_other_column_is_drawn_as_it_is_and_none_of_it_is_best():
    table = frontier(f1=[0.2, 0.4, 0.6, 0.9])
    (ax,) = plots.frontier_plot(table, column="f1", legend=False).axes
    containers = {container.get_label(): container for container in ax.containers}
    np.testing.assert_allclose(containers["topk"][0].get_ydata(orig=False), [0.5, 0.2])
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_ylabel()) == ("log", "linear", "f1")
    assert not ax.texts
    assert ax.get_legend() is None


def test_axes_can_share_their_looks():
    looks = {"topafa": ("#123456", "s"), "topk": ("#654321", "o")}
    (ax,) = plots.frontier_plot(frontier(), looks=looks, best=False).axes
    found = {c.get_label(): (c[0].get_color(), c[0].get_marker()) for c in ax.containers}
    assert found == looks
    assert not ax.texts


def test_how_an_sae_was_trained_goes_before_what_it_was_saved_as():
    table = frontier(trained_as=["topk", "batchtopk", "batchtopk", "topafa"])
    (ax,) = plots.frontier_plot(table).axes
    assert sorted(c.get_label() for c in ax.containers) == ["batchtopk", "topafa", "topk"]


def test_a_column_that_is_missing_is_named():
    with pytest.raises(ValueError, match="no column core_ce_loss_score: evaluate with core=True"):
        plots.frontier_plot(frontier(), ce_recovered=True)
    with pytest.raises(ValueError, match="the table has no column l0_mean"):
        plots.frontier_plot(frontier().drop(columns="l0_mean"))
    results = results_of()
    results.summary = results.summary.drop(columns="max_abs_cos")
    with pytest.raises(ValueError, match="no coherence: evaluate with coherence=True"):
        plots.coherence_plot(results)


def test_the_energy_budget_is_stacked_up_to_one():
    results = results_of()
    (ax,) = plots.energy_plot(results).axes
    shares = ("share_features", "share_interference", "share_unexplained", "share_shrinkage")
    for share, bars in zip(shares, ax.containers, strict=True):
        widths = [bar.get_width() for bar in bars]
        np.testing.assert_allclose(widths, results.summary[f"{share}_mean"])
    for sae in range(3):
        bars = [container[sae] for container in ax.containers]
        spans = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for bar in bars)
        spans = [tuple(sorted(span)) for span in spans]
        # what adds stands to the right of zero without a gap, what takes away to the left
        assert min(span[0] for span in spans) == pytest.approx(-0.2)
        assert max(span[1] for span in spans) == pytest.approx(1.2)
        covered = sum(end - start for start, end in spans)
        assert covered == pytest.approx(1.4)
    assert [text.get_text() for text in ax.get_yticklabels()] == NAMES
    assert [line.get_xdata()[0] for line in ax.lines] == [1, 0]
    results.summary = results.summary.drop(columns="share_features_mean")
    assert "energy" not in plots.drawable(results)
    with pytest.raises(ValueError, match="have no energy budget"):
        plots.energy_plot(results)


@pytest.mark.filterwarnings("error::UserWarning", "ignore::DeprecationWarning")
def test_no_figure_or_table_grows_with_a_name(tmp_path):
    from_names = {"short": ["one", "two", "three"], "long": [letter * 3000 for letter in "abc"]}
    pixels: dict[str, dict[str, int]] = {}
    for length, names in from_names.items():
        results = made_up_results(names, 60)
        pixels[length] = {}
        for name, draw in plots.drawable(results).items():
            file = tmp_path / f"{length} {name}.png"
            draw(results).savefig(file, dpi=100, bbox_inches="tight")
            height, width = matplotlib.image.imread(file).shape[:2]
            pixels[length][name] = height * width
        table = results_table(results, width=100)
        assert Console(width=10_000).measure(table).maximum < 300
    assert len(pixels["long"]) == 6
    assert all(pixels["long"][name] < 4 * pixels["short"][name] for name in pixels["long"])


@pytest.mark.filterwarnings("error")
def test_long_names_leave_room_for_the_bars(tmp_path):
    results = results_of(["short", "l" * 400, "two\nlines $x$"])
    figure = plots.energy_plot(results)
    figure.savefig(tmp_path / "energy.png")
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == ["short", "l" * 18 + "…" + "l" * 18, r"two lines \$x\$"]


def test_lines_of_the_frontier_join_no_different_hooks():
    table = frontier()
    table["hook_name"] = ["blocks.1", "blocks.2"] * (len(table) // 2)
    (ax,) = plots.frontier_plot(table).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == ["topafa, blocks.2", "topk, blocks.1", "topk, blocks.2"]
    assert not [text for text in ax.texts if text.get_text() == "best"]  # of what?


def test_an_architecture_without_values_has_no_line():
    table = frontier()
    kind = table["architecture"].iloc[0]
    table.loc[table["architecture"] == kind, "nmse_mean"] = np.nan
    (ax,) = plots.frontier_plot(table).axes
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert labels == sorted(set(table["architecture"]) - {kind})
    table["nmse_mean"] = np.nan
    with pytest.raises(ValueError, match="no SAE has both l0_mean and nmse_mean: there is nothing"):
        plots.frontier_plot(table)


def test_figures_keep_their_signatures():
    parameters = inspect.signature(plots.zf_plot).parameters
    assert list(parameters) == ["results", "ax", "dots_up_to"]
    assert parameters["dots_up_to"].default == 20_000


def test_a_new_picture_is_drawn_wherever_the_others_are(monkeypatch, tmp_path):
    monkeypatch.setattr(plots.style, "PICTURES", dict(plots.PICTURES))
    monkeypatch.setattr(plots, "PICTURES", plots.style.PICTURES)

    @plots.picture("mine", title="Mine", text="Read it so.", place=99)
    def my_plot(results, ax=None):
        """One line."""
        figure = Figure()
        figure.subplots().plot(results.summary["nmse_mean"])
        return figure

    assert {file.name for file in plots.save_plots(results_of(), tmp_path)} > {"mine.png"}
    page = render_report(results_of())
    assert page.index("<h2>Error against sparsity</h2>") < page.index("<h2>Mine</h2>")


# --- all of them ---


@pytest.mark.parametrize("draw", [one.draw for one in plots.PICTURES.values()], ids=plots.PICTURES)
def test_drawing_into_given_axes(draw):
    figure = Figure()
    axes = figure.subplots(1, 3)
    given = list(axes) if draw is plots.l0_plot else axes[1]
    assert draw(results_of(), ax=given) is figure
    assert axes[1].has_data()


def test_l0_needs_three_axes():
    with pytest.raises(ValueError, match="l0_plot draws into three axes: got 2"):
        plots.l0_plot(results_of(), ax=list(Figure().subplots(1, 2)))


def test_several_results_side_by_side():
    one, other = results_of(["a", "b"]), results_of(["b", "c"], seed=1)
    both = plots.merged([one, other])
    assert list(both.summary.index) == ["a", "1: b", "2: b", "c"]
    assert len(both.tokens) == 1600
    np.testing.assert_array_equal(
        tokens_of(both, "2: b")["norm_f"], tokens_of(other, "b")["norm_f"]
    )
    (ax,) = plots.zf_plot([one, other]).axes
    assert [text.get_text() for text in ax.artists[0].get_texts()] == list(both.summary.index)
    with pytest.raises(ValueError, match="there are no results to draw"):
        plots.merged([])


def test_dollars_in_a_name_are_no_mathematics(tmp_path):
    results = results_of(["a$x_{$", "b"])
    plots.save_plots(results, tmp_path)
    (ax,) = plots.coherence_plot(results).axes
    assert [label.get_text() for label in ax.get_xticklabels()] == [r"a\$x_{\$", "b"]


def test_colours_of_few_and_of_many():
    assert len(set(plots.colours([str(i) for i in range(7)]).values())) == 7
    many = plots.colours([str(i) for i in range(13)])
    assert len(set(many.values())) == 13

    def brightness(colour):
        return sum(int(colour[i : i + 2], 16) for i in (1, 3, 5))

    shades = [brightness(colour) for colour in many.values()]
    assert shades[0] < shades[6] < shades[12]  # layers keep their order in print


@pytest.mark.filterwarnings(
    "error",
    # Matplotlib below 3.10.7 calls pyparsing by its old names
    "ignore:.*deprecated(,| -) use:DeprecationWarning",
)
def test_one_sae_alone_and_every_figure_in_both_formats(tmp_path):
    written = plots.save_plots(results_of(["only"]), tmp_path / "figures")
    assert sorted(path.name for path in written) == sorted(
        f"{name}.{kind}"
        for name in ("zf", "energy", "violin", "l0", "coherence")
        for kind in ("png", "pdf")
    )
    for path in written:
        start = path.read_bytes()[:5]
        assert start == (b"%PDF-" if path.suffix == ".pdf" else b"\x89PNG\r")
    assert sum(path.stat().st_size for path in written) < 2_000_000


@pytest.mark.filterwarnings("error:An artist whose label")
def test_names_that_begin_with_an_underscore_are_in_the_legend():
    names = ["_first", "__", "third"]
    results = made_up_results(names, 60)
    for picture in ("zf", "l0"):
        figure = plots.drawable(results)[picture](results)
        shown = [text.get_text() for one in figure.findobj(Legend) for text in one.get_texts()]
        assert set(names) <= set(shown), picture


def test_the_figure_has_room_for_the_names_beside_it():
    results = made_up_results(["first", "the id of an SAE that is as long as many are, 48"], 60)
    for picture in ("zf", "l0"):
        figure = plots.drawable(results)[picture](results)
        figure.draw_without_rendering()
        for one in figure.findobj(Legend):
            assert one.get_window_extent().x1 <= figure.bbox.x1 + 1, picture
