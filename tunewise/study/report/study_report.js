document.documentElement.classList.add("js");
{
  const specifications = JSON.parse(document.getElementById("charts").textContent);
  const picked = new Set(), views = [], legend = document.querySelectorAll(".legend button");
  const show = view => view.signal("picked", [...picked]).runAsync();

  // Drawn when it is first seen: a hidden box has no width. If that fails, the still picture stays.
  const draw = async figure => {
    if (figure.classList.contains("drawn")) return;
    figure.classList.add("drawn");
    try {
      const { view } = await vegaEmbed(figure.querySelector(".live"), specifications[figure.dataset.chart], {
        mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false,
        tooltip: { disableDefaultStyle: true },
      });
      views.push(view);
      await show(view);
    } catch (error) {
      figure.classList.remove("drawn");
      throw error;
    }
  };

  for (const button of legend) button.addEventListener("click", () => {
    const key = Number(button.dataset.key);
    picked.delete(key) || picked.add(key);
    for (const b of legend) b.setAttribute("aria-pressed", picked.has(Number(b.dataset.key)));
    views.forEach(show);
  });

  const tabs = document.querySelectorAll(".tabs button");
  for (const tab of tabs) tab.addEventListener("click", () => {
    for (const t of tabs) {
      const on = t === tab, pane = document.getElementById(t.getAttribute("aria-controls"));
      t.setAttribute("aria-pressed", on);
      pane.classList.toggle("on", on);
      if (on) draw(pane);
    }
  });

  document.querySelectorAll("figure[data-chart]").forEach(figure => figure.offsetParent && draw(figure));
}
for (const button of document.querySelectorAll("button.copy")) button.addEventListener("click", () => {
  // Selected first, so that it can be copied by hand where the browser does not allow it.
  getSelection().selectAllChildren(button.parentElement.querySelector("code"));
  button.textContent = document.execCommand("copy") ? "Copied" : "Selected";
});

// Paper cannot be unfolded.
const folded = [];
addEventListener("beforeprint", () => folded.push(...document.querySelectorAll("details:not([open])")));
addEventListener("beforeprint", () => folded.forEach(details => details.open = true));
addEventListener("afterprint", () => folded.splice(0).forEach(details => details.open = false));
