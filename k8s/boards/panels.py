"""Builders for panels and boards, so that they all look alike. Knows neither metrics nor queries."""

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
"""Folder of the runbooks; the chart replaces it by the address where they are published."""

IMAGES_PER_S = "suffix: img/s"
IMAGES = "suffix: img"

_DATASOURCE = model.DataSourceRef(type_val="prometheus", uid="${datasource}")
_WIDTH, _HEIGHT = 24, 8

Panel = Builder[model.Panel]


class Query(NamedTuple):
    """A PromQL expression, and the name of its series in the legend."""

    expr: str
    legend: str


class Board(NamedTuple):
    """Definition of a board."""

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
    """Draw time series.

    Args:
        title: Title of the panel.
        unit: Unit, by its name in Grafana.
        description: What the panel shows, and what to do about it.
        queries: The series.
        runbook: Name of the alert to link to.
        limit: Value of a dashed line; red above it.
        least: Lower end of the axis; None for automatic.
        most: Upper end of the axis; None for automatic.
        bars: Draw stacked bars, for counts per interval.
        width: Width, in 24ths of the board.
    """
    panel = (
        timeseries.Panel()
        .title(title)
        .unit(unit)
        .description(_with_alert(description, runbook))
        .links(_runbook_links(runbook))
        .datasource(_DATASOURCE)
        .height(_HEIGHT)
        .span(width)
        .fill_opacity(10)
        .show_points(VisibilityMode.AUTO)
        .legend(_table_legend())
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
    """Show the latest value as one number.

    Args:
        title: Title of the panel.
        unit: Unit, by its name in Grafana.
        description: What the panel shows, and what to do about it.
        query: The value.
        runbook: Name of the alert to link to.
        limit: Red at this value and above.
        words: Text and colour by value, shown in place of the value.
        name_only: Show the name of the series in place of its value.
        width: Width, in 24ths of the board.
    """
    panel = (
        stat.Panel()
        .title(title)
        .unit(unit)
        .description(_with_alert(description, runbook))
        .links(_runbook_links(runbook))
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
        mapping = {
            value: model.ValueMappingResult(text=text, color=color, index=index)
            for index, (value, (text, color)) in enumerate(words.items())
        }
        panel.mappings([model.ValueMap(options=mapping)])
    return panel


def buckets(title: str, unit: str, description: str, query: Query, *, width: int = 8) -> Panel:
    """Draw a histogram over time as a heatmap; the query returns the increase of each bucket by `le`."""
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
    """Add a drop-down of a label's values; with `several`, multiple choice with all selected at first."""
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
    """Build a board; it links to the other boards, and its panels to their runbooks."""
    builder = (
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
        builder.with_variable(variable)
    for title, panels in board.rows:
        builder.with_row(build.Row(title))
        for panel in panels:
            builder.with_panel(panel)
    dashboard = builder.build()
    for panel_id, panel_or_row in enumerate(dashboard.panels or [], 1):
        panel_or_row.id_val = panel_id
    return dashboard


def _target(query: Query, name: str = "A") -> prometheus.Dataquery:
    return prometheus.Dataquery().ref_id(name).expr(query.expr).legend_format(query.legend).datasource(_DATASOURCE)


def _table_legend() -> common.VizLegendOptions:
    return (
        common.VizLegendOptions()
        .display_mode(LegendDisplayMode.TABLE)
        .placement(LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs(["lastNotNull", "max"])
    )


def _with_alert(description: str, alert: str) -> str:
    return f"{description} Alert: {alert}." if alert else description


def _runbook_links(alert: str) -> list[Builder[model.DashboardLink]]:
    if not alert:
        return []
    link = build.DashboardLink(f"Runbook: {alert}").type(model.DashboardLinkType.LINK)
    return [link.url(f"{RUNBOOKS}/{alert}.md").target_blank(True)]


def _limits(limit: float | None) -> Builder[model.ThresholdsConfig]:
    steps = [model.Threshold(value=None, color="green")]
    if limit is not None:
        steps.append(model.Threshold(value=limit, color="red"))
    return build.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(steps)
