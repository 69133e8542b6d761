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

const form = document.querySelector("form.filters");
form.addEventListener("change", () => filter(form));
// a page that is opened again keeps what was chosen
window.addEventListener("pageshow", () => filter(form));
