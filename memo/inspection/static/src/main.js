// The live view in its two homes. `npm ci && npm run build` makes ../view.js and ../view.css of it.

import { make } from "./elements.js";
import "./view.css";
import { View } from "./view.js";

// In a notebook: memo/jupyter/dashboard_widget.py.
function render({ model, el }) {
  const view = new View(make("div", el), (message) => model.send(message));
  const update = () => view.update(model.get("state"));
  model.on("change:state", update);
  update();
  model.send({ do: "open" });
  return () => {
    model.off("change:state", update);
    model.send({ do: "shut" });
  };
}

// On the page of `memo ui`: memo/cli/web_page.py.
export function serve(el) {
  const token = new URLSearchParams(location.search).get("token");
  const headers = { "X-Memo-Token": token, "Content-Type": "application/json" };
  let stopped = false;
  const lost = make("p", null, { className: "memo-bad", role: "alert" });
  const ask = async (path, options) => {
    try {
      const reply = await fetch(path, { headers, ...options });
      if (!reply.ok) throw new Error(await reply.text());
      lost.remove();
      view.update(await reply.json());
    } catch (error) {
      lost.textContent = `memo ui does not answer: ${error.message}. Is it still running?`;
      el.before(lost);
    }
  };
  const view = new View(el, (message) => {
    ask("do", { method: "POST", body: JSON.stringify(message) });
  });
  const look = async () => {
    if (!document.hidden) await ask("state");
    if (!stopped) setTimeout(look, 1000);
  };
  look();
  return () => { stopped = true; };
}

export default { render };
