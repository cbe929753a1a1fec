// The site picker: a searchable list, and the chosen site's histogram with its range, its steps and other ranges.
(() => {
  "use strict";
  const holder = document.getElementById("site-data");
  const list = document.getElementById("list");
  if (!holder || !list) return;
  const sites = JSON.parse(holder.textContent);
  const search = document.getElementById("search");
  const place = document.getElementById("site");
  const short = (x) => (x === null ? "–" : Number(x.toPrecision(4)).toString());
  const SVG = "http://www.w3.org/2000/svg";

  function make(parent, name, attributes, text) {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text !== undefined) element.textContent = text;
    parent.append(element);
    return element;
  }

  function histogram(site) {
    const width = 640, height = 300, left = 20, right = 20, top = 66, bottom = 40;
    const { low, high, counts } = site.bars;
    const x = (value) => left + ((value - low) / (high - low)) * (width - left - right);
    const inside = (value) => value >= low && value <= high;
    const tallest = Math.log1p(Math.max(...counts, 1));
    const y = (count) => height - bottom - (Math.log1p(count) / tallest) * (height - top - bottom);
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("class", "chart");
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `histogram of ${site.name}`);
    const from = Math.max(site.low, low), to = Math.min(site.high, high);
    make(svg, "rect", { class: "range", x: x(from), y: top, width: Math.max(1, x(to) - x(from)), height: height - top - bottom });
    const bar = (width - left - right) / counts.length;
    counts.forEach((count, index) => {
      if (count) make(svg, "rect", { class: "bar", x: left + index * bar, y: y(count), width: Math.max(bar - 0.5, 0.5), height: height - bottom - y(count) });
    });
    for (const level of site.levels || []) {
      if (inside(level)) make(svg, "line", { class: "step", x1: x(level), x2: x(level), y1: top, y2: height - bottom });
    }
    const alike = new Map(); // calibrators that answer alike share a line and a label
    for (const [name, ends] of Object.entries(site.ranges)) {
      const key = ends.map(short).join(" ");
      alike.set(key, { ends, names: [...(alike.get(key)?.names ?? []), name] });
    }
    [...alike.values()].forEach(({ ends, names }, row) => {
      for (const end of ends) {
        if (inside(end) && end !== 0) make(svg, "line", { class: "other", x1: x(end), x2: x(end), y1: top, y2: height - bottom });
      }
      const end = x(Math.min(ends[1], high));
      const anchor = end > width / 2 ? "end" : "start";
      make(svg, "text", { class: "label", x: end, y: top - 5 - 16 * (row % 4), "text-anchor": anchor }, names.join(" = "));
    });
    for (const value of [low, (low + high) / 2, high]) {
      const anchor = value === low ? "start" : value === high ? "end" : "middle";
      make(svg, "text", { class: "tick", x: x(value), y: height - bottom + 17, "text-anchor": anchor }, short(value));
    }
    return svg;
  }

  function show(site) {
    place.replaceChildren();
    place.dataset.name = site.name;
    const title = document.createElement("h3");
    title.textContent = site.name;
    place.append(title, histogram(site));
    const facts = document.createElement("dl");
    facts.className = "facts";
    const rows = [
      ["format", `${site.format}, ${site.granularity}`],
      ["range", `${short(site.low)} to ${short(site.high)}`],
      ["step", site.step === null ? "differs" : short(site.step)],
      ["values seen", `${site.count.toLocaleString("en")}, ${short(site.min)} to ${short(site.max)}`],
      ["outside the range", `${(100 * site.clipped).toPrecision(3)}%`],
      ["signal to noise", site.sqnr === null ? "–" : `${site.sqnr.toFixed(1)} dB`],
      ["read by", site.layers.join(", ") || "no layer"],
      ...Object.entries(site.ranges).map(([name, ends]) => [name, `${short(ends[0])} to ${short(ends[1])}`]),
    ];
    for (const [name, value] of rows) {
      const row = document.createElement("div");
      const term = document.createElement("dt");
      const text = document.createElement("dd");
      term.textContent = name;
      text.textContent = value;
      row.append(term, text);
      facts.append(row);
    }
    place.append(facts);
  }

  function fill() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = place.dataset.name;
    list.replaceChildren();
    sites.forEach((site, index) => {
      const text = [site.name, site.format, ...site.layers].join(" ").toLowerCase();
      if (words.every((word) => text.includes(word))) {
        list.append(new Option(site.name + (site.weight ? " (weight)" : ""), index, false, site.name === chosen));
      }
    });
    document.getElementById("found").textContent = list.options.length;
    if (list.selectedIndex < 0 && list.options.length) {
      list.selectedIndex = 0;
      show(sites[list.value]);
    }
  }

  list.addEventListener("change", () => show(sites[list.value]));
  search.addEventListener("input", fill);
  fill();
})();
