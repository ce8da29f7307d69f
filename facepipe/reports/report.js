// The list of groups: filter, kinds, order, pages, colours.
(() => {
  const $ = (id) => document.getElementById(id);
  const root = document.documentElement;
  const count = new Intl.NumberFormat("en");
  // Controls, and characters that make text run the other way or hide, are spelt out; so are halves of surrogate pairs.
  const HIDDEN = /[\u0000-\u001f\u007f-\u009f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]/gu;
  const visible = (text) => text.replace(HIDDEN, (c) => "\\u{" + c.codePointAt(0).toString(16) + "}");

  const head = JSON.parse($("report").textContent);
  const groups = JSON.parse($("data").textContent);
  const summary = JSON.parse($("summary").textContent);
  // A page that `facepipe review` serves says so; a file does not.
  const server = $("server") ? JSON.parse($("server").textContent) : null;
  groups.forEach((group, n) => {
    group.rank = n + 1 + (server ? server.part * server.per_part : 0);
    group.size = group.faces.length + group.more;
  });
  const kinds = new Map();
  for (const { kind } of groups) kinds.set(kind, (kinds.get(kind) || 0) + 1);
  const hue = new Map([...kinds.keys()].map((kind, n) => [kind, "c" + (n % 6)]));
  const named = (kind) => visible(kind) || "other";

  const folder = shared();

  const orders = {
    suspicion: [...groups].sort((a, b) => b.suspicion - a.suspicion),
    largest: [...groups].sort((a, b) => b.size - a.size),
  };
  const state = { text: "", kind: null, sort: "suspicion", size: 24, page: 1, open: false };
  let chosen = groups;

  // Text gets into the page through textContent and attributes' setters only, never as markup.
  function make(tag, name, text) {
    const element = document.createElement(tag);
    if (name) element.className = name;
    if (text !== undefined) element.textContent = visible(text);
    return element;
  }

  // The folder that all faces' images are in; it is said once and left out of every tile.
  function shared() {
    const uris = groups.flatMap((group) => group.faces.map((face) => face.uri));
    let prefix = uris.length > 1 ? uris[0].slice(0, uris[0].lastIndexOf("/") + 1) : "";
    for (const uri of uris) {
      while (!uri.startsWith(prefix)) prefix = prefix.slice(0, prefix.slice(0, -1).lastIndexOf("/") + 1);
    }
    return prefix;
  }

  function pairs(figures) {
    const list = make("dl", "pairs");
    for (const [name, value] of figures) {
      const row = make("div");
      row.append(make("dt", "", name), make("dd", "", value));
      list.append(row);
    }
    return list;
  }

  function address(uri) {
    const text = visible(uri.slice(folder.length));
    let cut = Math.max(0, text.length - 12);
    if (/[\udc00-\udfff]/.test(text.charAt(cut))) cut += 1;
    const whole = make("div", "uri");
    whole.title = visible(uri);
    whole.append(make("span", "head", text.slice(0, cut)), make("span", "tail", text.slice(cut)));
    return whole;
  }

  const hasPicture = (face) => Boolean(face.jpeg || (server && face.id));
  const describe = (face) => "Face in " + visible(face.uri).split("/").pop().slice(-60);

  function picture(face) {
    const frame = make("span", "frame");
    if (!hasPicture(face)) {
      frame.append(make("span", "none"));
      return frame;
    }
    const image = make("img");
    image.alt = describe(face);
    image.decoding = "async";
    image.loading = server ? "lazy" : "eager";
    image.src = face.jpeg ? "data:image/jpeg;base64," + face.jpeg : "thumb/" + face.id;
    frame.append(image);
    return frame;
  }

  function tile(face, group, n, pictures) {
    const item = make("li", "face");
    // The picture is a button: it selects the face, and looks larger where nothing can be decided.
    const button = make("button", "picture");
    button.type = "button";
    button.tabIndex = -1;
    if (pictures) button.append(picture(face));
    else button.append(make("span", "blank", "select"));
    button.setAttribute("aria-label", describe(face));
    const larger = make("button", "larger", "⤢");
    larger.type = "button";
    larger.tabIndex = -1;
    larger.title = "Look larger (Enter)";
    larger.setAttribute("aria-label", "Look larger: " + describe(face));
    item.append(button, larger);
    bench.dressTile(item, face, group, n);
    if (face.badge) {
      const badge = make("span", "badge", face.badge);
      badge.dataset.badge = face.badge;
      item.append(badge);
    }
    item.append(address(face.uri));
    if (face.figures) item.append(pairs(face.figures));
    return item;
  }

  function card(group) {
    const article = make("article", "card group");
    article.tabIndex = -1;
    const about = make("div", "about");
    const line = make("div", "line");
    line.append(make("span", "kind " + hue.get(group.kind), named(group.kind)));
    line.append(make("span", "", "#" + count.format(group.rank)));
    line.append(make("span", "", count.format(group.size) + (group.size === 1 ? " face" : " faces")));
    const title = make("h3", "", group.title);
    title.title = visible(group.title);
    about.append(line, title, pairs(group.figures));
    const faces = make("ul", "faces");
    const pictures = group.faces.some(hasPicture);
    group.faces.forEach((face, n) => faces.append(tile(face, group, n, pictures)));
    if (group.more) faces.append(make("li", "more", "and " + count.format(group.more) + " more"));
    article.setAttribute("aria-label", visible(group.title));
    article.append(about, faces);
    bench.dress(article, group);
    return article;
  }

  const pages = () => Math.max(1, Math.ceil(chosen.length / state.size));

  function choose() {
    const words = state.text.toLowerCase().split(/\s+/).filter(Boolean);
    // The ranking learns from what was decided; it is made when the list is, and not while somebody works in it.
    if (state.sort === "gain") orders.gain = bench.rank();
    chosen = orders[state.sort].filter((group) => {
      if (state.open && (!group.choices?.length || bench.answer(group))) return false;
      if (state.kind !== null && group.kind !== state.kind) return false;
      if (!words.length) return true;
      group.words ??= (group.title + "\n" + group.faces.map((face) => face.uri).join("\n")).toLowerCase();
      return words.every((word) => group.words.includes(word));
    });
  }

  function draw() {
    state.page = Math.min(Math.max(1, state.page), pages());
    const start = (state.page - 1) * state.size;
    const shown = chosen.slice(start, start + state.size);
    $("list").replaceChildren(...shown.map(card));
    if (!shown.length) $("list").append(make("p", "card empty", "No group matches. Press Esc to clear the filter."));
    else $("list").firstChild.tabIndex = 0;
    $("page").textContent = "Page " + count.format(state.page) + " of " + count.format(pages());
    $("first").disabled = $("previous").disabled = state.page === 1;
    $("last").disabled = $("next").disabled = state.page === pages();
    $("status").textContent = shown.length
      ? `Groups ${count.format(start + 1)} to ${count.format(start + shown.length)} of ${count.format(chosen.length)}`
      : "No group";
    if ($("filter").value !== state.text) $("filter").value = state.text;
    $("sort").value = state.sort;
    $("size").value = String(state.size);
    $("open").checked = state.open;
    bench.refresh();
    for (const chip of $("kinds").children) chip.setAttribute("aria-pressed", String(chip.kind === state.kind));
  }

  function remember() {
    const hash = new URLSearchParams();
    if (state.text) hash.set("q", state.text.toWellFormed ? state.text.toWellFormed() : state.text);
    if (state.kind !== null) hash.set("kind", String([...kinds.keys()].indexOf(state.kind)));
    if (state.sort !== "suspicion") hash.set("sort", state.sort);
    if (state.open) hash.set("open", "1");
    if (state.size !== 24) hash.set("size", String(state.size));
    if (state.page > 1) hash.set("page", String(state.page));
    try {
      history.replaceState(null, "", "#" + hash);
    } catch {
      // Some browsers forbid it on files; the page works without.
    }
  }

  function recall() {
    const hash = new URLSearchParams(location.hash.slice(1));
    const kind = [...kinds.keys()][Number(hash.get("kind") ?? -1)];
    state.text = hash.get("q") || "";
    state.kind = kind === undefined ? null : kind;
    state.sort = ["largest", "gain"].find((sort) => sort === hash.get("sort")) || "suspicion";
    if (state.sort === "gain" && !bench.hasRanking) state.sort = "suspicion";
    state.open = bench.canDecide && hash.get("open") === "1";
    state.size = [12, 24, 48, 96].includes(Number(hash.get("size"))) ? Number(hash.get("size")) : 24;
    state.page = Math.floor(Number(hash.get("page"))) || 1;
  }

  function change(what) {
    Object.assign(state, { page: 1 }, what);
    choose();
    draw();
    remember();
  }

  function turn(page, focus) {
    const wanted = Math.min(Math.max(1, page), pages());
    if (wanted === state.page) return;
    const within = $("list").contains(document.activeElement);
    change({ page: wanted });
    $("list").scrollIntoView({ block: "start" });
    if (within || focus) move(0, focus === "last");
  }

  // The group in focus.
  const focused = () => document.activeElement?.closest?.(".group")?.group;

  // Go to the next group that a question is open on, over the edges of pages.
  function advance(group, isWanted) {
    const from = chosen.indexOf(group);
    let at = chosen.findIndex((other, n) => n > from && isWanted(other));
    if (at < 0) at = chosen.findIndex((other) => other !== group && isWanted(other));
    if (at < 0) return;
    const wanted = Math.floor(at / state.size) + 1;
    if (wanted !== state.page) {
      state.page = wanted;
      draw();
      remember();
      $("list").scrollIntoView({ block: "start" });
    }
    focusCard([...$("list").querySelectorAll(".group")].find((card) => card.group === chosen[at]));
  }

  function focusCard(target) {
    if (!target) return;
    for (const one of $("list").querySelectorAll(".group")) one.tabIndex = one === target ? 0 : -1;
    target.focus({ preventScroll: true });
    target.scrollIntoView({ block: "nearest" });
  }

  function move(step, fromEnd) {
    const cards = [...$("list").querySelectorAll(".group")];
    const at = cards.indexOf(document.activeElement?.closest?.(".group"));
    if (!cards.length) return;
    if (at + step >= cards.length && at >= 0) return turn(state.page + 1, "first");
    if (at + step < 0 && at >= 0) return turn(state.page - 1, "last");
    const target = fromEnd ? cards[cards.length - 1] : at < 0 ? cards[0] : cards[at + step];
    focusCard(target);
  }

  const isDark = () => (root.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";

  function theme(name) {
    if (name) root.dataset.theme = name;
    $("theme").textContent = isDark() ? "Light" : "Dark";
    $("theme").setAttribute("aria-label", isDark() ? "Switch to light colours" : "Switch to dark colours");
    $("theme").title = "Light or dark (t)";
  }

  function toggle() {
    theme(isDark() ? "light" : "dark");
    try {
      localStorage.setItem("facepipe-theme", root.dataset.theme);
    } catch {
      // Storage may be switched off; the choice then lasts as long as the page.
    }
  }

  function stored() {
    try {
      const name = localStorage.getItem("facepipe-theme");
      return name === "light" || name === "dark" ? name : "";
    } catch {
      return "";
    }
  }

  const keys = {
    "/": () => $("filter").select(),
    j: () => move(1),
    k: () => move(-1),
    n: () => turn(state.page + 1),
    p: () => turn(state.page - 1),
    t: toggle,
    "?": () => $("help").showModal(),
    Escape: () => {
      if (bench.hasSelection()) return bench.unpick();
      document.activeElement?.blur?.();
      if (state.text || state.kind !== null) change({ text: "", kind: null });
    },
  };

  // What a key does, with Ctrl+Z and Ctrl+Y as everywhere.
  function find(event) {
    if (event.ctrlKey || event.metaKey) {
      const name = event.key.toLowerCase();
      if (name === "z") return bench.find(event.shiftKey ? "U" : "u", false);
      return name === "y" ? bench.find("U", false) : undefined;
    }
    const within = document.activeElement?.closest?.(".group");
    // Space and Enter belong to a button that has the focus, except to a face.
    const tag = document.activeElement?.tagName;
    const isButton = (tag === "BUTTON" && !document.activeElement.classList.contains("picture")) || tag === "SUMMARY";
    if (isButton && (event.key === " " || event.key === "Enter")) return undefined;
    if (Object.hasOwn(keys, event.key)) return keys[event.key];
    const arrow = within && { ArrowDown: "j", ArrowUp: "k" }[event.key];
    return (arrow && keys[arrow]) || bench.find(event.key, event.shiftKey);
  }

  function press(event) {
    if (event.altKey || event.isComposing || document.querySelector("dialog[open]")) return;
    const typing = /^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName || "");
    if (typing && event.target.type !== "checkbox" && event.key !== "Escape") return;
    if (!groups.length && !/^[t?]$/.test(event.key)) return;
    const action = find(event);
    if (!action) return;
    event.preventDefault();
    action();
  }

  function chips() {
    const all = [[null, groups.length], ...kinds];
    for (const [kind, n] of all) {
      const chip = make("button", "chip", kind === null ? "all" : named(kind));
      chip.type = "button";
      chip.kind = kind;
      chip.append(" ", make("span", "count", count.format(n)));
      chip.addEventListener("click", () => change({ kind }));
      $("kinds").append(chip);
    }
  }

  function scope() {
    const parts = [];
    if (server) {
      const first = server.part * server.per_part;
      if (server.parts > 1) parts.push(`Groups ${count.format(first + 1)} to ${count.format(Math.min(summary.total, first + server.per_part))} of ${count.format(summary.total)} are here.`);
    } else if (summary.total > groups.length) {
      parts.push(`The first ${count.format(groups.length)} of ${count.format(summary.total)} are here; all are in the Parquet file beside this page.`);
    }
    if (summary.bare) {
      parts.push(`${count.format(summary.bare)} faces are shown without their pictures, to keep this file small.`);
    }
    if (folder) parts.push("All images are in " + visible(folder));
    $("scope").textContent = parts.join(" ");
  }

  function goToPart(part) {
    location.search = part ? "?part=" + part : "";
  }

  function listen() {
    let waiting = 0;
    if (server && server.parts > 1) {
      $("parts").hidden = false;
      $("earlier").disabled = server.part === 0;
      $("later").disabled = server.part === server.parts - 1;
      $("earlier").addEventListener("click", () => goToPart(server.part - 1));
      $("later").addEventListener("click", () => goToPart(server.part + 1));
    }
    $("filter").addEventListener("input", (event) => {
      clearTimeout(waiting);
      waiting = setTimeout(() => change({ text: event.target.value }), 90);
    });
    $("sort").addEventListener("change", (event) => change({ sort: event.target.value }));
    $("open").addEventListener("change", (event) => change({ open: event.target.checked }));
    $("size").addEventListener("change", (event) => change({ size: Number(event.target.value) }));
    $("first").addEventListener("click", () => turn(1));
    $("previous").addEventListener("click", () => turn(state.page - 1));
    $("next").addEventListener("click", () => turn(state.page + 1));
    $("last").addEventListener("click", () => turn(pages()));
    $("theme").addEventListener("click", toggle);
    $("ask").addEventListener("click", () => $("help").showModal());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => theme());
    addEventListener("keydown", press);
    addEventListener("hashchange", () => {
      recall();
      choose();
      draw();
    });
  }

  const bench = facepipeWorkbench({ $, make, visible, count, groups, head, server, pairs, picture, address, focused, advance, chosen: () => chosen });
  $("open-label").hidden = !bench.canDecide;
  $("sort-gain").hidden = !bench.hasRanking;
  theme(stored());
  $("tools").hidden = false;
  listen();
  bench.listen();
  if (groups.length) {
    $("groups").hidden = false;
    chips();
    scope();
    recall();
    choose();
    draw();
  }
  // How long it took from the start of navigation, in ms; tests read it.
  root.dataset.ready = String(Math.round(performance.now()));
})();
