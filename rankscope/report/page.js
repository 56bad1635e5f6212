"use strict";
// Tables are sorted by their headers and filtered by a word; without this script they stand as they were written.
(() => {
  const names = new Intl.Collator("en", { numeric: true });
  const orders = { none: "ascending", ascending: "descending", descending: "none" };
  const shortest = 16; // rows from which a table can be filtered, as LONG in page.py

  // Numbers before words, what is empty last, whichever way.
  function compare(a, b, column, way) {
    const [x, y] = [a.cells[column], b.cells[column]];
    const kind = (cell) => ("v" in cell.dataset ? 0 : "none" in cell.dataset ? 2 : 1);
    if (kind(x) !== kind(y)) return kind(x) - kind(y);
    if (kind(x) === 0) return way * (Number(x.dataset.v) - Number(y.dataset.v));
    return kind(x) === 1 ? way * names.compare(x.textContent, y.textContent) : 0;
  }

  function sort(table, rows, header) {
    const order = orders[header.getAttribute("aria-sort")];
    for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
    header.setAttribute("aria-sort", order);
    const way = order === "ascending" ? 1 : -1;
    const sorted = order === "none" ? rows : [...rows].sort((a, b) => compare(a, b, header.cellIndex, way));
    table.tBodies[0].append(...sorted);
  }

  function addSorting(table, rows) {
    for (const header of table.tHead.rows[0].cells) {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...header.childNodes);
      button.addEventListener("click", () => sort(table, rows, header));
      header.append(button);
      header.setAttribute("aria-sort", "none");
    }
  }

  function addFilter(table, rows) {
    const label = document.createElement("label");
    const input = document.createElement("input");
    const count = document.createElement("span");
    const tools = document.createElement("span");
    input.type = "search";
    count.setAttribute("role", "status");
    const texts = rows.map((row) => row.textContent.toLowerCase());
    const show = () => {
      const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      let shown = 0;
      rows.forEach((row, i) => {
        row.hidden = !words.every((word) => texts[i].includes(word));
        shown += row.hidden ? 0 : 1;
      });
      count.textContent = words.length ? `${shown} of ${rows.length} rows` : `${rows.length} rows`;
    };
    input.addEventListener("input", show);
    label.append("Filter", input);
    tools.className = "tools";
    tools.append(label, count);
    table.caption.append(tools);
    show();
  }

  for (const table of document.querySelectorAll("table")) {
    const rows = [...table.tBodies[0].rows];
    if (rows.length > 1) addSorting(table, rows);
    if (rows.length >= shortest) addFilter(table, rows);
  }
})();
