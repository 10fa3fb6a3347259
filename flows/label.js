// The page of `lifecycle label`. Whatever comes from a model or from data is put in as text, never as markup.
const find = (name) => element.querySelector("." + name);
const KEY = "lifecycle-labeler";
let view = null; // what the server said: labeler, item, done, total, undo
let places = []; // best first; answers (by number) that share a place stand together
let joins = false; // whether the next answer shares the last place
let busy = false;
let shown = 0;

const make = (tag, name, text) => {
  const made = document.createElement(tag);
  made.className = name;
  if (text !== undefined) made.textContent = text;
  return made;
};
const placed = () => places.flat();
const count = () => (view && view.item ? view.item.answers.length : 0);
const unplaced = () => [...Array(count()).keys()].filter((answer) => !placed().includes(answer));
const say = (text, wrong) => {
  find("said").textContent = text;
  find("said").classList.toggle("wrong", Boolean(wrong));
};

const remember = (name) => {
  try { localStorage.setItem(KEY, name); } catch { /* a browser that keeps nothing */ }
};
const remembered = () => {
  try { return localStorage.getItem(KEY) || ""; } catch { return ""; }
};

function remove(answer) {
  places = places.map((place) => place.filter((each) => each !== answer)).filter((place) => place.length);
  if (!places.length) joins = false;
}

function choose(answer) {
  if (placed().includes(answer)) {
    remove(answer);
  } else if (joins) {
    places[places.length - 1].push(answer);
    joins = false;
  } else {
    places.push([answer]);
  }
  draw();
}

// Into the rest, onto the place `at`, or into the gap before it.
function move(answer, where, at) {
  const inside = where !== "rest" && at < places.length;
  const others = inside ? places[at].filter((each) => each !== answer) : [];
  if (inside && !others.length) return; // onto itself
  remove(answer);
  const found = places.findIndex((place) => place.includes(others[0]));
  if (where === "join") places[found].push(answer);
  if (where === "gap") places.splice(found < 0 ? places.length : found, 0, [answer]);
  draw();
}

function card(answer) {
  const made = make("li", "card");
  made.tabIndex = 0;
  made.draggable = true;
  made.dataset.answer = answer;
  made.append(make("kbd", "number", String(answer + 1)), make("span", "text", view.item.answers[answer]));
  made.addEventListener("click", () => {
    if (!String(getSelection())) choose(answer);
  });
  made.addEventListener("dragstart", (event) => event.dataTransfer.setData("text/plain", String(answer)));
  return made;
}

function target(made, where, at) {
  made.addEventListener("dragover", (event) => {
    event.preventDefault();
    event.stopPropagation();
    made.classList.add("over");
  });
  made.addEventListener("dragleave", () => made.classList.remove("over"));
  made.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    made.classList.remove("over");
    const answer = Number.parseInt(event.dataTransfer.getData("text/plain"), 10);
    if (answer >= 0 && answer < count()) move(answer, where, at);
  });
  return made;
}

function draw() {
  const rest = unplaced();
  find("rest").replaceChildren(...rest.map(card));
  find("rest").classList.toggle("empty", !rest.length);
  const order = [];
  places.forEach((place, at) => {
    order.push(target(make("li", "gap"), "gap", at));
    const row = target(make("li", "place"), "join", at);
    const cards = make("ul", "tied");
    cards.append(...place.map(card));
    row.append(make("span", "rank", String(at + 1)), cards);
    order.push(row);
  });
  order.push(target(make("li", "gap last", places.length ? "" : "Press a number, or drag the best answer here."), "gap", places.length));
  find("order").replaceChildren(...order);
  find("tie").disabled = !places.length || !rest.length;
  find("tie").setAttribute("aria-pressed", String(joins));
  find("save").disabled = rest.length > 1;
  find("undo").disabled = !view.undo;
}

function show(next) {
  view = next;
  places = [];
  joins = false;
  shown = performance.now();
  find("who").hidden = true;
  find("top").hidden = false;
  find("name").textContent = view.labeler;
  find("count").textContent = view.done + " of " + view.total;
  find("meter").max = Math.max(view.total, 1);
  find("meter").value = view.done;
  find("work").hidden = !view.item;
  find("end").hidden = Boolean(view.item);
  find("undo-end").hidden = !view.undo;
  if (view.item) {
    find("prompt").textContent = view.item.prompt;
    find("prompt").scrollTop = 0;
    draw();
  }
}

async function ask(name, values, done) {
  if (busy) return;
  busy = true;
  element.setAttribute("aria-busy", "true");
  try {
    const answer = await server[name](values);
    if (answer.error) say(answer.error, true);
    else {
      show(answer);
      say(done);
    }
  } catch {
    say("Not saved: the server does not answer. Start it again, and repeat this here.", true);
  }
  busy = false;
  element.removeAttribute("aria-busy");
}

function judge(verdict, done) {
  const seconds = Math.round(performance.now() - shown) / 1000;
  const ranks = [...Array(count()).keys()].map((answer) => places.findIndex((place) => place.includes(answer)) + 1);
  const { id, answers } = view.item;
  ask("judge", { labeler: view.labeler, item: id, verdict, answers, ranks, seconds }, done);
}

function save() {
  const rest = unplaced();
  if (rest.length > 1) {
    say("Not ranked yet: " + rest.map((answer) => answer + 1).join(", ") + ".", true);
    return;
  }
  if (rest.length) choose(rest[0]);
  judge("ranked", "Saved.");
}

function tie() {
  if (find("tie").disabled) return;
  joins = !joins;
  draw();
}

const bad = () => judge("all bad", "Saved: all bad.");
const skip = () => judge("skipped", "Skipped.");
const undo = () => view.undo && ask("undo", { labeler: view.labeler }, "Taken back: judge it again.");

function back() {
  if (joins) joins = false;
  else if (places.length) remove(placed().at(-1));
  draw();
}

const ACTIONS = { Enter: save, "=": tie, t: tie, b: bad, s: skip, Backspace: back };

function pressed(event) {
  const on = event.target;
  if (!element.isConnected) return document.removeEventListener("keydown", pressed);
  if (!view || event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (/^(INPUT|TEXTAREA|SELECT)$/.test(on.tagName)) return;
  if (event.key === "Enter" && /^(BUTTON|SUMMARY|A)$/.test(on.tagName)) return;
  if (event.key === "u") return void undo();
  if (busy || !view.item) return;
  const answer = "123456789".indexOf(event.key);
  if (event.key === " " && on.classList.contains("card")) choose(Number(on.dataset.answer));
  else if (answer >= 0 && answer < count()) choose(answer);
  else if (ACTIONS[event.key]) ACTIONS[event.key]();
  else return;
  event.preventDefault();
}

function begin(name) {
  ask("view", { labeler: name }, "").then(() => {
    if (view) remember(name);
    else find("who").hidden = false;
  });
}

document.addEventListener("keydown", pressed);
target(find("rest"), "rest", 0);
for (const [name, act] of Object.entries({ save, tie, bad, skip, undo, "undo-end": undo })) {
  find(name).addEventListener("click", (event) => {
    event.currentTarget.blur();
    act();
  });
}
find("who").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(find("labeler").value.trim());
});
find("change").addEventListener("click", () => {
  view = null;
  for (const name of ["top", "work", "end"]) find(name).hidden = true;
  find("who").hidden = false;
  find("labeler").focus();
  say("");
});
const name = props.labeler || remembered();
find("labeler").value = name;
if (name) begin(name);
else find("who").hidden = false;
