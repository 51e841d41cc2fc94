"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const $ = (id) => document.getElementById(id);
  // all numbers are little-endian, as in the computers that browsers run on
  const unpack = (packed, Type) =>
    new Type(Uint8Array.from(atob(packed), (c) => c.charCodeAt(0)).buffer);
  const saes = data.saes.map((sae) => ({
    name: sae.name,
    colour: sae.colour,
    z: unpack(sae.norm_z, Float32Array),
    f: unpack(sae.norm_f, Float32Array),
    nmse: unpack(sae.nmse, Float32Array),
    interference: unpack(sae.interference, Float32Array),
    l0: unpack(sae.l0, Uint32Array),
    place: unpack(sae.place, Uint32Array),
  }));
  const tokens = unpack(data.tokens, Uint32Array);

  // --- the plot ---
  const webgl = (() => {
    try { return !!document.createElement("canvas").getContext("webgl"); } catch { return false; }
  })();
  const total = saes.reduce((sum, sae) => sum + sae.z.length, 0);
  // without WebGL every point is an element of the page: only some thousands are bearable
  const step = webgl ? 1 : Math.max(1, Math.ceil(total / 6000));
  const jitter = (i) => ((i * 2654435761) % 4096) / 4096 - 0.5;
  const xs = saes.map((sae, lane) => data.lanes ? Float32Array.from(sae.z, (_, i) => lane + 0.7 * jitter(i)) : sae.z);
  const shown = saes.map((sae) => Array.from({ length: Math.ceil(sae.z.length / step) }, (_, i) => i * step));
  const every = (pick) => saes.flatMap((sae, s) => shown[s].map((i) => pick(s, i))).filter((v) => v > 0).sort((a, b) => a - b);
  const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))];
  const allF = every((s, i) => saes[s].f[i]);
  const allZ = every((s, i) => saes[s].z[i]);
  const low = Math.min(quantile(allF, 0.0005), quantile(allZ, 0.0005));
  const high = Math.max(quantile(allF, 0.9995), quantile(allZ, 0.9995));
  const log = !data.lanes && high / low > 10;
  const ends = log ? [low / 1.15, high * 1.15] : [Math.max(0, low - 0.1 * (high - low)), high + 0.08 * (high - low)];
  const safe = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
  const points = saes.map((sae, s) => ({
    type: webgl ? "scattergl" : "scatter",
    mode: "markers",
    name: safe(sae.name),
    x: shown[s].map((i) => xs[s][i]),
    y: shown[s].map((i) => sae.f[i]),
    marker: { size: 4, color: sae.colour, opacity: total > 20000 ? 0.35 : 0.6 },
    hoverinfo: "none",
  }));
  const lines = [[1, "‖f‖ = ‖z‖", "#000", "solid", 1.8]];
  const dashes = ["dash", "5px,3px", "dot"];
  data.bands.forEach(([e, under, over], n) => [under, over].forEach((ratio) => {
    if (ratio !== null) lines.push([ratio, `e = ${e}`, "#555", dashes[n], 1.2]);
  }));
  const lineOf = ([ratio, name, color, dash, width]) => {
    const x = data.lanes ? saes.flatMap((sae, lane) => [lane - 0.5, lane + 0.5, null]) : ends;
    const y = data.lanes ? saes.flatMap((sae) => [ratio * sae.z[0], ratio * sae.z[0], null]) : ends.map((v) => v * ratio);
    return { mode: "lines", x, y, name, line: { color, dash, width }, hoverinfo: "skip" };
  };
  const chosen = {
    mode: "markers", x: [], y: [], hoverinfo: "skip",
    marker: { size: 14, color: "rgba(0,0,0,0)", line: { color: "#000", width: 2 } },
  };
  const axis = { type: log ? "log" : "linear", range: log ? ends.map(Math.log10) : ends, zeroline: false, linecolor: "#888", ticks: "outside" };
  Plotly.newPlot("zf", [...points, ...lines.map(lineOf), chosen], {
    margin: { l: 60, r: data.lanes ? 50 : 12, t: 12, b: data.lanes ? 90 : 50 },
    showlegend: false,
    hovermode: "closest",
    dragmode: "pan",
    xaxis: data.lanes
      ? { tickvals: saes.map((_, s) => s), ticktext: saes.map((sae) => safe(sae.name)), range: [-0.6, saes.length - 0.4], zeroline: false }
      : { ...axis, title: { text: "norm of the input ‖z‖" } },
    yaxis: { ...axis, title: { text: "norm of the features ‖f‖" } },
  }, {
    responsive: true, displaylogo: false, scrollZoom: false,
    // Plotly's own button would upload the data
    plotlyServerURL: "", modeBarButtonsToRemove: ["select2d", "lasso2d", "sendChartToCloud", "sendDataToCloud"],
  });

  if (step > 1) {
    const drawn = shown.reduce((sum, of) => sum + of.length, 0).toLocaleString("en");
    $("hint").prepend(`Without WebGL, only ${drawn} of these points are drawn here. `);
  }

  // --- one token ---
  const ring = points.length + lines.length;
  let marked = null;
  const ratio = (sae, i) => sae.z[i] > 0 ? sae.f[i] / sae.z[i] : NaN;
  const show = (s, i) => {
    const sae = saes[s];
    marked = s;
    const known = (value, text) => Number.isNaN(value) ? "undefined" : text;
    const number = (value) => known(value, value.toPrecision(3));
    $("figures").textContent =
      `${sae.name}: ‖z‖ ${number(sae.z[i])}, ‖f‖ ${number(sae.f[i])}, ratio ${known(ratio(sae, i), ratio(sae, i).toFixed(3))}, ` +
      `NMSE ${number(sae.nmse[i])}, interference ${number(sae.interference[i])}, L0 ${sae.l0[i]}`;
    const place = sae.place[i];
    const start = place - (place % data.size);
    const text = (from, to) => Array.from(tokens.subarray(Math.max(start, from), Math.min(start + data.size, to)),
      (t) => data.texts[t]).join("").replaceAll("\n", "⏎");
    const mark = document.createElement("mark");
    mark.textContent = text(place, place + 1) || data.empty;
    $("context").replaceChildren(text(place - data.context, place), mark, text(place + 1, place + data.context + 1));
    Plotly.restyle("zf", { x: [[xs[s][i]]], y: [[sae.f[i]]], visible: true }, [ring]);
  };
  let alone = null;
  $("zf").on("plotly_hover", ({ points: [point] }) => {
    if (point.curveNumber < saes.length) show(point.curveNumber, shown[point.curveNumber][point.pointNumber]);
  });
  // a finger cannot point without touching
  $("zf").on("plotly_click", ({ points: [point] }) => {
    if (point.curveNumber < saes.length) show(point.curveNumber, shown[point.curveNumber][point.pointNumber]);
  });

  // --- one SAE alone ---
  let stepped = { sae: -1, order: [], at: 0 };
  const isolate = (s) => {
    alone = alone === s ? null : s;
    document.querySelectorAll("#chips button").forEach((button) =>
      button.setAttribute("aria-pressed", String(alone === Number(button.dataset.sae))));
    const visible = [...saes.keys(), marked].map((n) => alone === null || alone === n);
    Plotly.restyle("zf", { visible }, [...saes.keys(), ring]);
    stepped = { sae: -1, order: [], at: 0 };
  };
  document.querySelectorAll("#chips button").forEach((button) =>
    button.addEventListener("click", () => isolate(Number(button.dataset.sae))));
  const go = (by) => {
    const s = alone ?? 0;
    if (stepped.sae !== s) {
      const sae = saes[s];
      const order = shown[s].filter((i) => ratio(sae, i) >= 0)
        .sort((a, b) => ratio(sae, a) - ratio(sae, b));
      stepped = { sae: s, order, at: by > 0 ? -1 : order.length };
    }
    if (stepped.order.length === 0) return;
    stepped.at = Math.min(stepped.order.length - 1, Math.max(0, stepped.at + by));
    show(s, stepped.order[stepped.at]);
  };
  $("previous").addEventListener("click", () => go(-1));
  $("next").addEventListener("click", () => go(1));
  document.documentElement.dataset.ready = "true";
})();
