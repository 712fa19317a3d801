"use strict";

const KEYS = {
  1: "left", 2: "right", 3: "tie", 4: "both_bad",
  ArrowLeft: "left", ArrowRight: "right", ArrowDown: "tie", ArrowUp: "both_bad",
};
const at = (id) => document.getElementById(id);
let rater = null;
let position = null; // of the pair on the screen; null while there is none
let busy = false; // one judgement at a time, however fast the keys

async function call(path, body) {
  if (busy) return;
  busy = true;
  try {
    const response = await fetch(path, {
      method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
    });
    const found = await response.json();
    if (!response.ok) throw new Error(found.error);
    show(found);
    report("");
  } catch (error) {
    report(error instanceof TypeError ? "The server does not answer. Nothing was stored; try again." : error.message);
  } finally {
    busy = false;
  }
}

function report(message) {
  at("error").textContent = message;
  at("error").hidden = !message;
}

function show(found) {
  const pair = found.pair;
  position = pair ? found.position : null;
  at("who").hidden = true;
  at("pair").hidden = !pair;
  at("done").hidden = Boolean(pair);
  at("undo").hidden = found.position === 0;
  at("leave").hidden = false;
  at("progress").textContent = `${rater}: ${found.position} of ${found.total} judged`;
  // textContent: answers are text, whatever they look like.
  for (const id of ["prompt", "left", "right"]) {
    at(id).textContent = pair ? pair[id] : "";
    at(id).scrollTop = 0;
  }
}

function judge(choice) {
  if (position !== null) call("/api/judge", { rater, position, choice });
}

function undo() {
  if (rater !== null && !at("undo").hidden) call("/api/undo", { rater });
}

function begin(name) {
  rater = name.trim();
  sessionStorage.setItem("rater", rater); // this window goes on after a reload
  call("/api/next", { rater });
}

at("who").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(at("name").value);
});
for (const button of document.querySelectorAll("[data-choice]")) {
  button.addEventListener("click", () => judge(button.dataset.choice));
}
at("undo").addEventListener("click", undo);
at("leave").addEventListener("click", () => {
  sessionStorage.removeItem("rater");
  location.reload();
});
document.addEventListener("keydown", (event) => {
  if (event.repeat || event.ctrlKey || event.altKey || event.metaKey || event.target instanceof HTMLInputElement) return;
  // Arrows scroll a text that has the focus.
  if (event.key.startsWith("Arrow") && event.target.classList?.contains("text")) return;
  if (event.key in KEYS && position !== null) {
    event.preventDefault();
    judge(KEYS[event.key]);
  } else if (event.key === "u" || event.key === "Backspace") {
    undo();
  }
});
if (sessionStorage.getItem("rater")) begin(sessionStorage.getItem("rater"));
