// htmx puts the server's HTML in its place. This file does the rest: it finds the newer of two cards, switches the
// light, moves cards smoothly, and keeps the keyboard's focus on a card that moves.

const stream = document.getElementById("stream");
const board = document.getElementById("board");
const log = document.getElementById("log");
const toast = document.getElementById("toast");

// --- Newer wins ------------------------------------------------------------------------------------------------
// A card may come twice (as the answer to a click, and by the stream), and a fetched board may cross an event on its
// way. Every change has a number (data-version), so the page can tell which of two cards is newer.

const version = (element) => Number(element?.dataset.version ?? 0);

document.addEventListener("htmx:before:swap", ({ detail: { tasks } }) => {
  remember();
  for (const task of [...tasks]) {
    const arrived = task.fragment.firstElementChild;
    if (arrived?.matches(".columns")) keepNewerCards(arrived);
    if (arrived?.matches(".ticket")) {
      const shown = document.getElementById(arrived.id);
      if (version(arrived) <= Math.max(version(shown), version(board.firstElementChild))) tasks.splice(tasks.indexOf(task), 1);
      else shown?.remove();
    }
  }
});

// A fetched board replaces all cards up to its version. Newer cards stay.
function keepNewerCards(columns) {
  for (const card of board.querySelectorAll(".ticket")) {
    if (version(card) <= version(columns)) continue;
    columns.querySelector(`#${card.id}`)?.remove();
    const list = columns.querySelector(`#${card.parentElement.id}`);
    list[list.id === "collected" ? "prepend" : "append"](card.cloneNode(true));
  }
}

// --- Motion and focus ------------------------------------------------------------------------------------------

const still = matchMedia("(prefers-reduced-motion: reduce)");
let places = new Map(); // where each card was before the swap
let focused = null; // the element with the focus before the swap, if it was on the board

function remember() {
  places = new Map([...board.querySelectorAll(".ticket")].map((card) => [card.id, card.getBoundingClientRect()]));
  const active = document.activeElement;
  focused = board.contains(active) && { ids: [active.id, active.closest(".ticket")?.id], keyboard: active.matches(":focus-visible") };
}

document.addEventListener("htmx:after:swap", () => {
  tidy();
  if (!still.matches) board.querySelectorAll(".ticket").forEach(glide);
  if (focused && document.activeElement === document.body) {
    const again = focused.ids.map((id) => id && document.getElementById(id)).find(Boolean) ?? board;
    again.focus({ preventScroll: !focused.keyboard });
  }
});

function glide(card) {
  const from = places.get(card.id);
  const to = card.getBoundingClientRect();
  if (!from) {
    card.animate([{ opacity: 0, transform: "translateY(-1.5rem) rotate(-2deg)" }, {}], { duration: 350, easing: "ease-out" });
  } else if (from.x !== to.x || from.y !== to.y) {
    const start = `translate(${from.x - to.x}px, ${from.y - to.y}px)`;
    card.animate([{ transform: start, zIndex: 1 }, { transform: "none", zIndex: 1 }], { duration: 450, easing: "cubic-bezier(.2, .9, .25, 1)" });
  }
}

// --- Counts, ages, the log -------------------------------------------------------------------------------------

function tidy() {
  for (const list of board.querySelectorAll("ul")) {
    if (list.id === "collected") [...list.children].slice(4).forEach((card) => card.remove());
  }
  for (const count of document.querySelectorAll("[data-count]")) {
    count.textContent = document.getElementById(count.dataset.count).children.length;
  }
  [...log.children].slice(6).forEach((line) => line.remove());
  for (const time of log.querySelectorAll("time")) {
    time.textContent = new Date(time.dateTime).toLocaleTimeString([], { timeStyle: "medium", hourCycle: "h23" });
  }
  for (const time of board.querySelectorAll("time")) {
    const minutes = Math.floor((Date.now() - new Date(time.dateTime)) / 60000);
    time.textContent = minutes < 1 ? "just now" : minutes < 60 ? `${minutes} min` : `${Math.floor(minutes / 60)} h`;
  }
}
setInterval(tidy, 15000);

function say(text) {
  const line = document.createElement("li");
  const time = document.createElement("time");
  const what = document.createElement("span");
  what.textContent = text;
  time.dateTime = new Date().toISOString();
  line.className = "say";
  line.append(time, what);
  log.prepend(line);
  tidy();
}

// --- The light -------------------------------------------------------------------------------------------------

const words = { connecting: "Connecting…", live: "Live", reconnecting: "Reconnecting…", away: "Database away…" };
const news = { live: "Stream open", reconnecting: "Stream lost, trying again", away: "The server has lost its database" };

function light(state) {
  if (stream.dataset.state === state) return;
  stream.dataset.state = state;
  stream.firstElementChild.textContent = words[state];
  say(news[state]);
}

let connection;
stream.addEventListener("sse-open", () => light("live"));
stream.addEventListener("sse-status", ({ detail }) => light(JSON.parse(detail.data).live ? "live" : "away"));
stream.addEventListener("htmx:sse:before:connection", ({ detail }) => {
  connection = detail.connection;
  if (connection.attempt > 0) light("reconnecting"); // the stream has ended; htmx waits a little and opens a new one
});

// htmx retries a stream that was open once. One that never opened is ours to try again.
for (const failure of ["htmx:error", "htmx:response:error"]) {
  stream.addEventListener(failure, () => {
    light("reconnecting");
    setTimeout(() => htmx.trigger(stream, "reconnect"), 3000);
  });
  board.addEventListener(failure, ({ target }) => {
    if (target === board) setTimeout(() => htmx.trigger(document, "stale"), 3000);
  });
}

// htmx closes the stream of a hidden tab. When the tab is shown again, or the network is back, reconnect at once.
const hurry = () => setTimeout(() => connection?.delayCanceller?.());
document.addEventListener("visibilitychange", hurry);
addEventListener("online", hurry);

// --- The form --------------------------------------------------------------------------------------------------

const form = document.getElementById("order");

form.addEventListener("click", ({ target }) => {
  if (target.dataset.step > 0) form.quantity.stepUp();
  if (target.dataset.step < 0) form.quantity.stepDown();
});

form.addEventListener("htmx:after:request", ({ detail }) => {
  if (detail.ctx.response.status >= 400) return;
  form.note.value = "";
  form.quantity.value = 1;
});

// Show a refusal for 8 s, or until the next request.
let fading;
document.addEventListener("htmx:before:request", ({ target }) => {
  if (target !== stream && target !== board) toast.replaceChildren();
});
toast.addEventListener("htmx:after:settle", () => {
  clearTimeout(fading);
  fading = setTimeout(() => toast.replaceChildren(), 8000);
});

// --- Requests that fail ----------------------------------------------------------------------------------------
document.addEventListener("htmx:error", ({ target }) => {
  if (target !== stream && target !== board) toast.textContent = "That did not reach the kitchen. Is the network there?";
});

tidy();
