// Asks the server for a newer page and changes what differs in this one, element by element: scroll
// position, focus, open sections and selected text stay.

const PERIOD_MS = 1000;
let version = "";

function change(node, wanted) {
  if (node.nodeName !== wanted.nodeName) return node.replaceWith(wanted);
  if (node.nodeType !== Node.ELEMENT_NODE) {
    if (node.data !== wanted.data) node.data = wanted.data;
    return;
  }
  for (const { name } of [...node.attributes])
    if (name !== "open" && !wanted.hasAttribute(name)) node.removeAttribute(name);
  for (const { name, value } of wanted.attributes)
    if (node.getAttribute(name) !== value) node.setAttribute(name, value);
  const present = [...node.childNodes], children = [...wanted.childNodes];
  children.forEach((child, i) => (i < present.length ? change(present[i], child) : node.append(child)));
  present.slice(children.length).forEach(child => child.remove());
}

function say(text) {
  const message = document.querySelector("#connection");
  if (message.textContent !== text) message.textContent = text;
}

async function refresh() {
  if (document.hidden) return;
  try {
    const options = { cache: "no-store", headers: version ? { "If-None-Match": version } : {} };
    const answer = await fetch(location.href, options);
    if (answer.status !== 304) {
      const text = await answer.text();
      if (!answer.ok) return say(text);
      const page = new DOMParser().parseFromString(text, "text/html");
      const visible = shown;
      for (const name of ["header", "main"])
        change(document.querySelector(name), page.querySelector(name));
      document.title = page.title;
      if (visible?.figure.dataset.hover) show(visible.figure, visible.step);
      version = answer.headers.get("ETag");
    }
    say("");
  } catch {
    say("No longer refreshed: exgrpo-fast watch has ended.");
  }
}

(async () => {
  for (;;) {
    await new Promise(resume => setTimeout(resume, PERIOD_MS));
    await refresh();
  }
})();
document.addEventListener("visibilitychange", refresh);
