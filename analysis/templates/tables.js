// Sorting and filtering of the page's tables, without a library.
(() => {
  const cellKey = (row, column) => {
    const cell = row.cells[column];
    if (cell.classList.contains("number")) return cell.dataset.key === undefined ? null : Number(cell.dataset.key);
    return cell.textContent === "-" ? null : cell.textContent.toLowerCase();
  };
  const sortBy = (table, column, descending) => {
    const body = table.tBodies[0];
    const order = (a, b) => {
      const [x, y] = [cellKey(a, column), cellKey(b, column)];
      if (x === null || y === null) return (x === null) - (y === null);  // missing values come last either way
      return (x < y ? -1 : x > y ? 1 : 0) * (descending ? -1 : 1);
    };
    body.append(...[...body.rows].sort(order));
  };
  for (const table of document.querySelectorAll("table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = head.textContent;
      head.replaceChildren(button);
      button.addEventListener("click", () => {
        const now = head.getAttribute("aria-sort");
        const descending = now ? now === "ascending" : head.classList.contains("number");
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", descending ? "descending" : "ascending");
        sortBy(table, column, descending);
      });
    });
  }
  const board = document.getElementById("board");
  const names = [...board.tHead.rows[0].cells].map((head) => head.dataset.name);
  const bar = document.createElement("div");
  bar.className = "filters";
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "filter by any text";
  search.setAttribute("aria-label", "filter the leaderboard");
  const count = document.createElement("span");
  const choices = ["family", "read", "protocol", "dtype"].filter((name) => names.includes(name)).map((name) => {
    const column = names.indexOf(name);
    const values = [...new Set([...board.tBodies[0].rows].map((row) => row.cells[column]?.textContent))].sort();
    const select = document.createElement("select");
    select.name = name;
    select.setAttribute("aria-label", name);
    select.add(new Option("every " + name, ""));
    values.forEach((value) => select.add(new Option(value, value)));
    select.hidden = values.length < 2;
    return [column, select];
  });
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let shown = 0;
    for (const row of board.tBodies[0].rows) {
      const text = row.textContent.toLowerCase();
      const matches = words.every((word) => text.includes(word))
        && choices.every(([column, select]) => !select.value || row.cells[column].textContent === select.value);
      row.hidden = !matches;
      shown += matches;
    }
    count.textContent = `${shown} of ${board.tBodies[0].rows.length}`;
  };
  bar.append(search, ...choices.map(([, select]) => select), count);
  bar.addEventListener("input", filter);
  board.closest(".scroll").before(bar);
  filter();
})();
