"""How all our panels and boards look: one manner for every number. Knows neither metrics nor queries."""

import string
from collections.abc import Sequence
from typing import NamedTuple

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.builder import Builder
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    BigValueTextMode,
    GraphDrawStyle,
    GraphThresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.heatmap import HeatmapColorMode
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

RUNBOOKS = "docs/runbooks"
"""Where runbooks are; the chart puts the address in its place at which they are published."""

IMAGES_PER_S = "suffix: img/s"
IMAGES = "suffix: img"

_DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT = 24, 8

Panel = Builder[model.Panel]


class Query(NamedTuple):
    """What a panel asks, and what the line is called."""

    expr: str
    legend: str


class Board(NamedTuple):
    """A board before it is written."""

    uid: str
    title: str
    description: str
    variables: Sequence[Builder[model.VariableModel]]
    rows: Sequence[tuple[str, Sequence[Panel]]]


def lines(
    title: str,
    unit: str,
    description: str,
    *queries: Query,
    runbook: str = "",
    limit: float | None = None,
    least: float | None = 0,
    most: float | None = None,
    bars: bool = False,
    width: int = 8,
) -> Panel:
    """Draw numbers over time.

    Args:
        title: What is seen.
        unit: As Grafana calls it.
        description: What it means, and what to do about it.
        queries: What is drawn.
        runbook: The alert that goes with it.
        limit: Where its line is; above it is red.
        least: The scale's beginning, where there is one.
        most: The scale's end, where there is one.
        bars: Draw counts of an interval, one upon the other.
        width: In 24ths of the board's.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .unit(unit)
        .description(_told(description, runbook))
        .links(_runbook(runbook))
        .datasource(_DATASOURCE)
        .height(_HEIGHT)
        .span(width)
        .fill_opacity(10)
        .show_points(VisibilityMode.AUTO)
        .legend(
            common.VizLegendOptions()
            .display_mode(LegendDisplayMode.TABLE)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
            .calcs(["lastNotNull", "max"])
        )
        .tooltip(common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI))
    )
    if least is not None:
        panel.min(least)
    if most is not None:
        panel.max(most)
    if bars:
        panel.draw_style(GraphDrawStyle.BARS).fill_opacity(60).stacking(
            common.StackingConfig().mode(StackingMode.NORMAL).group("A")
        )
    if limit is not None:
        panel.thresholds(_limits(limit)).thresholds_style(
            common.GraphThresholdsStyleConfig().mode(GraphThresholdsStyleMode.DASHED)
        )
    for name, query in zip(string.ascii_uppercase, queries, strict=False):
        panel.with_target(_target(query, name).range())
    return panel


def number(
    title: str,
    unit: str,
    description: str,
    query: Query,
    *,
    runbook: str = "",
    limit: float | None = None,
    words: dict[str, tuple[str, str]] | None = None,
    name_only: bool = False,
    width: int = 4,
) -> Panel:
    """Show how it is now, in one number.

    Args:
        title: What is seen.
        unit: As Grafana calls it.
        description: What it means, and what to do about it.
        query: What is shown.
        runbook: The alert that goes with it.
        limit: From it on it is red.
        words: Text and colour for some values.
        name_only: Show the line's name and not its value.
        width: In 24ths of the board's.
    """
    panel = (
        stat.Panel()
        .title(title)
        .unit(unit)
        .description(_told(description, runbook))
        .links(_runbook(runbook))
        .datasource(_DATASOURCE)
        .height(4)
        .span(width)
        .color_mode(BigValueColorMode.BACKGROUND if limit is not None or words else BigValueColorMode.VALUE)
        .graph_mode(BigValueGraphMode.NONE)
        .text_mode(BigValueTextMode.NAME if name_only else BigValueTextMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_limits(limit))
        .with_target(_target(query).instant())
    )
    if words:
        results = {
            value: model.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, (text, color)) in enumerate(words.items())
        }
        panel.mappings([model.ValueMap(options=results)])
    return panel


def buckets(title: str, unit: str, description: str, query: Query, *, width: int = 8) -> Panel:
    """Show how many values each bucket of a histogram took, over time: the query gives increases by `le`."""
    return (
        heatmap.Panel()
        .title(title)
        .description(description)
        .datasource(_DATASOURCE)
        .height(_HEIGHT)
        .span(width)
        .unit(unit)
        .calculate(False)
        .color(heatmap.HeatmapColorOptions().mode(HeatmapColorMode.SCHEME).scheme("Blues").steps(32))
        .y_axis(heatmap.YAxisConfig().unit("none"))
        .cell_values(heatmap.CellValues().unit(unit))
        .show_legend()
        .with_target(_target(query).range().format(PromQueryFormat.HEATMAP))
    )


def choice(name: str, label: str, query: str, *, several: bool) -> Builder[model.VariableModel]:
    """Let the reader choose a label's value; with several, all are chosen at first."""
    variable = (
        build.QueryVariable(name)
        .label(label)
        .datasource(_DATASOURCE)
        .query({"query": query, "refId": name})
        .refresh(model.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(model.VariableSort.ALPHABETICAL_ASC)
        .multi(several)
        .include_all(several)
    )
    if several:
        variable.all_value(".*").current(model.VariableOption(selected=True, text=["All"], value=["$__all"]))
    return variable


def write(board: Board) -> model.Dashboard:
    """Put a board together; its panels have links to the runbooks, and the board to the others."""
    built = (
        build.Dashboard(board.title)
        .uid(board.uid)
        .description(board.description)
        .tags(["flawstream"])
        .time("now-3h", "now")
        .refresh("30s")
        .tooltip(model.DashboardCursorSync.CROSSHAIR)
        .readonly()
        .with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .link(
            build.DashboardLink("flawstream")
            .type(model.DashboardLinkType.DASHBOARDS)
            .tags(["flawstream"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
    )
    for variable in board.variables:
        built.with_variable(variable)
    for title, panels in board.rows:
        built.with_row(build.Row(title))
        for panel in panels:
            built.with_panel(panel)
    whole = built.build()
    for number_of_panel, panel_or_row in enumerate(whole.panels or [], 1):
        panel_or_row.id_val = number_of_panel
    return whole


def _target(query: Query, name: str = "A") -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(name).expr(query.expr).legend_format(query.legend).datasource(_DATASOURCE)


def _told(description: str, runbook: str) -> str:
    return f"{description} Alert: {runbook}." if runbook else description


def _runbook(alert: str) -> list[Builder[model.DashboardLink]]:
    if not alert:
        return []
    link = build.DashboardLink(f"Runbook: {alert}").type(model.DashboardLinkType.LINK)
    return [link.url(f"{RUNBOOKS}/{alert}.md").target_blank(True)]


def _limits(limit: float | None) -> Builder[model.ThresholdsConfig]:
    steps = [model.Threshold(value=None, color="green")]
    if limit is not None:
        steps.append(model.Threshold(value=limit, color="red"))
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
