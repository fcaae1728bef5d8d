"use strict";

// Tables: a header sorts its column, numbers in descending order first; missing values stay last.
for (const table of document.querySelectorAll("table.sortable")) {
  const headers = [...table.tHead.rows[0].cells];
  const body = table.tBodies[0];
  headers.forEach((header, column) => header.firstElementChild.addEventListener("click", () => {
    const numeric = header.dataset.kind === "number";
    const first = numeric ? "descending" : "ascending";
    const other = numeric ? "ascending" : "descending";
    const direction = header.ariaSort === first ? other : first;
    headers.forEach((each) => { each.ariaSort = each === header ? direction : "none"; });
    const sign = direction === "ascending" ? 1 : -1;
    const value = (row) => row.cells[column].dataset.value;
    const compare = (a, b) => {
      if (a === "" || b === "") return (a === "") - (b === "");
      return sign * (numeric ? Number(a) - Number(b) : a.localeCompare(b));
    };
    body.append(...[...body.rows].sort((a, b) => compare(value(a), value(b))));
  }));
}

// Filter by category.
const cases = [...document.querySelectorAll(".case")];
const filters = [...document.querySelectorAll(".filter button")];
for (const filter of filters) {
  filter.addEventListener("click", () => {
    const wanted = filter.dataset.category;
    filters.forEach((each) => each.setAttribute("aria-pressed", each === filter));
    cases.forEach((each) => { each.hidden = wanted !== "" && each.dataset.category !== wanted; });
    const count = cases.filter((each) => !each.hidden).length;
    document.getElementById("shown").textContent = `${count} of ${cases.length} prompts shown`;
  });
}

// Image viewer: left and right step to neighbours, up and down to the same place in another prompt, Escape closes.
const viewer = document.getElementById("viewer");
if (viewer) {
  const details = JSON.parse(document.getElementById("details").textContent);
  const part = (name) => document.getElementById(name);
  let current = null;

  const visible = () => [...document.querySelectorAll(".case:not([hidden]) .shot")];

  const show = (shot) => {
    current = shot;
    const detail = details[shot.dataset.id];
    const image = shot.querySelector("img");
    part("viewer-image").src = image.src;
    part("viewer-image").alt = image.alt;
    part("viewer-image").className = image.naturalWidth <= 128 ? "small" : "";
    part("viewer-category").textContent = filters.length ? detail.category : "";
    part("viewer-prompt").textContent = detail.prompt;
    part("viewer-method").textContent = detail.method;
    part("viewer-sample").textContent = detail.sample;
    part("viewer-badge").textContent = detail.badge;
    part("viewer-badge").className = `verdict-badge ${detail.kind}`;
    part("viewer-scores").replaceChildren(...detail.scores.flatMap(([name, value]) => {
      const term = document.createElement("dt");
      const definition = document.createElement("dd");
      term.textContent = name;
      definition.textContent = value;
      return [term, definition];
    }));
    const shots = visible();
    part("position").textContent = `${shots.indexOf(shot) + 1} of ${shots.length}`;
  };

  const step = (by) => {
    const shots = visible();
    show(shots[(shots.indexOf(current) + by + shots.length) % shots.length]);
  };

  const stepPrompt = (by) => {
    const rows = cases.filter((each) => !each.hidden);
    const row = current.closest(".case");
    const place = [...row.querySelectorAll(".shot")].indexOf(current);
    const shots = rows[(rows.indexOf(row) + by + rows.length) % rows.length].querySelectorAll(".shot");
    if (shots.length) show(shots[Math.min(place, shots.length - 1)]);
  };

  for (const shot of document.querySelectorAll(".shot")) {
    shot.addEventListener("click", () => { show(shot); viewer.showModal(); });
  }
  part("previous").addEventListener("click", () => step(-1));
  part("next").addEventListener("click", () => step(1));
  part("close").addEventListener("click", () => viewer.close());
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  viewer.addEventListener("close", () => current.focus());
  viewer.addEventListener("keydown", (event) => {
    const act = {
      ArrowLeft: () => step(-1), ArrowRight: () => step(1), ArrowUp: () => stepPrompt(-1), ArrowDown: () => stepPrompt(1),
    }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  window.addEventListener("beforeprint", () => { if (viewer.open) viewer.close(); });
}
