"use strict";
(() => {
  const { charts, histories, signs, words: texts, tables } = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const POINTS = ["circle", "rect", "triangle", "rectRot", "star", "crossRot", "rectRounded"];
  const DASHES = [[], [6, 3], [2, 3], [8, 3, 2, 3], [12, 4], [4, 2, 1, 2], [1, 2]];
  const OUTCOMES = {
    failed: "--failed", "not run": "--s1", blocked: "--s6", known: "--s4", passed: "--s2", "not claimed": "--line",
  };
  const VERDICTS = { worse: "--failed", better: "--passed", same: "--open", inconclusive: "--known" };
  const color = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const drawn = [];

  // An implementation, or a kind of memory, keeps its colour and mark from chart to chart.
  const places = { line: new Map(), bar: new Map() };
  const lasting = (spec, name, index) => {
    if (spec.x_label !== "rank r") return index;
    const known = places[spec.kind];
    if (!known.has(name)) known.set(name, known.size);
    return known.get(name);
  };

  // A line across the chart, at the budget or at no change, with its name.
  const limitLine = ([name, value]) => ({
    id: `limitLine ${name}`,
    afterDatasetsDraw(chart) {
      const { ctx, chartArea: area, scales } = chart;
      const upright = chart.options.indexAxis === "y";
      const at = (upright ? scales.x : scales.y).getPixelForValue(value);
      if (upright ? at < area.left || at > area.right : at < area.top || at > area.bottom) return;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = color("--failed");
      if (upright) ctx.strokeStyle = ctx.fillStyle = color("--muted");
      ctx.setLineDash([5, 4]);
      ctx.lineWidth = 1.5;
      ctx.beginPath();
      if (upright) { ctx.moveTo(at, area.top); ctx.lineTo(at, area.bottom); }
      else { ctx.moveTo(area.left, at); ctx.lineTo(area.right, at); }
      ctx.stroke();
      ctx.font = `600 11px ${Chart.defaults.font.family}`;
      if (!upright) {
        // On a backing of its own, so that it can be read over bars and lines.
        const width = ctx.measureText(name).width;
        ctx.fillStyle = color("--sheet");
        ctx.fillRect(area.left + 3, at - 17, width + 6, 15);
        ctx.fillStyle = color("--failed");
        ctx.fillText(name, area.left + 6, at - 5);
      }
      ctx.restore();
    },
  });

  const number = (value) =>
    typeof value === "number" ? value.toLocaleString("en", { maximumSignificantDigits: 5 }) : value;

  const axis = (text, more = {}) => ({
    title: { display: Boolean(text), text, color: color("--muted") },
    grid: { color: color("--line") },
    border: { display: false },
    ...more,
    ticks: { color: color("--muted"), maxRotation: 0, autoSkipPadding: 12, ...more.ticks },
  });

  const shorten = (text, most) => (text.length > most ? text.slice(0, most - 1) + "…" : text);

  function settings(spec) {
    const narrow = window.innerWidth < 640;
    const options = {
      animation: false,
      responsive: true,
      maintainAspectRatio: false,
      interaction: { mode: "index", intersect: false },
      plugins: {
        legend: {
          display: spec.series.length > 1 && spec.kind !== "interval",
          position: "bottom",
          labels: { color: color("--ink"), usePointStyle: true, boxWidth: 8, boxHeight: 8, padding: 12 },
        },
        tooltip: { callbacks: { label: (item) => `${item.dataset.label}: ${number(item.parsed.y)}` } },
      },
    };
    if (spec.kind === "interval") return intervals(spec, options, narrow);
    const bar = spec.kind === "bar";
    const many = spec.x.length > 24;
    const hue = (series, index) => color(OUTCOMES[series.name] ?? `--s${index % 7}`);
    options.scales = {
      x: axis(spec.x_label, { stacked: bar, grid: { display: false }, ticks: { maxTicksLimit: narrow ? 5 : 9 } }),
      y: axis(spec.y_label, {
        stacked: bar,
        beginAtZero: bar || spec.limits.length > 0,
        suggestedMax: Math.max(spec.top ?? 0, ...spec.limits.map(([, value]) => value * 1.08)) || undefined,
        ticks: { maxTicksLimit: 6 },
      }),
    };
    const datasets = spec.series.map((series, at) => [series, lasting(spec, series.name, at)]).map(([series, index]) => ({
      label: series.name,
      data: series.y,
      borderColor: bar ? color("--sheet") : hue(series, index),
      backgroundColor: hue(series, index),
      borderWidth: bar ? (many ? 0 : 1) : 2,
      borderDash: bar ? [] : DASHES[index % 7],
      pointStyle: bar ? "rect" : many ? "line" : POINTS[index % 7],
      pointRadius: many ? 0 : 4,
      spanGaps: true,
      maxBarThickness: 46,
      categoryPercentage: many ? 1 : 0.8,
      barPercentage: many ? 1 : 0.9,
    }));
    return { type: bar ? "bar" : "line", data: { labels: spec.x, datasets }, options, plugins: spec.limits.map(limitLine) };
  }

  function intervals(spec, options, narrow) {
    const [low, ratio, high] = spec.series.map((series) => series.y);
    const hues = spec.x.map((name) => color(VERDICTS[name.split(":")[0]] ?? "--open"));
    options.indexAxis = "y";
    options.interaction = { mode: "nearest", axis: "y", intersect: false };
    options.plugins.tooltip.callbacks.label = (item) =>
      `${number(ratio[item.dataIndex])} (${number(low[item.dataIndex])} to ${number(high[item.dataIndex])})`;
    const ends = [...low, ...high, 1];
    const room = (Math.max(...ends) - Math.min(...ends)) * 0.08 || 0.05;
    options.scales = {
      x: axis(spec.y_label, { min: Math.min(...ends) - room, max: Math.max(...ends) + room }),
      y: axis("", { ticks: { autoSkip: false, callback(_value, index) { return shorten(spec.x[index], Math.floor(this.chart.width / (narrow ? 15 : 14))); } } }),
    };
    return {
      type: "bar",
      data: {
        labels: spec.x,
        datasets: [
          { type: "scatter", label: "ratio", data: ratio.map((x, index) => ({ x, y: spec.x[index] })), pointStyle: "rectRot", pointRadius: 5, backgroundColor: color("--ink"), borderColor: color("--sheet") },
          { label: "interval", data: low.map((from, index) => [from, high[index]]), backgroundColor: hues, barThickness: 8, borderRadius: 4, borderSkipped: false },
        ],
      },
      options,
      plugins: spec.limits.map(limitLine),
    };
  }

  function draw(canvas, spec) {
    Chart.getChart(canvas)?.destroy();
    const chart = new Chart(canvas, settings(spec));
    const found = drawn.find((one) => one.canvas === canvas);
    if (found) Object.assign(found, { spec, chart });
    else drawn.push({ canvas, spec, chart });
  }

  // ── history ──

  const unfold = (values) => values.flatMap((one) => (Array.isArray(one) ? Array(one[1]).fill(one[0]) : [one]));

  function row(index, which) {
    const { runs, rows } = histories[index];
    const { name, where, unit, values, changes } = rows[which];
    const readings = unfold(values);
    const words = [...new Set(readings.filter((one) => typeof one === "string"))].sort();
    const y = readings.map((one) => (typeof one === "string" ? words.indexOf(one) : one));
    const told = new Map(changes.map(([run, verdict, why]) => [run, `${verdict ?? ""}: ${why}`]));
    const canvas = document.querySelector(`[data-row="${index}"]`);
    draw(canvas, {
      kind: "line", title: name, x: runs.map((run) => run.slice(0, 10)), x_label: "", limits: [], top: null,
      y_label: words.length ? "" : unit, series: [{ name: where ? `${name}, ${where}` : name, y }],
    });
    const { chart } = drawn.find((one) => one.canvas === canvas);
    const line = chart.data.datasets[0];
    line.pointStyle = "circle";
    line.stepped = words.length > 0;
    line.pointRadius = readings.map((_, run) => (told.has(run) ? 6 : 0));
    line.pointBackgroundColor = color("--failed");
    if (words.length) {
      chart.options.scales.y.ticks = { ...chart.options.scales.y.ticks, stepSize: 1, callback: (at) => words[at] ?? "" };
      chart.options.scales.y.suggestedMin = -0.5;
      chart.options.scales.y.suggestedMax = words.length - 0.5;
    }
    chart.options.plugins.tooltip.callbacks.label = (item) =>
      [number(readings[item.dataIndex] ?? "–"), told.get(item.dataIndex)].filter(Boolean);
    chart.update();

    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const text of ["run", `${name}${unit ? `, ${unit}` : ""}`, "change"]) {
      head.append(Object.assign(document.createElement("th"), { scope: "col", textContent: text }));
    }
    const body = table.createTBody();
    readings.forEach((value, run) => {
      const line_ = body.insertRow();
      for (const text of [runs[run], number(value ?? "–"), told.get(run) ?? ""]) line_.insertCell().textContent = text;
    });
    document.querySelector(`[data-table="${index}"]`).replaceChildren(table);
  }

  for (const select of document.querySelectorAll("[data-history]")) {
    const index = Number(select.dataset.history);
    const groups = [["changed", (one) => one.changes.length], ["unchanged", (one) => !one.changes.length]];
    for (const [label, chosen] of groups) {
      const group = Object.assign(document.createElement("optgroup"), { label });
      histories[index].rows.forEach((one, which) => {
        const text = shorten(one.where ? `${one.name}, ${one.where}` : one.name, 110);
        if (chosen(one)) group.append(Object.assign(document.createElement("option"), { value: which, textContent: text }));
      });
      if (group.children.length) select.append(group);
    }
    select.addEventListener("change", () => row(index, Number(select.value)));
  }

  // ── long tables, built when they are first seen ──

  function build(region) {
    if (region.firstChild) return;
    const { columns, cells } = tables[Number(region.dataset.long)];
    const table = document.createElement("table");
    const head = table.createTHead().insertRow();
    for (const [textContent, kind] of columns) {
      if (kind !== "under") head.append(Object.assign(document.createElement("th"), { scope: "col", textContent, className: kind === "n" ? "n" : "" }));
    }
    const body = table.createTBody();
    for (let at = 0; at < cells.length; at += columns.length) {
      const line = body.insertRow();
      columns.forEach(([, kind], column) => {
        const textContent = texts[cells[at + column]];
        if (kind === "under") {
          const under = Object.assign(document.createElement("span"), { className: "muted", textContent });
          if (textContent) line.lastChild.append(document.createElement("br"), under);
          return;
        }
        const cell = line.insertCell();
        cell.className = kind === "badge" ? "" : kind;
        if (kind === "badge") {
          const sign = Object.assign(document.createElement("span"), { textContent: signs[textContent] });
          sign.setAttribute("aria-hidden", "true");
          const badge = Object.assign(document.createElement("span"), { className: `badge ${textContent}` });
          badge.append(sign, ` ${textContent}`);
          cell.append(badge);
        } else if (kind === "row") cell.append(Object.assign(document.createElement("code"), { textContent }));
        else cell.textContent = textContent;
      });
    }
    region.replaceChildren(table);
  }

  for (const region of document.querySelectorAll("[data-long]")) {
    const folded = region.closest("details:not([open])");
    if (folded) folded.addEventListener("toggle", () => build(region), { once: true });
    else build(region);
  }

  // ── failure records ──

  function open(hash) {
    const record = hash.startsWith("#record-") && document.getElementById(hash.slice(1));
    if (!record) return;
    for (let one = record; one; one = one.parentElement?.closest("details")) one.open = true;
    record.querySelector("summary").focus();
  }
  addEventListener("hashchange", () => open(location.hash));
  document.addEventListener("click", (event) => {
    const link = event.target.closest('a[href^="#record-"]');
    if (link) setTimeout(() => open(link.hash));
  });

  // ── drawing, again where the colours change ──

  function drawAll() {
    Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;
    Chart.defaults.font.size = 12;
    for (const canvas of document.querySelectorAll("[data-chart]")) draw(canvas, charts[Number(canvas.dataset.chart)]);
    for (const select of document.querySelectorAll("[data-history]")) {
      if (select.value !== "") row(Number(select.dataset.history), Number(select.value));
    }
  }

  let closed = [];
  addEventListener("beforeprint", () => {
    root.classList.add("paper");
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
    document.querySelectorAll("[data-long]").forEach(build);
    drawAll();
  });
  addEventListener("afterprint", () => {
    root.classList.remove("paper");
    for (const one of closed) one.open = false;
    drawAll();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  drawAll();
  open(location.hash);
  root.dataset.drawn = String(drawn.length);
})();
