"use strict";
// tables whose headings are buttons are sorted by them: numbers from the largest, names from A
document.querySelectorAll("table.sortable").forEach((table) => {
  const body = table.tBodies[0];
  table.querySelectorAll("thead button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const heading = button.parentElement;
      const up = heading.getAttribute("aria-sort") === "descending" || column === 0
        ? heading.getAttribute("aria-sort") !== "ascending" : false;
      table.querySelectorAll("thead th").forEach((th) => th.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", up ? "ascending" : "descending");
      const cell = (row) => row.cells[column];
      const key = (row) => cell(row).dataset.value === undefined ? cell(row).textContent : Number(cell(row).dataset.value);
      const order = (a, b) => (key(a) > key(b) ? 1 : key(a) < key(b) ? -1 : 0) * (up ? 1 : -1);
      body.append(...[...body.rows].sort(order));
    });
  });
});
