// Calls over time, as a small bar chart with labelled axes.

import { clock, draw } from "./elements.js";

const KINDS = [["hits", "memo-hits"], ["stale", "memo-stale"], ["misses", "memo-misses"]];

export function plot(parent, { width, step: each, points }) {
  if (!points.length) return;
  const [left, wide, high] = [26, 150, 30];
  const top = Math.max(1, ...points.map((point) => point[1] + point[2] + point[3]));
  const step = wide / Math.max(points.length, 12);
  const drawing = draw("svg", parent, {
    viewBox: `0 0 ${left + wide + 4} ${high + 14}`, width: left + wide + 4, height: high + 14,
    role: "img", "aria-label": `calls in each ${each}, at most ${top}`,
  });
  draw("text", drawing, { x: left - 3, y: 9, "text-anchor": "end" }, top);
  draw("text", drawing, { x: left - 3, y: high, "text-anchor": "end" }, 0);
  draw("path", drawing, { d: `M${left} 2V${high}H${left + wide}`, class: "memo-axis" });
  points.forEach((point, at) => {
    let base = high;
    KINDS.forEach(([name, kind], index) => {
      const count = point[index + 1];
      if (!count) return;
      const height = (count / top) * (high - 4);
      base -= height;
      const bar = draw("rect", drawing, {
        x: left + at * step, y: base, width: Math.max(1, step - 1), height, class: kind,
      });
      draw("title", bar, {}, `${count} ${name}, ${clock(point[0])}`);
    });
  });
  draw("text", drawing, { x: left, y: high + 12 }, clock(points[0][0]));
  if (points.length > 1) {
    const last = clock(points[points.length - 1][0] + width);
    draw("text", drawing, { x: left + wide, y: high + 12, "text-anchor": "end" }, last);
  }
}
