// Draws the charts of a page from JSON, and draws them again when the page's live part says that there is more.
//
// A chart is <div class="chart" data-chart="KIND" data-url="...">; the live part carries data-charts, a word that
// changes when the data did. Text goes onto a canvas, never into markup. A fetch that fails is tried again with the
// next change, and at the latest after ten seconds.

const { echarts } = window;
const drawn = new Map(); // element -> { chart, version, data, at }
const RETRY_MS = 10_000;

const SHAPES = {
  complete: ["circle", "--complete", 8],
  infeasible: ["triangle", "--infeasible", 9],
  pruned: ["diamond", "--pruned", 10],
  failed: ["path://M1 0 5 4 9 0 10 1 6 5 10 9 9 10 5 6 1 10 0 9 4 5 0 1z", "--failed", 9],
};

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

function format(value, percent) {
  if (value === null || value === undefined) return "–";
  if (percent) return `${(100 * value).toFixed(1)}%`;
  const size = Math.abs(value);
  return size && (size < 0.1 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

function axis(extra) {
  return {
    nameTextStyle: { color: color("--faint") },
    axisLabel: { color: color("--faint"), ...extra.axisLabel },
    axisLine: { lineStyle: { color: color("--rule") } },
    splitLine: { show: extra.grid ?? false, lineStyle: { color: color("--line") } },
    ...extra.options,
  };
}

function base(data, { tooltip, x, y, second }) {
  return {
    animation: false,
    textStyle: { fontFamily: getComputedStyle(document.body).fontFamily },
    grid: { left: 12, right: second ? 30 : 24, top: 46, bottom: 30, containLabel: true },
    legend: { top: 10, left: 16, right: 16, type: "scroll", itemWidth: 16, itemHeight: 9, itemGap: 14, textStyle: { color: color("--ink") }, pageTextStyle: { color: color("--faint") }, pageIconColor: color("--ink"), pageIconInactiveColor: color("--line") },
    tooltip: {
      renderMode: "richText", // HTML tooltips need inline styles
      confine: true,
      backgroundColor: color("--card"),
      borderColor: color("--rule"),
      textStyle: { color: color("--ink"), fontSize: 13 },
      ...tooltip,
    },
    xAxis: axis({ options: { type: "value", minInterval: 1, ...x } }),
    yAxis: second ? [y, second] : y,
  };
}

function valueAxis(data, values, extra = {}) {
  const known = values.filter((value) => value !== null);
  const top = Math.max(...known, data.chance ?? 0);
  const range = data.percent ? { min: 0, max: Math.min(1, Math.ceil((top + 0.02) * 10) / 10) } : { scale: true };
  return axis({
    grid: true,
    axisLabel: { formatter: (value) => (data.percent ? `${Math.round(100 * value)}%` : format(value, false)) },
    options: { type: "value", name: extra.name, nameLocation: "end", nameTextStyle: { align: "left", color: color("--faint") }, ...range },
  });
}

function guide(name, value, data) {
  return {
    yAxis: value,
    label: { formatter: `${name} ${format(value, data.percent)}`, position: "insideEndTop", color: color("--faint") },
    lineStyle: { color: color("--faint"), type: "dashed", width: 1 },
  };
}

function guides(data) {
  const lines = [];
  if (data.chance !== null && data.chance !== undefined) lines.push(guide("chance", data.chance, data));
  if (data.target !== null && data.target !== undefined) lines.push(guide("target", data.target, data));
  return { silent: true, symbol: "none", animation: false, data: lines };
}

function progress(data) {
  const known = data.value.filter((value) => value !== null);
  const lowest = known.length ? Math.min(...known, ...data.best.filter((value) => value !== null)) : 0;
  const floor = data.percent ? 0 : lowest; // where trials without a value stand
  const series = Object.entries(SHAPES).map(([state, [symbol, ink, size]]) => ({
    name: state,
    type: "scatter",
    symbol,
    symbolSize: data.trial.length > 400 ? size / 2 : size,
    itemStyle: { color: color(ink), opacity: 0.85 },
    data: data.state.flatMap((each, i) => (each === state ? [[i + 1, data.value[i] ?? floor, i]] : [])),
  })).filter((each) => each.data.length);
  series.push({
    name: "best so far",
    type: "line",
    step: "end",
    symbol: "none",
    z: 1,
    lineStyle: { color: color("--best"), width: 2.5 },
    itemStyle: { color: color("--best") },
    data: data.best.map((value, i) => [i + 1, value]),
    markLine: guides(data),
  });
  return {
    ...base(data, {
      tooltip: {
        trigger: "item",
        formatter: ({ value }) => {
          const i = value[2];
          if (i === undefined) return "";
          const result = data.value[i] === null ? "no value" : `${data.name} ${format(data.value[i], data.percent)}`;
          return `Trial ${data.trial[i]}, ${data.state[i]}\n${result}\nbest so far ${format(data.best[i], data.percent)}`;
        },
      },
      x: { name: "finished trials", nameLocation: "middle", nameGap: 26, min: 0, max: Math.max(data.trial.length, 2) },
      y: valueAxis(data, [...data.value, ...data.best, data.target ?? null]),
    }),
    series,
  };
}

function curve(data) {
  const points = (column) => data.epoch.map((epoch, i) => [epoch, column[i]]);
  const has = (column) => column.some((value) => value !== null);
  const dots = data.epoch.length < 60;
  const resumed = data.attempt.flatMap((attempt, i) => (i && attempt !== data.attempt[i - 1] ? [[data.epoch[i], attempt]] : []));
  const series = [{
    name: data.name,
    type: "line",
    symbol: "circle",
    symbolSize: dots ? 6 : 0,
    lineStyle: { color: color("--running"), width: 2.5 },
    itemStyle: { color: color("--running") },
    data: points(data.value),
    markLine: {
      ...guides(data),
      data: [
        ...guides(data).data,
        ...resumed.map(([epoch, attempt]) => ({
          xAxis: epoch,
          label: { formatter: `attempt ${attempt}`, color: color("--faint") },
          lineStyle: { color: color("--rule"), type: "solid" },
        })),
      ],
    },
  }];
  if (has(data.accuracy_320)) {
    series.push({
      name: "accuracy on 320 tasks",
      type: "line",
      symbol: "none",
      lineStyle: { color: color("--pruned"), width: 1.5, type: "dotted" },
      itemStyle: { color: color("--pruned") },
      data: points(data.accuracy_320),
    });
  }
  if (has(data.loss)) {
    series.push({
      name: "loss",
      type: "line",
      yAxisIndex: 1,
      symbol: dots ? "rect" : "none",
      symbolSize: 5,
      lineStyle: { color: color("--best"), width: 1.5, type: "dashed" },
      itemStyle: { color: color("--best") },
      data: points(data.loss),
    });
  }
  const isShare = (name) => data.percent && name !== "loss";
  return {
    ...base(data, {
      tooltip: {
        trigger: "axis",
        axisPointer: { lineStyle: { color: color("--rule") } },
        formatter: (items) =>
          [`Epoch ${items[0].value[0]}`, ...items.map((item) => `${item.seriesName} ${format(item.value[1], isShare(item.seriesName))}`)].join("\n"),
      },
      x: { name: "epoch", nameLocation: "middle", nameGap: 26, min: 0, max: Math.max(...data.epoch, 1) },
      y: valueAxis(data, [...data.value, ...data.accuracy_320]),
      second: axis({ axisLabel: { formatter: (value) => format(value, false) }, options: { type: "value", name: "loss", nameLocation: "middle", nameRotate: -90, nameGap: 40, scale: true, show: has(data.loss) } }),
    }),
    series,
  };
}

const KINDS = { progress, curve };

function paint(element) {
  const state = drawn.get(element);
  const count = (state.data.trial ?? state.data.epoch).length;
  const empty = element.parentElement.querySelector(".chart-empty");
  element.hidden = count === 0;
  if (empty) empty.hidden = count !== 0;
  if (count === 0) return;
  if (!state.chart) {
    state.chart = echarts.init(element, null, { renderer: "canvas" });
    state.chart.on("click", ({ value }) => {
      if (state.data.url && value?.[2] !== undefined) location.assign(state.data.url + state.data.trial[value[2]]);
    });
    new ResizeObserver(() => state.chart.resize()).observe(element);
  }
  state.chart.setOption(KINDS[element.dataset.chart](state.data), { notMerge: true });
  element.dataset.drawn = String(count);
}

async function refresh() {
  const version = document.querySelector("[data-charts]")?.dataset.charts ?? "";
  for (const element of document.querySelectorAll("[data-chart]")) {
    const state = drawn.get(element) ?? {};
    drawn.set(element, state);
    if (state.busy || (state.version === version && state.data)) continue;
    if (state.failed && Date.now() - state.failed < RETRY_MS && state.version === version) continue;
    state.busy = true;
    try {
      const response = await fetch(element.dataset.url, { headers: { Accept: "application/json" } });
      if (!response.ok) throw new Error(String(response.status));
      state.data = await response.json();
      state.version = version;
      state.failed = 0;
      paint(element);
    } catch {
      state.failed = Date.now(); // the live part says what is wrong, and its next answer brings us here again
    } finally {
      state.busy = false;
    }
  }
}

document.body.addEventListener("htmx:afterSettle", refresh);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const element of drawn.keys()) if (drawn.get(element).data) paint(element);
});
refresh();
