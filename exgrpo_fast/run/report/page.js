// The values of a figure at one step: under the pointer, or by the arrow keys once it has the focus.
// Each figure carries data-hover: "x" the range of steps, "px" where it is drawn, "s" the series.

let shown = null; // the figure whose values are visible, and their step

const nearest = (points, x) =>
  points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));

function show(figure, x) {
  const { x: [low, high], px: [left, right], s: series } = JSON.parse(figure.dataset.hover);
  const found = series.map(([name, points]) => [...nearest(points, x), name]);
  const step = nearest(found, x)[0];
  const lines = found.filter(([at]) => at === step).map(([, value, name]) => `${name}  ${value}`);
  figure.querySelector(".rule").setAttribute("transform",
    `translate(${left + (step - low) / (high - low) * (right - left)} 0)`);
  figure.querySelector("output").textContent = [`step ${Math.round(step)}`, ...lines].join("\n");
  hide();
  figure.classList.add("on");
  shown = { figure, step };
}

function hide() {
  if (shown) shown.figure.classList.remove("on");
  shown = null;
}

const figureOf = target => target.closest?.("figure[data-hover] svg")?.closest("figure");

document.addEventListener("pointermove", event => {
  const figure = figureOf(event.target);
  if (!figure) return document.activeElement?.matches("figure svg") || hide();
  const { x: [low, high], px: [left, right] } = JSON.parse(figure.dataset.hover);
  const svg = figure.querySelector("svg"), box = svg.getBoundingClientRect();
  const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
  show(figure, low + (at - left) / (right - left) * (high - low));
});

document.addEventListener("focusin", event => {
  const figure = figureOf(event.target);
  if (figure && event.target.matches(":focus-visible"))
    show(figure, JSON.parse(figure.dataset.hover).x[1]); // the last step
});

document.addEventListener("focusout", hide);

document.addEventListener("keydown", event => {
  const figure = figureOf(event.target);
  if (!figure) return;
  if (event.key === "Escape") return hide();
  const series = JSON.parse(figure.dataset.hover).s.map(([, points]) => points.map(([x]) => x));
  const steps = [...new Set(series.flat())].sort((a, b) => a - b);
  const at = shown?.figure === figure ? steps.indexOf(shown.step) : steps.length - 1;
  const next = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: steps.length - 1 }[event.key];
  if (next === undefined) return;
  event.preventDefault();
  show(figure, steps[Math.min(Math.max(next, 0), steps.length - 1)]);
});
