"use strict";
(() => {
  const form = document.getElementById("controls"), grid = document.getElementById("cards");
  const cards = [...grid.children].map((element, order) => ({
    element, order, present: JSON.parse(element.dataset.present), predicted: JSON.parse(element.dataset.predicted),
    right: element.dataset.right, sure: Math.abs(Number(element.dataset.sure)), name: element.dataset.name,
    energy: element.dataset.energy === "" ? Infinity : Number(element.dataset.energy),
    layers: [...element.querySelectorAll(".layer")],
  }));
  const by = {
    order: (a, b) => a.order - b.order, sure: (a, b) => a.sure - b.sure || a.order - b.order,
    energy: (a, b) => a.energy - b.energy || a.order - b.order, name: (a, b) => a.name.localeCompare(b.name),
  };
  function wanted(card, of) {
    if (of === "*none") return [];
    const names = of === "*lead" ? [card.element.dataset.lead] : of === "*predicted" ? card.predicted : [of.slice(1)];
    const known = card.layers.filter((layer) => layer.classList.contains("cam")).map((layer) => layer.dataset.of);
    return names.filter((name) => known.includes(name)).slice(0, 1);
  }
  function show() {
    let count = 0;
    for (const card of cards) {
      const finding = form.filter.value.slice(1);
      const there = (!finding || card.present.includes(finding) || card.predicted.includes(finding)) &&
        (!form.right.value || card.right === form.right.value);
      card.element.hidden = !there;
      count += there;
      const of = wanted(card, form.cam.value);
      for (const layer of card.layers) {
        const kind = ["cam", "lungs", "region", "lesion"].find((name) => layer.classList.contains(name));
        const ours = kind === "lungs" || of.includes(layer.dataset.of) || (kind === "lesion" && form.cam.value === "*none");
        layer.classList.toggle("on", ours && (kind === "cam" || form[kind].checked));
      }
      card.element.querySelector(".view").style.setProperty("--opacity", form.opacity.value / 100);
    }
    grid.classList.toggle("boxes", form.box.checked);
    grid.append(...[...cards].sort(by[form.sort.value]).map((card) => card.element));
    form.count.value = `${count} of ${cards.length} shown`;
  }
  form.addEventListener("input", show);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.hidden = false;
  show();
})();
