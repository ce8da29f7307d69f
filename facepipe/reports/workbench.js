// Work on the groups of a page: select faces, decide with one key, look larger, compare, and export what was decided.
const facepipeWorkbench = (page) => {
  const { $, make, visible, count, groups } = page;
  const target = page.head.review;
  const server = page.server;
  const storage = !target ? null : server ? facepipeServerStorage(server, (text) => say("Not saved: " + text, true), (n) => say("Saved; older decisions that it replaces: " + count.format(n))) : facepipeBrowserStorage(target);
  const decisions = target ? facepipeDecisions(target, storage) : null;
  const selected = new Map(); // face by id
  const SVG = "http://www.w3.org/2000/svg";
  let anchor = null; // the tile where a range begins
  let pinned = null; // the group to compare with
  let looked = null; // what the large view shows: a group and the number of a face
  let isExported = true;

  const plural = (n, word) => count.format(n) + " " + word + (n === 1 ? "" : "s");

  // ---------------------------------------------------------------- groups

  const asked = groups.filter((group) => group.choices?.length);
  groups.forEach((group) => {
    let hash = 7;
    for (const face of group.faces) for (const c of face.id || face.uri) hash = (Math.imul(hash, 31) + c.charCodeAt(0)) | 0;
    group.key = group.kind + ":" + (hash >>> 0).toString(36) + ":" + (group.faces[0]?.id || group.faces.length);
  });

  const same = (row, face, held) =>
    held.decision === row.decision && held.person === row.person && (!row.other || held.other === row.other || held.face === row.other);

  // The choice that holds: the one whose rows are all in force.
  function answer(group) {
    if (!decisions || !group.choices) return null;
    const act = decisions.answer(group.key);
    if (act) return group.choices.find((choice) => choice.key === act.key) || null;
    return group.choices.find((choice) => choice.rows.length && choice.rows.every((row) =>
      row.faces.every((face) => decisions.ofFace(face).some((held) => same(row, face, held))))) || null;
  }

  function learn() {
    const curves = new Map();
    for (const group of asked) {
      const agrees = answer(group)?.agrees;
      if (group.probability === undefined || agrees === undefined) continue;
      if (!curves.has(group.kind)) curves.set(group.kind, []);
      curves.get(group.kind).push({ probability: group.probability, agrees });
    }
    for (const [kind, decided] of curves) curves.set(kind, facepipeCalibration(decided));
    return curves;
  }

  // Rank by expected gain: how likely the suggestion is right, by what was decided so far, times what it sets right.
  function rank() {
    const curves = learn();
    const worth = new Map(groups.map((group) => {
      if (group.probability === undefined) return [group, group.choices?.length ? 0 : -1];
      return [group, (curves.get(group.kind) || ((p) => p))(group.probability) * group.gain];
    }));
    return [...groups].sort((a, b) => worth.get(b) - worth.get(a) || b.suspicion - a.suspicion);
  }

  // ---------------------------------------------------------------- what a card shows

  const words = {
    is: (row) => "is " + row.person,
    is_not: (row) => "is not " + row.person,
    not_a_face: () => "not a face",
    ignore: () => "ignored",
    keep: () => "kept",
    same_as: () => "same person",
    different_from: () => "other person",
  };

  function dress(article, group) {
    article.group = group;
    const about = article.querySelector(".about");
    if (!decisions) return;
    const row = make("div", "choices");
    for (const choice of group.choices || []) {
      const button = make("button", "choice");
      button.type = "button";
      button.dataset.key = choice.key;
      button.setAttribute("aria-keyshortcuts", choice.key);
      button.append(make("kbd", "", choice.key), make("bdi", "", choice.label));
      button.addEventListener("click", () => choose(group, choice, true));
      row.append(button);
    }
    if (row.childNodes.length) about.append(row);
    refreshCard(article);
  }

  function refreshCard(article) {
    const held = answer(article.group);
    article.classList.toggle("decided", Boolean(held));
    article.classList.toggle("pinned", article.group === pinned);
    for (const button of article.querySelectorAll(".choice")) {
      button.setAttribute("aria-pressed", String(button.dataset.key === held?.key));
    }
    for (const tile of article.querySelectorAll(".face")) refreshTile(tile);
  }

  function refreshTile(tile) {
    const face = tile.face;
    const button = tile.querySelector("button.picture");
    if (button && face.id) button.setAttribute("aria-pressed", String(selected.has(face.id)));
    tile.classList.toggle("selected", Boolean(face.id) && selected.has(face.id));
    tile.querySelector(".verdict")?.remove();
    const rows = face.id && decisions ? decisions.ofFace(face.id) : [];
    if (rows.length) tile.append(make("span", "badge verdict", [...new Set(rows.map((row) => words[row.decision]?.(row) ?? row.decision))].join(", ")));
  }

  function dressTile(tile, face, group, n) {
    tile.face = face;
    tile.n = n;
    const button = tile.querySelector("button.picture");
    button.addEventListener("click", (event) => {
      if (!decisions || !face.id) return look(group, n);
      pick(tile, event.shiftKey);
    });
    button.addEventListener("dblclick", () => look(group, n));
    button.addEventListener("focus", () => button.closest(".group")?.setAttribute("data-at", String(n)));
    tile.querySelector(".larger").addEventListener("click", () => look(group, n));
  }

  // ---------------------------------------------------------------- selection

  const tiles = () => [...$("list").querySelectorAll(".face")].filter((tile) => tile.face.id);

  function pick(tile, isRange) {
    const all = tiles();
    const from = all.indexOf(anchor);
    const to = all.indexOf(tile);
    if (isRange && from >= 0 && to >= 0) {
      for (const one of all.slice(Math.min(from, to), Math.max(from, to) + 1)) selected.set(one.face.id, one.face);
    } else {
      if (!selected.delete(tile.face.id)) selected.set(tile.face.id, tile.face);
      anchor = tile;
    }
    refresh();
  }

  function pickGroup(group) {
    const faces = group.faces.filter((face) => face.id);
    const isWhole = faces.every((face) => selected.has(face.id));
    for (const face of faces) isWhole ? selected.delete(face.id) : selected.set(face.id, face);
    refresh();
  }

  function pickAll() {
    for (const group of page.chosen()) for (const face of group.faces) if (face.id) selected.set(face.id, face);
    refresh();
    say(plural(selected.size, "face") + " selected: all of the groups that the filter leaves");
  }

  function unpick() {
    selected.clear();
    refresh();
  }

  // ---------------------------------------------------------------- decisions

  let speaking = 0;
  function say(text, isError = false) {
    $("said").textContent = visible(text);
    $("said").classList.toggle("error", isError);
    clearTimeout(speaking);
    if (!isError) speaking = setTimeout(() => ($("said").textContent = ""), 6000);
  }

  const reason = (group, text) => `${target.report} report, ${group.kind}: ${text}`;

  function choose(group, choice, goesOn) {
    if (answer(group) === choice && decisions.answer(group.key)) return say("Already decided: " + choice.label);
    isExported = false;
    decisions.decide({ group: group.key, key: choice.key, rows: choice.rows, why: reason(group, choice.label) });
    say(choice.label + " (u undoes it)");
    if (goesOn) page.advance(group, (other) => other.choices?.length && !answer(other));
  }

  // The faces that a key is about: those selected, else the one in focus, else the one that the group is about.
  function subjects() {
    if (selected.size) return [...selected.values()];
    if ($("look").open) return [looked.group.faces[looked.n]].filter((face) => face.id);
    const tile = document.activeElement?.closest?.(".face");
    if (tile?.face?.id) return [tile.face];
    const group = page.focused();
    return group?.subject && group.faces[0].id ? [group.faces[0]] : [];
  }

  function decide(rows, text) {
    if (!rows.length) return;
    isExported = false;
    decisions.decide({ rows, why: `${target.report} report: ${text}` });
    say(text + " (u undoes it)");
    unpick();
  }

  function decideFaces(decision, text, person) {
    const faces = subjects();
    if (!faces.length) return say("Select faces first: click them, or press Space; g selects a whole group.");
    const row = { decision, faces: faces.map((face) => face.id) };
    if (person !== undefined) row.person = person;
    decide([row], `${plural(faces.length, "face")}: ${text}`);
  }

  // Each face by the label that it bears.
  function decideLabels(decision, text) {
    const faces = subjects().filter((face) => face.person);
    if (!faces.length) return say("Select faces with a label first.");
    const byPerson = new Map();
    for (const face of faces) byPerson.set(face.person, [...(byPerson.get(face.person) || []), face.id]);
    const rows = [...byPerson].map(([person, ids]) => ({ decision, faces: ids, person }));
    decide(rows, `${plural(faces.length, "face")}: ${text}`);
  }

  function decideSame() {
    const [first, ...others] = subjects();
    if (!others.length) return say("Select two or more faces of one person first.");
    decide([{ decision: "same_as", faces: others.map((face) => face.id), other: first.id }], plural(others.length + 1, "face") + ": one person");
  }

  function decideDifferent() {
    const faces = subjects();
    if (faces.length !== 2) return say("Select two faces of different persons first.");
    decide([{ decision: "different_from", faces: [faces[0].id], other: faces[1].id }], "2 faces: different persons");
  }

  function askName() {
    const faces = subjects();
    if (!faces.length) return say("Select faces first: click them, or press Space; g selects a whole group.");
    if (!$("names").childNodes.length) {
      const known = new Map();
      for (const group of groups) for (const face of group.faces) if (face.person) known.set(face.person, (known.get(face.person) || 0) + 1);
      const names = [...known].sort((a, b) => b[1] - a[1]).slice(0, 2000);
      $("names").append(...names.map(([name]) => Object.assign(make("option"), { value: name })));
    }
    $("naming-title").textContent = `Who ${faces.length === 1 ? "is this face" : "are these " + count.format(faces.length) + " faces"}?`;
    $("name").value = "";
    naming = faces;
    $("naming").showModal();
  }

  let naming = [];
  function giveName() {
    const name = $("name").value.trim().normalize("NFC");
    if (!name || !naming.length) return;
    decide([{ decision: "is", faces: naming.map((face) => face.id), person: name }], `${plural(naming.length, "face")}: is ${name}`);
  }

  function undo() {
    const act = decisions.undo();
    isExported = false;
    say(act ? "Undone: " + act.why : "Nothing to undo");
  }

  function redo() {
    const act = decisions.redo();
    isExported = false;
    say(act ? "Done again: " + act.why : "Nothing to do again");
  }

  // ---------------------------------------------------------------- large view

  function picture(face, name) {
    const frame = page.picture(face);
    frame.classList.add(name);
    return frame;
  }

  // Where the face is in its photo, as a drawing.
  function place(face) {
    if (!face.place) return null;
    const [width, height, left, top, right, bottom] = face.place;
    const svg = document.createElementNS(SVG, "svg");
    const scale = 220 / Math.max(width, height, 1);
    svg.setAttribute("viewBox", `-1 -1 ${width * scale + 2} ${height * scale + 2}`);
    svg.setAttribute("class", "place");
    svg.setAttribute("width", String(width * scale + 2));
    svg.setAttribute("height", String(height * scale + 2));
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", `Place of the face in its photo of ${width} × ${height} pixels`);
    for (const [name, x, y, w, h] of [["photo", 0, 0, width, height], ["box", left, top, right - left, bottom - top]]) {
      const shape = document.createElementNS(SVG, "rect");
      const values = { class: name, x: x * scale, y: y * scale, width: Math.max(1, w * scale), height: Math.max(1, h * scale) };
      for (const [key, value] of Object.entries(values)) shape.setAttribute(key, String(value));
      svg.append(shape);
    }
    return svg;
  }

  // The distance of two faces of a group, from the list of all pairs.
  function distance(group, a, b) {
    const n = group.faces.length;
    const [i, j] = a < b ? [a, b] : [b, a];
    return group.distances?.length === (n * (n - 1)) / 2 ? group.distances[i * n - (i * (i + 1)) / 2 + (j - i - 1)] : undefined;
  }

  function look(group, n) {
    looked = { group, n };
    const face = group.faces[n];
    const facts = [["photo", face.uri]];
    if (face.place) {
      const [width, height, left, top, right, bottom] = face.place;
      facts.push(["photo's size", `${count.format(width)} × ${count.format(height)} px`]);
      facts.push(["face", `${right - left} × ${bottom - top} px, ${left} px from the left, ${top} px from the top`]);
    }
    facts.push(...(face.figures || []));
    if (face.badge) facts.push(["in this group", face.badge]);
    const held = face.id && decisions ? decisions.ofFace(face.id).map((row) => words[row.decision]?.(row) ?? row.decision) : [];
    if (held.length) facts.push(["decided", [...new Set(held)].join(", ")]);
    $("look-title").textContent = `Face ${n + 1} of ${group.faces.length}`;
    const side = make("div", "look-facts");
    side.append(page.pairs(facts));
    const drawn = place(face);
    if (drawn) side.append(drawn);
    side.append(make("h3", "", "Why it is here"), make("p", "", group.title), page.pairs(group.figures));
    const near = group.faces.map((other, k) => ({ other, k, d: k === n ? undefined : distance(group, n, k) }))
      .filter((entry) => entry.k !== n && entry.d !== undefined && entry.d >= 0).sort((a, b) => a.d - b.d);
    const body = $("look-body");
    body.replaceChildren(picture(face, "large"), side);
    if (near.length) {
      const row = make("ul", "near");
      for (const { other, k, d } of near.slice(0, 8)) {
        const item = make("li");
        const button = make("button", "plain");
        button.type = "button";
        button.append(picture(other, "small"), make("span", "", d.toFixed(3) + (other.badge ? " " + other.badge : "")));
        button.addEventListener("click", () => look(group, k));
        item.append(button);
        row.append(item);
      }
      body.append(make("h3", "wide", "Nearest faces of this group, by distance"), row);
    }
    if (!$("look").open) $("look").showModal();
  }

  function turnLook(step) {
    const n = looked.group.faces.length;
    look(looked.group, (looked.n + step + n) % n);
  }

  // ---------------------------------------------------------------- two groups side by side

  function compare(group) {
    if (!group) return say("Choose a group first: j and k, or click one.");
    if (!pinned || pinned === group) {
      pinned = pinned === group ? null : group;
      refresh();
      return say(pinned ? "Chosen for a comparison: press c on another group" : "");
    }
    const sides = [pinned, group];
    $("compare-body").replaceChildren(...sides.map((side) => {
      const column = make("section", "side");
      column.append(make("h3", "", side.title), page.pairs(side.figures));
      const row = make("ul", "faces");
      side.faces.forEach((face) => {
        const item = make("li", "face");
        item.append(picture(face, "medium"), page.address(face.uri));
        row.append(item);
      });
      column.append(row);
      return column;
    }));
    const ends = sides.map((side) => side.faces.find((face) => face.id));
    const canDecide = decisions && ends[0] && ends[1] && ends[0].id !== ends[1].id;
    $("compare-same").hidden = $("compare-different").hidden = !canDecide;
    const settle = (decision, text) => {
      $("compare").close();
      decide([{ decision, faces: [ends[0].id], other: ends[1].id }], text);
    };
    $("compare-same").onclick = () => settle("same_as", "2 groups: one person");
    $("compare-different").onclick = () => settle("different_from", "2 groups: different persons");
    pinned = null;
    refresh();
    $("compare").showModal();
  }

  // ---------------------------------------------------------------- export

  const quote = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : "'" + text.replace(/'/g, "'\\''") + "'");

  function openExport() {
    const n = decisions.rows.length;
    $("export-count").textContent = n ? `${plural(n, "decision")} on ${plural(new Set(decisions.rows.map((row) => row.face)).size, "face")}.` : "Nothing is decided yet.";
    $("download").disabled = !n;
    const name = fileName();
    $("command").textContent = visible(`facepipe apply ${quote(target.gallery)} ${name}`);
    try {
      $("who").value = localStorage.getItem("facepipe-who") || "";
    } catch {
      // The name is then asked each time.
    }
    $("export").showModal();
  }

  function fileName() {
    const day = new Date().toISOString().slice(0, 16).replace(/[-:]/g, "").replace("T", "-");
    return `decisions-${target.report}-${day}.jsonl`;
  }

  function download() {
    const who = $("who").value.trim();
    try {
      localStorage.setItem("facepipe-who", who);
    } catch {
      // The name is then asked each time.
    }
    const link = make("a");
    const address = URL.createObjectURL(new Blob([decisions.write(who)], { type: "application/x-ndjson" }));
    link.href = address;
    link.download = fileName();
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 60000);
    isExported = true;
    refresh();
  }

  // ---------------------------------------------------------------- the bar

  function refresh() {
    for (const article of $("list").querySelectorAll(".group")) refreshCard(article);
    if (!decisions) return;
    const decided = asked.filter(answer);
    $("progress").max = Math.max(1, asked.length);
    $("progress").value = decided.length;
    $("progress-text").textContent = asked.length ? `${count.format(decided.length)} of ${count.format(asked.length)} decided` : plural(decisions.rows.length, "decision");
    $("selection").textContent = selected.size ? plural(selected.size, "face") + " selected" : "";
    $("unpick").hidden = !selected.size;
    $("undo").disabled = !decisions.canUndo;
    $("redo").disabled = !decisions.canRedo;
    $("export-open").textContent = `Export decisions (${count.format(decisions.rows.length)})`;
    $("precision").textContent = describePrecision(decided);
    $("storage").textContent = describeStorage();
    warnOfLoss();
  }

  // How many suggestions were right so far, and how many of the rest are by what was learnt from them.
  function describePrecision(decided) {
    const kinds = new Map();
    for (const group of decided) {
      const agrees = answer(group).agrees;
      if (agrees === undefined) continue;
      const entry = kinds.get(group.kind) || { right: 0, all: 0 };
      entry.all += 1;
      entry.right += agrees ? 1 : 0;
      kinds.set(group.kind, entry);
    }
    const curves = learn();
    return [...kinds].map(([kind, { right, all }]) => {
      let text = `${visible(kind)}: ${count.format(right)} of ${count.format(all)} suggestions right (${Math.round((100 * right) / all)} %)`;
      const curve = curves.get(kind);
      if (curve && all >= 5) {
        const rest = asked.filter((group) => group.kind === kind && group.probability !== undefined && !answer(group));
        const expected = rest.reduce((sum, group) => sum + curve(group.probability), 0);
        if (rest.length) text += `, about ${count.format(Math.round(expected))} of the other ${count.format(rest.length)} by that`;
      }
      return text;
    }).join("; ");
  }

  function describeStorage() {
    if (server) return "Each decision is saved in the gallery at once.";
    if (!storage.state.isKept) return "This browser keeps nothing for pages from files: export before you close the page.";
    if (storage.state.isFull) return "The storage of this browser is full: export now. Later decisions are lost when you close the page.";
    return "Decisions are kept in this browser until you export them.";
  }

  // ---------------------------------------------------------------- keys

  function focusTile(step) {
    const article = document.activeElement?.closest?.(".group");
    if (!article) return;
    const buttons = [...article.querySelectorAll("button.picture")];
    if (!buttons.length) return;
    const at = buttons.indexOf(document.activeElement);
    const next = at < 0 ? (step > 0 ? 0 : buttons.length - 1) : Math.min(buttons.length - 1, Math.max(0, at + step));
    buttons[next].focus();
  }

  function extend(step) {
    const before = document.activeElement?.closest?.(".face");
    if (before?.face?.id) selected.set(before.face.id, before.face);
    focusTile(step);
    const after = document.activeElement?.closest?.(".face");
    if (after?.face?.id) selected.set(after.face.id, after.face);
    refresh();
  }

  function toggleFocused() {
    const tile = document.activeElement?.closest?.(".face");
    if (tile?.face?.id) return pick(tile, false);
    const group = page.focused();
    if (group) pickGroup(group);
  }

  const withGroup = (action) => () => {
    const group = page.focused();
    if (group) action(group);
    else say("Choose a group first: j and k, or click one.");
  };

  const viewing = {
    ArrowRight: () => focusTile(1),
    ArrowLeft: () => focusTile(-1),
    c: () => compare(page.focused()),
    Enter: () => {
      const tile = document.activeElement?.closest?.(".face");
      const group = page.focused();
      if (group) look(group, tile ? tile.n : 0);
    },
  };
  const deciding = {
    " ": toggleFocused,
    g: withGroup(pickGroup),
    G: pickAll,
    x: () => decideFaces("not_a_face", "not a face"),
    i: () => decideFaces("ignore", "ignored"),
    e: askName,
    l: () => decideLabels("is", "the label is right"),
    w: () => decideLabels("is_not", "the label is wrong"),
    m: decideSame,
    d: decideDifferent,
    s: withGroup((group) => page.advance(group, (other) => other.choices?.length && !answer(other))),
    u: undo,
    U: redo,
  };

  // A key of a group's own choices comes first.
  function find(key, isShift) {
    const group = page.focused();
    const choice = decisions && group?.choices?.find((one) => one.key === key);
    if (choice) return () => choose(group, choice, true);
    if (isShift && decisions && key === "ArrowRight") return () => extend(1);
    if (isShift && decisions && key === "ArrowLeft") return () => extend(-1);
    if (Object.hasOwn(viewing, key)) return viewing[key];
    return decisions && Object.hasOwn(deciding, key) ? deciding[key] : undefined;
  }

  function pressInLook(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const keys = { ArrowRight: () => turnLook(1), ArrowLeft: () => turnLook(-1) };
    if (decisions) for (const key of ["x", "i", "l", "w"]) keys[key] = () => {
      unpick();
      deciding[key]();
      look(looked.group, looked.n);
    };
    if (!Object.hasOwn(keys, event.key)) return;
    event.preventDefault();
    keys[event.key]();
  }

  function listen() {
    $("look").addEventListener("keydown", pressInLook);
    $("look-previous").addEventListener("click", () => turnLook(-1));
    $("look-next").addEventListener("click", () => turnLook(1));
    if (!decisions) return;
    $("workbar").hidden = false;
    document.body.classList.add("has-workbar");
    const actions = {
      unpick,
      undo,
      redo,
      "export-open": openExport,
      download,
      "act-x": deciding.x,
      "act-i": deciding.i,
      "act-e": askName,
      "act-l": deciding.l,
      "act-w": deciding.w,
      "act-m": decideSame,
      "act-d": decideDifferent,
    };
    for (const [id, action] of Object.entries(actions)) $(id).addEventListener("click", action);
    $("naming").addEventListener("close", () => {
      if ($("naming").returnValue === "ok") giveName();
      $("naming").returnValue = "";
    });
    $("copy").addEventListener("click", async () => {
      try {
        await navigator.clipboard.writeText($("command").textContent);
        $("copy").textContent = "Copied";
      } catch {
        getSelection().selectAllChildren($("command"));
      }
    });
    $("forget").addEventListener("click", () => {
      decisions.forget();
      isExported = true;
      say("The decisions in this browser are deleted");
    });
    $("forget").hidden = Boolean(server);
    decisions.onChange(refresh);
  }

  // What the browser does not keep is lost when the page closes. The listener is there only while it is needed, because
  // a page with one is slower to leave.
  const warn = (event) => event.preventDefault();
  function warnOfLoss() {
    const isAtRisk = !isExported && decisions.rows.length > 0 && (!storage.state.isKept || storage.state.isFull);
    if (isAtRisk) addEventListener("beforeunload", warn);
    else removeEventListener("beforeunload", warn);
  }

  return { dress, dressTile, refresh, rank, find, listen, unpick, answer, hasSelection: () => selected.size > 0, canDecide: Boolean(decisions), hasRanking: asked.some((group) => group.probability !== undefined) };
};
