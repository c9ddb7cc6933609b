// Draws boxes, masks and labels over the picture. All positions are shares of the picture's size, so that they
// stay right when the page changes its width; only the places of the labels are computed again.

const SVG = "http://www.w3.org/2000/svg";
// Bright enough for black letters (a contrast of 9 at least). Boxes have a dark casing, so that they show on
// any picture.
const COLOURS = ["#ffb000", "#4fc3f7", "#ff8fb1", "#8fd14f", "#c9a6ff", "#ffe14d", "#4ddfc1", "#ff9d6b"];

/** A colour for each label, in the order in which the labels appear. */
export function colours(objects) {
  const labels = [...new Set(objects.map((o) => o.label))];
  return new Map(labels.map((label, n) => [label, COLOURS[n % COLOURS.length]]));
}

export function score(value) {
  return typeof value === "number" ? value.toFixed(2) : "";
}

function svg(name, attributes, ...children) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

/** Replaces what is drawn in `layer`, an element that covers the picture exactly. The size is in the pixels of
 *  the boxes. Large objects come first, so that small ones are not hidden. */
export function drawMarks(layer, objects, [width, height]) {
  const colour = colours(objects);
  const area = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
  const order = objects.map((o, n) => ({ ...o, n })).sort((a, b) => area(b.box) - area(a.box));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none" });
  const tags = [];
  for (const { label, box, mask, n, ...o } of order) {
    const [x0, y0, x1, y1] = box;
    const group = svg("g", { "data-object": n });
    if (typeof mask === "string" && mask.startsWith("data:image/png;base64,")) {
      const whole = { x: 0, y: 0, width, height };
      const image = svg("image", { ...whole, href: mask, preserveAspectRatio: "none" });
      drawing.append(svg("mask", { id: `mask-${n}`, maskUnits: "userSpaceOnUse", ...whole }, image));
      const tint = { class: "mask", fill: colour.get(label), mask: `url(#mask-${n})` };
      group.append(svg("rect", { ...whole, ...tint }));
    }
    const frame = { x: x0, y: y0, width: x1 - x0, height: y1 - y0 };
    group.append(svg("rect", { ...frame, class: "casing" }));
    group.append(svg("rect", { ...frame, class: "box", stroke: colour.get(label) }));
    drawing.append(group);

    const tag = document.createElement("div");
    tag.className = "tag";
    tag.dataset.object = n;
    tag.style.background = colour.get(label);
    tag.textContent = [label, score(o.score)].filter(Boolean).join(" ");
    tags.push({ tag, shares: [x0 / width, y0 / height, x1 / width, y1 / height] });
  }
  layer.replaceChildren(drawing, ...tags.map(({ tag }) => tag));
  const arrange = () => placeTags(layer, tags);
  watcher?.disconnect();
  watcher = new ResizeObserver(arrange);
  watcher.observe(layer);
  arrange();
}

let watcher = null;

/** Puts each label above, below or inside its box, inside the picture, where it hides least of other labels.
 *  The labels of small boxes, which have the least room, are placed first. */
function placeTags(layer, tags) {
  const [width, height] = [layer.clientWidth, layer.clientHeight];
  const taken = [];
  for (const { tag, shares } of tags.toReversed()) {
    const [x0, y0, x1, y1] = shares.map((share, n) => share * (n % 2 ? height : width));
    const [w, h] = [tag.offsetWidth, tag.offsetHeight];
    const places = [
      [x0, y0 - h], [x0, y1], [x0, y0], [x1 - w, y0 - h], [x1 - w, y1], [x0, y1 - h], [x1 - w, y0],
    ].map(([x, y]) => [Math.max(0, Math.min(x, width - w)), Math.max(0, Math.min(y, height - h))]);
    const hidden = ([x, y]) => taken.reduce((sum, t) => sum + common([x, y, x + w, y + h], t), 0);
    // A label that the edge of the picture pushed into its box comes after one that has its full place.
    const moved = ([x, y]) => (Math.abs(y - (y0 - h)) < 1 || y === y1 || (y >= y0 && y + h <= y1) ? 0 : 1);
    const cost = (place, n) => hidden(place) + moved(place) + n / 100;
    const costs = places.map(cost);
    const [x, y] = places[costs.indexOf(Math.min(...costs))];
    tag.style.left = `${x}px`;
    tag.style.top = `${y}px`;
    taken.push([x, y, x + w, y + h]);
  }
}

/** The area of the intersection. */
function common(a, b) {
  const across = Math.min(a[2], b[2]) - Math.max(a[0], b[0]);
  return Math.max(0, across) * Math.max(0, Math.min(a[3], b[3]) - Math.max(a[1], b[1]));
}
