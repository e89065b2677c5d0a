"use strict";
// Draws every .chart from the JSON beside it, in the colours of the page, and again when these change.
(() => {
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "x", "cross"];
  const MOST_TICKS = 12;
  const BAR_HEIGHT = 30; // pixels, less where there are many bars
  const BARS_HEIGHT = 700; // pixels of all bars of a chart, unless they get thinner than
  const LEAST_BAR_HEIGHT = 8; // pixels
  const LETTER = 9; // pixels of a letter of an axis title, and
  const BESIDE = 150; // of what stands to the left of an axis

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
    if (chart.kind === "scatter") {
      const marker = { color, size: 7, opacity: 0.8, symbol: SYMBOLS[index % SYMBOLS.length] };
      return { ...drawn, type: "scatter", mode: "markers", marker };
    }
    // Dashes and symbols differ too: colour alone does not reach everyone.
    const line = { color, width: 2.5, dash: DASHES[index % DASHES.length] };
    return { ...drawn, type: "scatter", mode: "lines+markers", line, marker: { color, size: 8, symbol: SYMBOLS[index % SYMBOLS.length] } };
  }

  // Plotly cuts off a title that is longer than its axis.
  function folded(text, pixels) {
    const most = Math.max(12, Math.floor(pixels / LETTER));
    return text.split(" ").reduce((lines, word) => {
      const longer = `${lines.at(-1)} ${word}`.trim();
      return longer.length > most ? [...lines, word] : [...lines.slice(0, -1), longer];
    }, [""]).join("<br>");
  }

  function xAxis(chart) {
    const values = [...new Set(chart.series.flatMap((series) => series.x))];
    const words = hasWords(chart);
    const axis = { title: { text: chart.xLabel }, type: words ? "category" : chart.logX ? "log" : "linear" };
    // The sizes that were measured are the ones to read off.
    return !words && chart.kind !== "scatter" && values.length <= MOST_TICKS ? { ...axis, tickvals: values, ticktext: values.map(String) } : axis;
  }

  // The line on which both axes are equal, from the least value to the greatest.
  function diagonal(chart) {
    const values = chart.series.flatMap((series) => [...series.x, ...series.y]).filter((value) => value !== null);
    const ends = [Math.min(...values), Math.max(...values)];
    return { x: ends, y: ends, type: "scatter", mode: "lines", hoverinfo: "skip", showlegend: false, line: { color: colour("--soft"), width: 1, dash: "dot" } };
  }

  function draw(element) {
    const chart = JSON.parse(element.dataset.chart);
    const palette = colour("--series").split(",").map((one) => one.trim());
    const axis = { gridcolor: colour("--line"), linecolor: colour("--soft"), zeroline: false, automargin: true };
    const lying = isLying(chart);
    const along = { ...axis, ...xAxis(chart) };
    const across = lying ? chart.yLabel : chart.xLabel;
    const title = { text: folded(across, element.clientWidth - BESIDE) };
    const up = { ...axis, title: lying ? title : { text: chart.yLabel } };
    if (!lying) along.title = title;
    if (lying) {
      const bars = chart.series.length * chart.series[0].x.length;
      const each = Math.max(LEAST_BAR_HEIGHT, Math.min(BAR_HEIGHT, BARS_HEIGHT / bars));
      element.style.height = `${Math.round(each * bars + 90)}px`;
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
      hovermode: chart.kind === "line" ? "x unified" : "closest",
      hoverlabel: { bgcolor: colour("--paper"), bordercolor: colour("--line"), font: { color: colour("--ink") } },
    };
    const traces = chart.series.map((series, index) => trace(series, index, chart, palette));
    if (chart.kind === "scatter") traces.unshift(diagonal(chart));
    element.dataset.drawn = "";
    return Plotly.react(element, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  // A network may have hundreds of charts: those of its layers are drawn when they come into view.
  const isLater = (element) => element.closest(".parts") !== null && "IntersectionObserver" in window;
  const seen = new IntersectionObserver(
    (entries) =>
      entries.filter((entry) => entry.isIntersecting).forEach((entry) => {
        seen.unobserve(entry.target);
        draw(entry.target);
      }),
    { rootMargin: "400px" },
  );
  const charts = [...document.querySelectorAll(".chart")];
  charts.forEach((element) => (isLater(element) ? seen.observe(element) : draw(element)));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () =>
    charts.filter((element) => "drawn" in element.dataset).forEach(draw),
  );
  const open = () => {
    const part = location.hash.startsWith("#") && document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (part instanceof HTMLDetailsElement) {
      part.open = true;
      part.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  open();
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((each) => (each.open = true));
    charts.filter((element) => !("drawn" in element.dataset)).forEach(draw);
  });
})();
