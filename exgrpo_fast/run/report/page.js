// Under the pointer: a rule at the nearest step, and the values there.
// Each figure carries data-hover: "x" the range of steps, "px" where it is drawn, "s" the series.

for (const figure of document.querySelectorAll("figure")) {
  const { x: [low, high], px: [left, right], s: series } = JSON.parse(figure.dataset.hover);
  const svg = figure.querySelector("svg"), rule = svg.querySelector(".rule");
  const output = figure.querySelector("output");
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect();
    const at = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
    const x = low + (at - left) / (right - left) * (high - low);
    const nearer = (a, b) => Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a;
    const found = series.map(([name, points]) => [...points.reduce(nearer), name]);
    const step = found.reduce(nearer)[0];
    const lines = found.filter(([at]) => at === step).map(([, value, name]) => `${name}  ${value}`);
    rule.setAttribute("transform",
      `translate(${left + (step - low) / (high - low) * (right - left)} 0)`);
    output.textContent = [`step ${Math.round(step)}`, ...lines].join("\n");
    figure.classList.add("on");
  });
  svg.addEventListener("pointerleave", () => figure.classList.remove("on"));
}
