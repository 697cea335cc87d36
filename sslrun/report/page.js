"use strict";
// Sort a table by a click on a column's head: numbers from high to low first, words from A to Z.
function prepare() {
  for (const head of document.querySelectorAll("thead th")) {
    const button = document.createElement("button");
    button.textContent = head.textContent || "row";
    head.replaceChildren(button);
    button.addEventListener("click", () => sort(head));
  }
}
function sort(head) {
  const column = head.cellIndex, body = head.closest("table").tBodies[0];
  const numeric = head.classList.contains("number");
  const was = head.getAttribute("aria-sort");
  const descending = was ? was === "ascending" : numeric;
  for (const other of head.parentNode.cells) other.removeAttribute("aria-sort");
  head.setAttribute("aria-sort", descending ? "descending" : "ascending");
  const key = (row) => {
    const cell = row.cells[column];
    return numeric ? (cell.dataset.value === undefined ? NaN : Number(cell.dataset.value)) : cell.textContent;
  };
  const sign = descending ? -1 : 1;
  const rows = [...body.rows].sort((a, b) => {
    const x = key(a), y = key(b);
    if (numeric && (isNaN(x) || isNaN(y))) return isNaN(x) - isNaN(y);
    return sign * (numeric ? x - y : x.localeCompare(y));
  });
  body.append(...rows);
}
prepare();
