"use strict";
function key(row, column) {
  const text = row.children[column].dataset.value;
  const number = text === "" ? NaN : Number(text);
  return { text, number };
}
function compare(a, b, sign) {
  if (a.text === "" || b.text === "") return (a.text === "") - (b.text === ""); // unknown stays last
  const both = !Number.isNaN(a.number) && !Number.isNaN(b.number);
  return sign * (both ? a.number - b.number : a.text.localeCompare(b.text));
}
for (const button of document.querySelectorAll("th[aria-sort] button")) {
  button.addEventListener("click", () => {
    const head = button.closest("th"), table = button.closest("table"), body = table.tBodies[0];
    const column = Array.prototype.indexOf.call(head.parentNode.children, head);
    const orders = ["descending", "ascending"];
    if (head.dataset.first === "ascending") orders.reverse();
    const order = orders[head.getAttribute("aria-sort") === orders[0] ? 1 : 0];
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    head.setAttribute("aria-sort", order);
    const sign = order === "ascending" ? 1 : -1;
    const rows = Array.from(body.rows, (row) => ({ row, key: key(row, column) }));
    rows.sort((a, b) => compare(a.key, b.key, sign));
    body.append(...rows.map((entry) => entry.row));
  });
}
window.addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("details")) part.open = true;
});
