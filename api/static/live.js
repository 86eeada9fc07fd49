// What every page shares: fresh parts keep what a person is doing with them, and a lost connection is said.
//
// Parts marked hx-get are asked for again by htmx and morphed in place. What a reader opened (a <details>) stays open,
// what has the focus keeps it. A page in the background does not ask; when it comes back it does so at once.

const banner = document.getElementById("connection");
const polling = "[hx-trigger^='every']";

function say(text) {
  banner.textContent = text;
  banner.hidden = !text;
}

if (window.Idiomorph) {
  window.Idiomorph.defaults.ignoreActiveValue = true;
  window.Idiomorph.defaults.callbacks.beforeAttributeUpdated = (name, node) =>
    !(name === "open" && node.matches("details")) &&
    !(name === "value" && node.matches("input:not([type=hidden])")) &&
    !(name === "hidden" && node.matches("[data-copy]"));
}

document.body.addEventListener("htmx:beforeRequest", (event) => {
  if (document.hidden && event.detail.elt.matches(polling)) event.preventDefault();
});

// A finger between press and release must find the button it pressed.
document.body.addEventListener("htmx:beforeSwap", (event) => {
  if (pressed) event.detail.shouldSwap = false;
});
let pressed = false;
addEventListener("pointerdown", () => (pressed = true), true);
for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => setTimeout(() => (pressed = false), 50), true);

document.addEventListener("visibilitychange", () => {
  if (!document.hidden) document.querySelectorAll(polling).forEach((part) => window.htmx.trigger(part, "refresh"));
});

document.body.addEventListener("htmx:afterRequest", (event) => {
  if (event.detail.successful) say("");
});
document.body.addEventListener("htmx:sendError", () => say("The server does not answer. This page will catch up when it does."));
document.body.addEventListener("htmx:timeout", () => say("The server is slow to answer. This page will catch up when it does."));
document.body.addEventListener("htmx:responseError", (event) => {
  const status = event.detail.xhr.status;
  if (status === 401) return; // on the way to the sign-in page
  if (status === 404) say("What this page shows is no longer there.");
  else if (status === 503) say("The database does not answer. This page will catch up when it does.");
  else say(`The server answered with an error (${status}). It is asked again.`);
});

// An open confirmation closes with Escape, or when another opens.
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  document.querySelectorAll("details.confirm[open]").forEach((box) => {
    box.open = false;
    box.querySelector("summary").focus();
  });
});
document.addEventListener("toggle", (event) => {
  const box = event.target;
  if (!box.matches("details.confirm") || !box.open) return;
  document.querySelectorAll("details.confirm[open]").forEach((other) => {
    if (other !== box) other.open = false;
  });
}, true);

// Copying needs a secure context (localhost or HTTPS): elsewhere there is no button.
function offerCopies() {
  if (navigator.clipboard) document.querySelectorAll("[data-copy][hidden]").forEach((button) => (button.hidden = false));
}
document.addEventListener("click", async (event) => {
  const button = event.target.closest("[data-copy]");
  if (!button) return;
  await navigator.clipboard.writeText(button.parentElement.querySelector("code").textContent);
  button.textContent = "Copied";
  setTimeout(() => (button.textContent = "Copy"), 1500);
});
document.body.addEventListener("htmx:afterSettle", offerCopies);
offerCopies();

// A second press on a button that is on its way changes nothing.
document.addEventListener("submit", (event) => {
  if (event.target.method !== "post") return;
  if (event.target.dataset.sent) event.preventDefault();
  event.target.dataset.sent = "yes";
});
addEventListener("pageshow", () => document.querySelectorAll("form[data-sent]").forEach((form) => delete form.dataset.sent));

document.querySelector("#faults")?.focus();
