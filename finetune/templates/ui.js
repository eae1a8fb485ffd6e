// The page without reloads: a form's answer replaces what is shown, and what runs is looked at again every two seconds.
// What somebody is typing meanwhile stays. All state is in the address and on the server's disk.
"use strict";

const POLL_MS = 2000;
let chain = Promise.resolve();
const sentParts = new Map(); // by id, what the server sent last of the parts that live

const main = () => document.getElementById("main");
const fields = (root) => root.querySelectorAll("input[id], textarea[id], select[id]");

function remember(root) {
  for (const part of root.querySelectorAll("[data-live]")) sentParts.set(part.id, part.innerHTML);
}

function isDirty(field) {
  if (field.type === "file") return field.files.length > 0;
  if (field.type === "checkbox") return field.checked !== field.defaultChecked;
  if (field.tagName === "SELECT") return [...field.options].some((option) => option.selected !== option.defaultSelected) && [...field.options].some((option) => option.defaultSelected);
  return field.value !== field.defaultValue;
}

function replace(html, sent) {
  const next = new DOMParser().parseFromString(html, "text/html").getElementById("main");
  if (!next) { fail(html); return; }
  remember(next);
  const old = main(), focus = document.activeElement, selection = focus && [focus.selectionStart, focus.selectionEnd];
  for (const box of old.querySelectorAll("details[id]")) {
    const same = next.querySelector(`#${CSS.escape(box.id)}`);
    if (same) same.open = box.open;
  }
  for (const field of fields(old)) {
    const same = next.querySelector(`#${CSS.escape(field.id)}`);
    if (!same || !isDirty(field) || (sent && sent.contains(field)) || field.type === "file") continue;
    if (field.type === "checkbox") same.checked = field.checked; else same.value = field.value;
  }
  old.replaceWith(next);
  const again = focus && focus.id && document.getElementById(focus.id);
  if (again) {
    again.focus({ preventScroll: true });
    try { again.setSelectionRange(...selection); } catch { /* a list has no cursor */ }
  }
  if (next.querySelector("[role=alert]")) next.querySelector("[role=alert]").scrollIntoView({ block: "nearest" });
}

function fail(text) {
  const box = document.createElement("pre");
  box.className = "box fault";
  box.setAttribute("role", "alert");
  box.textContent = text.slice(0, 2000);
  main().prepend(box);
}

async function ask(url, options, sent) {
  try {
    const response = await fetch(url, options);
    const text = await response.text();
    if (!(response.headers.get("content-type") || "").startsWith("text/html")) { fail(text); return; }
    if (response.redirected || !options.body) history.pushState(null, "", response.url);
    replace(text, sent);
  } catch {
    fail("The page's server does not answer. What runs goes on; start `finetune ui` again and reload.");
  }
}

// One after the other: a field's change is made to the file that the change before has left.
const enqueue = (work) => { chain = chain.then(work); return chain; };

document.addEventListener("submit", (event) => {
  const form = event.target, button = event.submitter;
  event.preventDefault();
  if (form.dataset.sent) return; // Enter is a change and a submission
  form.dataset.sent = "1";
  const done = () => delete form.dataset.sent;
  if (form.getAttribute("method") !== "post") { // not form.method: a field may have that name
    const query = new URLSearchParams(new FormData(form));
    enqueue(() => ask(`${form.getAttribute("action")}?${query}`, {}, form)).then(done);
    return;
  }
  const data = new FormData(form);
  if (button && button.name) data.set(button.name, button.value);
  const body = form.getAttribute("enctype") === "multipart/form-data" ? data : new URLSearchParams(data);
  enqueue(() => ask(form.getAttribute("action"), { method: "POST", body }, form)).then(done);
});

document.addEventListener("change", (event) => {
  const form = event.target.closest("form[data-auto]");
  if (form) form.requestSubmit();
});

addEventListener("popstate", () => location.reload());

async function poll() {
  if (main().hasAttribute("data-poll") && !document.hidden) {
    try {
      const response = await fetch(location.href, { headers: { "x-finetune-again": "1" } });
      const next = new DOMParser().parseFromString(await response.text(), "text/html").getElementById("main");
      if (next) {
        main().toggleAttribute("data-poll", next.hasAttribute("data-poll"));
        for (const part of next.querySelectorAll("[data-live]")) {
          const old = document.getElementById(part.id);
          if (!old || sentParts.get(part.id) === part.innerHTML || old.contains(document.activeElement)) continue;
          sentParts.set(part.id, part.innerHTML);
          old.replaceWith(part);
        }
        for (const log of document.querySelectorAll(".log")) if (document.activeElement !== log) log.scrollTop = log.scrollHeight;
      }
    } catch { /* the next look may be answered */ }
  }
  setTimeout(poll, POLL_MS);
}
remember(document);
setTimeout(poll, POLL_MS);
