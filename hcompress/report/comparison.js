// Without this the page is whole, only longer: panels in a row, tables unsorted, points without words.
document.documentElement.classList.add("js");

// One panel of several at a time.
for (const group of document.querySelectorAll("[data-panels]")) {
  const panels = [...group.children].filter((child) => child.classList.contains("panel"));
  if (panels.length < 2) continue;
  const tabs = document.createElement("div");
  tabs.className = "tabs";
  tabs.setAttribute("role", "tablist");
  const show = (chosen) => {
    panels.forEach((panel, index) => (panel.hidden = index !== chosen));
    [...tabs.children].forEach((tab, index) => tab.setAttribute("aria-selected", index === chosen));
  };
  panels.forEach((panel, index) => {
    const tab = document.createElement("button");
    tab.textContent = panel.dataset.title;
    tab.setAttribute("role", "tab");
    tab.addEventListener("click", () => show(index));
    tabs.append(tab);
  });
  group.prepend(tabs);
  show(Number(group.dataset.panels));
}

// A method's button takes it out of all plots of its group.
for (const key of document.querySelectorAll(".keys button")) {
  key.addEventListener("click", () => {
    const shown = key.getAttribute("aria-pressed") === "false";
    key.setAttribute("aria-pressed", shown);
    for (const mark of key.closest("section").querySelectorAll(`.${key.dataset.series}`))
      mark.style.display = shown ? "" : "none";
  });
}

// A head sorts its table; cells hold their number in data-value, and those without one stay at the end.
for (const head of document.querySelectorAll("table.sortable thead th")) {
  const button = head.querySelector("button");
  button.addEventListener("click", () => {
    const table = head.closest("table"), body = table.tBodies[0], column = head.cellIndex;
    const up = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "descending" : head.dataset.first !== "down";
    for (const other of table.querySelectorAll("th")) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const value = (row) => row.cells[column].dataset.value ?? "";
    const number = (row) => (value(row) === "" || isNaN(value(row)) ? null : Number(value(row)));
    const order = (a, b) => {
      if (number(a) === null || number(b) === null)
        return (number(a) === null) - (number(b) === null) || value(a).localeCompare(value(b)) * (up ? 1 : -1);
      return (number(a) - number(b)) * (up ? 1 : -1);
    };
    for (const row of [...body.rows].sort(order)) (row.classList.remove("starts"), body.append(row));
  });
}

// The nearest point of a plot says what it is.
const tip = document.createElement("div");
tip.className = "tip";
tip.hidden = true;
document.body.append(tip);
for (const plot of document.querySelectorAll(".plots svg")) {
  plot.addEventListener("pointermove", (event) => {
    let nearest = null, least = 28;
    for (const point of plot.querySelectorAll(".pt")) {
      const box = point.getBoundingClientRect();
      const away = Math.hypot(event.clientX - box.x - box.width / 2, event.clientY - box.y - box.height / 2);
      if (box.width && away < least) [nearest, least] = [point, away];
    }
    tip.hidden = !nearest;
    if (!nearest) return;
    tip.textContent = nearest.dataset.tip;
    const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8);
    tip.style.left = `${Math.max(8, left)}px`;
    tip.style.top = `${event.clientY + (event.clientY > innerHeight - 120 ? -tip.offsetHeight - 12 : 16)}px`;
  });
  plot.addEventListener("pointerleave", () => (tip.hidden = true));
}
