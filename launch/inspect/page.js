"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const $ = id => document.getElementById(id);
const MODES = { plain: "plain", think: "thinking", no_think: "no thinking" };
const weights = new Set(data.samples.flatMap(one => [...new Set(one.weights || [])].filter(Boolean)));
const weightsDiffer = weights.size > 1;
const largest = Math.max(...weights, 0) || 1;

function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

function fillTable(table, rows) {
  rows.forEach((cells, at) => {
    const row = table.appendChild(make("tr", cells[0].startsWith("all of ") ? "all" : ""));
    cells.forEach(cell => row.appendChild(make(at ? "td" : "th", "", cell)));
  });
}

function factList(facts) {
  const list = make("dl");
  let before = "";
  for (const [label, what, more] of facts) {
    list.appendChild(make("dt", "", label === before ? "" : label));
    const value = list.appendChild(make("dd", "", what));
    if (more) value.append(what ? "  " : "", make("span", what ? "quiet more" : "quiet", more));
    before = label;
  }
  return list;
}

function card(title, kind, facts, lengths) {
  const node = make("section", "card");
  node.append(make("h2", "", title), make("div", "quiet", kind));
  if (lengths) {
    const bars = node.appendChild(make("div", "bars"));
    const highest = Math.max(...lengths.histogram.map(bin => bin[2]));
    for (const [first, last, number] of lengths.histogram) {
      const bar = bars.appendChild(make("i"));
      bar.style.height = number ? Math.max(3, 100 * number / highest) + "%" : "0";
      bar.dataset.tip = `${first.toLocaleString("en")} to ${last.toLocaleString("en")} tokens: ${number.toLocaleString("en")} samples`;
    }
    const axis = node.appendChild(make("div", "axis"));
    axis.append(make("span", "", lengths.min.toLocaleString("en")), make("span", "", `median ${lengths.median.toLocaleString("en")}, 95% up to ${lengths.p95.toLocaleString("en")}`), make("span", "", lengths.max.toLocaleString("en") + " tokens"));
  }
  node.appendChild(factList(facts));
  return node;
}

function tokenNodes(tokens, weights, hits) {
  const all = document.createDocumentFragment();
  let place = 0;
  tokens.forEach(([text, ids], at) => {
    const weight = weights ? weights[at] : 0;
    const node = make("span", "t");
    if (weight) {
      node.classList.add("trained");
      if (weightsDiffer) node.style.setProperty("--shade", (0.07 + 0.43 * weight / largest).toFixed(3));
    }
    if (ids < 0) node.classList.add("control");
    const end = place + text.length;
    if (hits.some(([from, to]) => from < end && to > place)) node.classList.add("hit");
    text.split("\n").forEach((line, number) => {
      if (number) node.append(make("u", "", "↵"), "\n");
      if (line) node.append(line);
    });
    const named = Array.isArray(ids) ? ids.join(" + ") : Math.abs(ids);
    node.dataset.tip = `id ${named}${weights ? weight ? `, weight ${weight}` : ", not trained" : ""}`;
    all.append(node);
    place = end;
  });
  return all;
}

function hitsOf(text, query) {
  const found = [];
  if (query) for (let at = text.indexOf(query); at >= 0; at = text.indexOf(query, at + query.length)) found.push([at, at + query.length]);
  return found;
}

function side(name, className, content) {
  const node = make("div", "side " + className);
  node.appendChild(make("div", "name", name));
  node.appendChild(content);
  return node;
}

function build(one) {
  const node = one.node;
  if (one.reason) {
    node.appendChild(make("div", "row", one.row));
    return;
  }
  const query = $("q").value.toLowerCase();
  const sides = make("div", "sides");
  const own = make("div", "tokens");
  own.append(tokenNodes(one.tokens, one.weights, hitsOf(one.text, query)));
  const fed = make("div", "tokens");
  const prompt = typeof one.prompt === "number" ? one.tokens.slice(0, one.prompt) : one.prompt;
  fed.append(tokenNodes(prompt, null, []), make("span", "here", "the model answers here"));
  sides.append(side("trained", "", own), side("fed by serving for the last turn", "fed", fed));
  node.appendChild(sides);
  const served = node.appendChild(make("div", "served"));
  for (const [equal, sentence] of one.served) {
    const line = served.appendChild(make("div"));
    line.append(make("span", equal ? "ok" : "no", equal ? "✓ " : "✗ "), sentence);
  }
}

function empty(one) {
  while (one.node.children.length > 1) one.node.lastChild.remove();
  one.built = false;
}

