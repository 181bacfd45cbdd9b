// Each heading of a table.sortable becomes a button that sorts by its column. Without script the headings stay text.
"use strict";
// 63.2, 63.2 ± 1.1 and 61.6 † go by what they begin with, 1,234 by 1234.
const number = /^[+\-–−]?[\d,]*\.?\d+(e[+\-]?\d+)?(?=[\s,;]|$)/;
const keyOf = (row, column) => {
  const text = row.cells[column].textContent.trim();
  const found = text.match(number);
  return { text, value: found && Number(found[0].replaceAll(",", "").replace(/^[–−]/, "-")) };
};
// Numbers before words, whichever way they are sorted.
const compare = (a, b, sign) => {
  if (a.value !== null && b.value !== null) return sign * (a.value - b.value);
  if (a.value !== null || b.value !== null) return a.value !== null ? -1 : 1;
  return sign * a.text.localeCompare(b.text, "en", { numeric: true });
};
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
      const absent = (key) => key.text === "–" || key.text === "";
      // Equal ones keep their order, whichever way; cells without a value come last either way.
      const keyed = [...table.tBodies[0].rows].map((row) => ({ row, key: keyOf(row, column) }));
      keyed.sort(({ key: a }, { key: b }) => absent(a) - absent(b) || compare(a, b, sign));
      table.tBodies[0].append(...keyed.map(({ row }) => row));
    });
  });
}
