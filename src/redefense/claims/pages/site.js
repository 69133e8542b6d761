"use strict";
const valueOf = (row, column) => row.cells[column].dataset.value;

function sort(table, column) {
  const head = table.tHead.rows[0].cells[column];
  const first = head.dataset.first || "descending";
  const second = first === "ascending" ? "descending" : "ascending";
  const order = head.ariaSort === first ? second : first;
  for (const cell of table.tHead.rows[0].cells) cell.ariaSort = "none";
  head.ariaSort = order;
  const sign = order === "ascending" ? 1 : -1;
  const compare = (a, b) => {
    const [one, other] = [valueOf(a, column), valueOf(b, column)];
    // what is unknown comes last either way
    if (one === "" || other === "") return (one === "") - (other === "");
    const numbers = Number(one) - Number(other);
    return sign * (Number.isNaN(numbers) ? one.localeCompare(other) : numbers);
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
}

function filter(form) {
  const wanted = Object.fromEntries(new FormData(form));
  let any = false;
  for (const group of document.querySelectorAll("section.group")) {
    const of = group.dataset;
    const fits = (key, values) => !wanted[key] || values.includes(wanted[key]);
    const there = fits("data", [of.data]) && fits("threat", [of.threat]) && fits("suite", of.suite.split("|"));
    let shown = false;
    for (const row of group.querySelectorAll("tbody tr")) {
      row.hidden = !fits("kind", [row.dataset.kind]);
      shown ||= !row.hidden;
      for (const point of group.querySelectorAll(`[data-row="${row.dataset.row}"].point`)) {
        point.style.display = row.hidden ? "none" : "";
      }
    }
    group.hidden = !(there && shown);
    any ||= !group.hidden;
  }
  document.querySelector(".none").hidden = any;
}

for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const cell = button.closest("th");
    sort(cell.closest("table"), cell.cellIndex);
  });
}
const form = document.querySelector("form.filters");
form.addEventListener("change", () => filter(form));
// a page that is opened again keeps what was chosen
window.addEventListener("pageshow", () => filter(form));
