"use strict";
// Draws every .chart from the JSON beside it, in the colours of the page, and again when these change.
(() => {
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross"];
  const MOST_TICKS = 12;
  const BAR_HEIGHT = 30; // pixels

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const hasWords = (chart) => chart.series.some((series) => series.x.some((value) => typeof value === "string"));
  // Names, such as module paths, are read along lying bars; numbers along standing ones.
  const isLying = (chart) => chart.kind === "bar" && hasWords(chart);

  function trace(series, index, chart, palette) {
    const color = palette[index % palette.length];
    const lying = isLying(chart);
    const drawn = { name: series.name, x: lying ? series.y : series.x, y: lying ? series.x : series.y };
    if (series.low) {
      const away = (ends) => ends.map((end, i) => (end === null || series.y[i] === null ? null : Math.abs(end - series.y[i])));
      drawn[lying ? "error_x" : "error_y"] = { type: "data", symmetric: false, array: away(series.high), arrayminus: away(series.low), color, thickness: 1.2, width: 4 };
    }
    if (chart.kind === "bar") {
      return { ...drawn, type: "bar", orientation: lying ? "h" : "v", marker: { color } };
    }
    // Dashes and symbols differ too: colour alone does not reach everyone.
    const line = { color, width: 2.5, dash: DASHES[index % DASHES.length] };
    return { ...drawn, type: "scatter", mode: "lines+markers", line, marker: { color, size: 8, symbol: SYMBOLS[index % SYMBOLS.length] } };
  }

  function xAxis(chart) {
    const values = [...new Set(chart.series.flatMap((series) => series.x))];
    const words = hasWords(chart);
    const axis = { title: { text: chart.xLabel }, type: words ? "category" : chart.logX ? "log" : "linear" };
    // The sizes that were measured are the ones to read off.
    return !words && values.length <= MOST_TICKS ? { ...axis, tickvals: values, ticktext: values.map(String) } : axis;
  }

  function draw(element) {
    const chart = JSON.parse(element.dataset.chart);
    const palette = colour("--series").split(",").map((one) => one.trim());
    const axis = { gridcolor: colour("--line"), linecolor: colour("--soft"), zeroline: false, automargin: true };
    const lying = isLying(chart);
    const along = { ...axis, ...xAxis(chart) };
    const up = { ...axis, title: { text: chart.yLabel } };
    if (lying) {
      const bars = chart.series.length * chart.series[0].x.length;
      element.style.height = `${BAR_HEIGHT * bars + 90}px`;
    }
    const layout = {
      font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: colour("--ink") },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 10, r: 10, t: 10, b: 10 },
      xaxis: lying ? up : along,
      yaxis: lying ? { ...along, title: undefined, autorange: "reversed" } : up,
      bargap: 0.35,
      showlegend: chart.series.length > 1,
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0 },
      hovermode: chart.kind === "bar" ? "closest" : "x unified",
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    };
    const traces = chart.series.map((series, index) => trace(series, index, chart, palette));
    return Plotly.react(element, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  const drawAll = () => document.querySelectorAll(".chart").forEach(draw);
  drawAll();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => (each.open = true)));
})();
