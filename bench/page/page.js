// Filters of the tables that are marked for it: a choice per column named in data-filter, and a
// search. Without scripts the tables are whole.
for (const table of document.querySelectorAll("table[data-filter]")) {
  const rows = [...table.tBodies[0].rows];
  const heads = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const box = document.createElement("div");
  box.className = "filters";
  const tests = [];
  const count = document.createElement("span");
  count.className = "soft";

  const field = (name, control) => {
    const label = document.createElement("label");
    label.append(name, control);
    box.append(label);
    control.addEventListener("input", show);
  };

  function show() {
    let shown = 0;
    for (const row of rows) {
      row.hidden = !tests.every((test) => test(row));
      shown += !row.hidden;
    }
    count.textContent = `${shown} of ${rows.length} rows`;
  }

  for (const name of table.dataset.filter.split(",")) {
    const column = heads.indexOf(name);
    const select = document.createElement("select");
    const value = (row) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();
    select.append(new Option("all", ""));
    for (const choice of new Set(rows.map(value))) select.append(new Option(choice, choice));
    tests.push((row) => !select.value || value(row) === select.value);
    field(name, select);
  }
  const search = document.createElement("input");
  search.type = "search";
  tests.push((row) => row.textContent.toLowerCase().includes(search.value.trim().toLowerCase()));
  field("search", search);
  box.append(count);
  table.parentElement.before(box);
  show();
}
