"use strict";

// Tables: a click, Enter or space on a heading sorts by its column; the next one turns the order; equal rows keep theirs.
function sortBy(heading) {
  const table = heading.closest("table"), body = table.tBodies[0];
  const current = heading.getAttribute("aria-sort");
  const turned = { ascending: "descending", descending: "ascending" };
  const order = turned[current] || heading.dataset.first;
  for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", order);
  const key = (row) => row.cells[heading.cellIndex].dataset.sort;
  const compare = (a, b) => {
    const [x, y] = [key(a), key(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // what is missing stays last
    const difference = isNaN(x) || isNaN(y) ? x.localeCompare(y, "en") : Number(x) - Number(y);
    return order === "ascending" ? difference : -difference;
  };
  body.append(...[...body.rows].sort(compare));
}
for (const button of document.querySelectorAll("th[aria-sort] button")) {
  button.addEventListener("click", () => sortBy(button.closest("th")));
}

// Theme: the system's until the button is pressed.
const root = document.documentElement, button = document.getElementById("theme");
const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
const name = () => { button.textContent = isDark() ? "Light" : "Dark"; };
button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; name(); });
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", name);
button.hidden = false;
name();

// What is wider than its box says so above it, as long as it does not fit.
const hints = new Map();
for (const box of document.querySelectorAll(".scroll")) {
  const hint = document.createElement("p");
  hint.className = "swipe";
  hint.textContent = "↔ wider than the screen: swipe or scroll sideways";
  hint.hidden = true;
  box.before(hint);
  hints.set(box, hint);
}
const watch = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const wider = target.scrollWidth > target.clientWidth + 1;
    target.classList.toggle("wider", wider);
    hints.get(target).hidden = !wider;
  }
});
for (const box of hints.keys()) watch.observe(box);

// A link into a folded part opens it; printing opens all.
const unfold = () => {
  const target = location.hash && document.getElementById(decodeURIComponent(location.hash.slice(1)));
  for (let part = target; part; part = part.parentElement) if (part.tagName === "DETAILS") part.open = true;
};
addEventListener("hashchange", unfold);
addEventListener("beforeprint", () => { for (const part of document.querySelectorAll("details")) part.open = true; });
unfold();