const near = new IntersectionObserver(entries => {
  for (const entry of entries) {
    const one = data.samples[entry.target.dataset.at];
    if (entry.isIntersecting && !one.built) {
      one.built = true;
      one.node.style.minHeight = "";
      build(one);
    }
  }
}, { rootMargin: "900px" });

function list() {
  data.samples.forEach((one, at) => {
    one.text = (one.reason ? one.row : one.tokens.map(token => token[0]).join("")).toLowerCase();
    const node = one.node = make("article", "card sample");
    node.dataset.at = at;
    node.style.minHeight = "120px";
    const top = node.appendChild(make("div", "top"));
    top.appendChild(make("span", "place", one.place));
    if (one.reason) top.appendChild(make("span", "reason", "dropped: " + one.reason));
    else top.appendChild(make("span", "about", [`${one.num_tokens.toLocaleString("en")} tokens, ${one.num_trained.toLocaleString("en")} trained`, one.of_row, one.mode === "plain" ? "" : MODES[one.mode]].filter(Boolean).join(" · ")));
    $("samples").appendChild(node);
    near.observe(node);
  });
}

function filter(isTyped) {
  const query = $("q").value.toLowerCase(), source = $("source").value, mode = $("mode").value, state = $("state").value;
  let shown = 0;
  for (const one of data.samples) {
    const fits = (!query || one.text.includes(query) || one.place.toLowerCase().includes(query))
      && (!source || String(one.source) === source) && (!mode || one.mode === mode)
      && (!state || (state === "dropped") === Boolean(one.reason));
    one.node.hidden = !fits;
    shown += fits;
    if (one.built && one.query !== query) empty(one);
    one.query = query;
    if (!one.built) { near.unobserve(one.node); near.observe(one.node); }
  }
  document.body.classList.toggle("beside", $("beside").checked);
  $("count").textContent = `${shown.toLocaleString("en")} of ${data.samples.length.toLocaleString("en")} shown`;
  $("none").hidden = shown > 0;
  if (isTyped) history.replaceState(null, "", "#" + new URLSearchParams(Object.entries({ q: $("q").value, source, mode, state, beside: $("beside").checked ? "1" : "" }).filter(([, value]) => value)));
}

function readHash() {
  const wanted = new URLSearchParams(location.hash.slice(1));
  for (const id of ["q", "source", "mode", "state"]) $(id).value = wanted.get(id) || "";
  $("beside").checked = wanted.get("beside") === "1";
  filter(false);
}

function tips() {
  const tip = $("tip");
  document.addEventListener("pointerover", event => {
    const node = event.target.closest ? event.target.closest("[data-tip]") : null;
    tip.hidden = !node;
    if (!node) return;
    tip.textContent = node.dataset.tip;
    const box = (node.getClientRects()[0] || node.getBoundingClientRect());
    tip.style.left = Math.max(4, Math.min(box.left, innerWidth - tip.offsetWidth - 6)) + "px";
    tip.style.top = (box.top > 40 ? box.top - tip.offsetHeight - 6 : box.bottom + 6) + "px";
  });
  document.addEventListener("scroll", () => { tip.hidden = true; }, true);
}

$("title").textContent = data.name;
const kept = data.samples.filter(one => !one.reason).length, dropped = data.samples.length - kept;
const some = (shown, all, what) => all === 0 ? "" : shown >= all ? `all ${all.toLocaleString("en")} ${what}` : `${shown.toLocaleString("en")} of ${all.toLocaleString("en")} ${what}`;
$("said").textContent = "On this page: " + [some(kept, data.num_samples, "samples"), some(dropped, data.num_dropped, "dropped")].filter(Boolean).join(", ") + (kept < data.num_samples ? "; spread evenly over the sources." : ".");
fillTable($("overview"), data.overview);
data.sources.forEach((source, at) => {
  $("sources").appendChild(card(source.name, source.kind, source.facts, source.lengths));
  const option = $("source").appendChild(make("option", "", source.name));
  option.value = at;
});
$("sources").appendChild(card("Packing", "of the first epoch", data.packing));
if (data.mixture.length) { $("mixed").hidden = false; fillTable($("mixture"), data.mixture); }
for (const mode of [...new Set(data.samples.map(one => one.mode).filter(Boolean))].sort()) {
  const option = $("mode").appendChild(make("option", "", MODES[mode]));
  option.value = mode;
}
list();
$("about").open = innerWidth > 700 && !location.hash;
readHash();
tips();
$("deeper").hidden = !weightsDiffer;
for (const id of ["q", "source", "mode", "state", "beside"]) $(id).addEventListener("input", () => filter(true));
addEventListener("hashchange", readHash);
document.body.dataset.ready = "1";
