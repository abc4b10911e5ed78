function (id) {
  // Sorts the table with this id by the column whose head is clicked.
  const table = document.getElementById(id);
  if (!table) return;
  const heads = table.querySelectorAll("thead th");
  heads.forEach((head, column) => {
    head.classList.add("memo-sorts");
    head.tabIndex = 0;
    head.title = "Sort";
    const value = (row) => {
      const text = row.cells[column].dataset.v;
      const number = Number(text);
      return text === "" ? -Infinity : Number.isNaN(number) ? text : number;
    };
    const sort = () => {
      const old = head.getAttribute("aria-sort");
      const up = old ? old === "descending" : !column;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const body = table.tBodies[0];
      Array.from(body.rows)
        .sort((a, b) => {
          const [x, y] = [value(a), value(b)];
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        })
        .forEach((row) => body.appendChild(row));
    };
    head.addEventListener("click", sort);
    head.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      sort();
    });
  });
}
